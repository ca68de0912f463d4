"""Outline what recurs in a graph, so that a compiler compiles it once."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from .base import GraphPass, PostconditionError, require_functional
from .cost import total_cost

# Lengths of regions that are looked at in one round, those first that cover most of the graph.
_LENGTHS = 24
# Places where a region may begin that are looked at for one length.
_PLACES = 48
# Of two regions that save nearly as much, the one that exchanges fewer tensors is taken.
_NEARLY = 0.85


@dataclass(frozen=True)
class OutlineRegions(GraphPass):
    """Nodes that recur, such as the blocks of a transformer, become calls of one submodule.

    Found by structure alone. The rules:

    1. A region is a run of calls that stand one after the other; its inputs are computed before
       all of it, so one call can take the place of the last of them.
    2. Two runs are one region if they call the same operators with the same constants, on operands
       of the same shapes, strides and dtypes, wired alike. Weights are operands.
    3. Nothing with symbolic sizes, or without metadata, is outlined: whether it is the same is not
       known.
    4. A region returns tensors that share memory neither with each other nor with what it was
       given: subgraphs that do are not understood by compilers.
    5. It computes: without a matrix product or convolution there is little to compile.

    Attributes:
        least: nodes that a region has at least.
    """

    least: int = 12

    def requires(self, graph_module: GraphModule) -> None:
        require_functional(graph_module)

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = Graph()
        graph.output(graph.graph_copy(graph_module.graph, {}))
        outlined = GraphModule(graph_module, graph)
        calls = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
        labels = _labels(calls)
        number = 0
        while (region := _best_region(calls, labels, self.least)) is not None:
            name = f"region_{number}"
            outlined.add_submodule(name, _as_module(region, calls, graph_module))
            for start in region.starts:
                _replace(graph, calls[start : start + region.length], region, name)
                for position in range(start, start + region.length):
                    labels[position] = -1 - position  # like nothing else
            number += 1
        outlined.recompile()
        return PassResult(outlined, modified=number > 0)

    def ensures(self, graph_module: GraphModule) -> None:
        for node in graph_module.graph.find_nodes(op="call_module"):
            if not all(user.target is operator.getitem for user in node.users):
                raise PostconditionError(f"the results of {node} are not taken one by one")


class _Region(NamedTuple):
    """Runs of calls that are alike.

    Attributes:
        starts: positions of their first calls.
        length: how many calls each has.
        outputs: of which of these the results are used elsewhere, by any of the runs.
    """

    starts: tuple[int, ...]
    length: int
    outputs: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Calls that need not be compiled."""
        return (len(self.starts) - 1) * self.length


def _labels(calls: Sequence[Node]) -> list[int]:
    """The same number for calls that are alike, apart from what gives them their operands."""
    known: dict[Any, int] = {}
    labels = []
    for position, node in enumerate(calls):
        try:
            if "call_module" in {node.op, *(one.op for one in node.all_input_nodes)}:
                raise TypeError("a region already")
            key = (
                node.target,
                _described(node.meta["val"]),
                _described(node.args),
                _described(sorted(node.kwargs.items())),
            )
            labels.append(known.setdefault(key, len(known)))
        except (KeyError, TypeError):  # no metadata, or something that cannot be compared
            labels.append(-1 - position)
    return labels


def _described(value: Any) -> Any:
    """What matters of an argument or a result.

    Raises:
        KeyError: it is a node without metadata.
        TypeError: it has symbolic sizes, or cannot be hashed.
    """
    if isinstance(value, Node):
        return "operand", _described(value.meta["val"])
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        if not all(type(size) is int for size in sizes):
            raise TypeError("symbolic sizes")
        return sizes, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_described, value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise TypeError("a symbolic number")
    hash(value)
    return type(value), value


def _best_region(calls: Sequence[Node], labels: Sequence[int], least: int) -> _Region | None:
    best: _Region | None = None
    for length in _promising_lengths(labels, least):
        found = _best_of_length(calls, labels, length)
        if found is not None and (best is None or found.saved > best.saved):
            best = found
    return best


def _promising_lengths(labels: Sequence[int], least: int) -> list[int]:
    """Lengths at which the labels repeat, those first that cover most of the graph."""
    places: dict[tuple[int, ...], int] = {}
    distances: Counter[int] = Counter()
    for start in range(len(labels) - least + 1):
        run = tuple(labels[start : start + least])
        if run in places:
            distances[start - places[run]] += 1
        places[run] = start
    covered: Counter[int] = Counter()
    for distance, _ in distances.most_common(8 * _LENGTHS):
        matched = 0
        for one, other in zip(labels, labels[distance:], strict=False):
            if one == other:
                matched += 1
                continue
            covered[min(matched, distance)] += matched
            matched = 0
        covered[min(matched, distance)] += matched
    return [length for length, _ in covered.most_common(_LENGTHS) if length >= least]


