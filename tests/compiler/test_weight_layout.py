"""Weights of convolutions are laid out channels-last where asked for, and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn

import dcompile
from dcompile.backends import resolve
from dcompile.compiler.weight_layout import WeightLayout
from dcompile.errors import ArtifactError, BackendError

LAST = torch.channels_last
LAID_OUT = {"enter", "down", "deep.0", "up", "leave"}


def channels_last_in(network: nn.Module) -> set[str]:
    """Names of the convolutions whose weights lie channels-last and not contiguous."""
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.weight.is_contiguous(memory_format=LAST)
        and not module.weight.is_contiguous()
    }


def drawn(network: Any) -> torch.Tensor:
    return sampled(network, picture(), timesteps())


def test_it_is_what_torch_does() -> None:
    network, reference = compiled(channels_last=True), plain().to(memory_format=LAST)
    before = {name: (p, p.detach().clone()) for name, p in network.named_parameters()}
    assert channels_last_in(network) == set()  # at the first call
    expected = sampled(compiled(reference, channels_last=False), picture(), timesteps())
    assert torch.equal(drawn(network), expected)
    assert channels_last_in(network) == LAID_OUT
    for name, parameter in network.named_parameters():
        own, value = before[name]
        assert parameter is own
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("undo", ["remove", "configure"])
def test_it_is_undone(undo: str) -> None:
    network = compiled(channels_last=True)
    drawn(network)
    if undo == "remove":
        dcompile.handle(network).remove()
        expected = sampled(plain(), picture(), timesteps())
    else:
        compiled(network, channels_last=False)
        expected = drawn(compiled())
    assert channels_last_in(network) == set()
    assert torch.equal(drawn(network), expected)


def test_what_lay_so_before_stays_so() -> None:
    network: Any = plain()
    network.up.to(memory_format=LAST)
    compiled(network, channels_last=True)
    drawn(network)
    dcompile.handle(network).remove()
    assert channels_last_in(network) == {"up"}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_auto_leaves_a_cpu_alone(backend: str) -> None:
    network = plain()
    layout = WeightLayout(network)
    layout.configure("auto", resolve(backend, None))
    layout.apply()
    assert channels_last_in(network) == set()


def test_auto_on_a_gpu_is_for_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weights would be on a GPU is pretended."""
    layout = WeightLayout(plain())
    layout.configure("auto", resolve("inductor", None))
    assert layout._wanted == "cuda"
    layout.configure("auto", resolve("eager", None))
    assert layout._wanted is False


def test_a_weight_that_is_replaced_is_laid_out_at_the_next_run() -> None:
    network = compiled(channels_last=True)
    drawn(network)
    with torch.no_grad():
        network.up.weight = nn.Parameter(network.up.weight.contiguous() * 2)
    found = drawn(network)
    assert channels_last_in(network) == LAID_OUT
    other: Any = plain()
    with torch.no_grad():
        other.up.weight.mul_(2)
    assert torch.equal(found, drawn(compiled(other, channels_last=True)))


def test_it_is_captured_once() -> None:
    network = compiled(channels_last=True)
    for _ in range(3):
        drawn(network)
    assert dcompile.handle(network).stats.captures == 1


def test_other_weights_are_left_alone() -> None:
    class More(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 3, 4, 5))
            self.volume = nn.Conv3d(2, 2, 3)
            self.pointwise = nn.Conv2d(3, 5, 1)

    network: Any = More().eval()
    before = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    compiled(network, channels_last=True)
    drawn(network)
    after = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    assert {name.removesuffix(".weight") for name in after if after[name] != before[name]} == (
        LAID_OUT
    )


def test_saved_programs_bring_their_layout(tmp_path: Path) -> None:
    network = compiled(channels_last=True)
    expected = drawn(network)
    folder = dcompile.handle(network).save(tmp_path / "saved")
    again = dcompile.load(plain(), folder, verbose=False)
    assert torch.equal(drawn(again), expected)
    assert dcompile.handle(again).stats.captures == 0
    assert channels_last_in(again) == LAID_OUT
    dcompile.handle(again).remove()
    assert channels_last_in(again) == set()


def test_a_load_that_fails_leaves_the_weights_alone(tmp_path: Path) -> None:
    network = compiled(channels_last=True)
    drawn(network)
    folder = dcompile.handle(network).save(tmp_path / "saved")
    other = plain(width=16)
    with pytest.raises(ArtifactError):
        dcompile.load(other, folder, verbose=False)
    assert channels_last_in(other) == set()


def test_a_bad_value() -> None:
    with pytest.raises(BackendError, match='channels_last: expected "auto", True or False'):
        compiled(channels_last="yes")


def test_weights_on_a_gpu_are_all_called_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says so of every tensor that is not on a CPU: they are laid out nevertheless."""
    monkeypatch.setattr(torch.Tensor, "is_shared", lambda tensor: True)
    network = plain()
    layout = WeightLayout(network)
    layout.configure(True, resolve("eager", None))
    layout.apply()
    assert channels_last_in(network) == set()
    network.to("meta")
    layout.apply()
    assert channels_last_in(network) == LAID_OUT
