"""What a user calls: ``cache_compile``, ``load`` and ``handle``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import nn

from dcompile.arguments import (
    aim_of,
    checked_cuda_graphs,
    checked_layout,
    checked_memory,
    checked_new_calls,
    checked_on_error,
    components_to_compile,
    depths_of,
    forecasts_of,
    require_sampler,
    schedule_of,
)
from dcompile.backends import Backend, GraphCompiler, resolve
from dcompile.compiler.fingerprint import identity_of, portable
from dcompile.compiler.program import ProgramSpec
from dcompile.compiler.program_memory import DEFAULT_BUDGET
from dcompile.compiler.roles import Roles
from dcompile.compiler.sizes import DynamicSizes
from dcompile.compiler.structure import structure_of
from dcompile.compiler.weight_layout import WeightLayout
from dcompile.errors import (
    NotCompiledError,
    ScheduleError,
)
from dcompile.handles import Handle, JointHandle, device_of
from dcompile.integrations.pipelines import (
    companions_of,
    denoisers_of,
    is_pipeline,
    network_of,
    sampler_of,
    take_denoisers,
)
from dcompile.policy.forecast import Forecast
from dcompile.policy.schedule import RefreshRule, Schedule
from dcompile.progress import Display
from dcompile.runtime.components import install_components
from dcompile.runtime.dispatcher import Dispatcher, dispatcher_of
from dcompile.runtime.install import install, install_companions
from dcompile.runtime.settings import Settings
from dcompile.selftuning import self_tune
from dcompile.storage.artifact import Artifact, read

M = TypeVar("M")


def cache_compile(
    module: M,
    *,
    interval: int | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    autotune: Literal["auto", "first", False] = "auto",
    schedule: Schedule | RefreshRule | None = None,
    forecast: str | Forecast | None = None,
    sampler: Any = None,
    sample: str | None = None,
    timestep: str | None = None,
    depth: int = 0,
    backend: str | GraphCompiler = "inductor",
    dynamic: bool | Mapping[str, Sequence[int]] = False,
    cuda_graphs: bool | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    on_error: Literal["uncached", "raise"] = "uncached",
    program_memory: int = DEFAULT_BUDGET,
    channels_last: bool | Literal["auto"] = "auto",
    components: Literal["compile", False] = False,
    verbose: bool = True,
) -> M:
    """Make a diffusion network reuse its deep features across sampling steps.

    The network is changed in place: its ``forward`` is replaced, everything else stays, and
    ``handle(module).remove()`` undoes it. It is captured and compiled at the first call, once for
    each call signature (shapes, dtypes, devices, constants). Calling ``cache_compile`` again
    replaces the settings and keeps the compiled programs that still fit.

    Only inference is cached: in training mode, or if an input requires grad, the network runs as
    if it had not been compiled. Outputs carry no gradient.

    Args:
        module: the network, called as ``(sample, timestep, ...)``: a UNet or a transformer of
            diffusers, or any module whose graph has skip connections or a residual stream. Or a
            whole pipeline: its denoiser is taken, or both where it has two of a class, one for
            much noise and one for little. Of a module that ``torch.compile`` wraps, the
            original is compiled and returned.
        interval: refresh every ``interval``-th step, as DeepCache does; 3 if none of this,
            ``speedup``, ``psnr`` and ``schedule`` is given.
        speedup: FLOPs of an uncached run over FLOPs of a cached one, from the second run on: closer
            to the uncached result than an interval at the same cost. See ``autotune``.
        psnr: instead, the fewest FLOPs at which the final sample (latents) is predicted to have so
            many dB against the uncached one, by the sample's own span; found by watching the first
            run of each kind, as for ``speedup``. A prediction, of the mean of pictures, good to
            some 5 dB (bench/results/predicted_psnr.json): ``tune(pipe, psnr=...)`` measures. A run
            that nothing is known of refreshes at every step.
        autotune: with ``speedup``, "first" has the first run of each kind (number of steps, sampler
            and its settings) refresh at every step, on the eager backend, and watches it; later
            runs refresh several cuts at the steps that were found. The first run's result is the
            uncached one, and takes somewhat longer. "auto" does so where neither ``depth`` nor
            ``forecast`` is given, and no process has done so before: what is found is kept in
            ``$DCOMPILE_CACHE_DIR``, by default in the user's cache folder. False watches nothing:
            refreshes are placed where the sampler's error gain is largest (``GainWeighted``), from
            the first run on, and features are forecast for samplers that add no noise.
        schedule: decides which steps refresh: any object with ``refresh(step, steps) -> bool``,
            or a ``dcompile.Schedule``. A ``Tuned`` one brings its depths and forecast, a
            ``MultiLevel`` its depths.
        forecast: what a reuse step feeds in for the features it does not compute: "reuse", the
            latest as they are, which is DeepCache's and the default; "linear", "quadratic" or
            "taylor", extrapolated from the latest refreshes; "damped", linear as far as that was
            right at the latest refreshes; or an object of your own (see
            ``dcompile.policy.forecast``).
            "auto", the default with ``speedup`` where nothing is watched: "reuse" if the sampler
            adds noise or the run has few refreshes, "linear" if they are frequent, else "damped".
        sampler: a diffusers scheduler, if ``module`` is no pipeline that has one.
            Read at the start of each run by ``speedup``, ``GainWeighted`` and "auto".
        sample, timestep: names of these two parameters of the network's forward, where shapes and
            names leave more than one candidate.
        depth: where to cut: 0, the outermost, is fastest; deeper is closer to the uncached result.
            At skip connections it equals DeepCache's ``cache_branch_id``; along a residual stream,
            reuse steps run the first ``depth + 1`` blocks.
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
        on_error: what happens to calls that cannot be captured or compiled: "uncached" runs them as
            if ``cache_compile`` had not been called, with one warning, and counted in
            ``handle(module).stats.uncached_reasons``; "raise" raises at each.
        program_memory: bytes, estimated, that captured and compiled code may take, 2 GiB by
            default. An SDXL-sized network takes some 80 MB for each call signature, and a copy of
            its weights with Inductor's ``freezing``. Beyond that the least recently used programs
            are dropped, with one warning, and compiled again when they are needed.
        channels_last: lay out the weights of convolutions channels-last, in place, as
            ``network.to(memory_format=torch.channels_last)`` does; ``handle(module).remove()``
            lays them out as before. "auto" does so on CUDA devices with Inductor, whose code
            would otherwise copy them at every step. False leaves them alone.
        components: "compile" has ``torch.compile`` compile, in place, what a pipeline runs beside
            its denoiser once for a picture: text encoders and the VAE's decoder, with Inductor, or
            ``backend`` where that is a name or callable of ``torch.compile``'s; "eager" compiles
            nothing. Each is compiled at its first call, and again for other sizes; if that fails it
            runs uncompiled, with one warning. ControlNets are served in any case.
        verbose: show on standard error what is captured and compiled.

    Returns:
        The same object; of a module that ``torch.compile`` wraps, the module inside.

    Raises:
        ScheduleError: a bad interval, speedup, schedule or forecast, or several of the first
            three; "first" without ``speedup``, or with a depth or forecast; ``speedup``,
            ``GainWeighted`` or "auto" without a sampler.
        DepthError: ``depth`` is negative or no int. Beyond the deepest: at the first call.
        CaptureError: ``dynamic`` is neither a bool nor ranges.
        BackendError: unknown backend or option; CUDA graphs asked for without a CUDA device;
            ``channels_last`` is none of the three.
        DcompileError: ``on_error`` or ``components`` is neither; ``components="compile"`` without a
            pipeline; ``program_memory`` is no positive int; a pipeline without a recognisable
            denoiser; a parallel wrapper (DDP, FSDP, DeepSpeed) or weights
            spread over processes.
        TimestepError: the network's forward takes no timestep, or has no parameter of the name
            given for it or for the sample.
    """
    plan = schedule_of(interval, schedule, speedup, psnr)
    aim = aim_of(autotune, speedup, psnr, depth, forecast)
    depths = depths_of(plan, depth)
    if forecast is None and speedup is not None:
        forecast = "auto"
    settings = Settings(
        schedule=plan,
        depths=depths,
        backend=resolve(backend, options),
        dynamic=DynamicSizes.of(dynamic),
        verbose=verbose,
        cuda_graphs=checked_cuda_graphs(cuda_graphs),
        forecasts=forecasts_of(plan, [forecast] * len(depths)),
        sampler=sampler_of(module, sampler),
        roles=Roles(sample, timestep),
        on_error=checked_on_error(on_error),
        program_memory=checked_memory(program_memory),
        channels_last=checked_layout(channels_last),
    )
    require_sampler(settings, aim)
    parts = components_to_compile(module, components)
    for network in map(network_of, denoisers_of(module).values()):
        plan.require_fit(identity_of(network))
    for network in take_denoisers(module):
        dispatcher = _install(network, settings, module, parts)
        if aim is not None:
            self_tune(dispatcher, settings, aim, asked_for=autotune == "first")
    return module if is_pipeline(module) else cast(M, network_of(module))


def load(
    module: M,
    folder: str | os.PathLike[str],
    *,
    interval: int | None = None,
    speedup: float | None = None,
    schedule: Schedule | RefreshRule | None = None,
    forecast: str | Forecast | None = None,
    sampler: Any = None,
    sample: str | None = None,
    timestep: str | None = None,
    on_error: Literal["uncached", "raise"] = "uncached",
    program_memory: int = DEFAULT_BUDGET,
    new_calls: Literal["compile", "uncached"] = "compile",
    components: Literal["compile", False] = False,
    verbose: bool = True,
) -> M:
    """``cache_compile`` with programs that ``Handle.save`` wrote: nothing is captured or compiled.

    Everything is checked first: that the files are whole, and that they were made with this torch,
    for this kind of device, and for a module built like this one, parameter by parameter. A call
    that none of the programs serves is captured and compiled, unless ``new_calls`` says otherwise.

    Saved programs are code, and loading runs it: load only what you trust.

    Args:
        module: the network or pipeline, with its weights, where it is to run.
        folder: what ``Handle.save`` wrote: the network's, or the pipeline's.
        interval, speedup, schedule: see ``cache_compile``; as it was saved if none is given.
        forecast: as it was saved if not given; programs are made for one length of history.
        sampler, sample, timestep, on_error, program_memory: see ``cache_compile``.
        new_calls: what a call does that none of the programs serves: "compile" captures and
            compiles it; "uncached" runs it as if nothing had been loaded, and counts it, which
            keeps captures out of a server's traffic.
        components: see ``cache_compile``. They are no part of what was saved: each is compiled at
            its first call, from Inductor's cache on disk where that has it.
        verbose: show on standard error what is done.

    Returns:
        The same object.

    Raises:
        ArtifactError: the folder is missing or damaged, or was made for something else; names the
            first difference. The module is as it was.
        ScheduleError: a bad schedule or forecast, one that needs a sampler where there is none, or
            none given where a class of your own was saved.
        DcompileError: ``on_error``, ``program_memory``, ``new_calls`` or ``components`` is none of
            what it may be; ``components="compile"`` without a pipeline.
    """
    denoisers = denoisers_of(module)
    parts = components_to_compile(module, components)
    given = (interval, speedup, schedule) != (None, None, None)
    asked_plan = schedule_of(interval, schedule, speedup) if given else None
    found: list[tuple[nn.Module, Artifact, Settings]] = []
    for name, denoiser in denoisers.items():
        network = network_of(denoiser)
        source = Path(folder, name if len(denoisers) > 1 else "").expanduser().resolve()
        artifact, backend = _read(network, source, verbose)
        plan = asked_plan or _saved("schedule", artifact.schedule, source)
        plan.require_fit(identity_of(network))
        depths = artifact.cuts.depths
        _require_depths(source, depths, plan)
        forecasts = artifact.forecasts if forecast is None else (forecast,) * len(depths)
        settings = Settings(
            schedule=plan,
            depths=depths,
            backend=backend,
            dynamic=DynamicSizes.of(artifact.dynamic),
            verbose=verbose,
            cuda_graphs=artifact.cuda_graphs,
            forecasts=forecasts_of(plan, [_saved("forecast", one, source) for one in forecasts]),
            sampler=sampler_of(module, sampler),
            roles=Roles(sample, timestep),
            on_error=checked_on_error(on_error),
            program_memory=checked_memory(program_memory),
            channels_last=artifact.channels_last,
            new_calls=checked_new_calls(new_calls),
        )
        require_sampler(settings)
        _require_spec(source, artifact.cuts, settings.target.spec)
        found.append((network, artifact, settings))
    take_denoisers(module)
    for network, artifact, settings in found:
        dispatcher = _install(network, settings, module, parts)
        dispatcher.programs.adopt(artifact.programs, artifact.written, settings.target)
    return module if is_pipeline(module) else cast(M, network_of(module))


def handle(module: Any) -> Handle:
    """The handle of a module, or of a pipeline's denoisers, that ``cache_compile`` was called on.

    Raises:
        NotCompiledError: it was not.
    """
    if not isinstance(module, nn.Module) and not is_pipeline(module):
        raise NotCompiledError(f"handle: expected a network or a pipeline, got {module!r}")
    handles = {
        name: Handle(dispatcher)
        for name, network in denoisers_of(module).items()
        if (dispatcher := dispatcher_of(network)) is not None
    }
    if not handles:
        raise NotCompiledError(
            f"this {type(module).__name__} is not compiled: call dcompile.cache_compile first"
        )
    return JointHandle(handles) if len(handles) > 1 else next(iter(handles.values()))


def _install(
    network: nn.Module, settings: Settings, module: Any, parts: Sequence[nn.Module]
) -> Dispatcher:
    """Install on a denoiser of ``module`` and, if that is a pipeline, on its auxiliary parts."""
    dispatcher = install(network, settings)
    if is_pipeline(module):
        install_companions(companions_of(module), dispatcher)
        install_components(parts, dispatcher, settings.backend, settings.verbose)
    return dispatcher


# What was saved


def _read(network: nn.Module, source: Path, verbose: bool) -> tuple[Artifact, Backend]:
    """What was saved for a network, checked against it."""
    with Display(type(network).__name__, verbose).stage(f"loading {source}"):
        layout = WeightLayout(network)

        def structure(written: Sequence[str], channels_last: Any, backend: Backend) -> Any:
            layout.configure(channels_last, backend)
            layout.apply()
            return portable(structure_of(network, written))

        try:
            return read(source, network, device_of(network), resolve, structure)
        finally:
            layout.restore()


def _saved(what: str, value: Any, source: Path) -> Any:
    """A part of an artefact, if it could be saved."""
    if value is None:
        raise ScheduleError(
            f"{source} was saved with a {what} class of your own, which is not part of it: give "
            f"load(..., {what}=...)"
        )
    return value


def _require_depths(source: Path, saved: tuple[int, ...], schedule: Schedule) -> None:
    wanted = schedule.depths or saved[:1]
    if wanted != saved:
        raise ScheduleError(
            f"{source} was saved at depth {_listed(saved)}, {schedule!r} cuts at depth "
            f"{_listed(wanted)}: compile for it"
        )


def _require_spec(source: Path, saved: ProgramSpec, wanted: ProgramSpec) -> None:
    if wanted != saved:
        one, other = (
            f"forecasts from {_listed(spec.histories)} refreshes and "
            f"{'no probe' if spec.probe is None else f'probe {spec.probe!r}'}"
            for spec in (saved, wanted)
        )
        raise ScheduleError(
            f"{source} was saved for {one}; what is asked for takes {other}: compile for it"
        )


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))
