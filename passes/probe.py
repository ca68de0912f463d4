"""Measure within the shallow graph how far what enters the deep region has moved."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .base import PreconditionError, call, is_floating, placeholder

_aten = torch.ops.aten

PROBES = ("l1", "l2")
"""Norms in which a drift is measured."""


def with_drift(graph_module: GraphModule, probed: int, probe: str = "l1") -> GraphModule:
    """A shallow graph that returns one number in the place of its last ``probed`` outputs.

    The number is |x - y| / |y| over all of these outputs x together, with y what the same values
    were when the cache was made (or their forecast), which comes in through extra
    placeholders after the others. The norm is the sum of magnitudes ("l1") or its Euclidean
    counterpart ("l2"), in float32 at least. What is no floating-point tensor does not count.

    Args:
        graph_module: a shallow graph of ``split_at`` with values probed; it stays as it is.
        probed: how many of its outputs those are.
        probe: one of ``PROBES``.

    Raises:
        PreconditionError: no such probe, the graph has fewer outputs, no output is a floating-point
            tensor, or metadata is missing.
    """
    if probe not in PROBES:
        raise PreconditionError(f"unknown probe {probe!r}; known are {', '.join(PROBES)}")
    output = next(iter(reversed(graph_module.graph.nodes)))
    results = output.args[0]
    if not 0 < probed <= len(results):
        raise PreconditionError(f"{probed} values to probe among {len(results)} outputs")
    watched = [
        (position, node)
        for position, node in enumerate(results[-probed:])
        if isinstance(node, Node) and is_floating(node.meta.get("val"))
    ]
    if not watched:
        raise PreconditionError("nothing that can be probed has floating-point metadata")
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs = graph_module.graph.find_nodes(op="placeholder")
    for node in inputs:
        copies[node] = graph.node_copy(node)
    then = [
        placeholder(graph, f"entered_{position}", getattr(node, "meta", {}).get("val"))
        for position, node in enumerate(results[-probed:])
    ]
    for node in graph_module.graph.nodes:
        if node.op != "output" and node not in copies:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    moved, size = (
        _sum(graph, [_size(graph, _wide(graph, *pair), probe) for pair in pairs])
        for pairs in (
            [(copies[node], then[position]) for position, node in watched],
            [(then[position], None) for position, _ in watched],
        )
    )
    drift = call(graph, _aten.div.Tensor, moved, call(graph, _aten.clamp.default, size, 1e-30))
    if probe == "l2":
        drift = call(graph, _aten.sqrt.default, drift)
    kept = map_arg(tuple(results[:-probed]), copies.__getitem__)
    graph.output((*kept, drift))
    graph.lint()
    return GraphModule(graph_module, graph)


def _wide(graph: Graph, value: Node, minus: Node | None) -> Node:
    """``value``, without ``minus`` if there is one, in float32 at least."""
    dtype = torch.promote_types(value.meta["val"].dtype, torch.float32)

    def wide(node: Node) -> Node:
        if node.meta["val"].dtype == dtype:
            return node
        return call(graph, _aten._to_copy.default, node, dtype=dtype)

    return wide(value) if minus is None else call(graph, _aten.sub.Tensor, wide(value), wide(minus))


def _size(graph: Graph, value: Node, probe: str) -> Node:
    """The sum of magnitudes, or of squares."""
    if probe == "l1":
        magnitude = call(graph, _aten.abs.default, value)
    else:
        magnitude = call(graph, _aten.mul.Tensor, value, value)
    return call(graph, _aten.sum.default, magnitude)


def _sum(graph: Graph, terms: list[Node]) -> Node:
    total = terms[0]
    for term in terms[1:]:
        total = call(graph, _aten.add.Tensor, total, term)
    return total
