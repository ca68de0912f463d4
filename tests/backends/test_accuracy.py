"""Compiled code is compared with its graph: rounding is told from mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from dcompile.backends.accuracy import computes_the_same


class Residual(nn.Module):
    """Returns a stream, and the small difference that its blocks make."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stream = x.to(weight.dtype)
        for _ in range(6):
            stream = stream + torch.tanh(stream @ weight) * 0.01
        return stream, stream - x


def traced(dtype: torch.dtype) -> tuple[GraphModule, list[torch.Tensor]]:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32) * 3, torch.randn(32, 32) / 6
    return symbolic_trace(Residual()), [x.to(dtype), weight.to(dtype)]


def fused(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a compiler makes of it: rounded at its end only."""
    stream, _ = Residual()(x.float(), weight.float())
    return stream.to(x.dtype), (stream - x.float()).to(x.dtype)


def mistaken(by: float) -> Callable[..., Any]:
    def run(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stream, change = fused(x, weight)
        return stream, change + by * change.roll(1, 0)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_mistake(dtype: torch.dtype) -> None:
    graph_module, inputs = traced(dtype)
    assert computes_the_same(graph_module, fused, inputs)
    assert computes_the_same(graph_module, graph_module, inputs)


def test_most_of_a_residual_in_half_precision_may_be_rounding() -> None:
    graph_module, inputs = traced(torch.bfloat16)
    change, expected = (run(*inputs)[1].double() for run in (fused, graph_module))
    assert (change - expected).norm() > 0.2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mistake_is_one_in_every_dtype(dtype: torch.dtype) -> None:
    graph_module, inputs = traced(dtype)
    assert not computes_the_same(graph_module, mistaken(by=4.0), inputs)


def test_operators_of_half_precision_only() -> None:
    """Nothing is more precise: what differs is refused."""

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (half_only(x),)

    module = symbolic_trace(Picky())
    x = torch.ones(4, dtype=torch.bfloat16)
    assert computes_the_same(module, module, [x])
    assert not computes_the_same(module, lambda x: (x * 3,), [x])


@torch.fx.wrap
def half_only(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.bfloat16:
        raise TypeError("bfloat16 only")
    return x * 2
