"""What a schedule is: it makes a plan for each run, and a plan says which level each step executes.

What a user writes is five lines: any object with a method ``refresh(step, steps) -> bool``. Inside,
everything is a ``Schedule``: it names the cuts it needs and plans a run from what is known of it
when the run starts (``RunInfo``). ``as_schedule`` turns the first into the second, so nothing else
has to ask what an object can do.

Levels count the cuts that a step refreshes, from the outermost: 0 reuses everything (the shallow
graph), the number of cuts is a refresh step (the full graph). The dispatcher only ever raises a
plan's level, where a cache is missing or older than the latest step at which its cut was due.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from dcompile import notices
from dcompile.errors import ScheduleError
from dcompile.policy.forecast import Forecast, Reuse


@runtime_checkable
class RefreshRule(Protocol):
    """The least a schedule can be: decides for each step whether the full network runs."""

    def refresh(self, step: int, steps: int | None) -> bool:
        """Whether step number ``step`` (from 0) of ``steps`` runs the full graph.

        Args:
            step: counts the network's timesteps from the first one of the run.
            steps: how many there are; None where that is not known (timesteps given as numbers).
        """
        ...


class Drift(Protocol):
    """A measured drift; a number that may still be on its way from a device.

    Attributes:
        late: whether converting it right away would wait for the device.
    """

    late: bool

    def __float__(self) -> float: ...


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Attributes:
        steps: number of steps from here to the end of the timesteps; None if not known.
        cuts: number of cuts the network is compiled for.
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        gains: the sampler's error gain at each step (see ``policy.sampler.error_gains``); None
            without a sampler that has noise levels.
        power: the default exponent of the gains for this sampler (``sampler.default_power``).
        forecast: the default forecast for this sampler (``sampler.default_forecast``).
        warn: shows a message to the user, once.
        sampler: the sampler's class and a digest of its settings; empty if it is not known.
        has_noise_levels: whether the gains are the sampler's, or all alike for want of them.
    """

    steps: int | None
    cuts: int = 1
    ratio: float = 0.0
    gains: tuple[float, ...] | None = None
    power: float = 0.5
    forecast: Forecast = Reuse()  # noqa: RUF009
    warn: Callable[[str], None] = notices.warn
    sampler: str = ""
    has_noise_levels: bool = True


class Plan:
    """The levels of one run. Made by ``Schedule.plan``; asked for every call of the network."""

    def level(self, step: int) -> int:
        """How many cuts step number ``step`` refreshes, 0 to ``RunInfo.cuts``.

        Asked once for each call, so several times for a step with several calls.
        """
        raise NotImplementedError

    def observe(self, step: int, drift: Drift) -> None:
        """What a reuse step measured; only called if the schedule has a ``probe``."""

    def refreshes(self) -> int | None:
        """How many steps refresh all cuts; None if that is not known beforehand."""
        return None


class Schedule:
    """Base of the schedules here, and of your own where ``refresh`` alone is not enough."""

    @property
    def depths(self) -> tuple[int, ...] | None:
        """The cuts to compile for, the outermost first; None for ``cache_compile(depth=...)``."""
        return None

    @property
    def forecasts(self) -> tuple[str | None, ...] | None:
        """For each of ``depths`` its forecast, or None for ``cache_compile(forecast=...)``."""
        return None

    @property
    def probe(self) -> str | None:
        """The norm in which reuse steps measure drift, "l1" or "l2"; None to measure nothing."""
        return None

    @property
    def uses_sampler(self) -> bool:
        """Whether ``plan`` looks at the sampler's error gains, where there is a sampler."""
        return False

    @property
    def needs_sampler(self) -> bool:
        """Whether ``plan`` fails without a sampler."""
        return False

    def require_fit(self, network: tuple[str, int]) -> None:
        """Check that the schedule may be used with a network.

        Args:
            network: its class and number of parameters.

        Raises:
            ScheduleError: it was made for another one.
        """

    def describe(self) -> list[str]:
        """Which steps it refreshes and why, a line for each kind of run it knows."""
        return [repr(self)]

    def refresh(self, step: int, steps: int | None) -> bool:
        """See ``RefreshRule``. Not every schedule can tell from the step alone."""
        raise ScheduleError(f"{self!r} decides for a whole run: ask plan(run).level(step)")

    def plan(self, run: RunInfo) -> Plan:
        """The plan of a run that starts now.

        Raises:
            ScheduleError: the schedule does not fit the run.
        """
        return RefreshPlan(self, run)


