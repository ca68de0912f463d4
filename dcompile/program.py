"""The compiled pair for one call signature, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_unflatten

from dcompile.capture import CapturedNetwork


class Constant(NamedTuple):
    """A tensor that is part of a network's code: an attribute that is no buffer, or a literal."""

    name: str
    value: torch.Tensor


class Convention(NamedTuple):
    """What a graph's placeholders stand for, in order: weights, then inputs, then the boundary.

    Attributes:
        weights: a parameter's or buffer's fully qualified name, or a constant.
        inputs: positions among the call's leaves.
    """

    weights: tuple[str | Constant, ...]
    inputs: tuple[int, ...]

    def weight_tensors(self, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(
            weights[item] if isinstance(item, str) else item.value for item in self.weights
        )


def convention_of(graph_module: GraphModule, network: CapturedNetwork) -> Convention:
    """Look up every placeholder of a graph that was split from ``network``'s."""
    weights: list[str | Constant] = []
    inputs: list[int] = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name in network.parameters:
            weights.append(network.parameters[name])
        elif name in network.constants:
            weights.append(Constant(network.constant_names[name], network.constants[name]))
        elif name in network.inputs:
            inputs.append(network.inputs[name])
    return Convention(tuple(weights), tuple(inputs))


class Bound(NamedTuple):
    """A compiled graph with its weights: call ``run(*weights, *inputs, *boundary)``."""

    run: Callable[..., Any]
    weights: tuple[torch.Tensor, ...]
    inputs: tuple[int, ...]

    def __call__(
        self, leaves: Sequence[Any], boundary: tuple[Any, ...] = (), coefficients: Any = None
    ) -> Any:
        inputs = [leaves[i] for i in self.inputs]
        if coefficients is None:
            return self.run(*self.weights, *inputs, *boundary)
        return self.run(*self.weights, *inputs, *boundary, coefficients)


@dataclass(frozen=True, eq=False)
class BakedWeights:
    """Which weights a backend folded into its code, and how they looked then."""

    seen: dict[str, tuple[object, ...]]

    @staticmethod
    def of(convention: Convention, weights: Mapping[str, torch.Tensor]) -> BakedWeights:
        names = [item for item in convention.weights if isinstance(item, str)]
        return BakedWeights({name: _fingerprint(weights[name]) for name in names})

    def match(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights are still those."""
        return all(_fingerprint(weights[name]) == seen for name, seen in self.seen.items())


def _fingerprint(tensor: torch.Tensor) -> tuple[object, ...]:
    """Changes when the tensor does: by its version, and for writes through ``.data``, which bear
    none, by a sample of its values.
    """
    version = None if tensor.is_inference() else tensor._version
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // 64)].tolist()
    return version, tuple(sample)


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """One compiled graph and its calling convention.

    Attributes:
        baked: the weights that are part of its code; None, as it should be, if it holds none.
    """

    run: Callable[..., Any]
    convention: Convention
    baked: BakedWeights | None = None

    def bind(
        self, weights: Mapping[str, torch.Tensor], order: Sequence[int] | None = None
    ) -> Bound:
        """With these weights, for leaves in this order (see ``StandardCall``)."""
        inputs = self.convention.inputs
        if order is not None:
            inputs = tuple(order[position] for position in inputs)
        return Bound(self.run, self.convention.weight_tensors(weights), inputs)


@dataclass(frozen=True, eq=False)
class Program:
    """Full and shallow graph for one call signature.

    Attributes:
        out_spec: the structure of what the network returns.
        history: how many boundaries the shallow graph takes, the latest first. If more than one,
            the forecast's coefficients come after them.
        ratio: r, FLOPs of the shallow graph over FLOPs of the full graph.
    """

    out_spec: TreeSpec
    full: CompiledGraph
    shallow: CompiledGraph
    history: int = 1
    ratio: float = 0.0

    def matches(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights folded into the code, if any were, are still the module's."""
        halves = (self.full, self.shallow)
        return all(half.baked is None or half.baked.match(weights) for half in halves)

    def bind(
        self, weights: Mapping[str, torch.Tensor], order: Sequence[int] | None = None
    ) -> BoundProgram:
        """With these weights, from ``weights_of`` the live module. Fast: references only.

        Args:
            order: where the program's leaves are among those it will be called with.
        """
        return BoundProgram(self, self.full.bind(weights, order), self.shallow.bind(weights, order))


class BoundProgram:
    """A program with the weights of one module, for one generation.

    Attributes:
        results: how many of the full graph's outputs the module returns; the rest is boundary.
    """

    __slots__ = ("_aliased", "_spec", "_tuple", "full", "history", "program", "results", "shallow")

    def __init__(self, program: Program, full: Bound, shallow: Bound) -> None:
        self.program = program
        self.full = full
        self.shallow = shallow
        self.history = program.history
        self._aliased = False
        self._spec = program.out_spec
        self.results = self._spec.num_leaves
        self._tuple = self._spec.type is tuple and self._spec.num_children == self.results

    def refresh(self, leaves: Sequence[Any], previous: Any = ()) -> tuple[Any, tuple[Any, ...]]:
        """Run the full graph: what the module returns, and the boundary to cache.

        Args:
            leaves: the call's leaves.
            previous: the same lane's cached boundary, which a forecast goes on from; empty if
                there is none.

        Returns:
            The result, and the boundaries of the last ``history`` refreshes, the latest first. In
            the place of those that there are not, the latest again.
        """
        values = tuple(self.full(leaves))
        results, boundary = values[: self.results], values[self.results :]
        self._aliased = _share_storage(results, boundary)
        if self._aliased:  # what the caller does to its result must not reach the cache
            boundary = tuple(_own(value) for value in boundary)
        return self.packed(results), boundary + with_earlier(boundary, previous, self.history)

    def reuse(
        self, leaves: Sequence[Any], boundary: tuple[Any, ...], coefficients: Any = None
    ) -> Any:
        """Run the shallow graph from a cached boundary: what the module returns.

        Args:
            leaves: the call's leaves.
            boundary: what ``refresh`` returned.
            coefficients: of the forecast, shape (history,); None without one.
        """
        results = tuple(self.shallow(leaves, boundary, coefficients))
        return self.packed(tuple(map(_own, results)) if self._aliased else results)

    def packed(self, values: tuple[Any, ...]) -> Any:
        """The graph's results in the form in which the module returns them."""
        return values if self._tuple else tree_unflatten(list(values), self._spec)


def with_earlier(
    boundary: tuple[Any, ...], previous: tuple[Any, ...], history: int
) -> tuple[Any, ...]:
    """What comes after ``boundary`` in a cache of ``history`` boundaries, ``previous`` its last."""
    if history == 1:
        return ()
    kept = len(boundary) * (history - 1)
    return previous[:kept] if previous else boundary * (history - 1)


def _share_storage(results: Sequence[Any], boundary: Sequence[Any]) -> bool:
    def storages(values: Sequence[Any]) -> set[int]:
        return {id(x.untyped_storage()) for x in values if isinstance(x, torch.Tensor)}

    return not storages(results).isdisjoint(storages(boundary))


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they go by."""
    found: dict[str, torch.Tensor] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (submodule._parameters, submodule._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found[prefix + name] = tensor
    return found
