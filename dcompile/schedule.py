"""Schedules: which steps refresh the cache and which reuse it.

A schedule is any object with a method ``refresh(step, steps) -> bool``. ``step`` counts the
network's timesteps from 0 at the start of a generation. ``steps`` is how many there are, or None
where that is not known (timesteps passed as plain numbers). Step 0 always refreshes, and so does
any step whose cache is missing or older than the last refresh step: a schedule can only ask for
more refreshing, never for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, cast, runtime_checkable

from dcompile.errors import ScheduleError


@runtime_checkable
class Schedule(Protocol):
    """Decides for each step whether the full network runs."""

    def refresh(self, step: int, steps: int | None) -> bool:
        """Whether step number ``step`` (from 0) of ``steps`` runs the full graph."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Refresh every ``interval``-th step: DeepCache's uniform policy.

    Raises:
        ScheduleError: ``interval`` is not an int of at least 1.
    """

    interval: int

    def __post_init__(self) -> None:
        _require_int("interval", self.interval)

    def refresh(self, step: int, steps: int | None) -> bool:
        return step % self.interval == 0


@dataclass(frozen=True)
class Steps:
    """Refresh at exactly these steps.

    Raises:
        ScheduleError: the steps are not ints, do not begin with 0 or do not ascend; when used,
            if the run has fewer steps than the last of them.
    """

    refresh_steps: tuple[int, ...]

    def __init__(self, refresh_steps: Sequence[int]) -> None:
        chosen = tuple(refresh_steps)
        if any(isinstance(step, bool) or not isinstance(step, int) for step in chosen):
            raise ScheduleError(f"Steps: expected ints, got {list(chosen)}")
        if not chosen or chosen[0] != 0:
            raise ScheduleError(
                f"Steps: got {list(chosen)}, but the first step has nothing to reuse: begin with 0"
            )
        if any(later <= earlier for earlier, later in pairwise(chosen)):
            raise ScheduleError(f"Steps: expected ascending steps, got {list(chosen)}")
        object.__setattr__(self, "refresh_steps", chosen)

    def refresh(self, step: int, steps: int | None) -> bool:
        if steps is not None and self.refresh_steps[-1] >= steps:
            raise ScheduleError(
                f"Steps: refresh step {self.refresh_steps[-1]} lies beyond this run of {steps} "
                f"steps (0 to {steps - 1}); give steps for this run, or use Uniform"
            )
        return step in self.refresh_steps


@dataclass(frozen=True)
class Power:
    """The paper's non-uniform policy: ``count`` refreshes, densest around step ``center``.

    Equal to the released reference code (DeepCache, Ma et al., CVPR 2024): ``count`` + 1 equally
    spaced points between (-center)^(1/p) and (n - center)^(1/p) are raised to p, truncated and
    shifted by ``center``; p goes down by 0.02 until they are distinct. Powers of negative
    numbers are principal complex ones, and the real part is kept at the end.

    Args:
        count: refresh steps in a run.
        center: step around which they are densest.
        power: p, at least 1; 1 is nearly uniform.

    Raises:
        ScheduleError: the arguments are out of range; when used, if the run has too few steps.
    """

    count: int
    center: int = 15
    power: float = 1.4

    def __post_init__(self) -> None:
        _require_int("count", self.count)
        _require_int("center", self.center, least=0)
        if not self.power >= 1:
            raise ScheduleError(f"Power: expected power >= 1, got {self.power}")

    def refresh(self, step: int, steps: int | None) -> bool:
        if steps is None:
            raise ScheduleError(
                "Power places its refreshes over the whole run, and the number of steps is not "
                "known: pass elements of scheduler.timesteps to the network, or use Uniform"
            )
        return step in self.refresh_steps(steps)

    def refresh_steps(self, steps: int) -> tuple[int, ...]:
        """The refresh steps of a run of ``steps`` steps, ascending from 0."""
        return _power_steps(steps, self.count, self.center, self.power)


@lru_cache(maxsize=64)
def _power_steps(steps: int, count: int, center: int, power: float) -> tuple[int, ...]:
    import numpy as np  # as in the reference: another pow() could truncate to another step

    if center >= steps or count > steps:
        raise ScheduleError(
            f"Power: {count} refreshes around step {center} do not fit a run of {steps} steps"
        )
    exponent = power
    while exponent > 1 or exponent == power:
        low = complex(-center) ** (1 / exponent)
        high = (steps - center) ** (1 / exponent)
        points = np.linspace(low, high, count + 1) ** exponent
        offsets = np.unique(points.real.astype(np.int32))
        # The first point is the start of the run, up to rounding; the last is its end.
        chosen = (0, *(int(offset) + center for offset in offsets[1:-1]))
        if len(chosen) == count:
            return chosen
        exponent -= 0.02
    raise ScheduleError(
        f"Power: found no {count} distinct refresh steps around {center} in a run of {steps}"
    )


def _require_int(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name}: expected an int of at least {least}, got {value!r}")


def to_json(schedule: Schedule) -> dict[str, Any] | None:
    """The schedule's class and fields; None if it is not one of this module's."""
    if type(schedule) not in _KINDS.values():
        return None
    return {"kind": type(schedule).__name__, **asdict(schedule)}  # type: ignore[call-overload]


def from_json(entry: Mapping[str, Any]) -> Schedule:
    """What ``to_json`` wrote.

    Raises:
        ScheduleError: unknown kind, or bad fields.
    """
    fields = dict(entry)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ScheduleError(f"unknown schedule {kind!r}; known are {', '.join(_KINDS)}")
    try:
        return cast(Schedule, _KINDS[kind](**fields))
    except TypeError as error:
        raise ScheduleError(f"{kind}: {error}") from error


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Uniform, Steps, Power)}
