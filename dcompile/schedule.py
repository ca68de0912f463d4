"""Schedules: which steps refresh the cache and which reuse it.

A schedule is any object with a method ``refresh(step, steps) -> bool``. ``step`` counts the
network's timesteps from 0 at the start of a generation. ``steps`` is how many there are, or None
where that is not known (timesteps passed as plain numbers). Step 0 always refreshes, and so does
any step whose cache is missing or older than the last refresh step: a schedule can only ask for
more refreshing, never for less.

A schedule may have more:

- ``plan(run) -> Schedule``: asked once, at the start of a generation, and what it returns is used
  for that generation. ``Sigma`` looks at the sampler this way.
- ``probe``, "l1" or "l2", and ``observe(step, drift)``: after each reuse step it is told how far
  what enters the deep region has moved since the refresh. ``Adaptive`` decides by that.
- ``depths``, ascending, and ``partly(step, steps) -> int``: cuts at several depths; at a step that
  does not refresh all of them, how many of the outer ones it refreshes. ``Pyramid`` does so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Protocol, cast, runtime_checkable

from dcompile.errors import ScheduleError
from dcompile.forecast import Forecast, Reuse


@runtime_checkable
class Schedule(Protocol):
    """Decides for each step whether the full network runs."""

    def refresh(self, step: int, steps: int | None) -> bool:
        """Whether step number ``step`` (from 0) of ``steps`` runs the full graph."""
        ...


@dataclass(frozen=True)
class Run:
    """What is known of a generation when it starts.

    Attributes:
        steps: how many steps there are from here on; None if that is not known.
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        weights: by how much an error at each step is multiplied on its way into the result (see
            ``samplers.step_weights``); None without a sampler that says so.
        power: what suits the sampler as exponent of the weights (see ``samplers.usual_power``).
        forecast: what suits it (see ``samplers.usual_forecast``).
        warn: takes a message for the user, and shows it once.
    """

    steps: int | None
    ratio: float = 0.0
    weights: tuple[float, ...] | None = None
    power: float = 0.5
    forecast: Forecast = Reuse()  # noqa: RUF009
    warn: Callable[[str], None] = warnings.warn


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
        try:
            chosen = tuple(refresh_steps)
        except TypeError as error:
            raise ScheduleError(f"Steps: expected a list of ints, got {refresh_steps!r}") from error
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
        _require_power("Power", self.power, 1, 100)

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


@dataclass(frozen=True)
class Sigma:
    """Refresh where the sampler turns errors into error of the result.

    An error at step i enters the result with weight w_i, for DDIM the change of
    sigma_bar = sqrt((1 - alpha_bar) / alpha_bar) (see ``samplers``). Refreshes are placed so that
    the sum of w_i^power between them is equal. With power 0 they are as even as can be, and the
    shorter intervals come last: features change most there. Knows nothing of the network, and
    measures nothing.

    Args:
        count: refresh steps in a run; or
        speedup: how much less compute a run takes than an uncached one, in FLOPs. A run of a few
            steps gets at least one refresh. One that ends before its timesteps do (SDXL's
            ``denoising_end``) is planned as if it did not.
        power: exponent of the weights; 0 is uniform. By default what suits the sampler, see
            ``samplers.usual_power``.

    Raises:
        ScheduleError: neither or both of count and speedup are given, or they are out of range;
            when used, if the run has too few steps, or the speed-up is beyond 1/r.
    """

    count: int | None = None
    speedup: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.speedup is None):
            raise ScheduleError(
                f"Sigma: give either count or speedup, got count={self.count!r} and "
                f"speedup={self.speedup!r}"
            )
        if self.count is not None:
            _require_int("count", self.count)
        if self.speedup is not None:
            require_speedup(self.speedup)
        if self.power is not None:
            _require_power("Sigma", self.power, 0, 4)

    def refresh(self, step: int, steps: int | None) -> bool:
        raise ScheduleError(
            "Sigma places its refreshes by the sampler's noise levels, and there is no sampler: "
            "pass the pipeline to cache_compile, or cache_compile(unet, scheduler=...)"
        )

    def plan(self, run: Run) -> Schedule:
        """The refresh steps for one run."""
        if run.weights is None:
            return cast(Schedule, self)  # whose refresh says what is missing
        weights = run.weights if run.steps is None else run.weights[-run.steps :]
        steps = run.steps or len(weights)
        # A run longer than the sampler's own timesteps is not the sampler's: count steps only.
        if len(weights) < steps:
            weights = (1.0,) * steps
        power = run.power if self.power is None else self.power
        count = self.refreshes(steps, run.ratio)
        even = power == 0 or len(set(weights)) == 1
        chosen = Steps(spread(steps, count) if even else placed([w**power for w in weights], count))
        return chosen if run.steps is not None else _Within(chosen, steps)

    def refreshes(self, steps: int, ratio: float) -> int:
        """How many refresh steps a run of ``steps`` has.

        Args:
            ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        """
        if self.count is not None:
            if self.count > steps:
                raise ScheduleError(f"Sigma: {self.count} refreshes in a run of {steps} steps")
            return self.count
        assert self.speedup is not None
        # speed-up = steps / (count + (steps - count) r)
        if self.speedup > 1 and self.speedup * ratio >= 1:
            raise ScheduleError(
                f"a speed-up of {self.speedup:g} is beyond this network at this depth: a reuse "
                f"step takes {ratio:.0%} of a refresh step's compute, so the limit is "
                f"{1 / ratio:.2f}"
            )
        count = steps * (1 / self.speedup - ratio) / (1 - ratio) if ratio < 1 else steps
        return max(1, math.floor(count + 1e-9))


@dataclass(frozen=True)
class _Within:
    """A schedule for as many steps as the sampler has; what goes on after them refreshes."""

    schedule: Schedule
    steps: int

    def refresh(self, step: int, steps: int | None) -> bool:
        return step >= self.steps or self.schedule.refresh(step, steps)


@dataclass(frozen=True)
class Adaptive:
    """Refresh when features have changed.

    At each reuse step the network's shallow graph measures how far what enters the deep region is
    from what a forecast makes of its past, relative to its size: with plain reuse, how far it has
    moved since the refresh. These drifts are weighted by what the sampler makes of an error at
    their step, w_i^power over its mean, and added up; the step after the sum has reached
    ``threshold`` refreshes. On a GPU the sum is one step behind, so that nothing waits for it.

    Args:
        threshold: of the sum. ``dcompile profile`` shows what to expect of a network; a run in
            which it is never reached, or always at once, warns with the sums there were.
        min_interval: steps from a refresh to the next, at least.
        max_interval: at most; None for no limit.
        probe: the norm of the drift: "l1", the sum of magnitudes, or "l2".
        power: exponent of the weights; 0 counts all steps alike, as they do without a sampler.

    Raises:
        ScheduleError: an argument is out of range.
    """

    threshold: float
    min_interval: int = 1
    max_interval: int | None = None
    probe: str = "l1"
    power: float = 1.0

    def __post_init__(self) -> None:
        threshold: Any = self.threshold
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < math.inf:
            raise ScheduleError(f"threshold: expected a positive number, got {threshold!r}")
        _require_int("min_interval", self.min_interval)
        if self.max_interval is not None:
            _require_int("max_interval", self.max_interval, least=self.min_interval)
        if self.probe not in ("l1", "l2"):
            raise ScheduleError(f'probe: expected "l1" or "l2", got {self.probe!r}')
        _require_power("Adaptive", self.power, 0, 4)

    def refresh(self, step: int, steps: int | None) -> bool:
        raise ScheduleError("Adaptive decides within a run: use plan(run), as cache_compile does")

    def plan(self, run: Run) -> Schedule:
        """A schedule for one run, which observes it."""
        weights: tuple[float, ...] = ()
        if run.weights is not None and self.power > 0:
            weights = run.weights if run.steps is None else run.weights[-run.steps :]
            weights = tuple(weight**self.power for weight in weights)
            mean = sum(weights) / len(weights)
            weights = tuple(weight / mean for weight in weights) if mean > 0 else ()
        return _Following(self, weights, run.warn)


class Reading(Protocol):
    """A number that may still be under way from a device."""

    late: bool  # whether taking it at once would wait for the device

    def __float__(self) -> float: ...


@dataclass(eq=False)
class _Following:
    """``Adaptive`` in one run. Decides each step once, however many calls the step has."""

    wanted: Adaptive
    weights: tuple[float, ...]
    warn: Callable[[str], None]
    _decided: int = -1
    _decision: bool = True
    _refreshed: int = 0  # the latest refresh step
    _sum: float = 0.0
    _pending: list[tuple[int, Any]] = field(default_factory=list)
    _drifts: dict[int, float] = field(default_factory=dict)  # by step, since the refresh
    _sums: list[float] = field(default_factory=list)  # what refreshes were decided at, and not
    _early: int = 0  # refreshes at the first opportunity
    _free: int = 0  # refreshes for the sum's sake
    _late: bool = False

    @property
    def probe(self) -> str:
        return self.wanted.probe

    def refresh(self, step: int, steps: int | None) -> bool:
        if step != self._decided:
            if step < self._decided or step == 0:
                self._decision = True  # another run over the same timesteps
            else:
                self._decision = self._due(step)
            self._decided = step
            if self._decision:
                self._refreshed, self._sum = step, 0.0
                self._pending.clear()
                self._drifts.clear()
            if steps is not None and step == steps - 1:
                self._judge(steps)
        return self._decision

    def observe(self, step: int, drift: Reading) -> None:
        """What the reuse step ``step`` measured; of several calls the largest counts."""
        self._pending.append((step, drift))

    def _due(self, step: int) -> bool:
        age = step - self._refreshed
        self._take()
        self._sums.append(self._sum)
        if age < self.wanted.min_interval:
            return False
        if not self._sum >= self.wanted.threshold:
            late = self.wanted.max_interval is not None and age >= self.wanted.max_interval
            return late or not math.isfinite(self._sum)  # what is not finite is due at once
        self._free += 1
        # After a refresh one reuse step at least is needed to measure anything.
        self._early += age <= max(2 + self._late, self.wanted.min_interval)
        return True

    def _take(self) -> None:
        """Add up what has arrived."""
        latest = self._pending[-1][0] if self._pending else 0
        waiting = []
        for step, reading in self._pending:
            self._late = reading.late
            if reading.late and step == latest:
                waiting.append((step, reading))
                continue
            drift = float(reading)
            if not math.isfinite(drift):
                self.warn("features are not finite: each such step is refreshed")
            before = self._drifts.get(step, 0.0)
            if not drift <= before:
                weight = self.weights[step] if step < len(self.weights) else 1.0
                self._sum += weight * (drift - before)
                self._drifts[step] = drift
        self._pending = waiting

    def _judge(self, steps: int) -> None:
        """At a run's end: did the threshold decide anything?"""
        sums = [value for value in self._sums if math.isfinite(value)]
        if steps < 4 or not sums:
            return
        seen = f"the weighted sums were {min(sums):.3g} to {max(sums):.3g}"
        wanted = self.wanted
        if self._free == 0:
            self.warn(
                f"Adaptive(threshold={wanted.threshold:g}) was never reached in a run of {steps} "
                f"steps: {seen}"
            )
        elif self._early == self._free >= (steps - 1) // max(2 + self._late, wanted.min_interval):
            self.warn(
                f"Adaptive(threshold={wanted.threshold:g}) was reached at every opportunity in a "
                f"run of {steps} steps: {seen}"
            )


