"""Find the skip connections of a network in its graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import Graph, GraphModule, Node

from passes.base import PreconditionError
from passes.cost import Cost, node_cost, total_cost


@dataclass(frozen=True)
class SkipConnection:
    """One skip connection: where the graph can be cut, and what the cut saves.

    Attributes:
        depth: 0 is the outermost, nearest the output; equals DeepCache's ``cache_branch_id``.
        cat: the concatenation.
        deep: its operand from the up path.
        skips: its other operands, from the down path.
        boundary: what must be cached so that everything behind ``deep`` can be left out. Nearly
            always ``(deep,)``; more tensors where a network carries a second up path.
        module_path: the submodule that reads the concatenation, e.g. ``up_blocks.3.resnets.2``.
        full: cost of the whole graph.
        shallow: cost of the graph without what the boundary replaces.
    """

    depth: int
    cat: Node
    deep: Node
    skips: tuple[Node, ...]
    boundary: tuple[Node, ...]
    module_path: str
    full: Cost = field(repr=False)
    shallow: Cost = field(repr=False)

    @property
    def ratio(self) -> float:
        """r: FLOPs of the shallow graph over FLOPs of the full graph."""
        return self.shallow.flops / self.full.flops if self.full.flops else 1.0

    def speed_limit(self, interval: float) -> float:
        """The highest possible speed-up, N / (1 + (N - 1) r), refreshing every Nth step."""
        return interval / (1 + (interval - 1) * self.ratio)


def find_skip_connections(
    graph_module: GraphModule, sample: str | Node | None = None
) -> list[SkipConnection]:
    """All skip connections, outermost first.

    A skip connection is a concatenation

    1. all of whose operands depend on the sample, which excludes text and time embeddings, and
    2. one of whose operands, the deep one, rests on compute that the others do not rest on and
       the shallow graph would save. That excludes concatenations inside an operation, such as
       the two halves of a rotary embedding.

    The deep operand is the one that rests on most nodes: the up path comes out of the down path.

    Args:
        graph_module: a functional ATen graph with metadata, as ``torch.export`` makes it.
        sample: the placeholder of the noisy sample (its name, or the node); by default the
            first one that is not a lifted parameter, buffer or constant.

    Raises:
        PreconditionError: there is no placeholder of that name.
    """
    graph = graph_module.graph
    analysis = _Dependencies(graph, _sample_placeholder(graph, sample))
    full: Cost | None = None
    found: list[SkipConnection] = []
    for cat in reversed(graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)):
        operands = [operand for operand in cat.args[0] if isinstance(operand, Node)]
        if len(operands) < 2 or not all(map(analysis.depends_on_sample, operands)):
            continue
        deep = max(operands, key=lambda node: (analysis.cone_size(node), analysis.index[node]))
        skips = tuple(operand for operand in operands if operand is not deep)
        boundary, left_out = analysis.cut(cat, deep, skips)
        if not any(node_cost(node).flops for node in left_out):
            continue
        full = full or total_cost(graph.nodes)
        shallow = total_cost(node for node in graph.nodes if node not in left_out)
        found.append(
            SkipConnection(
                depth=len(found),
                cat=cat,
                deep=deep,
                skips=skips,
                boundary=boundary,
                module_path=_reader_path(cat),
                full=full,
                shallow=shallow,
            )
        )
    return found


def _sample_placeholder(graph: Graph, sample: str | Node | None) -> Node:
    placeholders: list[Node] = graph.find_nodes(op="placeholder")
    if isinstance(sample, Node):
        return sample
    if sample is None:
        # torch.export's names for what it lifts: parameters, buffers, constants, objects, tokens.
        lifted = ("p_", "b_", "c_", "obj_", "token")
        inputs = [node for node in placeholders if not str(node.target).startswith(lifted)]
        if inputs:
            return inputs[0]
        raise PreconditionError("the graph has no input that is not a lifted parameter")
    for node in placeholders:
        if sample in (node.target, node.name):
            return node
    names = ", ".join(str(node.target) for node in placeholders[-8:])
    raise PreconditionError(f"no placeholder is called {sample!r}; the last ones are: {names}")


def _reader_path(cat: Node) -> str:
    """The submodule, within the one that concatenates, that first reads the concatenation."""

    def path(node: Node) -> list[str]:
        return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]

    own = path(cat)
    inner = path(next(iter(cat.users)))[len(own) :] if cat.users else []
    return (inner or own or [""])[0 if inner else -1]


class _Dependencies:
    """Who depends on whom, as bit sets over node positions: one big integer per node."""

    def __init__(self, graph: Graph, sample: Node) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self._cones: list[int] = []
        for position, node in enumerate(self.nodes):
            cone = 1 << position
            for operand in node.all_input_nodes:
                cone |= self._cones[self.index[operand]]
            self._cones.append(cone)
        self._sample_bit = 1 << self.index[sample]

    def cone(self, node: Node) -> int:
        """The node and everything it rests on."""
        return self._cones[self.index[node]]

    def cone_size(self, node: Node) -> int:
        return self.cone(node).bit_count()

    def depends_on_sample(self, node: Node) -> bool:
        return bool(self.cone(node) & self._sample_bit)

    @cached_property
    def on_sample(self) -> int:
        return self._set(node for node in self.nodes if self.depends_on_sample(node))

    def cut(
        self, cat: Node, deep: Node, skips: tuple[Node, ...]
    ) -> tuple[tuple[Node, ...], set[Node]]:
        """The boundary of a cut at ``deep``, and the nodes a shallow graph leaves out.

        The deep region starts with what ``deep`` rests on and the skips do not. It goes on with
        all that follows from it, until the concatenation. Values of the region that are read
        outside of it are the boundary.
        """
        rests_on_skips = 0
        for skip in skips:
            rests_on_skips |= self.cone(skip)
        region = self.cone(deep) & ~rests_on_skips & self.on_sample
        cat_bit = 1 << self.index[cat]
        for position, node in enumerate(self.nodes):
            behind_cat = self._cones[position] & cat_bit
            if node.op != "output" and not behind_cat and self._cones[position] & region:
                region |= 1 << position
        boundary = tuple(
            node
            for node in self._members(region)
            if any(not region >> self.index[user] & 1 for user in node.users)
        )
        return boundary, self._left_out(set(boundary))

    def _left_out(self, boundary: set[Node]) -> set[Node]:
        needed: set[Node] = set()
        for node in reversed(self.nodes):
            read = node.op == "output" or any(user in needed for user in node.users)
            if read and node not in boundary:
                needed.add(node)
        return {node for node in self.nodes if node not in needed}

    def _set(self, nodes: Iterable[Node]) -> int:
        return sum(1 << self.index[node] for node in nodes)

    def _members(self, bits: int) -> list[Node]:
        return [node for position, node in enumerate(self.nodes) if bits >> position & 1]
