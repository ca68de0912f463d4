"""``GainWeighted``: refreshes placed by the sampler's error gains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcompile.errors import ScheduleError
from dcompile.policy.checks import require_int, require_power, require_speedup
from dcompile.policy.placement import by_load, evenly
from dcompile.policy.schedule import Plan, RunInfo, Schedule


@dataclass(frozen=True)
class GainWeighted(Schedule):
    """Refresh where the sampler turns errors of the network into error of the result.

    An error at step i enters the result multiplied by the sampler's error gain g_i, for DDIM the
    change of sigma_bar = sqrt((1 - alpha_bar) / alpha_bar) (see ``policy.sampler``). Refreshes are
    placed so that the sum of g_i^power between them is equal. With power 0 they are as even as can
    be, and the shorter intervals come last: features change most there. Nothing is measured on the
    network.

    Args:
        count: refresh steps in a run; or
        speedup: FLOPs of an uncached run over FLOPs of a cached one. A run of a few steps gets at
            least one refresh. One that ends before its timesteps do (SDXL's ``denoising_end``) is
            planned as if it did not.
        power: exponent of the gains; 0 is uniform. By default ``sampler.default_power``.

    Raises:
        ScheduleError: neither or both of count and speedup are given, or they are out of range;
            when used, if there is no sampler, the run has too few steps, or the speed-up is beyond
            1/r.
    """

    count: int | None = None
    speedup: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.speedup is None):
            raise ScheduleError(
                f"GainWeighted: give either count or speedup, got count={self.count!r} and "
                f"speedup={self.speedup!r}"
            )
        if self.count is not None:
            require_int("count", self.count)
        if self.speedup is not None:
            require_speedup(self.speedup)
        if self.power is not None:
            require_power("GainWeighted", self.power, 0, 4)

    def describe(self) -> list[str]:
        if self.count is not None:
            return [f"{self.count} refreshes, placed by the sampler's error gains"]
        return [f"speedup={self.speedup:g}: refreshes are placed by the sampler's error gains"]

    @property
    def uses_sampler(self) -> bool:
        return True

    @property
    def needs_sampler(self) -> bool:
        return True

    def plan(self, run: RunInfo) -> Plan:
        if run.gains is None:
            raise ScheduleError(
                "GainWeighted places its refreshes by the sampler's noise levels, and there is no "
                "sampler: pass the pipeline to cache_compile, or cache_compile(unet, sampler=...)"
            )
        gains = run.gains if run.steps is None else run.gains[-run.steps :]
        steps = run.steps or len(gains)
        # A run longer than the sampler's own timesteps is not the sampler's: count steps only.
        if len(gains) < steps:
            gains = (1.0,) * steps
        power = run.power if self.power is None else self.power
        count = self.refreshes(steps, run.ratio)
        if power == 0 or len(set(gains)) == 1:
            chosen = evenly(steps, count)
        else:
            chosen = by_load([gain**power for gain in gains], count)
        return GainPlan(frozenset(chosen), steps, run.cuts)

    def refreshes(self, steps: int, ratio: float) -> int:
        """How many refresh steps a run of ``steps`` has.

        Args:
            ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        """
        if self.count is not None:
            if self.count > steps:
                raise ScheduleError(
                    f"GainWeighted: {self.count} refreshes in a run of {steps} steps"
                )
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


@dataclass(frozen=True, eq=False)
class GainPlan(Plan):
    """Given refresh steps of a run.

    Attributes:
        refresh_steps: which steps refresh.
        steps: how many the plan covers; steps beyond them refresh.
        cuts: all cuts' level.
    """

    refresh_steps: frozenset[int]
    steps: int
    cuts: int

    def level(self, step: int) -> int:
        return self.cuts if step in self.refresh_steps or step >= self.steps else 0

    def refreshes(self) -> int | None:
        return len(self.refresh_steps)
