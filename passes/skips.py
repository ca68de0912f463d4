"""Find the skip connections of a network in its graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from .base import argument, has_argument, is_pure
from .cost import Cost, Saving, node_cost, tensor_bytes, total_cost
from .dataflow import Dependencies, Sample, is_view, sample_placeholders

# The same operation under the names that capture leaves in a graph.
CONCATENATIONS = frozenset(
    {
        torch.ops.aten.cat.default,
        torch.ops.aten.concat.default,
        torch.ops.aten.concatenate.default,
        torch.ops.aten.hstack.default,
    }
)

# FLOPs for each byte of a result up to which computing it again costs no more than reading it: a
# depthwise 3x3 convolution in half precision takes 9, others and matrix products hundreds.
CHEAP = 10


@dataclass(frozen=True)
class SkipConnection(Saving):
    """One skip connection: where the graph can be cut, and what the cut saves.

    Attributes:
        depth: 0 is the outermost, nearest the output; equals DeepCache's ``cache_branch_id``.
        cat: the concatenation.
        deep: its operand from the up path.
        skips: its other operands, from the down path.
        boundary: what must be cached so that everything behind ``deep`` can be left out. Nearly
            always ``(deep,)``; where more of the deep region is read outside of it, the fewest
            bytes from which all of that follows cheaply. More than one tensor where a network
            carries a second up path.
        module_path: the submodule that reads the concatenation, e.g. ``up_blocks.3.resnets.2``.
        full: cost of the whole graph.
        shallow: cost of the graph without what the boundary replaces.
        entering: what a graph without the deep region still computes of what goes into it, and
            depends on the sample.
    """

    depth: int
    cat: Node
    deep: Node
    skips: tuple[Node, ...]
    boundary: tuple[Node, ...]
    module_path: str
    full: Cost = field(repr=False)
    shallow: Cost = field(repr=False)
    entering: tuple[Node, ...] = field(default=(), repr=False)

    @property
    def replaced(self) -> tuple[tuple[Node, Node | None], ...]:
        """Each tensor that is replaced by a cached one: added to nothing."""
        return tuple((node, None) for node in self.boundary)


def find_skip_connections(graph_module: GraphModule, sample: Sample = None) -> list[SkipConnection]:
    """All skip connections, outermost first.

    A skip connection is a concatenation, not along the batch, which is no joining of features,

    1. all of whose operands depend on the sample, which excludes text and time embeddings,
    2. one of whose operands, the deep one, depends on compute that the others do not depend on and
       the shallow graph would save. That excludes concatenations inside an operation, such as
       the two halves of a rotary embedding, and
    3. whose cut lies within the next outer one's: it leaves out only part of what that one leaves
       out. That excludes parallel branches of a stem, and two networks side by side that
       exchange their features (ControlNet-XS). The outermost is the one that saves most.

    The deep operand is the one that depends on most nodes: the up path comes out of the down path.

    Args:
        graph_module: a functional ATen graph with metadata, as ``torch.export`` makes it.
        sample: the placeholder of the noisy sample (its name, or the node), or all of them, if the
            network takes it as a list of tensors; by default the first one that is not a lifted
            parameter, buffer or constant.

    Raises:
        PreconditionError: there is no placeholder of that name, or it is of another graph.
    """
    graph = graph_module.graph
    analysis = _SkipAnalysis(graph, sample_placeholders(graph, sample))
    cats = (
        node
        for node in reversed(graph.nodes)
        if node.target in CONCATENATIONS and not _along_batch(node)
    )
    cuts = [cut for cut in map(analysis.cut, cats) if cut is not None]
    full = total_cost(graph.nodes)
    return [
        SkipConnection(
            depth=depth,
            cat=cut.cat,
            deep=cut.deep,
            skips=cut.skips,
            boundary=cut.boundary,
            entering=analysis.entering(cut.left_out),
            module_path=_reader_path(cut.cat),
            full=full,
            shallow=total_cost(node for node in graph.nodes if node not in cut.left_out),
        )
        for depth, cut in enumerate(_nested(cuts))
    ]


def _along_batch(cat: Node) -> bool:
    if not has_argument(cat, "dim"):
        return False
    dimension, value = argument(cat, "dim"), cat.meta.get("val")
    rank = value.dim() if isinstance(value, torch.Tensor) else 0
    return bool(dimension == 0 or dimension == -rank)


def _reader_path(cat: Node) -> str:
    """The submodule, within the one that concatenates, that first reads the concatenation."""

    def path(node: Node) -> list[str]:
        return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]

    own = path(cat)
    inner = path(next(iter(cat.users)))[len(own) :] if cat.users else []
    return (inner or own or [""])[0 if inner else -1]


@dataclass(frozen=True)
class _Cut:
    """A cut at the deep operand of a concatenation, and the nodes a shallow graph leaves out."""

    cat: Node
    deep: Node
    skips: tuple[Node, ...]
    boundary: tuple[Node, ...]
    left_out: set[Node]

    @property
    def saved_flops(self) -> int:
        return total_cost(self.left_out).flops


def _nested(cuts: list[_Cut]) -> list[_Cut]:
    """Of cuts in order, the one that saves most and those after it that lie within each other."""
    if not cuts:
        return []
    outermost = max(range(len(cuts)), key=lambda position: cuts[position].saved_flops)
    nested = [cuts[outermost]]
    for cut in cuts[outermost + 1 :]:
        if cut.left_out < nested[-1].left_out:
            nested.append(cut)
    return nested


class _SkipAnalysis(Dependencies):
    """What a cut at a concatenation leaves out, and what it has to cache."""

    def cone_size(self, node: Node) -> int:
        return self.cone(node).bit_count()

    def cut(self, cat: Node) -> _Cut | None:
        """The cut at the deep operand of ``cat``, if that is to be cut at all.

        The deep region starts with what the deep operand depends on and the skips do not. It goes
        on with all that follows from it, until the concatenation. Values of the region that are
        read outside of it are the boundary.
        """
        operands = cat.all_input_nodes  # each once: a tensor next to itself skips nothing
        if len(operands) < 2 or not all(map(self.depends_on_sample, operands)):
            return None
        deep = max(operands, key=lambda node: (self.cone_size(node), self.index[node]))
        skips = tuple(operand for operand in operands if operand is not deep)
        rests_on_skips = 0
        for skip in skips:
            rests_on_skips |= self.cone(skip)
        region = self.cone(deep) & ~rests_on_skips & self.on_sample
        cat_bit = 1 << self.index[cat]
        for position, node in enumerate(self.nodes):
            behind_cat = self.cones[position] & cat_bit
            if node.op != "output" and not behind_cat and self.cones[position] & region:
                region |= 1 << position
        boundary = tuple(
            node
            for node in self.members(region)
            if any(not region >> self.index[user] & 1 for user in node.users)
        )
        if len(boundary) > 1:
            boundary = self._minimum_cut(boundary, region)
        left_out = self._left_out(set(boundary))
        if not any(node_cost(node).flops for node in left_out):
            return None
        return _Cut(cat, deep, skips, boundary, left_out)

    def _minimum_cut(self, boundary: tuple[Node, ...], region: int) -> tuple[Node, ...]:
        """A boundary of fewest bytes from which ``boundary`` follows cheaply: a minimum cut.

        What lies between is computed at every step: a block's norm, say, whose input goes on as a
        residual. Of several such boundaries, the one that leaves least to compute.
        """
        import networkx

        flow = networkx.DiGraph()
        waiting, seen = list(boundary), set(boundary)
        for node in boundary:
            flow.add_edge((node, "out"), "readers")
        while waiting:
            node = waiting.pop()
            size = tensor_bytes(node.meta.get("val"))
            kept = {"capacity": size} if size and not is_view(node) else {}
            flow.add_edge((node, "in"), (node, "out"), **kept)
            expensive = node_cost(node).flops > CHEAP * size
            if node.op != "call_function" or expensive or not is_pure(node):
                flow.add_edge("deep", (node, "in"))
                continue
            for operand in node.all_input_nodes:
                if region >> self.index[operand] & 1:
                    flow.add_edge((operand, "out"), (node, "in"))
                    if operand not in seen:
                        seen.add(operand)
                        waiting.append(operand)
        if "deep" not in flow:
            return boundary
        # Of equal cuts it finds the one nearest to the sink.
        try:
            _, (_, near) = networkx.minimum_cut(flow, "deep", "readers")
        except networkx.NetworkXUnbounded:  # something between that is no tensor
            return boundary
        least = {node for node in seen if (node, "out") in near and (node, "in") not in near}
        return tuple(sorted(least, key=self.index.__getitem__))

    def entering(self, left_out: set[Node]) -> tuple[Node, ...]:
        """What depends on the sample, is computed without ``left_out``, and is read there."""
        return tuple(
            node
            for node in self.nodes
            if node not in left_out
            and self.depends_on_sample(node)
            and any(user in left_out for user in node.users)
        )

    def _left_out(self, boundary: set[Node]) -> set[Node]:
        needed: set[Node] = set()
        for node in reversed(self.nodes):
            read = node.op == "output" or any(user in needed for user in node.users)
            if read and node not in boundary:
                needed.add(node)
        return {node for node in self.nodes if node not in needed}
