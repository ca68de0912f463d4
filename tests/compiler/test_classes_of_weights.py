"""Weights of a class that torch.export puts ordinary tensors in the place of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Plain, compiled, picture, sampled, timesteps
from torch import nn

import dcompile


class Packed(nn.Parameter):
    """Whole numbers, and as an attribute what to make of them: so are the weights of GGUF files."""

    factor: float

    @staticmethod
    def of(weight: torch.Tensor, factor: float = 0.01) -> Packed:
        numbers = (weight.detach() / factor).round().to(torch.int8)
        packed: Packed = torch.Tensor._make_subclass(Packed, numbers, False)  # type: ignore[attr-defined]
        packed.factor = factor
        return packed

    def as_tensor(self) -> torch.Tensor:
        plain: torch.Tensor = torch.Tensor._make_subclass(torch.Tensor, self, False)  # type: ignore[attr-defined]
        return plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.factor = next(arg.factor for arg in args if isinstance(arg, cls))
        return result


class PackedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if hasattr(weight, "factor"):
            weight = weight.as_tensor().float() * weight.factor
        return F.linear(x, weight, self.bias)


class Doubling(nn.Parameter):
    """Does something that no graph sees."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if func is F.linear else result


def made(factor: float = 0.01) -> Plain:
    torch.manual_seed(0)
    network = Plain().eval()
    for name in ("time", "condition"):
        layer = getattr(network, name)
        packed = PackedLinear(layer.in_features, layer.out_features)
        packed.bias = layer.bias
        packed.weight = Packed.of(layer.weight, factor)
        setattr(network, name, packed)
    return network


def run(network: Any) -> torch.Tensor:
    return sampled(network, picture(), timesteps(), torch.ones(2, 4))


def uncached(network: Any) -> int:
    return dcompile.handle(network).stats.uncached_calls


def test_attributes_of_weights_are_seen() -> None:
    network = compiled(made(), interval=1)
    for _ in range(2):
        result = run(network)
        assert torch.equal(result, run(made()))
        assert type(result) is torch.Tensor
    assert (dcompile.handle(network).stats.captures, uncached(network)) == (1, 0)
    assert type(network.time.weight) is Packed
    assert network.time.weight.as_tensor().dtype is torch.int8


def test_new_values_and_new_attributes() -> None:
    network, other = compiled(made(), interval=1), made()
    before = run(network)
    for each in (network, other):
        each.time.weight.as_tensor().mul_(2)
    in_place = run(network)
    assert torch.equal(in_place, run(other))
    assert not torch.equal(in_place, before)
    assert dcompile.handle(network).stats.captures == 1
    for each in (network, other):
        each.time.weight.factor = 0.05
    assert torch.equal(run(network), run(other))
    assert not torch.equal(run(other), in_place)
    assert (dcompile.handle(network).stats.captures, uncached(network)) == (2, 0)


def test_reuse_steps_read_them_too() -> None:
    network = compiled(made(), interval=3)
    reference = compiled(made(), interval=1)
    assert (run(network) - run(reference)).abs().max() < 0.5
    stats = dcompile.handle(network).stats
    assert stats.flops_speedup > 1
    assert stats.uncached_calls == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    network = compiled(made())
    expected = run(network)
    dcompile.handle(network).save(tmp_path / "saved")
    loaded = dcompile.load(made(), tmp_path / "saved", verbose=False)
    assert torch.equal(run(loaded), expected)
    assert dcompile.handle(loaded).stats.captures == 0
    with pytest.raises(dcompile.DcompileError, match="weight"):
        dcompile.load(made(factor=0.02), tmp_path / "saved", verbose=False)


def test_a_class_that_computes_something_else() -> None:
    def doubling() -> Plain:
        torch.manual_seed(0)
        network = Plain().eval()
        network.time.weight = Doubling(network.time.weight.detach(), requires_grad=False)
        return network

    network = compiled(doubling(), interval=1)
    for _ in range(2):
        assert torch.equal(run(network), run(doubling()))
    assert uncached(network) == 14
    (reason,) = dcompile.handle(network).stats.uncached_reasons
    assert "Doubling" in reason
    assert "computes something else than the network itself" in reason