@dataclass(frozen=True, eq=False)
class RefreshPlan(Plan):
    """All cuts or none, as ``rule.refresh`` says."""

    rule: RefreshRule
    run: RunInfo

    def level(self, step: int) -> int:
        return self.run.cuts if self.rule.refresh(step, self.run.steps) else 0

    def refreshes(self) -> int | None:
        steps = self.run.steps
        if steps is None:
            return None
        return sum(bool(self.rule.refresh(step, steps)) for step in range(steps))


@dataclass(frozen=True)
class UserSchedule(Schedule):
    """An object of the user's that has a ``refresh`` method and nothing else."""

    rule: Any

    def refresh(self, step: int, steps: int | None) -> bool:
        answer = self.rule.refresh(step, steps)
        try:
            if answer in (True, False):  # of NumPy or torch, too
                return bool(answer)
        except (TypeError, ValueError, RuntimeError):  # an array, say
            pass
        raise ScheduleError(
            f"{self.rule!r}: refresh({step}, {steps}) returned {answer!r}, expected True or False"
        )

    def __repr__(self) -> str:
        return repr(self.rule)


def as_schedule(schedule: Any) -> Schedule:
    """A ``Schedule`` as it is; any other object with ``refresh(step, steps)`` wrapped as one.

    Raises:
        ScheduleError: it is neither.
    """
    if isinstance(schedule, type):
        raise ScheduleError(
            f"schedule: expected an object, got the class {schedule.__name__}: call it, as in "
            f"{schedule.__name__}(...)"
        )
    if isinstance(schedule, Schedule):
        _require_consistent(schedule)
        return schedule
    if not callable(getattr(schedule, "refresh", None)):
        raise ScheduleError(
            f"schedule: expected an object with refresh(step, steps) -> bool, got {schedule!r}"
        )
    try:
        inspect.signature(schedule.refresh).bind(0, None)
    except TypeError as error:
        raise ScheduleError(
            f"schedule: {schedule!r} must have refresh(step, steps) -> bool; {error}"
        ) from error
    return UserSchedule(schedule)


def _require_consistent(schedule: Schedule) -> None:
    probe, depths, forecasts = schedule.probe, schedule.depths, schedule.forecasts
    if probe not in (None, "l1", "l2"):
        raise ScheduleError(f'{schedule!r}: probe is {probe!r}, expected "l1", "l2" or None')
    if depths is None:
        cuts = 1
    else:
        cuts = len(tuple(depths))
        if not cuts or list(depths) != sorted(set(depths)):
            raise ScheduleError(
                f"{schedule!r}: depths are {depths!r}, expected ascending ones, the outermost first"
            )
    if forecasts is not None and len(tuple(forecasts)) != cuts:
        raise ScheduleError(
            f"{schedule!r}: {len(tuple(forecasts))} forecasts for {cuts} depth{'s' * (cuts > 1)}, "
            "expected one for each"
        )


@dataclass(frozen=True, eq=False)
class CheckedPlan(Plan):
    """A plan of a user's, whose answers are checked."""

    plan: Plan
    schedule: Schedule
    cuts: int

    @staticmethod
    def of(plan: Any, schedule: Schedule, cuts: int) -> Plan:
        """The plan, checked if it is no class of this package.

        Raises:
            ScheduleError: it cannot say levels.
        """
        if not callable(getattr(plan, "level", None)):
            raise ScheduleError(f"{schedule!r}: plan(run) returned {plan!r}, expected a Plan")
        own = type(plan).__module__.startswith(f"{__package__}.")
        return cast(Plan, plan) if own else CheckedPlan(plan, schedule, cuts)

    def level(self, step: int) -> int:
        answer: Any = self.plan.level(step)
        if not isinstance(answer, int) or not 0 <= answer <= self.cuts:
            raise ScheduleError(
                f"{self.schedule!r}: level({step}) of its plan returned {answer!r}, expected 0 to "
                f"{self.cuts}"
            )
        return answer

    def observe(self, step: int, drift: Drift) -> None:
        if hasattr(self.plan, "observe"):
            self.plan.observe(step, drift)

    def refreshes(self) -> int | None:
        return self.plan.refreshes() if hasattr(self.plan, "refreshes") else None
