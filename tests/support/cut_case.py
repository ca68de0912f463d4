"""An exported network with the values of its inputs, to cut and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from dcompile.compat.export import functionalized, is_higher_order
from dcompile.passes import Canonicalize, Cut, split_levels
from dcompile.passes.base import is_mutating


class _Called(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.network(*args, **kwargs)


class CutCase:
    """One call of a module, as a functional and canonical graph with metadata."""

    @torch.no_grad()
    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.expected = tree_leaves(module.eval()(*args, **kwargs))
        exported = torch.export.export(_Called(module), (args, kwargs), strict=False)
        nodes = exported.graph.nodes
        if any(is_mutating(node) or is_higher_order(node.target) for node in nodes):
            exported = functionalized(exported)
        self.values: dict[str, Any] = {}
        inputs = iter(tree_leaves((args, kwargs)))
        for spec in exported.graph_signature.input_specs:
            tables = (exported.state_dict, exported.constants)
            found = [table[spec.target] for table in tables if spec.target in table]
            self.values[spec.arg.name] = found[0] if found else next(inputs)
        self.graph_module: GraphModule = Canonicalize()(exported.graph_module).graph_module

    @torch.no_grad()
    def run(self, graph_module: GraphModule, cached: Sequence[Tensor] = ()) -> tuple[Any, ...]:
        """Run a graph that was made of this one, with what it takes besides the inputs."""
        names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
        own = names[: len(names) - len(cached)]
        return tuple(graph_module(*(self.values[name] for name in own), *cached))

    def check(self, cuts: Sequence[Cut], stale: bool = True) -> None:
        """Full is exact, and each level with a fresh cache is, within rounding; so are the
        differences that a level returns.
        """
        *levels, full = split_levels(self.graph_module, cuts)
        number = len(self.expected)
        outputs = self.run(full)
        assert all(map(torch.equal, outputs[:number], self.expected))
        made = iter(outputs[number:])
        caches = [[next(made) for _ in cut.boundary] for cut in cuts]
        assert next(made, None) is None
        for depth, (level, cut) in enumerate(zip(levels, cuts, strict=True)):
            for difference, node in zip(caches[depth], cut.boundary, strict=True):
                value = node.meta["val"]
                assert (difference.shape, difference.dtype) == (value.shape, value.dtype)
            fresh = self.run(level, caches[depth])
            outer = [tensor for cache in caches[:depth] for tensor in cache]
            assert len(fresh) == number + len(outer)
            for one, other in zip(fresh, [*self.expected, *outer], strict=True):
                assert close(one, other), f"depth {depth}: {distance(one, other)}"
            if stale:
                old = self.run(level, [torch.randn_like(one) for one in caches[depth]])[:number]
                assert not all(map(close, old, self.expected)), f"depth {depth}"


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def close(one: Tensor, other: Tensor) -> bool:
    """Equal within the rounding of a few float32 sums that a network has passed on."""
    return one.shape == other.shape and distance(one, other) < 1e-4
