"""Extrapolate cached features within the shallow graph, so that a reuse step launches no more."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .base import PreconditionError, call, is_floating, placeholder

_aten = torch.ops.aten


def with_forecast(graph_module: GraphModule, boundary: int, history: int) -> GraphModule:
    """A shallow graph that computes its boundary from several earlier ones.

    Each boundary tensor b becomes ``c[0] * b_0 + c[1] * b_1 + ...``, b_0 the latest refresh's and
    c an input, in float32 at least whatever the dtype of b. The rules:

    1. Where the sum is not finite, b_0 is used: what a refresh computed is passed on, what
       extrapolation made of it is not. So coefficients (1, 0, ...) give b_0 (of a zero, not the
       sign).
    2. What is no floating-point tensor (a size, a mask) is not extrapolated: the latest is used.

    Args:
        graph_module: a shallow graph of ``split_at``; it stays as it is.
        boundary: how many of its last placeholders are the boundary.
        history: how many boundaries go in, at least 2.

    Returns:
        The graph with placeholders, after the others: the boundary of the latest refresh, that of
        the one before, and so on; then the coefficients, float32, shape (history,).

    Raises:
        PreconditionError: the graph has fewer placeholders, metadata is missing, or history < 2.
    """
    placeholders: list[Node] = graph_module.graph.find_nodes(op="placeholder")
    if not 0 < boundary <= len(placeholders):
        raise PreconditionError(f"a boundary of {boundary} among {len(placeholders)} placeholders")
    if history < 2:
        raise PreconditionError(f"a forecast needs at least two boundaries, got {history}")
    cached = placeholders[-boundary:]
    if any("val" not in node.meta for node in cached):
        raise PreconditionError("a boundary placeholder has no metadata")
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in placeholders:
        copies[node] = graph.node_copy(node)
    earlier = [
        [placeholder(graph, f"{node.target}_{age}", node.meta["val"]) for node in cached]
        for age in range(1, history)
    ]
    coefficients = placeholder(graph, "coefficients", _coefficients_like(cached, history))
    for position, node in enumerate(cached):
        if is_floating(node.meta["val"]):
            ages = [copies[node], *(others[position] for others in earlier)]
            copies[node] = _extrapolated(graph, ages, coefficients)
    for node in graph_module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.lint()
    return GraphModule(graph_module, graph)


def _extrapolated(graph: Graph, ages: list[Node], coefficients: Node) -> Node:
    latest = ages[0]
    dtype = latest.meta["val"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total: Node | None = None
    for age, node in enumerate(ages):
        factor = call(graph, _aten.select.int, coefficients, 0, age)
        value = node
        if dtype != wide:
            value = call(graph, _aten._to_copy.default, node, dtype=wide)
        term = call(graph, _aten.mul.Tensor, value, factor)
        total = term if total is None else call(graph, _aten.add.Tensor, total, term)
    assert total is not None
    if dtype != wide:
        total = call(graph, _aten._to_copy.default, total, dtype=dtype)
    finite = call(graph, _aten.isfinite.default, total)
    return call(graph, _aten.where.self, finite, total, latest)


def _coefficients_like(cached: list[Node], history: int) -> Any:
    """Where the boundary is, and as fake as it is."""
    like = next((n.meta["val"] for n in cached if is_floating(n.meta["val"])), None)
    if like is None:
        raise PreconditionError("the boundary holds no floating-point tensor to extrapolate")
    return like.new_empty((history,), dtype=torch.float32)
