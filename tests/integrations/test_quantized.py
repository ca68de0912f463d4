"""Weights that are made of several tensors: torchao's quantized ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, sampled, timesteps
from torch import nn

import dcompile

quantization = pytest.importorskip("torchao.quantization")
STEPS = 7


class Mixed(Plain):
    """With linear layers wide enough to be quantized, outside of the cut and behind it."""

    def __init__(self) -> None:
        super().__init__(width=32)
        self.outer = nn.Linear(32, 3)
        self.inner = nn.Linear(32, 32)

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        time = torch.zeros(1, 32) + timestep.float().reshape(-1, 1) / 1000
        sample = sample + self.outer(time + self.inner(time))[:, :, None, None]
        return super().forward(sample, timestep, condition)


def quantized(network: nn.Module, config: Any) -> nn.Module:
    quantization.quantize_(
        network, config, filter_fn=lambda m, _: isinstance(m, nn.Linear) and m.in_features >= 16
    )
    return network


def made() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


CONFIGS = {
    "weights": quantization.Int8WeightOnlyConfig,
    "activations": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8": quantization.Float8WeightOnlyConfig,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_quantized_weights(config: Any) -> None:
    expected = sampled(quantized(made(), config()), picture(), timesteps(STEPS))
    network = compiled(quantized(made(), config()), interval=1)
    for _ in range(2):
        assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    assert dcompile.handle(network).stats.uncached_calls == 0
    assert dcompile.handle(network).stats.captures == 1


def test_quantized_between_two_runs() -> None:
    config = quantization.Int8WeightOnlyConfig()
    network = compiled(made(), interval=1)
    before = sampled(network, picture(), timesteps(STEPS))
    quantized(network, config)
    found = sampled(network, picture(), timesteps(STEPS))
    assert not torch.equal(found, before)
    assert torch.equal(found, sampled(quantized(made(), config), picture(), timesteps(STEPS)))
    assert dcompile.handle(network).stats.captures == 2
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_quantized_on_inductor() -> None:
    config = quantization.Int8WeightOnlyConfig()
    expected = sampled(quantized(made(), config), picture(), timesteps(STEPS))
    network = compiled(quantized(made(), config), interval=1, backend="inductor")
    assert torch.allclose(sampled(network, picture(), timesteps(STEPS)), expected, atol=1e-5)
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = quantization.Int8WeightOnlyConfig()
    network = compiled(quantized(made(), config))
    expected = sampled(network, picture(), timesteps(STEPS))
    dcompile.handle(network).save(tmp_path / "saved")
    loaded = dcompile.load(quantized(made(), config), tmp_path / "saved", verbose=False)
    assert torch.equal(sampled(loaded, picture(), timesteps(STEPS)), expected)
    assert dcompile.handle(loaded).stats.captures == 0
    with pytest.raises(dcompile.DcompileError, match="weight"):
        dcompile.load(made(), tmp_path / "saved", verbose=False)
