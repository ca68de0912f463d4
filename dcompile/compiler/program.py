"""The compiled graphs for one call signature, and how to call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_structure, tree_unflatten

from dcompile.compat.storages import storage_of
from dcompile.compat.tensors import ORDINARY, is_wrapper, parts_by_name, version_of, without_class
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.lazy import LazyTensor, materialize
from dcompile.passes.hoist import HOISTED


class Constant(NamedTuple):
    """A tensor that is part of a network's code: an attribute that is no buffer, or a literal."""

    name: str
    value: torch.Tensor


class Convention(NamedTuple):
    """What a graph's placeholders stand for, in order: weights, then inputs, then the boundary.

    Attributes:
        weights: a parameter's or buffer's fully qualified name, or a constant.
        inputs: positions among the call's leaves; of hoisted values, which follow them, negative.
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
        elif HOISTED in node.meta:
            inputs.append(node.meta[HOISTED])
    return Convention(tuple(weights), tuple(inputs))


class Bound(NamedTuple):
    """A compiled graph with its weights: call ``run(*weights, *inputs, *cached)``."""

    run: Callable[..., Any]
    weights: tuple[torch.Tensor, ...]
    inputs: tuple[int, ...]

    def __call__(
        self, leaves: Sequence[Any], cached: Sequence[Any] = (), coefficients: Any = None
    ) -> Any:
        inputs = [leaves[i] for i in self.inputs]
        for value in inputs:
            if type(value) is LazyTensor:
                inputs = materialize(inputs)
                break
        if coefficients is None:
            return self.run(*self.weights, *inputs, *cached)
        return self.run(*self.weights, *inputs, *cached, coefficients)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """Which weights a backend folded into its code, how they looked then, and their size."""

    seen: dict[str, tuple[object, ...]]
    nbytes: int = 0

    @staticmethod
    def of(convention: Convention, weights: Mapping[str, torch.Tensor]) -> FoldedWeights:
        names = [item for item in convention.weights if isinstance(item, str)]
        size = sum(weights[name].nbytes for name in names)
        return FoldedWeights({name: _fingerprint(weights[name]) for name in names}, size)

    def match(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights are still those."""
        return all(_fingerprint(weights[name]) == seen for name, seen in self.seen.items())


def _fingerprint(tensor: torch.Tensor) -> tuple[object, ...]:
    """Changes when the tensor does: by its version, and for writes through ``.data``, which bear
    none, by a sample of its values.
    """
    version = version_of(tensor)
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // 64)].tolist()
    return version, tuple(sample)


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """One compiled graph and its calling convention.

    Attributes:
        folded: the weights that are part of its code; None, as it should be, if it holds none.
    """

    run: Callable[..., Any]
    convention: Convention
    folded: FoldedWeights | None = None

    def bind(
        self, weights: Mapping[str, torch.Tensor], order: Sequence[int] | None = None
    ) -> Bound:
        """With these weights, for leaves in this order (see ``StandardCall``)."""
        inputs = self.convention.inputs
        if order is not None:
            inputs = tuple(order[i] if i >= 0 else i for i in inputs)
        return Bound(self.run, self.convention.weight_tensors(weights), inputs)


class ProgramSpec(NamedTuple):
    """Where a program is cut, and what else its reuse steps do.

    Attributes:
        depths: of the cuts, ascending. Nearly always one; more for a ``MultiLevel``.
        histories: for each cut, how many boundaries are extrapolated from; 1 is plain reuse.
        probe: how the outermost cut's graph measures the drift of its cache (see
            ``passes.with_drift``); None if it does not.
    """

    depths: tuple[int, ...]
    histories: tuple[int, ...]
    probe: str | None = None


