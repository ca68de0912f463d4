"""Which sizes to build for, where a compiler needs a range and not just a symbol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dcompile.compat.export import (
    bounds_of,
    expression_of,
    guards_of,
    shape_env_of,
    traced_size,
    traced_sizes,
)

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # smallest, best, largest: TensorRT's min, opt, max
REQUESTED = "requested_sizes"  # see Backend.compile


def profiles_of(placeholders: list[Node], inputs: Sequence[Any]) -> list[Profile]:
    """The shapes to build an engine for: the requested ranges, or the sizes seen with a margin."""
    sizes: dict[Any, _Size] = {}
    dimensions = [
        (axis, size, value, node.meta.get(REQUESTED, {}).get(axis))
        for node, value in zip(placeholders, inputs, strict=True)
        for axis, size in enumerate(node.meta["val"].shape)
        if _free_symbols(size)
    ]
    for (
        axis,
        size,
        value,
        requested,
    ) in dimensions:  # the boundary's come last, and are never requested
        symbol, shape_env = expression_of(size), shape_env_of(size)
        if symbol.is_symbol and symbol not in sizes:
            captured = traced_size(shape_env, symbol)
            sizes[symbol] = _Size(symbol, captured, value.shape[axis], requested, shape_env)
    for _, size, _, _ in dimensions:  # symbols that occur in expressions only
        for symbol in _free_symbols(size) - sizes.keys():
            shape_env = shape_env_of(size)
            captured = traced_size(shape_env, symbol)
            sizes[symbol] = _Size(symbol, captured, captured, None, shape_env)
    ranges = {symbol: size.range() for symbol, size in sizes.items()}

    def shape_at(node: Node, which: int) -> Shape:
        values = {symbol: ends[which] for symbol, ends in ranges.items()}
        return tuple(
            int(expression_of(size).subs(values)) if isinstance(size, torch.SymInt) else size
            for size in node.meta["val"].shape
        )

    return [(shape_at(node, 0), shape_at(node, 1), shape_at(node, 2)) for node in placeholders]


def _free_symbols(size: Any) -> frozenset[Any]:
    return (
        frozenset(expression_of(size).free_symbols)
        if isinstance(size, torch.SymInt)
        else frozenset()
    )


@dataclass(frozen=True)
class _Size:
    """A size that varies.

    Attributes:
        symbol: its name in the graph's shapes.
        captured, now: what it was when the network was captured, and is as it is compiled.
        requested: the range asked for, if one was.
        shape_env: knows what the network's code takes.
    """

    symbol: Any
    captured: int
    now: int
    requested: tuple[int, int] | None
    shape_env: Any

    def range(self) -> tuple[int, int, int]:
        """Smallest, best and largest; the network's code takes the ends as well.

        Without one, wide enough for related sizes and for those seen, and no wider: TensorRT
        reserves memory for the largest.
        """
        small, large = sorted((self.captured, self.now))
        lower, upper = bounds_of(self.shape_env, self.symbol)
        low, high = self.requested or ((small + 1) // 2, 3 * large // 2)
        low = max(low, int(lower))
        high = high if upper > high else int(upper)
        while low < small and not self._taken(low):
            low += 1
        while high > large and not self._taken(high):
            high -= 1
        return low, self.now, high

    def _taken(self, size: int) -> bool:
        """Whether the guards hold at ``size``, everything else as it was captured."""
        from sympy import false  # type: ignore[import-untyped]  # not with the package: slow

        values = {**traced_sizes(self.shape_env), self.symbol: size}
        guards = guards_of(self.shape_env)
        return not any(
            guard.subs(values) == false for guard in guards if self.symbol in guard.free_symbols
        )
