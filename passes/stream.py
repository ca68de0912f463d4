"""Find the residual stream of a network: what its blocks read, add to and hand on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .cost import node_cost, tensor_sizes
from .dataflow import Dependencies, is_view, operands_read

_aten = torch.ops.aten

# They hold the values of their operand, laid out or rounded in another way.
_COPIES = frozenset(
    {
        _aten._to_copy,
        _aten._unsafe_view,
        _aten.alias_copy,
        _aten.clone,
        _aten.lift_fresh_copy,
        _aten.permute_copy,
        _aten.type_as,
        _aten.view_copy,
    }
)

# The first operand, and something added to it; or limited, against overflow in half precision.
_SUMS_WITH_FIRST = frozenset(
    {
        _aten.addcdiv,
        _aten.addcmul,
        _aten.clamp,
        _aten.clamp_max,
        _aten.clamp_min,
        _aten.clip,
        _aten.nan_to_num,
        _aten.sub,
    }
)
_SCALINGS = frozenset({_aten.div, _aten.mul})
_JOINS = frozenset({_aten.cat, _aten.concat, _aten.concatenate, _aten.stack})

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
            that costs no FLOPs: a concatenation, a ControlNet's residual.
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


def find_segments(graph: Graph, sample: Node) -> list[Segment]:
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
    analysis = _Streams(graph, sample)
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


class _Place(NamedTuple):
    """After the node at ``position``: live values of the stream, and all others."""

    position: int
    stream: tuple[int, ...]
    others: frozenset[int]


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


class _Streams(Dependencies):
    """Which values carry which, and what is live where. Values are positions of nodes."""

    def __init__(self, graph: Graph, sample: Node) -> None:
        super().__init__(graph, sample)
        self.flops = [node_cost(node).flops for node in self.nodes]
        self.spent = [0]  # FLOPs on the sample before each position
        self.bases: list[int] = []
        self.family: dict[int, int] = {}  # a base and all that shows it
        self.carried: list[int] = []
        self.through: list[int] = []  # on what it depends through an operator with FLOPs
        self.stream = 0
        for position, node in enumerate(self.nodes):
            on_sample = self.on_sample >> position & 1
            self.spent.append(self.spent[-1] + (self.flops[position] if on_sample else 0))
            operands = [self.index[operand] for operand in node.all_input_nodes]
            through = 0
            for operand in operands:
                through |= self.through[operand]
            if self.flops[position]:
                through |= self.cones[position] & ~(1 << position)
            self.through.append(through)
            base = self.bases[operands[0]] if operands and _shows_operand(node) else position
            self.bases.append(base)
            self.family[base] = self.family.get(base, 0) | 1 << position
            carried = 1 << position
            for operand in self._carries(node):
                carried |= self.carried[operand]
                # The latest that is carried is the stream in front of the block.
                source = self.carried[operand] & through
                if source and on_sample:
                    start = source.bit_length() - 1
                    self.stream |= 1 << base | 1 << self.bases[start]
            self.carried.append(carried)

    def _carries(self, node: Node) -> Iterator[int]:
        """The operands that ``node`` carries."""
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands:
            return
        packet = getattr(node.target, "overloadpacket", None)
        tensors = [operand for operand in node.args if isinstance(operand, Node)]
        if _shows_operand(node) or (packet in _SUMS_WITH_FIRST and tensors):
            yield self.index[operands[0]]
        elif packet is _aten.add or packet in _JOINS:
            yield from (self.index[operand] for operand in operands)
        elif packet in _SCALINGS and tensors:
            depending = [operand for operand in tensors if self.depends_on_sample(operand)]
            divisor = packet is _aten.div and depending[:1] != tensors[:1]
            if len(depending) == 1 and not divisor:
                yield self.index[depending[0]]
        elif not self.flops[self.index[node]]:
            depending = [one for one in operands_read(node) if self.depends_on_sample(one)]
            if len(depending) == 1 and len(depending[0].users) == 1:
                yield self.index[depending[0]]

    def places(self) -> Iterator[_Place]:
        """Where the live values change and some are of the stream; each set of values once."""
        last_read: dict[int, int] = {}
        for position, node in enumerate(self.nodes):
            for operand in operands_read(node):
                base = self.bases[self.index[operand]]
                if self.bases[position] != base:
                    last_read[base] = position
        ending: dict[int, list[int]] = {}
        for base, position in last_read.items():
            ending.setdefault(position, []).append(base)
        live: set[int] = set()
        seen: set[tuple[tuple[int, ...], frozenset[int]]] = set()
        for position in range(len(self.nodes)):
            starts = self.on_sample >> position & 1 and position in last_read
            live.difference_update(ending.get(position, ()))
            if starts:
                live.add(position)
            elif position not in ending:
                continue
            stream = tuple(sorted(base for base in live if self.stream >> base & 1))
            others = frozenset(live.difference(stream))
            if stream and (stream, others) not in seen:
                seen.add((stream, others))
                yield _Place(position, stream, others)

    def chains(self) -> list[list[_Place]]:
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
        kept: list[list[_Place]] = []
        for number in sorted(range(len(places)), key=lambda number: -links[number].blocks):
            chain: list[_Place] = []
            at: int | None = number
            while at is not None and not any(
                other[0].position <= places[at].position <= other[-1].position for other in kept
            ):
                chain.append(places[at])
                at = links[at].earlier
            # The stream ends where its last block leaves it.
            while len(chain) > 1 and not self._between(chain[1].position, chain[0].position):
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

    def _joined(self, chains: list[list[_Place]], places: list[_Place]) -> list[list[_Place]]:
        """Chains with the block that drops a tensor (rule 6), and what follows from it."""
        joined: list[list[_Place]] = []
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

    def _drops(self, chain: list[_Place], place: _Place) -> bool:
        """Whether a place follows from the end of a chain but for tensors that are dropped.

        Those that are left have moved before.
        """
        found = self._carried_at(place.stream, chain[-1])
        if found is None or place.others != chain[-1].others:
            return False
        followed = {self.bases[one] for one in found}
        start = set(chain[0].stream)
        return (
            followed < set(chain[-1].stream)
            and not followed & start
            and self._between(chain[-1].position, place.position) > 0
        )

    def _between(self, earlier: int, later: int) -> int:
        return self.spent[later + 1] - self.spent[earlier + 1]

    def _link(
        self, place: _Place, earlier: Sequence[int], places: list[_Place], links: list[_Link]
    ) -> _Link:
        """To the place before it in the chain of most blocks; of several such, one of as many
        tensors, and the latest.
        """
        best, best_rank = _Link(), (-1, 0)
        for number in reversed(earlier):
            if not self._follows(place, places[number]):
                continue
            blocks = links[number].blocks
            blocks += self._between(places[number].position, place.position) > 0
            rank = (blocks, int(len(place.stream) == len(places[number].stream)))
            if rank > best_rank:
                best, best_rank = _Link(blocks, number), rank
        return best

    def _follows(self, place: _Place, earlier: _Place) -> bool:
        """Whether a place is a boundary because an earlier one is (rules 3 and 5)."""
        found = self._carried_at(place.stream, earlier)
        if found is None or found == list(place.stream):
            return False
        followed = {self.bases[one] for one in found if self.on_sample >> one & 1}
        return len(followed) == len(earlier.stream)

    def _carried_at(self, values: Sequence[int], place: _Place) -> list[int] | None:
        """What ``values`` carry of the stream at an earlier place, or of what does not depend on
        the sample. None if one carries nothing, or none carries anything of the stream.

        Views of the stream count: two streams may start as parts of one tensor.
        """
        waiting = 0
        for base in place.stream:
            waiting |= self.family[base]
        found: list[int] = []
        for value in values:
            options = 1 << value if waiting >> value & 1 else self.carried[value] & waiting
            one = self._like(value, _positions(options))
            if one is None:
                # The latest: behind the embeddings and norms of the text.
                options = self.carried[value] & ~self.on_sample
                one = self._like(value, reversed(list(_positions(options))))
            if one is None:
                return None
            base = self.bases[one]
            whole = self._is_whole(one, base)
            waiting &= ~(self.family[base] if whole else 1 << one)
            found.append(base if whole else one)
        return found if any(self.on_sample >> one & 1 for one in found) else None

    def _is_whole(self, one: int, other: int) -> bool:
        """Whether two values that show the same tensor show as much of it."""
        first, second = self._value(one), self._value(other)
        tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return tensors and prod(tensor_sizes(first)) == prod(tensor_sizes(second))

    def _showing(self, value: int) -> list[int]:
        """A value and all that show the whole of it in other layouts and dtypes."""
        base = self.bases[value]
        if value != base:
            return [value]
        return [one for one in _positions(self.family[base]) if self._is_whole(one, base)]

    def _like(self, value: int, options: Iterable[int]) -> int | None:
        """The first option with a shape and dtype that the value is shown in."""
        wanted = {_form(self._value(one)) for one in self._showing(value)} - {None}
        return next((one for one in options if _form(self._value(one)) in wanted), None)

    def _value(self, position: int) -> Any:
        return self.nodes[position].meta.get("val")

    def boundaries(self, chain: list[_Place]) -> list[_Group]:
        """The boundaries of a chain: places without FLOPs between them are one.

        From the end to the start, each tensor is followed to what it carries. Where one cannot
        be, the chain starts.
        """
        stream = dict(enumerate(chain[-1].stream))
        names = len(stream)
        rows = [(chain[-1].position, stream)]
        for place in reversed(chain[:-1]):
            kept = {name: one for name, one in stream.items() if self.on_sample >> one & 1}
            found = self._carried_at(list(kept.values()), place)
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
            if groups and not self._between(groups[-1].end, position):
                groups[-1] = groups[-1]._replace(end=position, last=stream)
            else:
                groups.append(_Group(position, position, stream, stream))
        return groups

    def costs(self, groups: list[_Group]) -> list[int]:
        """FLOPs of the blocks between boundaries."""
        return [self._between(one.end, other.start) for one, other in pairwise(groups)]

    def without_cheap(self, groups: list[_Group], least: float) -> list[_Group]:
        """Boundaries with at least so many FLOPs between them."""
        kept = groups[:1]
        for group in groups[1:]:
            if self._between(kept[-1].end, group.start) >= least:
                kept.append(group)
        if kept and kept[-1] is not groups[-1]:
            kept[1:] = [*kept[1:-1], groups[-1]] if len(kept) > 1 else []
        return kept

    def _read_through(self, value: int) -> list[int]:
        """A value and the views and copies through which alone it is read."""
        found = [value]
        while len(readers := list(self.nodes[value].users)) == 1:
            reader = self.index[readers[0]]
            if self.bases[reader] != self.bases[value] or not self._is_whole(reader, value):
                break
            found.append(value := reader)
        return found

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
        before = self._computing(range(group.start, -1, -1))
        after = self._computing(range(group.end + 1, len(self.nodes)))
        return list(_module_calls(before)), list(_module_calls(after))

    def _computing(self, positions: Iterable[int]) -> Node | None:
        """The first that has FLOPs and depends on the sample."""
        return next(
            (self.nodes[p] for p in positions if self.flops[p] and self.on_sample >> p & 1), None
        )

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
                    before=nodes(group.last, self._showing),
                    after=nodes(group.first, self._read_through),
                )
                for group in groups
            ),
            follows_sample=tuple(follows if any(follows) else [name in end for name in names]),
            paths=tuple(self._path(group) for group in groups[:-1]),
        )

    def _path(self, group: _Group) -> str:
        """The submodule that follows a boundary: the outermost that is not around it."""
        node = self._computing(range(group.end + 1, len(self.nodes)))
        paths = list(_module_calls(node).values())
        return next(iter(paths[self.level(group) :] or paths[-1:]), "")


def _positions(bits: int) -> Iterator[int]:
    """Positions in a bit set, in order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _module_calls(node: Node | None) -> dict[str, str]:
    """The module calls that a node is part of, from the outermost, and their paths."""
    stack = (node.meta.get("nn_module_stack") or {}) if node is not None else {}
    return {call: entry[0] for call, entry in stack.items()}


def _form(value: object) -> tuple[Any, ...] | None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    return (value.dtype, value.device, tensor_sizes(value))


def _shows_operand(node: Node) -> bool:
    """Whether a node is a view of its first operand, a part of it, or a copy in another form."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and is_view(source)
    packet = getattr(node.target, "overloadpacket", None)
    return is_view(node) or packet in _COPIES
