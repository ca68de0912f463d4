"""What a user calls: ``cache_compile`` to make a network faster, ``handle`` to see and steer it."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.backends import GraphCompiler, resolve
from dcompile.compiler.capture import DynamicSizes
from dcompile.compiler.fingerprint import identity_of, portable, structure_of
from dcompile.compiler.signature import example_of
from dcompile.errors import (
    BackendError,
    CaptureError,
    DcompileError,
    DepthError,
    ExportError,
    NotCompiledError,
    ScheduleError,
)
from dcompile.policy.checks import require_speedup
from dcompile.policy.fixed import Uniform
from dcompile.policy.forecast import Forecast, resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.schedule import RefreshRule, Schedule, as_schedule
from dcompile.progress import Display
from dcompile.report.explain import Explanation, explain
from dcompile.runtime.dispatcher import Dispatcher, Settings, Stats, dispatcher_of
from dcompile.runtime.lazy_network import OnDemand
from dcompile.runtime.wrapper import free_slot, standin_of
from dcompile.storage.artifact import read, write
from dcompile.storage.onnx import export, without_autocast

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
    found = _without_torch_compile(_denoiser_of(module))
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
        sampler=_sampler_of(module, sampler),
    )
    _require_sampler(settings)
    network = _network_of(module)
    dispatcher = _install(network, settings)
    if _is_pipeline(module):
        _install_beside(module, dispatcher)
    return module if _is_pipeline(module) else cast(M, network)


class Handle:
    """Steers one compiled module; ``handle(module)`` makes it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @property
    def module(self) -> nn.Module:
        return self._dispatcher.module

    @property
    def enabled(self) -> bool:
        return self._dispatcher.enabled

    @property
    def stats(self) -> Stats:
        """Counts since the last ``cache_compile``."""
        return self._dispatcher.stats()

    def enable(self) -> None:
        """Cache again, after ``disable`` or after a failed compile."""
        self._dispatcher.enabled = True
        for standin in self._dispatcher.beside:
            standin.follow_users()

    def disable(self) -> None:
        """Run uncached, as before ``cache_compile``, and drop what is cached."""
        self._dispatcher.enabled = False
        for standin in self._dispatcher.beside:
            standin.follow_users()
        self._dispatcher.release()

    def reset(self) -> None:
        """Drop what is cached: the next step of every running generation refreshes."""
        self._dispatcher.reset()

    def remove(self) -> None:
        """Give the module its own forward back. Afterwards it is no longer a compiled one."""
        self.disable()
        self._dispatcher.uninstall()
        self._dispatcher.leave(self._dispatcher.beside)

    @property
    def signatures(self) -> list[str]:
        """The call signatures compiled or loaded so far, to be given to ``warmup`` elsewhere."""
        return self._dispatcher.signatures()

    def warmup(self, *calls: str | Mapping[str, Any] | Sequence[Any]) -> None:
        """Compile ahead of traffic: capture, compile and run both graphs once for each call.

        Before traffic, not during it: see README. The kernels of a graph are compiled in parallel
        processes, as many as ``TORCHINDUCTOR_COMPILE_THREADS`` says.

        Args:
            calls: each one of ``signatures``, from this process or another, or an example call:
                ``(sample, timestep, ...)``, a dict of keyword arguments, or a pair
                ``((sample, timestep), {...})``. Of an example, sizes matter and values do not.

        Raises:
            CaptureError: such a call would run uncached, or cannot be captured.
            BackendError, DepthError, NoSkipConnectionError: as at a first call.
        """
        dispatcher = self._dispatcher
        device = _device_of(self.module)
        prepared = [_example_call(call, device) for call in calls]
        display = Display(type(self.module).__name__, dispatcher.settings.verbose)
        for number, (args, kwargs, autocast) in enumerate(prepared, start=1):
            with (
                display.stage(f"warming up, call {number} of {len(prepared)}"),
                torch.autocast(device.type, autocast) if autocast else nullcontext(),
            ):
                dispatcher.warm_up(args, kwargs)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the compiled programs of all call signatures so far, for ``dcompile.load``.

        The folder holds no weights. It appears at once, when it is complete; programs that were
        saved there before are replaced.

        Args:
            folder: where to write.

        Returns:
            The folder's full path.

        Raises:
            NotCompiledError: nothing is compiled yet.
            ArtifactError: the backend's programs cannot be saved, or the folder cannot be written.
        """
        target = Path(folder).expanduser().resolve()
        settings = self._dispatcher.settings
        device = _device_of(self.module)
        with Display(type(self.module).__name__, settings.verbose).stage(f"saving to {target}"):
            write(target, self._dispatcher.saved(), settings.backend, device)
        return target

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What can be cut where, and what it saves: a table, and a dict (``as_dict()``).

        Args:
            args, kwargs: an example call of the network; only shapes matter. Without one, the
                network as it was called first.

        Raises:
            NotCompiledError: no example, and the network was not called yet.
            CaptureError: the network cannot be captured.
        """
        dispatcher = self._dispatcher
        networks = dispatcher.networks()
        if not args and not kwargs and not networks and dispatcher.signatures():
            # Loaded programs are code only: the graph is captured again, which is quick.
            args, kwargs, _ = example_of(dispatcher.signatures()[0], _device_of(self.module))
        if args or kwargs:
            network = dispatcher.network_for(args, kwargs)
        elif networks:
            network = networks[0]
        else:
            raise NotCompiledError(
                "nothing is captured yet: call the network or its pipeline once, or give an "
                "example call: handle(unet).explain(sample, timestep, ...)"
            )
        least = [parts[0] for parts in (one.parts() for one in dispatcher.beside) if parts]
        beside = tuple(part for part in least if part.results < part.of)
        name = type(self.module).__name__
        return explain(network, dispatcher.settings.depths[0], name, beside)

    def export_onnx(self, folder: str | os.PathLike[str], /, *args: Any, **kwargs: Any) -> Path:
        """Write both graphs for ONNX runtimes and TensorRT: a folder that needs no Python.

        ``full.onnx`` and ``shallow.onnx``, cut at the current depth, read their weights from one
        ``weights.data``, where each is stored once and goes by its parameter's name. Inputs have
        the names of forward's parameters, results are ``out_0`` (or ``out_sample``, if the network
        returns named fields), and the full graph's ``boundary_0`` feeds the shallow graph's.
        ``manifest.json`` lists names, dtypes and shapes of all of them, and the schedule.

        Weights and inputs keep their dtypes; autocast and forecasts are no part of the graphs: the
        shallow one takes one boundary, which the caller may have extrapolated. A capture made
        with ``dynamic=True`` has named sizes, such as ``sample_2``, where others have numbers.
        The folder appears at once, when it is complete; an export that stands there is replaced.

        Args:
            folder: where to write.
            args, kwargs: an example call of the network; only shapes matter. Without one, the
                network as it was called first.

        Returns:
            The folder's full path.

        Raises:
            NotCompiledError: no example, and the network was not called since it last changed.
            ExportError: a package is missing, the folder cannot be written or holds other files,
                the network is in training mode, its weights have no values, an operator has no
                ONNX form, or the schedule is a ``MultiLevel``, which takes more than two graphs.
            CaptureError: the network cannot be captured.
            NoSkipConnectionError, DepthError: there is nothing to cut at this depth.
        """
        dispatcher = self._dispatcher
        if self.module.training:
            raise ExportError("the network is in training mode: call .eval() before the export")
        if len(dispatcher.settings.depths) > 1:
            raise ExportError(
                "an export is one full and one shallow graph, and this schedule takes more: "
                "cache_compile with another schedule first"
            )
        if args or kwargs:
            with without_autocast(tree_leaves((args, kwargs))):
                network = dispatcher.network_for(args, kwargs)
        else:
            current = dispatcher.current_networks()
            if not dispatcher.networks() and dispatcher.signatures():  # loaded: code only
                args, kwargs, _ = example_of(dispatcher.signatures()[0], _device_of(self.module))
                current = [dispatcher.network_for(args, kwargs)]
            if not current:
                raise NotCompiledError(
                    "nothing is captured of the network as it is now: call it or its pipeline "
                    "once, or give an example call: "
                    "handle(unet).export_onnx(folder, sample, timestep, ...)"
                )
            network = current[0]
        target = Path(folder).expanduser().resolve()
        settings = dispatcher.settings
        export(
            network,
            self.module,
            dispatcher.original,
            settings.depths[0],
            settings.schedule,
            target,
            Display(type(self.module).__name__, settings.verbose),
        )
        return target


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
    network = _without_torch_compile(_denoiser_of(module))
    if not isinstance(network, nn.Module):
        network = _network_of(module)  # raises
    device = _device_of(network)
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
        sampler=_sampler_of(module, sampler),
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
    dispatcher = _install(_network_of(module), settings)
    dispatcher.adopt(artifact)
    if _is_pipeline(module):
        _install_beside(module, dispatcher)
    return module if _is_pipeline(module) else cast(M, network)


