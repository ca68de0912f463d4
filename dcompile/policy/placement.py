"""Where to place a given number of refresh steps in a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def evenly(steps: int, count: int) -> tuple[int, ...]:
    """``count`` of ``steps`` steps from 0, as evenly as can be, the shorter intervals last."""
    length, longer = divmod(steps, count)
    return tuple(number * length + min(number, longer) for number in range(count))


def by_load(loads: Sequence[float], count: int) -> tuple[int, ...]:
    """``count`` ascending steps from 0, between which the sums of ``loads`` are about equal."""
    steps = len(loads)
    total = sum(loads)
    if total <= 0:
        loads, total = [1.0] * steps, float(steps)
    before = list(accumulate(loads, initial=0.0))[:steps]
    chosen: list[int] = []
    for number in range(count):
        target = total * number / count
        nearest = min(range(steps), key=lambda step: abs(before[step] - target))
        # At least one step after the previous one, and room for those to come.
        least = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(nearest, least), steps - (count - number)))
    return tuple(chosen)
