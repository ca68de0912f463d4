"""``Adaptive``: refresh when features have changed, measured while the run is under way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dcompile.errors import ScheduleError
from dcompile.policy.checks import require_int, require_power
from dcompile.policy.schedule import Drift, Plan, RunInfo, Schedule


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Refresh when features have changed.

    At each reuse step the shallow graph measures the drift of its cache: how far what enters the
    deep region is from the forecast made from its past, relative to its size; with plain reuse, how
    far it has moved since the refresh. Drifts are weighted by the sampler's error gain at their
    step, g_i^power over its mean, and summed; the step after the sum has reached ``threshold``
    refreshes. On a GPU the sum is one step behind, so that nothing waits for it.

    Args:
        threshold: of the weighted sum of drifts, which have no unit. ``dcompile profile`` shows
            what to expect of a network; a run in which it is never reached, or always at once,
            warns with the sums that were seen.
        min_interval: steps from a refresh to the next, at least.
        max_interval: at most; None for no limit.
        probe: the norm of the drift: "l1", the sum of magnitudes, or "l2".
        power: exponent of the gains; 0 counts all steps alike, as they do without a sampler.

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
        require_int("min_interval", self.min_interval)
        if self.max_interval is not None:
            require_int("max_interval", self.max_interval, least=self.min_interval)
        if self.probe not in ("l1", "l2"):
            raise ScheduleError(f'probe: expected "l1" or "l2", got {self.probe!r}')
        require_power("Adaptive", self.power, 0, 4)

    @property
    def uses_sampler(self) -> bool:
        return True

    def plan(self, run: RunInfo) -> Plan:
        weights: tuple[float, ...] = ()
        if run.gains is not None and self.power > 0:
            gains = run.gains if run.steps is None else run.gains[-run.steps :]
            weights = tuple(gain**self.power for gain in gains)
            mean = sum(weights) / len(weights)
            weights = tuple(weight / mean for weight in weights) if mean > 0 else ()
        return DriftPlan(self, run.cuts, run.steps, weights, run.warn)


@dataclass(eq=False)
class DriftPlan(Plan):
    """``Adaptive`` in one run. Decides each step once, however many calls the step has."""

    settings: Adaptive
    cuts: int
    steps: int | None
    weights: tuple[float, ...]
    warn: Callable[[str], None]
    _decided: int = -1  # the latest step that was decided
    _decision: bool = True
    _refreshed: int = 0  # the latest refresh step
    _sum: float = 0.0
    _pending: list[tuple[int, Drift]] = field(default_factory=list)
    _drifts: dict[int, float] = field(default_factory=dict)  # by step, since the refresh
    _sums: list[float] = field(default_factory=list)  # at every decision so far
    _early: int = 0  # refreshes at the first opportunity
    _reached: int = 0  # refreshes because the threshold was reached
    _late: bool = False  # whether drifts arrive a step late

    def level(self, step: int) -> int:
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
            if self.steps is not None and step == self.steps - 1:
                self._report_unused_threshold(self.steps)
        return self.cuts if self._decision else 0

    def observe(self, step: int, drift: Drift) -> None:
        """What the reuse step ``step`` measured; of several calls the largest counts."""
        self._pending.append((step, drift))

    def _due(self, step: int) -> bool:
        age = step - self._refreshed
        self._add_arrived()
        self._sums.append(self._sum)
        if age < self.settings.min_interval:
            return False
        if not self._sum >= self.settings.threshold:
            late = self.settings.max_interval is not None and age >= self.settings.max_interval
            return late or not math.isfinite(self._sum)  # a sum that is not finite is due at once
        self._reached += 1
        # After a refresh one reuse step at least is needed to measure anything.
        self._early += age <= self._first_opportunity
        return True

    @property
    def _first_opportunity(self) -> int:
        """The least age of a cache at which the threshold can have been reached."""
        return max(2 + self._late, self.settings.min_interval)

    def _add_arrived(self) -> None:
        """Add up the drifts that have arrived from the device."""
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

    def _report_unused_threshold(self, steps: int) -> None:
        """At the end of a run: did the threshold decide anything?"""
        sums = [value for value in self._sums if math.isfinite(value)]
        if steps < 4 or not sums:
            return
        seen = f"the weighted sums were {min(sums):.3g} to {max(sums):.3g}"
        threshold = f"Adaptive(threshold={self.settings.threshold:g})"
        if self._reached == 0:
            self.warn(f"{threshold} was never reached in a run of {steps} steps: {seen}")
        elif self._early == self._reached >= (steps - 1) // self._first_opportunity:
            self.warn(
                f"{threshold} was reached at every opportunity in a run of {steps} steps: {seen}"
            )