class CacheLayout(NamedTuple):
    """What is cached for one cut, as part of all that a lane caches.

    For each of the latest ``history`` refreshes, the latest first: the boundary, and for the first
    cut what a probe compares with.

    Attributes:
        start: where it begins among the cached values.
        size: how many values one refresh makes.
        history: how many refreshes are kept.
    """

    start: int
    size: int
    history: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.history

    @property
    def latest(self) -> slice:
        """The values of the latest refresh."""
        return slice(self.start, self.start + self.size)

    @property
    def all(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Program:
    """The graphs for one call signature: the full one, and a smaller one for each cut.

    Attributes:
        out_spec: the structure of what the network returns.
        graphs: the outermost cut's first, the full graph last. Number k reads what is cached for
            cut k, and returns, after the network's results, the boundaries of all outer cuts; the
            full graph those of all. If a cut extrapolates from several boundaries, its graph takes
            the forecast's coefficients after them. If it measures its cache's drift, it returns
            that after all else.
        cached: one for each cut.
        ratios: of each cut, r: FLOPs of its graph over FLOPs of the full graph.
        probed: whether the first graph returns a drift.
        prologue: computes what is the same at every step from the call's other leaves; the graphs
            read its results after the call's leaves. None if there is no such thing.
    """

    out_spec: TreeSpec
    graphs: tuple[CompiledGraph, ...]
    cached: tuple[CacheLayout, ...]
    ratios: tuple[float, ...] = (0.0,)
    probed: bool = False
    prologue: CompiledGraph | None = None

    @property
    def all_graphs(self) -> tuple[CompiledGraph, ...]:
        """The graphs, and the prologue if there is one."""
        return self.graphs if self.prologue is None else (*self.graphs, self.prologue)

    @property
    def full(self) -> CompiledGraph:
        return self.graphs[-1]

    @property
    def ratio(self) -> float:
        """r of the outermost cut."""
        return self.ratios[0]

    def cost(self, level: int) -> float:
        """FLOPs of the graph that refreshes ``level`` cuts over FLOPs of the full graph."""
        return 1.0 if level == len(self.cached) else self.ratios[level]

    def matches(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights folded into the code, if any were, are still the module's."""
        return all(graph.folded is None or graph.folded.match(weights) for graph in self.all_graphs)

    def bind(
        self, weights: Mapping[str, torch.Tensor], order: Sequence[int] | None = None
    ) -> BoundProgram:
        """With these weights, from ``weights_of`` the live module. Fast: references only.

        Args:
            order: where the program's leaves are among those it will be called with.
        """
        prologue = None if self.prologue is None else self.prologue.bind(weights, order)
        graphs = tuple(graph.bind(weights, order) for graph in self.graphs)
        return BoundProgram(self, graphs, prologue)


def cache_layouts(sizes: Sequence[int], histories: Sequence[int]) -> tuple[CacheLayout, ...]:
    """The layouts of several cuts, one after the other, from how many values a refresh makes."""
    found: list[CacheLayout] = []
    for size, history in zip(sizes, histories, strict=True):
        found.append(CacheLayout(found[-1].stop if found else 0, size, history))
    return tuple(found)


def graph_label(number: int, cuts: int) -> str:
    """What messages call graph ``number`` of a program with ``cuts`` cuts."""
    if number == cuts:
        return "full"
    return "shallow" if cuts == 1 else f"level {number}"


class BoundProgram:
    """A program with the weights of one module, for one run.

    Attributes:
        graphs: as in the program.
        prologue: as in the program. What it returns has to follow the leaves of each call.
        results: how many of a graph's outputs the module returns.
    """

    __slots__ = (
        "_aliased",
        "_outermost",
        "_spec",
        "_tuple",
        "graphs",
        "program",
        "prologue",
        "results",
    )

    def __init__(
        self, program: Program, graphs: tuple[Bound, ...], prologue: Bound | None = None
    ) -> None:
        self.program = program
        self.graphs = graphs
        self.prologue = prologue
        self._outermost = program.cached[0].all
        self._aliased = False
        self._spec = program.out_spec
        self.results = self._spec.num_leaves
        self._tuple = self._spec == tree_structure((0,) * self.results)

    def refresh(
        self,
        leaves: Sequence[Any],
        previous: Any = (),
        level: int | None = None,
        coefficients: Any = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Recompute boundaries: those of all cuts, by the full graph, or only of outer ones.

        Args:
            leaves: the call's leaves.
            previous: what the same lane has cached, which a forecast goes on from; empty if there
                is nothing.
            level: how many cuts, at least 1; fewer than all read what is cached for the next one.
            coefficients: of that one's forecast.

        Returns:
            The result, and what to cache. In the place of earlier boundaries that there are not,
            the latest again.
        """
        cached = self.program.cached
        if level is None or level == len(cached):
            level = len(cached)
            values = tuple(self.graphs[level](leaves))
        else:
            values = tuple(self.graphs[level](leaves, previous[cached[level].all], coefficients))
        results, made = values[: self.results], values[self.results :]
        if _share_storage(results, made):  # what the caller does to a result must not reach them
            self._aliased = True
            made = tuple(_own(value) for value in made)
        kept: list[Any] = []
        for cut in cached[:level]:
            boundary, made = made[: cut.size], made[cut.size :]
            kept += boundary
            earlier = cut.size * (cut.history - 1)
            if earlier:
                kept += (
                    previous[cut.start :][:earlier] if previous else boundary * (cut.history - 1)
                )
        for cut in cached[level:]:
            kept += previous[cut.all]
        return self.packed(results), tuple(kept)

    def reuse(
        self, leaves: Sequence[Any], cached: tuple[Any, ...], coefficients: Any = None
    ) -> tuple[Any, Any]:
        """Run the smallest graph from what is cached.

        Args:
            leaves: the call's leaves.
            cached: what ``refresh`` returned.
            coefficients: of the forecast, shape (history,); None without one.

        Returns:
            What the module returns, and the cache's drift; None if that is not measured.
        """
        values = tuple(self.graphs[0](leaves, cached[self._outermost], coefficients))
        drift = None
        if self.program.probed:
            values, drift = values[:-1], values[-1]
        return self.packed(tuple(map(_own, values)) if self._aliased else values), drift

    def packed(self, values: tuple[Any, ...]) -> Any:
        """The graph's results in the form in which the module returns them."""
        return values if self._tuple else tree_unflatten(list(values), self._spec)


def _share_storage(results: Sequence[Any], boundary: Sequence[Any]) -> bool:
    def storages(values: Sequence[Any]) -> set[int]:
        return {id(storage_of(x)) for x in values if isinstance(x, torch.Tensor)}

    return not storages(results).isdisjoint(storages(boundary))


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they go by; of quantized ones the parts, too."""
    found: dict[str, torch.Tensor] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (submodule._parameters, submodule._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                found[prefix + name] = tensor
                if type(tensor) in ORDINARY:
                    continue
                if is_wrapper(tensor):
                    found.update(parts_by_name(prefix, name, tensor))
                else:
                    found[prefix + name] = without_class(tensor)
    return found
