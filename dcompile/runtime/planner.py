"""Plans a run when it starts: schedule and forecasts, by its sampler if they ask for that."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dcompile.compat.storages import storage_of
from dcompile.notices import Notices
from dcompile.policy.forecast import Forecast, Reuse
from dcompile.policy.sampler import (
    default_forecast,
    default_power,
    describe_sampler,
    error_gains,
    is_stochastic,
    over_timesteps,
)
from dcompile.policy.schedule import CheckedPlan, Plan, RunInfo
from dcompile.runtime.callers import sampler_of_callers
from dcompile.runtime.settings import Settings


class Planner:
    """Makes the plan of each run.

    Args:
        settings: what was asked for.
        notices: shows messages to the user.
    """

    def __init__(self, settings: Settings, notices: Notices) -> None:
        self._settings = settings
        self._notices = notices
        self._stochastic: dict[int, tuple[weakref.ref[Any], bool]] = {}  # by a sampler's id

    def plan(
        self, steps: int | None, ratio: float, timestep: Any
    ) -> tuple[Plan, tuple[Forecast, ...]]:
        """The plan of a run that starts now, and the forecast of each cut.

        Args:
            steps: of the run, if known.
            ratio: r of the program's outermost cut.
            timestep: of the first call.

        Raises:
            ScheduleError: the schedule does not fit the run.
        """
        settings = self._settings
        if settings.schedule.uses_sampler or "auto" in settings.forecasts:
            run = self.describe_run(steps, ratio, timestep)
        else:
            run = RunInfo(steps, len(settings.depths), ratio, warn=self._notices.warn)
        plan = CheckedPlan.of(settings.schedule.plan(run), settings.schedule, run.cuts)
        automatic = run.forecast
        if "auto" in settings.forecasts and automatic != Reuse() and not settings.schedule.probe:
            refreshes = plan.refreshes() if steps else None
            automatic = default_forecast(stochastic=False, steps=steps, refreshes=refreshes)
        return plan, tuple(
            automatic if forecast == "auto" else forecast for forecast in settings.forecasts
        )

    def describe_run(self, steps: int | None, ratio: float, timestep: Any = None) -> RunInfo:
        """What is known of a run that starts now, with its first timestep if that is known."""
        cuts, warn = len(self._settings.depths), self._notices.warn
        sampler = self._settings.sampler() if self._settings.sampler is not None else None
        if sampler is None:
            return RunInfo(steps, cuts, ratio, power=0.0, warn=warn)
        name = type(sampler).__name__
        if steps is not None and not _is_the_samplers_own(timestep, sampler):
            found = _sampler_of_run(timestep, steps, sampler)
            if found is None:
                warn(
                    f"a run whose timesteps are not those of the {name} given to cache_compile: "
                    "its steps count alike, and nothing is extrapolated by 'auto'"
                )
                alike = (1.0,) * steps
                return RunInfo(
                    steps, cuts, ratio, alike, power=0.0, warn=warn, has_noise_levels=False
                )
            sampler, name = found, type(found).__name__
        gains = error_gains(sampler)
        has_noise_levels = gains is not None
        if gains is None:
            warn(f"{name} has no noise levels that can be read: its steps count alike")
            timesteps = getattr(sampler, "timesteps", None)
            count = steps if timesteps is None else len(timesteps)
            if count is None:
                return RunInfo(steps, cuts, ratio, power=0.0, warn=warn)
            gains = [1.0] * count
        elif steps is None:
            gains = gains[_first_step(timestep, sampler.timesteps) :]
        stochastic = self._is_stochastic(sampler)
        return RunInfo(
            steps,
            cuts,
            ratio,
            tuple(gains),
            default_power(sampler, stochastic=stochastic),
            default_forecast(stochastic=stochastic),
            warn,
            describe_sampler(sampler),
            has_noise_levels,
        )

    def _is_stochastic(self, sampler: Any) -> bool:
        known = self._stochastic.get(id(sampler))
        if known is None or known[0]() is not sampler:
            alive = {key: one for key, one in self._stochastic.items() if one[0]() is not None}
            known = (weakref.ref(sampler), is_stochastic(sampler))
            self._stochastic = {**alive, id(sampler): known}
        return known[1]


def _is_the_samplers_own(timestep: Any, sampler: Any) -> bool:
    """Whether a timestep is an element of ``sampler.timesteps``; of a number that is assumed."""
    if not isinstance(timestep, torch.Tensor):
        return True
    own = getattr(sampler, "timesteps", None)
    return isinstance(own, torch.Tensor) and storage_of(own) is storage_of(timestep)


def _sampler_of_run(timestep: torch.Tensor, steps: int, given: Any) -> Any | None:
    """The sampler of a run that does not go over the given one's timesteps.

    The one that the calling code has at hand; else the given one over the timesteps of this run, if
    they are all of their storage from the first on.
    """
    found = sampler_of_callers(timestep)
    if found is not None:
        return found
    first, elements = int(timestep.storage_offset()), storage_of(timestep).nbytes()
    if elements // timestep.element_size() - first != steps:
        return None
    own = over_timesteps(given, timestep.detach().as_strided((steps,), (1,), first))
    return own if error_gains(own) is not None else None


def _first_step(timestep: Any, timesteps: Any) -> int:
    """At which of a sampler's timesteps a run begins whose timesteps are identified by value."""
    if timestep is None:
        return 0
    value = float(timestep if not isinstance(timestep, torch.Tensor) else timestep.flatten()[0])
    return next((step for step, own in enumerate(timesteps) if float(own) == value), 0)
