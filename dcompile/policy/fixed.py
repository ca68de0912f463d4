"""Schedules that depend on the step number alone: ``Uniform``, ``Steps``, ``NonUniform``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from dcompile.errors import ScheduleError
from dcompile.policy.checks import require_int, require_power
from dcompile.policy.schedule import Schedule


@dataclass(frozen=True)
class Uniform(Schedule):
    """Refresh every ``interval``-th step: DeepCache's uniform policy.

    Raises:
        ScheduleError: ``interval`` is not an int of at least 1.
    """

    interval: int

    def __post_init__(self) -> None:
        require_int("interval", self.interval)

    def refresh(self, step: int, steps: int | None) -> bool:
        return step % self.interval == 0


@dataclass(frozen=True)
class Steps(Schedule):
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
class NonUniform(Schedule):
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
        require_int("count", self.count)
        require_int("center", self.center, least=0)
        require_power("NonUniform", self.power, 1, 100)

    def refresh(self, step: int, steps: int | None) -> bool:
        if steps is None:
            raise ScheduleError(
                "NonUniform places its refreshes over the whole run, and the number of steps is "
                "not known: pass elements of scheduler.timesteps to the network, or use Uniform"
            )
        return step in self.refresh_steps(steps)

    def refresh_steps(self, steps: int) -> tuple[int, ...]:
        """The refresh steps of a run of ``steps`` steps, ascending from 0."""
        return _non_uniform_steps(steps, self.count, self.center, self.power)


@lru_cache(maxsize=64)
def _non_uniform_steps(steps: int, count: int, center: int, power: float) -> tuple[int, ...]:
    # NumPy's power as in the reference: another implementation could truncate to another step.
    if center >= steps or count > steps:
        raise ScheduleError(
            f"NonUniform: {count} refreshes around step {center} do not fit a run of {steps} steps"
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
        f"NonUniform: found no {count} distinct refresh steps around {center} in a run of {steps}"
    )