def handle(module: Any) -> Handle:
    """The handle of a module, or of a pipeline's denoiser, that ``cache_compile`` was called on.

    Raises:
        NotCompiledError: it was not.
    """
    network = _denoiser_of(module)
    dispatcher = dispatcher_of(getattr(network, "_orig_mod", network))
    if dispatcher is None:
        raise NotCompiledError(
            f"this {type(network).__name__} is not compiled: call dcompile.cache_compile first"
        )
    return Handle(dispatcher)


def _network_of(module: Any) -> nn.Module:
    """The network itself: a pipeline's denoiser, and without ``torch.compile`` around it."""
    if _is_pipeline(module):
        name = _denoiser_name(module)
        network: nn.Module = _without_torch_compile(getattr(module, name))
        _unwrapped(network)
        if network is not getattr(module, name):
            setattr(module, name, network)
        return network
    if not isinstance(module, nn.Module):
        raise DcompileError(
            f"expected a torch.nn.Module or a diffusers pipeline, got {type(module).__name__}"
        )
    return _unwrapped(cast(nn.Module, _without_torch_compile(module)))


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network, if it is one process's own.

    Raises:
        DcompileError: a parallel wrapper is around it, or its weights are spread over processes.
    """
    name = type(network).__name__
    parameters = inspect.signature(network.forward).parameters.values()
    inner = getattr(network, "module", None)
    if isinstance(inner, nn.Module) and all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        raise DcompileError(
            f"{name} is a parallel wrapper around {type(inner).__name__}: a captured graph would "
            "go past what it does with the weights. Compile the network inside, which runs in "
            "each process by itself: cache_compile(wrapper.module, ...)"
        )
    for key, parameter in network.named_parameters():
        spread = hasattr(parameter, "ds_id") or hasattr(parameter, "_local_tensor")
        if spread or "_flat_param" in key.rpartition(".")[2]:
            raise DcompileError(
                f"{name}.{key} is spread over several processes (FSDP, DeepSpeed ZeRO-3 or tensor "
                "parallel), and a captured graph reads whole weights. Load the network unsharded "
                "for inference"
            )
    return network


def _device_of(network: nn.Module) -> torch.device:
    tensors = (*network.parameters(), *network.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _example_call(
    call: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], torch.dtype | None]:
    """Args and kwargs of what ``warmup`` takes, and autocast's dtype if it is to be on."""
    if isinstance(call, str):
        try:
            return example_of(call, device)
        except ValueError as error:
            raise CaptureError(f"warmup: {error}; expected one of handle.signatures") from error
    if isinstance(call, Mapping):
        return (), dict(call), None
    if not isinstance(call, Sequence):
        raise CaptureError(
            "warmup: expected (sample, timestep, ...), a dict or one of handle.signatures, got "
            f"{type(call).__name__}"
        )
    if len(call) == 2 and isinstance(call[0], (tuple, list)) and isinstance(call[1], Mapping):
        return tuple(call[0]), dict(call[1]), None
    return tuple(call), {}, None


