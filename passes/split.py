"""Cut a graph at a skip connection: one full graph, one shallow graph."""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from passes.base import PostconditionError, PreconditionError, is_pure, require_functional
from passes.skips import SkipConnection


class SplitGraphs(NamedTuple):
    """The two graphs of a cut. Their placeholders keep the names they had.

    Attributes:
        full: the original graph with the boundary as extra outputs, after its own.
        shallow: the original outputs computed from the boundary, which comes in through extra
            placeholders, after the others; without everything only the boundary needed.
    """

    full: GraphModule
    shallow: GraphModule


def split_at(graph_module: GraphModule, skip: SkipConnection) -> SplitGraphs:
    """Cut ``graph_module`` at ``skip``, one of its own skip connections; it stays as it is.

    The graphs share the module's attributes and copy no tensors. Placeholders nobody reads are
    left out of each.

    Raises:
        PreconditionError: the graph is not functional, or ``skip`` is of another graph.
        PostconditionError: the shallow graph leaves nothing out.
    """
    require_functional(graph_module)
    graph = graph_module.graph
    if any(node.graph is not graph for node in (skip.cat, *skip.boundary)):
        raise PreconditionError(f"skip connection {skip.cat.name} belongs to another graph")
    full = _rebuild(graph_module, exposed=skip.boundary)
    shallow = _rebuild(graph_module, cached=skip.boundary)
    if len(shallow.graph.nodes) >= len(full.graph.nodes):
        raise PostconditionError(f"the cut at {skip.cat.name} leaves nothing out")
    return SplitGraphs(full, shallow)


def _rebuild(
    graph_module: GraphModule, exposed: tuple[Node, ...] = (), cached: tuple[Node, ...] = ()
) -> GraphModule:
    """Copy a graph with ``exposed`` as further outputs and ``cached`` as further inputs."""
    needed = _needed(graph_module.graph, exposed, cached)
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
            graph.output((*mapped, *(copies[value] for value in exposed)))
        elif node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.lint()
    return GraphModule(graph_module, graph)


def _needed(graph: Graph, exposed: tuple[Node, ...], cached: tuple[Node, ...]) -> set[Node]:
    """What the outputs rest on, without what ``cached`` stands for; and what has side effects."""
    needed: set[Node] = set(exposed)
    for node in reversed(graph.nodes):
        read = node.op == "output" or any(user in needed for user in node.users)
        kept = node in needed or read or (node.op != "placeholder" and not is_pure(node))
        if kept and node not in cached:
            needed.add(node)
    return needed