def _best_of_length(calls: Sequence[Node], labels: Sequence[int], length: int) -> _Region | None:
    """Of all runs of this length that recur, those that save most and exchange little."""
    alike: dict[int, list[int]] = defaultdict(list)
    for start, value in enumerate(_hashes(labels, length)):
        alike[value].append(start)
    groups = [_apart(starts, length) for starts in alike.values() if len(starts) > 1]
    groups = sorted((group for group in groups if len(group) > 1), key=len, reverse=True)
    found: list[tuple[int, _Region]] = []
    for group in groups[:_PLACES]:
        if found and len(group) - 1 < _NEARLY * (len(found[0][1].starts) - 1):
            break
        region = _wired_alike(calls, group, length)
        if region is not None:
            found.append((_exchanged(calls, region), region))
    if not found:
        return None
    most = max(region.saved for _, region in found)
    return min((pair for pair in found if pair[1].saved >= _NEARLY * most), key=lambda p: p[0])[1]


def _hashes(labels: Sequence[int], length: int) -> Iterable[int]:
    """A hash of each run of this length; two runs of one hash are compared afterwards."""
    base, modulus = 1_000_003, (1 << 61) - 1
    leading = pow(base, length, modulus)
    value = 0
    for position, label in enumerate(labels):
        value = (value * base + label + len(labels) + 1) % modulus
        if position >= length:
            gone = labels[position - length] + len(labels) + 1
            value = (value - gone * leading) % modulus
        if position >= length - 1:
            yield value


def _apart(starts: Sequence[int], length: int) -> list[int]:
    """As many of these runs as do not overlap, from the first on."""
    taken: list[int] = []
    for start in starts:
        if not taken or start >= taken[-1] + length:
            taken.append(start)
    return taken


def _wired_alike(calls: Sequence[Node], starts: Sequence[int], length: int) -> _Region | None:
    """Those of the runs that are one region; None if there is no two of them."""
    by_wiring: dict[Any, list[int]] = defaultdict(list)
    for start in starts:
        by_wiring[_wiring(calls[start : start + length])].append(start)
    chosen = max(by_wiring.values(), key=len)
    if len(chosen) < 2 or not total_cost(calls[chosen[0] : chosen[0] + length]).flops:
        return None
    outputs: set[int] = set()
    for start in chosen:
        run = calls[start : start + length]
        inside = set(run)
        outputs |= {k for k, node in enumerate(run) if not inside.issuperset(node.users)}
    region = _Region(tuple(chosen), length, tuple(sorted(outputs)))
    return region if all(_returns_its_own(calls, region, start) for start in chosen) else None


def _wiring(run: Sequence[Node]) -> tuple[tuple[Any, ...], ...]:
    """The calls, and where each operand comes from: a call of the run, or an input of it."""
    inside = {node: number for number, node in enumerate(run)}
    inputs: dict[Node, int] = {}
    wired = []
    for node in run:
        operands: list[Any] = []
        for operand in _operands(node):
            if operand in inside:
                operands.append(inside[operand])
            else:
                operands.append(("input", inputs.setdefault(operand, len(inputs))))
        wired.append((node.target, *operands))
    return tuple(wired)


def _operands(node: Node) -> list[Node]:
    """All of them in order, each as often as it is used."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _inputs(run: Sequence[Node]) -> list[Node]:
    inside = set(run)
    return [*dict.fromkeys(o for node in run for o in _operands(node) if o not in inside)]


def _returns_its_own(calls: Sequence[Node], region: _Region, start: int) -> bool:
    """Whether its outputs are tensors with memory of their own."""
    run = calls[start : start + region.length]
    values = [run[k].meta["val"] for k in region.outputs]
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return False
    given = [node.meta.get("val") for node in _inputs(run)]
    others = [id(value.untyped_storage()) for value in given if isinstance(value, torch.Tensor)]
    own = [id(value.untyped_storage()) for value in values]
    return len(set(own)) == len(own) and not set(own) & set(others)


def _exchanged(calls: Sequence[Node], region: _Region) -> int:
    """Computed tensors that go into a region and out of it."""
    run = calls[region.starts[0] : region.starts[0] + region.length]
    return len(region.outputs) + sum(node.op == "call_function" for node in _inputs(run))


def _as_module(region: _Region, calls: Sequence[Node], root: GraphModule) -> GraphModule:
    """The region as a module of its own: takes its inputs, returns a tuple of its outputs."""
    run = calls[region.starts[0] : region.starts[0] + region.length]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(_inputs(run)):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta["val"] = node.meta["val"]
    for node in run:
        copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.output(tuple(copies[run[k]] for k in region.outputs))
    return GraphModule(root, graph)


def _replace(graph: Graph, run: Sequence[Node], region: _Region, name: str) -> None:
    """Call the region's module instead of a run of it."""
    with graph.inserting_after(run[-1]):
        called = graph.call_module(name, tuple(_inputs(run)))
    called.meta["val"] = tuple(run[k].meta["val"] for k in region.outputs)
    inside = set(run)
    for position, k in enumerate(region.outputs):
        with graph.inserting_after(called):
            result = graph.call_function(operator.getitem, (called, position))
        result.meta["val"] = run[k].meta["val"]
        run[k].replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)
