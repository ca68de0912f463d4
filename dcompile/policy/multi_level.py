"""``MultiLevel``: cuts at several depths, each with an interval of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dcompile.errors import ScheduleError
from dcompile.policy.checks import require_int
from dcompile.policy.schedule import Plan, RunInfo, Schedule


@dataclass(frozen=True)
class MultiLevel(Schedule):
    """Cuts at several depths at once, each refreshed at an interval of its own.

    ``MultiLevel([(0, 2), (2, 6)])`` runs the full graph at every sixth step, the graph that takes
    the boundary at depth 2 as input at every second step, and at the others the shallow graph of
    depth 0.

    Args:
        levels: (depth, interval) or (depth, interval, forecast), the outermost first. A deeper cut
            has the longer interval, or the same. Without a forecast of its own a level has the one
            that ``cache_compile`` is given.

    Raises:
        ScheduleError: levels are missing, malformed or out of order.
    """

    levels: tuple[tuple[int, int] | tuple[int, int, str], ...]

    def __init__(self, levels: Sequence[Sequence[Any]]) -> None:
        try:
            chosen: tuple[Any, ...] = tuple(tuple(level) for level in levels)
        except TypeError as error:
            raise ScheduleError(
                f"MultiLevel: expected (depth, interval) pairs, got {levels!r}"
            ) from error
        if not chosen or any(len(level) not in (2, 3) for level in chosen):
            raise ScheduleError(
                "MultiLevel: expected (depth, interval) or (depth, interval, forecast), got "
                f"{levels!r}"
            )
        for level in chosen:
            require_int("MultiLevel depth", level[0], least=0)
            require_int("MultiLevel interval", level[1])
            if len(level) == 3 and not isinstance(level[2], str):
                raise ScheduleError(f"MultiLevel: expected a forecast's name, got {level[2]!r}")
        for outer, inner in pairwise(chosen):
            if inner[0] <= outer[0] or inner[1] < outer[1]:
                raise ScheduleError(
                    f"MultiLevel: {inner} after {outer}: depths have to ascend, and a deeper cut "
                    "is refreshed as rarely as the one before it or more rarely"
                )
        object.__setattr__(self, "levels", chosen)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(level[0] for level in self.levels)

    @property
    def forecasts(self) -> tuple[str | None, ...]:
        return tuple(level[2] if len(level) == 3 else None for level in self.levels)

    def refresh(self, step: int, steps: int | None) -> bool:
        return step % self.levels[-1][1] == 0

    def plan(self, run: RunInfo) -> Plan:
        return IntervalsPlan(tuple(level[1] for level in self.levels), run.steps)


@dataclass(frozen=True, eq=False)
class IntervalsPlan(Plan):
    """One interval for each cut, the outermost first."""

    intervals: tuple[int, ...]
    steps: int | None

    def level(self, step: int) -> int:
        due = [number for number, every in enumerate(self.intervals, 1) if step % every == 0]
        return max(due, default=0)

    def refreshes(self) -> int | None:
        return None if self.steps is None else len(range(0, self.steps, self.intervals[-1]))
