"""Cut a network along its residual stream: skip blocks by what they added at the latest refresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from .cost import Cost, Saving, node_cost, tensor_bytes, tensor_sizes
from .dataflow import Sample, needed_nodes, nodes_with_effects, sample_placeholders
from .stream import Segment, find_segments


@dataclass(frozen=True)
class SkippedSegment:
    """Blocks of one segment that a residual cut skips: the last ones, or all.

    Attributes:
        before: the stream before the first skipped block.
        after: the stream after the last one, in the same order. It is replaced by ``before`` plus
            the difference of the two at the latest refresh, tensor by tensor; shapes and dtypes
            are equal.
        follows_sample: for each tensor, whether it comes out of the sample and goes on to the
            output. In a joint stream the text's does not.
        paths: the submodules of the skipped blocks.
    """

    before: tuple[Node, ...]
    after: tuple[Node, ...]
    follows_sample: tuple[bool, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class ResidualCut(Saving):
    """Where a residual stream can be cut, and what the cut saves.

    Attributes:
        depth: ``depth + 1`` blocks run, the first ones; all others are skipped.
        segments: what is skipped, in order; one entry for each segment that skips anything.
        full: cost of the whole graph.
        shallow: cost of the graph without the skipped blocks.
    """

    depth: int
    segments: tuple[SkippedSegment, ...]
    full: Cost = field(repr=False)
    shallow: Cost = field(repr=False)

    @property
    def module_path(self) -> str:
        """The first skipped block, e.g. ``transformer_blocks.1``."""
        return self.segments[0].paths[0]

    @property
    def skipped_blocks(self) -> tuple[str, ...]:
        """All skipped blocks, in order."""
        return tuple(path for segment in self.segments for path in segment.paths)

    @property
    def entering(self) -> tuple[Node, ...]:
        """What goes into the first skipped block and comes out of the sample."""
        first = self.segments[0]
        return tuple(
            node
            for node, follows in zip(first.before, first.follows_sample, strict=True)
            if follows
        )

    @property
    def boundary(self) -> tuple[Node, ...]:
        """What the cached differences are added up to: one tensor of the same shape and dtype each.

        The differences are cached in this order.
        """
        return tuple(node for segment in self.segments for node in segment.after)

    @property
    def replaced(self) -> tuple[tuple[Node, Node | None], ...]:
        """Each tensor that is replaced, with the one that a cached difference is added to."""
        return tuple(
            pair
            for segment in self.segments
            for pair in zip(segment.after, segment.before, strict=True)
        )


def find_residual_cuts(graph_module: GraphModule, sample: Sample = None) -> list[ResidualCut]:
    """All cuts along the residual stream, the one that saves most first.

    ``find_segments`` says what the stream and its blocks are. A cut at depth d lets the first
    d + 1 blocks of the network run. In each segment the others are skipped:

    1. The stream after a segment's last skipped block is the stream before the first one plus a
       difference. With the difference of the same call that is exact, up to the rounding of
       a + (b - a); with an earlier call's it is an approximation, as every cache is.
    2. Each segment has a difference of its own, as shapes differ between segments. What lies
       between them, such as the concatenation of text and image, is computed.
    3. Only what nobody else needs is left out, so that any graph can be cut. A cut that leaves out
       no FLOPs, or not less than the next deeper one, is dropped.

    Returns:
        The cuts; empty if there is no stream or it has fewer than three blocks: two gain nothing
        worth a cache.

    Args:
        graph_module: a functional ATen graph with metadata, as ``torch.export`` makes it.
        sample: the placeholder of the noisy sample (its name, or the node), or all of them, if the
            network takes it as a list of tensors; by default the first one that is not a lifted
            parameter, buffer or constant.

    Raises:
        PreconditionError: there is no placeholder of that name, or it is of another graph.
    """
    graph = graph_module.graph
    segments = find_segments(graph, sample_placeholders(graph, sample))
    if not segments:
        return []
    costs = {node: node_cost(node) for node in graph.nodes}
    full = sum(costs.values(), Cost())
    effects = nodes_with_effects(graph)
    blocks = sum(len(segment.paths) for segment in segments)
    cuts: list[ResidualCut] = []
    for running in range(1, blocks):
        skipped = tuple(_skipped(segments, running))
        if not skipped or not all(part.after for part in skipped):
            continue
        before = {node for part in skipped for node in part.before}
        after = {node for part in skipped for node in part.after}
        needed = needed_nodes(graph, before, after, effects)
        shallow = sum((costs[node] for node in needed), Cost())
        if shallow.flops < full.flops and (not cuts or cuts[-1].shallow.flops < shallow.flops):
            cuts.append(ResidualCut(len(cuts), skipped, full, shallow))
    return cuts


def _skipped(segments: Sequence[Segment], running: int) -> list[SkippedSegment]:
    """What each segment skips if the network's first ``running`` blocks run."""
    found = []
    for segment in segments:
        runs = min(running, len(segment.paths))
        running -= runs
        if runs == len(segment.paths):
            continue
        start, end = segment.boundaries[runs], segment.boundaries[-1]
        replaced = []
        for befores, afters, follows in zip(
            start.before, end.after, segment.follows_sample, strict=True
        ):
            if not (befores and afters) or befores[0] is afters[0]:
                continue
            pair = _same_form(befores, afters)
            if pair is None:
                return []
            replaced.append((*pair, follows))
        found.append(
            SkippedSegment(
                before=tuple(before for before, _, _ in replaced),
                after=tuple(after for _, after, _ in replaced),
                follows_sample=tuple(follows for _, _, follows in replaced),
                paths=segment.paths[runs:],
            )
        )
    return found


def _same_form(befores: Sequence[Node], afters: Sequence[Node]) -> tuple[Node, Node] | None:
    """A stream before and after blocks, both in the shape and dtype of fewest bytes.

    Either is computed without the other one's views: ``before`` comes first. Of several ``after``,
    the first: what was added to the last skipped block's result is part of the difference, so that
    a ControlNet need not compute it.
    """
    pairs = [
        (before, after)
        for after in afters
        for before in befores
        if before < after and _form(before) == _form(after)
    ]
    return min(pairs, key=lambda pair: tensor_bytes(pair[0].meta["val"]), default=None)


def _form(node: Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return value.dtype, tensor_sizes(value)
