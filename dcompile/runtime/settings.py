"""What ``cache_compile`` was asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dcompile.backends import Backend
from dcompile.compiler.program import ProgramSpec
from dcompile.compiler.program_cache import Target
from dcompile.compiler.program_memory import DEFAULT_BUDGET
from dcompile.compiler.roles import UNKNOWN, Roles
from dcompile.compiler.sizes import DynamicSizes
from dcompile.policy.forecast import Forecast, Reuse
from dcompile.policy.schedule import Schedule

# Boundaries that a shallow graph takes while its forecast is not chosen yet.
AUTO_HISTORY = 2


@dataclass(frozen=True)
class Settings:
    """What ``cache_compile`` was asked for.

    Attributes:
        schedule: plans each run.
        depths: of the cuts, ascending.
        backend: compiles the graphs.
        dynamic: which sizes one capture leaves open; None for fixed sizes.
        verbose: whether progress is shown.
        cuda_graphs: whether programs are recorded as CUDA graphs.
        forecasts: one for each cut; "auto" is chosen at the start of each run.
        sampler: where to find the sampler then; None without one.
        roles: names of the sample's and the timestep's parameter, where they were given.
        on_error: what a network or call that cannot be captured or compiled does.
        program_memory: bytes that captured and compiled code may take.
        channels_last: whether the weights of convolutions are laid out channels-last.
        new_calls: what a call does that no program serves yet.
    """

    schedule: Schedule
    depths: tuple[int, ...]
    backend: Backend
    dynamic: DynamicSizes | None
    verbose: bool
    cuda_graphs: bool | Literal["auto"] = "auto"
    forecasts: tuple[Forecast | Literal["auto"], ...] = (Reuse(),)
    sampler: Callable[[], Any] | None = None
    roles: Roles = UNKNOWN
    on_error: Literal["uncached", "raise"] = "uncached"
    program_memory: int = DEFAULT_BUDGET
    channels_last: bool | Literal["auto"] = "auto"
    new_calls: Literal["compile", "uncached"] = "compile"

    @functools.cached_property
    def target(self) -> Target:
        """What programs are built for."""
        histories = tuple(
            AUTO_HISTORY if forecast == "auto" else forecast.history for forecast in self.forecasts
        )
        spec = ProgramSpec(self.depths, histories, self.schedule.probe)
        return Target(spec, self.backend, self.dynamic)
