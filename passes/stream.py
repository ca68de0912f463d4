"""Find the residual stream of a network: what its blocks read, add to and hand on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from .live import LiveValues, Place

# Fewer blocks than these are no stream worth cutting: the first one always runs.
FEWEST_BLOCKS = 3

# What takes less than this share of the costliest block's FLOPs is part of the next block: a
# residual convolution in front of a transformer.
CHEAP_BLOCK = 0.1

# How many earlier places are looked at for the boundary before. They are few: only what has the
# same values waiting besides the stream counts.
_LOOK_BACK = 24


@dataclass(frozen=True)
class Boundary:
    """A place between two blocks, and the tensors that carry everything from one to the other.

    Attributes:
        position: the index in the graph of the last node before it.
        before: the stream as what follows reads it: for each tensor of the segment's stream, the
            nodes that hold all of it, in one layout or dtype or another. Empty if it has ended.
        after: the stream as the block before leaves it: for each tensor, the nodes through which
            all that follows reads it. Others than ``before`` where something is applied in between
            that costs no FLOPs, such as a concatenation. Where something is added to it that does
            not depend on the sample, such as a ControlNet's residual, the sum comes first.
    """

    position: int
    before: tuple[tuple[Node, ...], ...]
    after: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Segment:
    """Boundaries one after the other whose streams have the same shapes; a block between each two.

    Attributes:
        boundaries: in order, at least two.
        follows_sample: for each tensor of the stream, whether it comes out of the sample and goes
            on to the output. The text's in a joint stream comes out of the text, or is dropped.
        paths: for each block, its submodule.
    """

    boundaries: tuple[Boundary, ...]
    follows_sample: tuple[bool, ...]
    paths: tuple[str, ...]


def find_segments(graph: Graph, samples: Collection[Node]) -> list[Segment]:
    """The segments of the residual stream, in order; empty if there is none.

    A *place* is what lies between two nodes of the topological order, with the values that depend
    on the sample and are still needed: the live values. A view or a copy in another dtype counts
    as the tensor it shows.

    A live value is of the stream if it is a residual sum or the start of one:

    1. A value *carries* another if it is that one plus something: a sum, also with a product
       (``addcmul``); a view, part or concatenation of parts; a multiple by what does not depend on
       the sample; a limit. So does what one operator without FLOPs makes of a value nobody else
       reads: the norm of a post-norm block, a ResNet's ReLU. A recurrent cell carries nothing: it
       multiplies its state by what it computed from it.
    2. A *residual sum* carries a value on which it also depends through an operator with FLOPs.

    A place is a *boundary* if its live values follow from those of an earlier one:

    3. Each tensor of the stream carries one of the same shape and dtype there, another one each,
       or is that one.
    4. All other live values are the same at both places: a skip connection's, or the sample if it
       is added to the output.
    5. There may be one more than before that carries something that does not depend on the sample:
       the text's stream in front of the first joint attention.
    6. There may be fewer, if those that are left have moved before: the last block of a joint
       stream drops the text. A sample that is added to the output has not.
    7. There are FLOPs between them. Otherwise both are the same boundary.

    Most blocks have several residual sums. A *block* is what modules make of them: the boundary
    lies between the calls of two modules, the outermost for which there is more than one block.
    Without metadata on modules each residual sum ends a block. What takes less than a tenth of the
    costliest block is none.

    That all holds where it is cut is proven by nothing here, and need not be: a cut replaces a
    value by what equals it (see ``ResidualCut``). Rules decide where that is worthwhile.
    """
    analysis = _Streams(graph, samples)
    found = [analysis.boundaries(chain) for chain in analysis.chains()]
    for level in sorted({level for groups in found for level in map(analysis.level, groups)}):
        kept = [[group for group in groups if analysis.level(group) <= level] for groups in found]
        costliest = max(cost for groups in kept for cost in [0, *analysis.costs(groups)])
        kept = [analysis.without_cheap(groups, CHEAP_BLOCK * costliest) for groups in kept]
        kept = [groups for groups in kept if len(groups) > 1]
        blocks = sum(len(groups) - 1 for groups in kept)
        if blocks > 1:
            return list(map(analysis.segment, kept)) if blocks >= FEWEST_BLOCKS else []
    return []


class _Link(NamedTuple):
    """How a place follows from an earlier one.

    Attributes:
        blocks: how many times there are FLOPs between two places, from the start of the chain.
        earlier: the number of the place before; None at the start of a chain.
    """

    blocks: int = 0
    earlier: int | None = None


class _Group(NamedTuple):
    """Places that are one boundary, with the stream in the order of the segment's tensors."""

    start: int
    end: int
    first: dict[int, int]
    last: dict[int, int]