@dataclass(frozen=True)
class Pyramid:
    """A frequency for every layer: cuts at several depths, each refreshed at its own beat.

    ``Pyramid([(0, 2), (2, 6)])`` runs the whole network at every sixth step, all but what lies
    beyond depth 2 at every second, and else only what lies outside of depth 0.

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
                f"Pyramid: expected (depth, interval) pairs, got {levels!r}"
            ) from error
        if not chosen or any(len(level) not in (2, 3) for level in chosen):
            raise ScheduleError(
                "Pyramid: expected (depth, interval) or (depth, interval, forecast), got "
                f"{levels!r}"
            )
        for level in chosen:
            _require_int("Pyramid depth", level[0], least=0)
            _require_int("Pyramid interval", level[1])
            if len(level) == 3 and not isinstance(level[2], str):
                raise ScheduleError(f"Pyramid: expected a forecast's name, got {level[2]!r}")
        for outer, inner in pairwise(chosen):
            if inner[0] <= outer[0] or inner[1] < outer[1]:
                raise ScheduleError(
                    f"Pyramid: {inner} after {outer}: depths have to ascend, and a deeper cut is "
                    "refreshed as rarely as the one before it or more rarely"
                )
        object.__setattr__(self, "levels", chosen)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(level[0] for level in self.levels)

    @property
    def forecasts(self) -> tuple[str | None, ...]:
        """Of each level; None for what ``cache_compile`` is given."""
        return tuple(level[2] if len(level) == 3 else None for level in self.levels)

    def refresh(self, step: int, steps: int | None) -> bool:
        return step % self.levels[-1][1] == 0

    def partly(self, step: int, steps: int | None) -> int:
        """How many of the outer cuts are refreshed at a step that does not refresh all."""
        due = [number for number, level in enumerate(self.levels, 1) if step % level[1] == 0]
        return max(due, default=0)


def require_speedup(value: object) -> float:
    """Check a speed-up.

    Raises:
        ScheduleError: it is no finite number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
        raise ScheduleError(f"speedup: expected a number of at least 1, got {value!r}")
    return float(value)


