"""Cut a graph at skip connections: one full graph, and a smaller one for each cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .base import PostconditionError, PreconditionError, call, is_pure, require_functional
from .skips import SkipConnection


class SplitGraphs(NamedTuple):
    """The two graphs of a cut. Their placeholders keep the names they had.

    Attributes:
        full: the original graph with the boundary as extra outputs, after its own.
        shallow: the original outputs computed from the boundary, which comes in through extra
            placeholders, after the others; without everything only the boundary needed.
    """

    full: GraphModule
    shallow: GraphModule


def split_at(
    graph_module: GraphModule, skip: SkipConnection, probed: Sequence[Node] = ()
) -> SplitGraphs:
    """Cut ``graph_module`` at ``skip``, one of its own skip connections; it stays as it is.

    The graphs share the module's attributes and copy no tensors. Placeholders nobody reads are
    left out of each.

    Args:
        probed: values that both graphs compute and are to return as well, after all others.

    Raises:
        PreconditionError: the graph is not functional, ``skip`` is of another graph, or the
            shallow graph does not compute what is probed.
        PostconditionError: the shallow graph leaves nothing out.
    """
    shallow, full = split_levels(graph_module, [skip], probed)
    return SplitGraphs(full, shallow)


def split_levels(
    graph_module: GraphModule, skips: Sequence[SkipConnection], probed: Sequence[Node] = ()
) -> tuple[GraphModule, ...]:
    """Cut ``graph_module`` at several skip connections at once; it stays as it is.

    Args:
        skips: of this graph, the outermost first.
        probed: see ``split_at``; the first and the last graph return it, the last a copy, which no
            write to its inputs reaches.

    Returns:
        One graph for each skip connection, and the full graph at the end. Number k takes the
        boundary of ``skips[k]`` through extra placeholders, after the others, and returns those of
        all outer ones, the outermost first, after the original outputs. The full graph takes none
        and returns all.

    Raises:
        PreconditionError: the graph is not functional, a skip connection is of another graph, they
            are not in order, or the first graph does not compute what is probed.
        PostconditionError: a cut leaves nothing out.
    """
    require_functional(graph_module)
    graph = graph_module.graph
    if any(node.graph is not graph for skip in skips for node in (skip.cat, *skip.boundary)):
        names = ", ".join(skip.cat.name for skip in skips)
        raise PreconditionError(f"a skip connection of {names} belongs to another graph")
    if any(one.depth >= other.depth for one, other in pairwise(skips)):
        raise PreconditionError(f"depths {[skip.depth for skip in skips]} do not ascend")
    if skips and not _needed(graph, (), skips[0].boundary).issuperset(probed):
        raise PreconditionError("what is probed lies beyond the cut")
    levels = []
    for number, skip in enumerate((*skips, None)):
        exposed = tuple(node for outer in skips[:number] for node in outer.boundary)
        if skip is None:
            levels.append(_rebuild(graph_module, exposed, (), copied=tuple(probed)))
        else:
            exposed += tuple(probed) if number == 0 else ()
            levels.append(_rebuild(graph_module, exposed, skip.boundary))
    for skip, level in zip(skips, levels, strict=False):
        if len(level.graph.nodes) >= len(levels[-1].graph.nodes):
            raise PostconditionError(f"the cut at {skip.cat.name} leaves nothing out")
    return tuple(levels)


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
    exposed: tuple[Node, ...],
    cached: tuple[Node, ...],
    copied: tuple[Node, ...] = (),
) -> GraphModule:
    """Copy a graph with ``exposed`` and copies of ``copied`` as further outputs, and ``cached`` as
    further inputs.
    """
    needed = _needed(graph_module.graph, (*exposed, *copied), cached)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node in needed and node not in cached:
            copies[node] = graph.node_copy(node)
    for node in cached:
        copies[node] = graph.placeholder(f"cached_{node.name}")
        copies[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            mapped = map_arg(tuple(outputs), copies.__getitem__)
            own = [call(graph, torch.ops.aten.clone.default, copies[value]) for value in copied]
            graph.output((*mapped, *(copies[value] for value in exposed), *own))
        elif node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.lint()
    return GraphModule(graph_module, graph)


def _needed(graph: Graph, exposed: Sequence[Node], cached: Sequence[Node]) -> set[Node]:
    """What the outputs depend on, without what ``cached`` replaces; and what has side effects."""
    needed: set[Node] = set(exposed)
    for node in reversed(graph.nodes):
        read = node.op == "output" or any(user in needed for user in node.users)
        kept = node in needed or read or (node.op != "placeholder" and not is_pure(node))
        if kept and node not in cached:
            needed.add(node)
    return needed
