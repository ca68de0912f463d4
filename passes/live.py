"""Which values of a graph are live where, and which carry which: what a stream consists of."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
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


class Place(NamedTuple):
    """After the node at ``position``: live values of the stream, and all others."""

    position: int
    stream: tuple[int, ...]
    others: frozenset[int]


class LiveValues(Dependencies):
    """Which values carry which, and what is live where (see ``stream.find_segments``).

    Values are positions of nodes; sets of them are bit sets.

    Attributes:
        flops: of each node.
        spent: FLOPs of what depends on the sample, before each position.
        bases: for each value, the one that it is a view, a part or a copy of; often itself.
        family: a base, and all that shows it.
        carried: what each value is a sum of, itself included.
        through: what each value depends on through an operator with FLOPs.
        stream: residual sums, and what they start from.
    """

    def __init__(self, graph: Graph, samples: Collection[Node]) -> None:
        super().__init__(graph, samples)
        self.flops = [node_cost(node).flops for node in self.nodes]
        self.spent = [0]
        self.bases: list[int] = []
        self.family: dict[int, int] = {}
        self.carried: list[int] = []
        self.through: list[int] = []
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

    def places(self) -> Iterator[Place]:
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
                yield Place(position, stream, others)

    def between(self, earlier: int, later: int) -> int:
        return self.spent[later + 1] - self.spent[earlier + 1]

    def carried_at(self, values: Sequence[int], place: Place) -> list[int] | None:
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

    def showing(self, value: int) -> list[int]:
        """A value and all that show the whole of it in other layouts and dtypes."""
        base = self.bases[value]
        if value != base:
            return [value]
        return [one for one in _positions(self.family[base]) if self._is_whole(one, base)]

    def _like(self, value: int, options: Iterable[int]) -> int | None:
        """The first option with a shape and dtype that the value is shown in."""
        wanted = {_form(self._value(one)) for one in self.showing(value)} - {None}
        return next((one for one in options if _form(self._value(one)) in wanted), None)

    def _value(self, position: int) -> Any:
        return self.nodes[position].meta.get("val")

    def read_through(self, value: int) -> list[int]:
        """A value and the views and copies through which alone it is read."""
        found = [value]
        while len(readers := list(self.nodes[value].users)) == 1:
            reader = self.index[readers[0]]
            if self.bases[reader] != self.bases[value] or not self._is_whole(reader, value):
                break
            found.append(value := reader)
        return found

    def computing(self, positions: Iterable[int]) -> Node | None:
        """The first that has FLOPs and depends on the sample."""
        return next(
            (self.nodes[p] for p in positions if self.flops[p] and self.on_sample >> p & 1), None
        )


def _positions(bits: int) -> Iterator[int]:
    """Positions in a bit set, in order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


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