def spread(steps: int, count: int) -> tuple[int, ...]:
    """``count`` steps from 0, as evenly as can be, the shorter intervals last."""
    length, longer = divmod(steps, count)
    return tuple(number * length + min(number, longer) for number in range(count))


def placed(loads: Sequence[float], count: int) -> tuple[int, ...]:
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
        # At least one step after the last, and room for those to come.
        least = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(nearest, least), steps - (count - number)))
    return tuple(chosen)


def _require_int(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name}: expected an int of at least {least}, got {value!r}")


def _require_power(name: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= cast(float, value) <= most:
        raise ScheduleError(f"{name}: expected a power from {least} to {most}, got {value!r}")


def to_json(schedule: Schedule) -> dict[str, Any] | None:
    """The schedule's class and fields; None if it is none of ``KINDS``."""
    kind = type(schedule)
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    if not own or kind.__name__ not in KINDS:
        return None
    return {"kind": kind.__name__, **asdict(schedule)}  # type: ignore[call-overload]


def from_json(entry: Mapping[str, Any]) -> Schedule:
    """What ``to_json`` wrote.

    Raises:
        ScheduleError: unknown kind, or bad fields.
    """
    fields = dict(entry)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ScheduleError(f"unknown schedule {kind!r}; known are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**fields)
    except TypeError as error:
        raise ScheduleError(f"{kind}: {error}") from error


KINDS: dict[str, Callable[..., Schedule]] = {
    kind.__name__: kind for kind in (Uniform, Steps, Power, Sigma, Adaptive, Pyramid)
}
"""What saved programs may name: each made of its own fields, as JSON has them."""