def _install(network: nn.Module, settings: Settings) -> Dispatcher:
    found = standin_of(network)
    if isinstance(found, Dispatcher):
        found.configure(settings)
        return found
    if found is not None:
        found.uninstall()
    slot = free_slot(network)
    dispatcher = Dispatcher(network, getattr(network, slot), settings)
    dispatcher.install(slot)
    return dispatcher


def _install_beside(pipeline: Any, dispatcher: Dispatcher) -> None:
    """Have the denoiser's companions, such as a ControlNet, compute only what it reads."""
    settings = dispatcher.settings
    names = [name for name in _timed_components(pipeline) if name != _denoiser_name(pipeline)]
    for network in (getattr(pipeline, name) for name in names):
        found = standin_of(network)
        if isinstance(found, OnDemand):
            found.configure(settings.backend, settings.verbose)
        elif found is None and not hasattr(network, "_orig_mod"):  # torch.compile's are the user's
            slot = free_slot(network)
            found = OnDemand(network, getattr(network, slot), settings.backend, settings.verbose)
            found.install(slot)
        if isinstance(found, OnDemand):
            found.users.add(dispatcher)
            if found not in dispatcher.beside:
                dispatcher.beside.append(found)


def _without_torch_compile(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


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


def _sampler_of(module: Any, given: Any) -> Callable[[], Any] | None:
    """Where to find the sampler when a generation starts; a pipeline's may be replaced."""
    if given is not None:
        if not callable(getattr(given, "set_timesteps", None)):
            raise ScheduleError(
                f"sampler: expected a diffusers scheduler, got {type(given).__name__}"
            )
        return lambda: given
    if not _is_pipeline(module) or not hasattr(module, "scheduler"):
        return None
    pipeline, latest = weakref.ref(module), module.scheduler

    def sampler() -> Any:
        # The network may outlive its pipeline, in another one made of the same parts.
        nonlocal latest
        latest = getattr(pipeline(), "scheduler", latest)
        return latest

    return sampler


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


def _is_pipeline(module: Any) -> bool:
    return not isinstance(module, nn.Module) and isinstance(
        getattr(module, "components", None), dict
    )


def _denoiser_of(module: Any) -> Any:
    """A pipeline's denoiser, as it stands there; anything else itself."""
    return getattr(module, _denoiser_name(module)) if _is_pipeline(module) else module


def _denoiser_name(pipeline: Any) -> str:
    """The component that is called with a timestep. Usual names settle it if there are several."""
    timed = _timed_components(pipeline)
    preferred: tuple[str, ...] = ("unet", "transformer", *(timed if len(timed) == 1 else ()))
    for name in preferred:
        if name in timed:
            return name
    raise DcompileError(
        f"{type(pipeline).__name__} has no single denoiser: components called with a timestep are "
        f"{', '.join(timed) or 'none'}. Pass the network itself: cache_compile(pipe.<name>)"
    )


def _timed_components(pipeline: Any) -> list[str]:
    """Names of the components that are called with a timestep."""
    return [
        name
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and _takes_timestep(_without_torch_compile(component))
    ]


def _takes_timestep(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return any("time" in name.lower() for name in names[1:])
