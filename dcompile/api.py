"""What a user calls: ``cache_compile`` to make a network faster, ``handle`` to see and steer it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from dcompile.backends import GraphCompiler, resolve
from dcompile.compiler.capture import DynamicSizes
from dcompile.compiler.fingerprint import identity_of, portable, structure_of
from dcompile.errors import (
    BackendError,
    DepthError,
    NotCompiledError,
    ScheduleError,
)
from dcompile.handles import Handle, device_of
from dcompile.integrations.pipelines import (
    denoiser_name,
    denoiser_of,
    is_pipeline,
    network_of,
    sampler_of,
    timed_components,
    without_torch_compile,
)
from dcompile.policy.checks import require_speedup
from dcompile.policy.fixed import Uniform
from dcompile.policy.forecast import Forecast, resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.schedule import RefreshRule, Schedule, as_schedule
from dcompile.progress import Display
from dcompile.runtime.dispatcher import Dispatcher, Settings, dispatcher_of
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.wrapper import wrapper_of, wrapper_slot
from dcompile.storage.artifact import read

M = TypeVar("M")


def cache_compile(
    module: M,
    *,
    interval: int | None = None,
    speedup: float | None = None,
    schedule: Schedule | RefreshRule | None = None,
    forecast: str | Forecast | None = None,
    sampler: Any = None,
    depth: int = 0,
    backend: str | GraphCompiler = "inductor",
    dynamic: bool | Mapping[str, Sequence[int]] = False,
    cuda_graphs: bool | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> M:
    """Make a skip-connection diffusion network reuse its deep features across sampling steps.

    The network is changed in place: its ``forward`` is replaced, everything else stays, and
    ``handle(module).remove()`` undoes it. It is captured and compiled at the first call, once for
    each call signature (shapes, dtypes, devices, constants). Calling ``cache_compile`` again
    replaces the settings and keeps the compiled programs that still fit.

    Only inference is cached: in training mode, or if an input requires grad, the network runs as
    if it had not been compiled. Outputs carry no gradient.

    Args:
        module: the network, called as ``(sample, timestep, ...)``: a diffusers UNet or any module
            whose graph has skip connections. Or a whole pipeline: its denoiser is taken. Of a
            ``torch.compile``\\ d module the original is taken, compiled and returned.
        interval: refresh every ``interval``-th step, as DeepCache does; 3 if neither this nor
            ``speedup`` nor ``schedule`` is given.
        speedup: FLOPs of an uncached run over FLOPs of a cached one. Refreshes are then placed
            where the sampler's error gain is largest (``GainWeighted``), and features are
            forecast for samplers that add no noise: closer to the uncached result than an interval
            at the same cost.
        schedule: decides which steps refresh: any object with ``refresh(step, steps) -> bool``,
            or a ``dcompile.Schedule``. A ``Tuned`` one brings its depths and forecast, a
            ``MultiLevel`` its depths.
        forecast: what a reuse step feeds in for the features it does not compute: "reuse", the
            latest as they are, which is DeepCache's and the default; "linear", "quadratic" or
            "taylor", extrapolated from the latest refreshes; "damped", linear as far as that was
            right at the latest refreshes; or an object of your own (see
            ``dcompile.policy.forecast``).
            "auto", the default with ``speedup``: "reuse" if the sampler adds noise or the run has
            few refreshes, else "damped".
        sampler: a diffusers scheduler, if ``module`` is no pipeline that has one.
            Read at the start of each generation by ``speedup``, ``GainWeighted`` and "auto".
        depth: the skip connection to cut at: 0, the outermost, is fastest; deeper is closer to
            the uncached result. Equals DeepCache's ``cache_branch_id``.
        backend: "inductor", "tensorrt", "eager" (exact), any name of
            ``torch.compiler.list_backends()``, or a callable
            ``(graph_module, example_inputs) -> callable``.
        dynamic: capture once for many sizes instead of once for each: True for as far as the
            network's code allows, or ranges of the sample's sizes (in latents, not pixels):
            ``{"batch": (2, 8), "height": (64, 128), "width": (64, 128)}``; sizes left out are
            fixed. A call beyond them, and batch size 1, which export cannot leave open, gets a
            program of its own.
        cuda_graphs: record both graphs as CUDA graphs, which takes the launch overhead off a step;
            "auto" does so on CUDA devices. Costs one set of input buffers for each call
            signature.
        options: Inductor settings, such as ``{"max_autotune": True}`` or, on CPUs,
            ``{"freezing": True}``; or arguments of ``torch_tensorrt.dynamo.compile``, such as
            ``{"engine_cache_dir": folder}``, and ``profiles`` (see ``TensorRT``).
        verbose: show on standard error what is captured and compiled.

    Returns:
        The same object; of a ``torch.compile``\\ d module, the module inside.

    Raises:
        ScheduleError: a bad interval, speedup, schedule or forecast, or several of the first
            three; ``speedup``, ``GainWeighted`` or "auto" without a sampler.
        DepthError: ``depth`` is negative or no int. Beyond the deepest: at the first call.
        CaptureError: ``dynamic`` is neither a bool nor ranges.
        BackendError: unknown backend or option; CUDA graphs asked for without a CUDA device.
        DcompileError: a pipeline without a recognisable denoiser; a parallel wrapper (DDP, FSDP,
            DeepSpeed) or weights spread over processes.
        TimestepError: the network's forward takes no timestep.
    """
    chosen = _chosen_schedule(interval, schedule, speedup)
    found = without_torch_compile(denoiser_of(module))
    if isinstance(found, nn.Module):
        chosen.require_fit(identity_of(found))
    if forecast is None and speedup is not None:
        forecast = "auto"
    depths = _chosen_depths(chosen, depth)
    settings = Settings(
        schedule=chosen,
        depths=depths,
        backend=resolve(backend, options),
        dynamic=DynamicSizes.of(dynamic),
        verbose=verbose,
        cuda_graphs=_checked_cuda_graphs(cuda_graphs),
        forecasts=_chosen_forecasts(chosen, depths, [forecast] * len(depths)),
        sampler=sampler_of(module, sampler),
    )
    _require_sampler(settings)
    network = network_of(module)
    dispatcher = _install(network, settings)
    if is_pipeline(module):
        _install_companions(module, dispatcher)
    return module if is_pipeline(module) else cast(M, network)


def load(
    module: M,
    folder: str | os.PathLike[str],
    *,
    interval: int | None = None,
    speedup: float | None = None,
    schedule: Schedule | RefreshRule | None = None,
    forecast: str | Forecast | None = None,
    sampler: Any = None,
    verbose: bool = True,
) -> M:
    """``cache_compile`` with programs that ``Handle.save`` wrote: nothing is captured or compiled.

    Everything is checked first: that the files are whole, and that they were made with this torch,
    for this kind of device, and for a module built like this one, parameter by parameter. A call
    that none of the programs serves is captured and compiled as usual.

    Saved programs are code, and loading runs it: load only what you trust.

    Args:
        module: the network or pipeline, with its weights, where it is to run.
        folder: what ``Handle.save`` wrote.
        interval, speedup, schedule: see ``cache_compile``; as it was saved if none is given.
        forecast: as it was saved if not given; programs are made for one length of history.
        sampler: see ``cache_compile``.
        verbose: show on standard error what is done.

    Returns:
        The same object.

    Raises:
        ArtifactError: the folder is missing or damaged, or was made for something else; names the
            first difference. The module is as it was.
        ScheduleError: a bad schedule or forecast, one that needs a sampler where there is none, or
            none given where a class of your own was saved.
    """
    network = without_torch_compile(denoiser_of(module))
    if not isinstance(network, nn.Module):
        network = network_of(module)  # raises
    device = device_of(network)
    source = Path(folder).expanduser().resolve()
    with Display(type(network).__name__, verbose).stage(f"loading {source}"):
        artifact, backend = read(
            source,
            network,
            device,
            resolve,
            lambda written: portable(structure_of(network, written)),
        )
    if (interval, speedup, schedule) != (None, None, None):
        chosen = _chosen_schedule(interval, schedule, speedup)
    elif artifact.schedule is None:
        raise ScheduleError(
            f"{source} was saved with a schedule class of your own, which is not part of it: give "
            "load(..., schedule=...)"
        )
    else:
        chosen = artifact.schedule
    cuts = artifact.cuts
    chosen.require_fit(identity_of(network))
    depth = 0 if chosen.depths is not None else cuts.depths[0]
    if _chosen_depths(chosen, depth) != cuts.depths:
        raise ScheduleError(
            f"{source} was saved at depth {_listed(cuts.depths)}, {chosen!r} cuts at depth "
            f"{_listed(_chosen_depths(chosen, depth))}: compile for it"
        )
    forecasts = artifact.forecasts if forecast is None else (forecast,) * len(cuts.depths)
    if None in forecasts:
        raise ScheduleError(
            f"{source} was saved with a forecast class of your own, which is not part of it: give "
            "load(..., forecast=...)"
        )
    settings = Settings(
        schedule=chosen,
        depths=cuts.depths,
        backend=backend,
        dynamic=DynamicSizes.of(artifact.dynamic),
        verbose=verbose,
        cuda_graphs=artifact.cuda_graphs,
        forecasts=_chosen_forecasts(chosen, cuts.depths, forecasts),
        sampler=sampler_of(module, sampler),
    )
    _require_sampler(settings)
    if settings.cuts != cuts:
        one, other = (
            f"forecasts from {_listed(wanted.histories)} refreshes and "
            f"{'no probe' if wanted.probe is None else f'probe {wanted.probe!r}'}"
            for wanted in (cuts, settings.cuts)
        )
        raise ScheduleError(
            f"{source} was saved for {one}; what is asked for takes {other}: compile for it"
        )
    dispatcher = _install(network_of(module), settings)
    dispatcher.adopt(artifact)
    if is_pipeline(module):
        _install_companions(module, dispatcher)
    return module if is_pipeline(module) else cast(M, network)


def handle(module: Any) -> Handle:
    """The handle of a module, or of a pipeline's denoiser, that ``cache_compile`` was called on.

    Raises:
        NotCompiledError: it was not.
    """
    network = denoiser_of(module)
    dispatcher = dispatcher_of(getattr(network, "_orig_mod", network))
    if dispatcher is None:
        raise NotCompiledError(
            f"this {type(network).__name__} is not compiled: call dcompile.cache_compile first"
        )
    return Handle(dispatcher)


def _install(network: nn.Module, settings: Settings) -> Dispatcher:
    found = wrapper_of(network)
    if isinstance(found, Dispatcher):
        found.configure(settings)
        return found
    if found is not None:
        found.uninstall()
    slot = wrapper_slot(network)
    dispatcher = Dispatcher(network, getattr(network, slot), settings)
    dispatcher.install(slot)
    return dispatcher


def _install_companions(pipeline: Any, dispatcher: Dispatcher) -> None:
    """Have the denoiser's companions, such as a ControlNet, compute only what it reads."""
    settings = dispatcher.settings
    names = [name for name in timed_components(pipeline) if name != denoiser_name(pipeline)]
    for network in (getattr(pipeline, name) for name in names):
        found = wrapper_of(network)
        if isinstance(found, LazyNetwork):
            found.configure(settings.backend, settings.verbose)
        elif found is None and not hasattr(network, "_orig_mod"):  # torch.compile's are the user's
            slot = wrapper_slot(network)
            found = LazyNetwork(network, getattr(network, slot), settings.backend, settings.verbose)
            found.install(slot)
        if isinstance(found, LazyNetwork):
            found.users.add(dispatcher)
            if found not in dispatcher.companions:
                dispatcher.companions.append(found)