class _Streams(LiveValues):
    """Places that follow from each other, and the boundaries and blocks that they make."""

    def chains(self) -> list[list[Place]]:
        """Places that follow from each other, in order.

        Where chains overlap, the one of most blocks is kept, and of the other what comes after it.
        """
        places = list(self.places())
        links: list[_Link] = []
        alike: dict[frozenset[int], list[int]] = {}
        for place in places:
            earlier = alike.setdefault(place.others, [])
            links.append(self._link(place, earlier[-_LOOK_BACK:], places, links))
            earlier.append(len(links) - 1)
        kept: list[list[Place]] = []
        for number in sorted(range(len(places)), key=lambda number: -links[number].blocks):
            chain: list[Place] = []
            at: int | None = number
            while at is not None and not any(
                other[0].position <= places[at].position <= other[-1].position for other in kept
            ):
                chain.append(places[at])
                at = links[at].earlier
            # The stream ends where its last block leaves it.
            while len(chain) > 1 and not self.between(chain[1].position, chain[0].position):
                chain.pop(0)
            overlaps = any(
                chain[-1].position < other[-1].position and other[0].position < chain[0].position
                for other in kept
                if chain
            )
            if len(chain) > 1 and not overlaps:
                kept.append(chain[::-1])
        kept.sort(key=lambda chain: chain[0].position)
        return self._joined(kept, places)

    def _joined(self, chains: list[list[Place]], places: list[Place]) -> list[list[Place]]:
        """Chains with the block that drops a tensor (rule 6), and what follows from it."""
        joined: list[list[Place]] = []
        for number, chain in enumerate(chains):
            if joined and self._drops(joined[-1], chain[0]):
                joined[-1] += chain
                continue
            joined.append(chain)
            end = chain[-1].position
            limit = chains[number + 1][0].position if number + 1 < len(chains) else len(self.nodes)
            if len(chain[-1].stream) > 1:
                between = (place for place in places if end < place.position < limit)
                last = next((place for place in between if self._drops(chain, place)), None)
                joined[-1] = [*chain, last] if last is not None else chain
        return joined

    def _drops(self, chain: list[Place], place: Place) -> bool:
        """Whether a place follows from the end of a chain but for tensors that are dropped.

        Those that are left have moved before.
        """
        found = self.carried_at(place.stream, chain[-1])
        if found is None or place.others != chain[-1].others:
            return False
        followed = {self.bases[one] for one in found}
        start = set(chain[0].stream)
        return (
            followed < set(chain[-1].stream)
            and not followed & start
            and self.between(chain[-1].position, place.position) > 0
        )

    def _link(
        self, place: Place, earlier: Sequence[int], places: list[Place], links: list[_Link]
    ) -> _Link:
        """To the place before it in the chain of most blocks; of several such, one of as many
        tensors, and the latest.
        """
        best, best_rank = _Link(), (-1, 0)
        for number in reversed(earlier):
            if not self._follows(place, places[number]):
                continue
            blocks = links[number].blocks
            blocks += self.between(places[number].position, place.position) > 0
            rank = (blocks, int(len(place.stream) == len(places[number].stream)))
            if rank > best_rank:
                best, best_rank = _Link(blocks, number), rank
        return best

    def _follows(self, place: Place, earlier: Place) -> bool:
        """Whether a place is a boundary because an earlier one is (rules 3 and 5)."""
        found = self.carried_at(place.stream, earlier)
        if found is None or found == list(place.stream):
            return False
        followed = {self.bases[one] for one in found if self.on_sample >> one & 1}
        return len(followed) == len(earlier.stream)

    def boundaries(self, chain: list[Place]) -> list[_Group]:
        """The boundaries of a chain: places without FLOPs between them are one.

        From the end to the start, each tensor is followed to what it carries. Where one cannot
        be, the chain starts.
        """
        stream = dict(enumerate(chain[-1].stream))
        names = len(stream)
        rows = [(chain[-1].position, stream)]
        for place in reversed(chain[:-1]):
            kept = {name: one for name, one in stream.items() if self.on_sample >> one & 1}
            found = self.carried_at(list(kept.values()), place)
            if found is None:
                break
            stream = {**stream, **dict(zip(kept, found, strict=True))}
            followed = {self.bases[one] for one in stream.values()}
            for base in place.stream:
                if base not in followed:  # a later block drops it
                    stream[names] = base
                    names += 1
            rows.append((place.position, stream))
        groups: list[_Group] = []
        for position, stream in reversed(rows):
            if groups and not self.between(groups[-1].end, position):
                groups[-1] = groups[-1]._replace(end=position, last=stream)
            else:
                groups.append(_Group(position, position, stream, stream))
        return groups

    def costs(self, groups: list[_Group]) -> list[int]:
        """FLOPs of the blocks between boundaries."""
        return [self.between(one.end, other.start) for one, other in pairwise(groups)]

    def without_cheap(self, groups: list[_Group], least: float) -> list[_Group]:
        """Boundaries with at least so many FLOPs between them."""
        kept = groups[:1]
        for group in groups[1:]:
            if self.between(kept[-1].end, group.start) >= least:
                kept.append(group)
        if kept and kept[-1] is not groups[-1]:
            kept[1:] = [*kept[1:-1], groups[-1]] if len(kept) > 1 else []
        return kept

    def level(self, group: _Group) -> int:
        """How many module calls contain both what computes before a boundary and after it."""
        before, after = self._calls_around(group)
        common = 0
        for one, other in zip(before, after, strict=False):
            if one != other:
                break
            common += 1
        return common

    def _calls_around(self, group: _Group) -> tuple[list[str], list[str]]:
        """The module calls of the last node with FLOPs before a boundary and the first after."""
        before = self.computing(range(group.start, -1, -1))
        after = self.computing(range(group.end + 1, len(self.nodes)))
        return list(_module_calls(before)), list(_module_calls(after))

    def segment(self, groups: list[_Group]) -> Segment:
        names = sorted({name for group in groups for name in (*group.first, *group.last)})

        def nodes(
            stream: dict[int, int], show: Callable[[int], list[int]]
        ) -> tuple[tuple[Node, ...], ...]:
            shown = [show(stream[name]) if name in stream else [] for name in names]
            return tuple(tuple(self.nodes[one] for one in ones) for ones in shown)

        start, end = groups[0].last, groups[-1].first
        follows = [
            name in end and name in start and bool(self.on_sample >> start[name] & 1)
            for name in names
        ]
        return Segment(
            boundaries=tuple(
                Boundary(
                    group.end,
                    before=nodes(group.last, self.showing),
                    after=nodes(group.first, self._read_after_sums),
                )
                for group in groups
            ),
            follows_sample=tuple(follows if any(follows) else [name in end for name in names]),
            paths=tuple(self._path(group) for group in groups[:-1]),
        )

    def _read_after_sums(self, value: int) -> list[int]:
        """A value and what it is read through alone, from the sum behind it on if there is one."""
        found = self.read_through(value)
        readers = list(self.nodes[found[-1]].users)
        if len(readers) != 1 or readers[0].target is not torch.ops.aten.add.Tensor:
            return found
        (total,) = readers
        others = [one for one in total.all_input_nodes if one is not self.nodes[found[-1]]]
        if not others or total.kwargs or any(map(self.depends_on_sample, others)):
            return found
        return [*self._read_after_sums(self.index[total]), *found]

    def _path(self, group: _Group) -> str:
        """The submodule that follows a boundary: the outermost that is not around it."""
        node = self.computing(range(group.end + 1, len(self.nodes)))
        paths = list(_module_calls(node).values())
        return next(iter(paths[self.level(group) :] or paths[-1:]), "")


def _module_calls(node: Node | None) -> dict[str, str]:
    """The module calls that a node is part of, from the outermost, and their paths."""
    stack = (node.meta.get("nn_module_stack") or {}) if node is not None else {}
    return {call: entry[0] for call, entry in stack.items()}
