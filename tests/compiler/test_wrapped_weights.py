"""Weights that are tensor subclasses around others, as quantized ones are."""

from __future__ import annotations

from typing import Any

import torch
from plain import Plain, compiled, picture, sampled, timesteps
from torch import nn
from torch.utils._pytree import tree_map_only

import dcompile

STEPS = 7


class Scaled(torch.Tensor):
    """Whole numbers and a scale."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, dtype=scale.dtype, device=scale.device
        )

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @staticmethod
    def of(weight: torch.Tensor) -> Any:
        scale = weight.detach().abs().max() / 127
        return Scaled((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, metadata: Any, size: Any, stride: Any) -> Any:
        return Scaled(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].numbers, args[0].scale)

        def plain(tensor: Any) -> torch.Tensor:
            return tensor.numbers.to(tensor.scale.dtype) * tensor.scale

        return func(*tree_map_only(Scaled, plain, args), **(kwargs or {}))


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
