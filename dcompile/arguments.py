"""The arguments of ``cache_compile`` and ``load``, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from dcompile.errors import BackendError, DcompileError, DepthError, ScheduleError
from dcompile.integrations.pipelines import auxiliary_components, is_pipeline
from dcompile.policy.aim import Aim
from dcompile.policy.checks import require_psnr, require_speedup
from dcompile.policy.fixed import Uniform
from dcompile.policy.forecast import Forecast, resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.schedule import RefreshRule, Schedule, as_schedule
from dcompile.runtime.settings import Settings


def schedule_of(
    interval: int | None,
    schedule: Schedule | RefreshRule | None,
    speedup: float | None,
    psnr: float | None = None,
) -> Schedule:
    """What decides which steps refresh, where nothing is known of the runs yet."""
    named = {"interval": interval, "speedup": speedup, "psnr": psnr, "schedule": schedule}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ScheduleError(f"give one of interval, speedup, psnr and schedule, not {listed}")
    if psnr is not None:
        require_psnr(psnr)
        return Uniform(1)
    if speedup is not None:
        return GainWeighted(speedup=require_speedup(speedup))
    if schedule is None:
        return Uniform(3 if interval is None else interval)
    return as_schedule(schedule)


def aim_of(
    autotune: object, speedup: float | None, psnr: float | None, depth: int, forecast: object
) -> Aim | None:
    """What self-tuning aims at; None if nothing is tuned."""
    if autotune is not False and autotune not in ("auto", "first"):
        raise ScheduleError(f'autotune: expected "auto", "first" or False, got {autotune!r}')
    free = depth == 0 and forecast is None
    if autotune == "first" and speedup is None and psnr is None:
        raise ScheduleError("autotune needs the speedup to tune for: give speedup=2.5, say")
    if not free and (autotune == "first" or psnr is not None):
        raise ScheduleError("autotune finds depths and forecast itself: give neither")
    if psnr is not None:
        if autotune is False:
            raise ScheduleError("psnr is reached by watching a run: leave out autotune=False")
        return Aim(psnr=float(psnr))
    return Aim(float(speedup)) if autotune is not False and speedup is not None and free else None


def depths_of(schedule: Schedule, depth: int) -> tuple[int, ...]:
    """Where to cut: what the schedule says, or at ``depth``."""
    depths = schedule.depths
    if depths is None:
        return (checked_depth(depth),)
    if depth not in (0, depths[0]):
        raise DepthError(
            f"{schedule!r} brings its depths, got depth={depth!r} as well: leave it out"
        )
    return tuple(checked_depth(value) for value in depths)


def forecasts_of(
    schedule: Schedule, given: Sequence[str | Forecast | None]
) -> tuple[Forecast | Literal["auto"], ...]:
    """One for each cut: the schedule's own where it has one."""
    own = schedule.forecasts or (None,) * len(given)
    pairs = list(zip(own, given, strict=True))
    if None not in own and any(other not in (None, one) for one, other in pairs):
        raise ScheduleError(
            f"{schedule!r} brings its forecasts, {', '.join(map(str, own))}, "
            f"got {given[0]!r} as well: leave it out"
        )
    wanted = [one if one is not None else other for one, other in pairs]
    return tuple("auto" if item == "auto" else resolve_forecast(item or "reuse") for item in wanted)


def require_sampler(settings: Settings, aim: Aim | None = None) -> None:
    """Raise if something is decided by the sampler, and there is none."""
    needs = settings.schedule.needs_sampler or aim is not None
    planned = "psnr looks" if aim is not None and aim.psnr is not None else None
    planned = planned or ("speedup and GainWeighted look" if needs else None)
    wanted = planned or ('forecast="auto" looks' if "auto" in settings.forecasts else None)
    if wanted is not None and settings.sampler is None:
        raise ScheduleError(
            f"{wanted} at the sampler: pass the pipeline instead of its network, or "
            "cache_compile(unet, sampler=pipe.scheduler, ...)"
        )


def checked_depth(depth: int) -> int:
    """``depth``. Raises a DepthError."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise DepthError(f"depth: expected an int of at least 0, got {depth!r}")
    return depth


def checked_cuda_graphs(wanted: bool | Literal["auto"]) -> bool | Literal["auto"]:
    """``cuda_graphs``. Raises a BackendError."""
    if wanted not in (True, False, "auto"):
        raise BackendError(f'cuda_graphs: expected "auto", True or False, got {wanted!r}')
    if wanted is True and not torch.cuda.is_available():
        raise BackendError(
            'cuda_graphs=True, and there is no CUDA device here; "auto" uses CUDA graphs where '
            "there is one"
        )
    return wanted


def components_to_compile(module: Any, components: object) -> list[nn.Module]:
    """Modules of a pipeline that ``components`` asks to compile. Raises a DcompileError."""
    if components is False:
        return []
    if components != "compile":
        raise DcompileError(f'components: expected "compile" or False, got {components!r}')
    if not is_pipeline(module):
        raise DcompileError(
            'components="compile" compiles what a pipeline runs beside its denoiser, got '
            f"{type(module).__name__}: pass the pipeline"
        )
    return auxiliary_components(module)


def checked_layout(wanted: bool | Literal["auto"]) -> bool | Literal["auto"]:
    """``channels_last``. Raises a BackendError."""
    if wanted not in (True, False, "auto"):
        raise BackendError(f'channels_last: expected "auto", True or False, got {wanted!r}')
    return wanted


def checked_memory(wanted: int) -> int:
    """``program_memory``, in bytes. Raises a DcompileError."""
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise DcompileError(f"program_memory: expected a positive number of bytes, got {wanted!r}")
    return wanted


def checked_on_error(wanted: Literal["uncached", "raise"]) -> Literal["uncached", "raise"]:
    """``on_error``. Raises a DcompileError."""
    if wanted not in ("uncached", "raise"):
        raise DcompileError(f'on_error: expected "uncached" or "raise", got {wanted!r}')
    return wanted


def checked_new_calls(wanted: Literal["compile", "uncached"]) -> Literal["compile", "uncached"]:
    """``new_calls``. Raises a DcompileError."""
    if wanted not in ("compile", "uncached"):
        raise DcompileError(f'new_calls: expected "compile" or "uncached", got {wanted!r}')
    return wanted