def _chosen_schedule(
    interval: int | None, schedule: Schedule | RefreshRule | None, speedup: float | None = None
) -> Schedule:
    named = {"interval": interval, "speedup": speedup, "schedule": schedule}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ScheduleError(f"give one of interval, speedup and schedule, not {listed}")
    if speedup is not None:
        return GainWeighted(speedup=require_speedup(speedup))
    if schedule is None:
        return Uniform(3 if interval is None else interval)
    return as_schedule(schedule)


def _chosen_depths(schedule: Schedule, depth: int) -> tuple[int, ...]:
    """Where to cut: what the schedule says, or at ``depth``."""
    depths = schedule.depths
    if depths is None:
        return (_checked_depth(depth),)
    if depth not in (0, depths[0]):
        raise DepthError(
            f"{schedule!r} brings its depths, got depth={depth!r} as well: leave it out"
        )
    return tuple(_checked_depth(value) for value in depths)


def _chosen_forecasts(
    schedule: Schedule, depths: Sequence[int], given: Sequence[str | Forecast | None]
) -> tuple[Forecast | Literal["auto"], ...]:
    """One for each cut: the schedule's own where it has one."""
    own = schedule.forecasts or (None,) * len(depths)
    pairs = list(zip(own, given, strict=True))
    if None not in own and any(other not in (None, one) for one, other in pairs):
        raise ScheduleError(
            f"{schedule!r} brings its forecasts, {_listed(own)}, got {given[0]!r} as well: leave "
            "it out"
        )
    wanted = [one if one is not None else other for one, other in pairs]
    return tuple("auto" if item == "auto" else resolve_forecast(item or "reuse") for item in wanted)


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))


def _require_sampler(settings: Settings) -> None:
    planned = "speedup and GainWeighted" if settings.schedule.needs_sampler else None
    wanted = planned or ('forecast="auto"' if "auto" in settings.forecasts else None)
    if wanted is not None and settings.sampler is None:
        raise ScheduleError(
            f"{wanted} look at the sampler: pass the pipeline instead of its network, or "
            "cache_compile(unet, sampler=pipe.scheduler, ...)"
        )


def _checked_depth(depth: int) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise DepthError(f"depth: expected an int of at least 0, got {depth!r}")
    return depth


def _checked_cuda_graphs(wanted: bool | Literal["auto"]) -> bool | Literal["auto"]:
    if wanted not in (True, False, "auto"):
        raise BackendError(f'cuda_graphs: expected "auto", True or False, got {wanted!r}')
    if wanted is True and not torch.cuda.is_available():
        raise BackendError(
            'cuda_graphs=True, and there is no CUDA device here; "auto" uses CUDA graphs where '
            "there is one"
        )
    return wanted
