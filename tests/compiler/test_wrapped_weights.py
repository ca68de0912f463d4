"""Weights that are tensor subclasses around others, as quantized ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain import Plain, compiled, picture, sampled, timesteps
from scaled import Scaled
from torch import nn

import dcompile

STEPS = 7


def quantized(network: Plain) -> Plain:
    for layer in (network.time, network.condition):
        layer.weight = nn.Parameter(Scaled.of(layer.weight), requires_grad=False)
    return network


def made() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def run(network: Any) -> torch.Tensor:
    return sampled(network, picture(), timesteps(STEPS), torch.ones(2, 4))


def test_the_parts_are_inputs_of_the_graph() -> None:
    network = compiled(quantized(made()), interval=1)
    expected = run(quantized(made()))
    for _ in range(2):
        assert torch.equal(run(network), expected)
    with torch.no_grad():
        network.time.weight.scale.mul_(2)
    other = quantized(made())
    with torch.no_grad():
        other.time.weight.scale.mul_(2)
    assert torch.equal(run(network), run(other))
    assert not torch.equal(run(network), expected)
    stats = dcompile.handle(network).stats
    assert (stats.captures, stats.uncached_calls) == (1, 0)


def test_wrapped_between_two_runs() -> None:
    network = compiled(made(), interval=1)
    before = run(network)
    quantized(network)
    found = run(network)
    assert torch.equal(found, run(quantized(made())))
    assert not torch.equal(found, before)
    stats = dcompile.handle(network).stats
    assert (stats.captures, stats.uncached_calls) == (2, 0)


def test_on_inductor() -> None:
    expected = run(quantized(made()))
    network = compiled(quantized(made()), interval=1, backend="inductor")
    assert torch.allclose(run(network), expected, atol=1e-5)
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    network = compiled(quantized(made()))
    expected = run(network)
    dcompile.handle(network).save(tmp_path / "saved")
    loaded = dcompile.load(quantized(made()), tmp_path / "saved", verbose=False)
    assert torch.equal(run(loaded), expected)
    assert dcompile.handle(loaded).stats.captures == 0
