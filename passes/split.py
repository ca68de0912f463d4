"""Cut a graph: one full graph, and a smaller one for each cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .base import PostconditionError, PreconditionError, call, is_pure, require_functional
from .cuts import Cut
from .dataflow import needed_nodes
from .skips import SkipConnection

# A value of the graph that is cached, as itself or as its difference from another one.
_Replaced = tuple[tuple[Node, Node | None], ...]


class SplitGraphs(NamedTuple):
    """The two graphs of a cut. Their placeholders keep the names they had.

    Attributes:
        full: the original graph with the boundary as extra outputs, after its own.
        shallow: the original outputs computed from the boundary, which comes in through extra
            placeholders, after the others; without everything only the boundary needed.
    """

    full: GraphModule
    shallow: GraphModule


def split_at(graph_module: GraphModule, cut: Cut, probed: Sequence[Node] = ()) -> SplitGraphs:
    """Cut ``graph_module`` at ``cut``, one of its own; it stays as it is.

    The graphs share the module's attributes and copy no tensors. Placeholders nobody reads are
    left out of each.

    Args:
        probed: values that both graphs compute and are to return as well, after all others.

    Raises:
        PreconditionError: the graph is not functional, ``cut`` is of another graph, or the
            shallow graph does not compute what is probed.
        PostconditionError: the shallow graph leaves nothing out.
    """
    shallow, full = split_levels(graph_module, [cut], probed)
    return SplitGraphs(full, shallow)


def split_levels(
    graph_module: GraphModule, cuts: Sequence[Cut], probed: Sequence[Node] = ()
) -> tuple[GraphModule, ...]:
    """Cut ``graph_module`` at several cuts at once; it stays as it is.

    What is cached at a skip connection is the boundary itself. At a residual cut it is, for each
    tensor of ``cut.boundary``, the difference that the skipped blocks make: a graph that takes it
    adds it to the stream before them, one that returns it subtracts that stream.

    Args:
        cuts: of this graph, the outermost first.
        probed: see ``split_at``; the first and the last graph return it, the last a copy, which no
            write to its inputs reaches.

    Returns:
        One graph for each cut, and the full graph at the end. Number k takes the boundary of
        ``cuts[k]`` through extra placeholders, after the others, and returns those of all outer
        ones, the outermost first, after the original outputs. The full graph takes none and
        returns all.

    Raises:
        PreconditionError: the graph is not functional, a cut is of another graph, they are not in
            order, or the first graph does not compute what is probed.
        PostconditionError: a cut leaves nothing out.
    """
    require_functional(graph_module)
    graph = graph_module.graph
    if any(node.graph is not graph for cut in cuts for node in _nodes_of(cut)):
        kinds = {"skip connection" if isinstance(cut, SkipConnection) else "cut" for cut in cuts}
        names = ", ".join(map(_name, cuts))
        raise PreconditionError(f"a {min(kinds)} of {names} belongs to another graph")
    if any(one.depth >= other.depth for one, other in pairwise(cuts)):
        raise PreconditionError(f"depths {[cut.depth for cut in cuts]} do not ascend")
    if cuts and not _needed(graph, (), cuts[0].replaced).issuperset(probed):
        raise PreconditionError("what is probed lies beyond the cut")
    levels = []
    for number, cut in enumerate((*cuts, None)):
        exposed: _Replaced = tuple(pair for outer in cuts[:number] for pair in outer.replaced)
        if cut is None:
            levels.append(_rebuild(graph_module, exposed, (), copied=tuple(probed)))
        else:
            exposed += tuple((node, None) for node in probed) if number == 0 else ()
            levels.append(_rebuild(graph_module, exposed, cut.replaced))
    size = len(_needed(graph, (), ()))
    for cut in cuts:
        if len(_needed(graph, (), cut.replaced)) + len(cut.replaced) >= size:
            raise PostconditionError(f"the cut at {_name(cut)} leaves nothing out")
    return tuple(levels)


def _name(cut: Cut) -> str:
    return cut.cat.name if isinstance(cut, SkipConnection) else cut.module_path


def _nodes_of(cut: Cut) -> list[Node]:
    own = [cut.cat] if isinstance(cut, SkipConnection) else []
    return [*own, *(node for pair in cut.replaced for node in pair if node is not None)]


def with_outputs(graph_module: GraphModule, outputs: Sequence[int]) -> GraphModule:
    """A graph with only these of its outputs, without everything only the others needed.

    The original stays as it is. Placeholders nobody reads are left out.

    Args:
        outputs: positions among the graph's outputs, in the order in which they are to come.

    Raises:
        PreconditionError: the graph is not functional, or has no such output.
    """
    require_functional(graph_module)
    own = graph_module.graph.output_node().args[0]
    values = tuple(own) if isinstance(own, (tuple, list)) else (own,)
    if not all(0 <= number < len(values) for number in outputs):
        raise PreconditionError(f"outputs {list(outputs)} of a graph that has {len(values)}")
    chosen = tuple(values[number] for number in outputs)
    needed = {value for value in chosen if isinstance(value, Node)}
    for node in reversed(graph_module.graph.nodes):
        kept = node.op not in ("placeholder", "output") and not is_pure(node)
        if node.op != "output" and (kept or any(user in needed for user in node.users)):
            needed.add(node)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.output(map_arg(chosen, copies.__getitem__))
    graph.lint()
    return GraphModule(graph_module, graph)


def _rebuild(
    graph_module: GraphModule,
    exposed: _Replaced,
    cached: _Replaced,
    copied: tuple[Node, ...] = (),
) -> GraphModule:
    """Copy a graph with ``exposed`` and copies of ``copied`` as further outputs, and ``cached`` as
    further inputs.
    """
    extra = [node for pair in exposed for node in pair if node is not None]
    needed = _needed(graph_module.graph, (*extra, *copied), cached)
    replaced = {node for node, _ in cached}
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node in needed and node not in replaced:
            copies[node] = graph.node_copy(node)
    differences: dict[Node, tuple[Node, Node]] = {}
    for node, start in cached:
        taken = graph.placeholder(f"cached_{node.name}")
        taken.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if start is None:
            copies[node] = taken
        else:
            differences[node] = (start, taken)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            mapped = map_arg(tuple(outputs), copies.__getitem__)
            returned = [
                copies[value]
                if start is None
                else _combined(graph, torch.ops.aten.sub.Tensor, copies[value], copies[start])
                for value, start in exposed
            ]
            own = [call(graph, torch.ops.aten.clone.default, copies[value]) for value in copied]
            graph.output((*mapped, *returned, *own))
        elif node in differences:
            start, taken = differences[node]
            copies[node] = _combined(graph, torch.ops.aten.add.Tensor, copies[start], taken)
        elif node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.lint()
    return GraphModule(graph_module, graph)


def _combined(graph: Graph, target: Any, stream: Node, other: Node) -> Node:
    """A sum or difference of two tensors of the same shape and dtype."""
    node = graph.call_function(target, (stream, other))
    if "val" in stream.meta:
        # Not computed: contiguous or not, it is as large, and sizes may be symbols.
        node.meta["val"] = stream.meta["val"]
    return node


def _needed(graph: Graph, exposed: Collection[Node], replaced: _Replaced) -> set[Node]:
    """What the outputs and ``exposed`` depend on, without what ``replaced`` stands for."""
    starts = [start for _, start in replaced if start is not None]
    return needed_nodes(graph, (*exposed, *starts), {node for node, _ in replaced})
