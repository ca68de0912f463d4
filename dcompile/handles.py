"""``Handle``: steers, reports on, saves and exports one compiled network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.fingerprint import portable
from dcompile.compiler.signature import example_of
from dcompile.errors import CaptureError, ExportError, NotCompiledError
from dcompile.policy.forecast import name_of
from dcompile.policy.schedule import Schedule
from dcompile.progress import Display
from dcompile.report.explain import CompanionReport, Explanation, explain
from dcompile.report.summary import summary
from dcompile.runtime.components import detach_components
from dcompile.runtime.counters import Stats
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.install import detach
from dcompile.runtime.warmup import captured_network, warm_up
from dcompile.storage.artifact import Artifact, write
from dcompile.storage.onnx import export, without_autocast


class Handle:
    """Steers one compiled network; ``dcompile.handle(module)`` makes it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._dispatcher.module

    @property
    def enabled(self) -> bool:
        """Whether calls are cached; False after ``disable``."""
        return self._dispatcher.enabled

    @property
    def schedule(self) -> Schedule:
        """What decides which steps refresh; with ``speedup=``, what was found by now."""
        return self._dispatcher.settings.schedule

    @property
    def stats(self) -> Stats:
        """Counts since the last ``cache_compile``."""
        return self._dispatcher.stats()

    def report(self) -> str:
        """What to know after a run: what was refreshed, forced and uncached, and why."""
        schedule = self._dispatcher.settings.schedule
        return summary(type(self.module).__name__, self.stats, schedule.describe())

    def enable(self) -> None:
        """Cache again, after ``disable``; what could not be compiled is tried again."""
        self._dispatcher.programs.forget_failures()
        self._switch(True)

    def disable(self) -> None:
        """Run uncached, as before ``cache_compile``, and drop what is cached."""
        self._switch(False)
        self._dispatcher.release()

    def reset(self, *, programs: bool = False) -> None:
        """Drop what is cached: the next step of every run refreshes.

        What could not be captured or compiled is tried again.

        Args:
            programs: drop everything captured, compiled and recorded as well, and free its memory.
                Programs loaded from a file stay.
        """
        self._dispatcher.programs.forget_failures()
        self._dispatcher.state.tracker.reset()
        if programs:
            self._dispatcher.runners.clear()
            self._dispatcher.state.binder.release()
            for companion in self._dispatcher.companions:
                companion.programs.clear()

    def remove(self) -> None:
        """Give the module its own forward back. Afterwards it is no longer a compiled one."""
        self.disable()
        self._dispatcher.uninstall()
        self._dispatcher.runners.layout.restore()
        detach(self._dispatcher, self._dispatcher.companions)
        detach_components(self._dispatcher)

    @property
    def signatures(self) -> list[str]:
        """The call signatures compiled or loaded so far, to be given to ``warmup`` elsewhere."""
        return self._dispatcher.programs.signatures()

    def warmup(self, *calls: str | Mapping[str, Any] | Sequence[Any]) -> None:
        """Compile ahead of traffic: capture, compile and run both graphs once for each call.

        Before traffic, not during it: a capture is not safe while other threads run the same
        network uncached. The kernels of a graph are compiled in parallel
        processes, as many as ``TORCHINDUCTOR_COMPILE_THREADS`` says.

        Args:
            calls: each one of ``signatures``, from this process or another, or an example call:
                ``(sample, timestep, ...)``, a dict of keyword arguments, or a pair
                ``((sample, timestep), {...})``. Of an example, sizes matter and values do not.

        Raises:
            CaptureError: such a call would run uncached, or cannot be captured.
            BackendError, DepthError, NoCutError: as at a first call.
        """
        dispatcher = self._dispatcher
        device = device_of(self.module)
        prepared = [_example_call(call, device) for call in calls]
        display = Display(type(self.module).__name__, dispatcher.settings.verbose)
        for number, (args, kwargs, autocast) in enumerate(prepared, start=1):
            with (
                display.stage(f"warming up, call {number} of {len(prepared)}"),
                torch.autocast(device.type, autocast) if autocast else nullcontext(),
            ):
                warm_up(dispatcher, args, kwargs)

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
        device = device_of(self.module)
        with Display(type(self.module).__name__, settings.verbose).stage(f"saving to {target}"):
            write(target, _artifact_of(self._dispatcher), settings.backend, device)
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
        networks = dispatcher.programs.captures.networks()
        if args or kwargs:
            network = captured_network(dispatcher, args, kwargs)
        elif networks:
            network = networks[0]
        else:
            network = self._captured_again("explain(sample, timestep, ...)")
        least = [costs[0] for one in dispatcher.companions if (costs := one.programs.costs())]
        companions = tuple(
            CompanionReport(cost.network, cost.results, cost.total, cost.ratio)
            for cost in least
            if cost.results < cost.total
        )
        name = type(self.module).__name__
        schedule = dispatcher.settings.schedule.describe()
        return explain(network, dispatcher.settings.depths, name, companions, tuple(schedule))

    def export_onnx(
        self, folder: str | os.PathLike[str], /, *args: Any, prologue: bool = False, **kwargs: Any
    ) -> Path:
        """Write both graphs for ONNX runtimes and TensorRT: a folder that needs no Python.

        ``full.onnx`` and ``shallow.onnx``, cut at the current depth, read their weights from one
        ``weights.data``, where each is stored once, under its parameter's name. Inputs have
        the names of forward's parameters, results are ``out_0`` (or ``out_sample``, if the network
        returns named fields), and the full graph's ``boundary_0`` feeds the shallow graph's.
        ``manifest.json`` lists names, dtypes and shapes of all of them, and the schedule.

        Weights and inputs keep their dtypes; autocast and forecasts are no part of the graphs: the
        shallow one takes one boundary, which the caller may have extrapolated. A capture made
        with ``dynamic=True`` has named sizes, such as ``sample_2``, where others have numbers.
        The folder appears at once, when it is complete; an earlier export in it is replaced.

        Args:
            folder: where to write.
            prologue: write what is the same at every step, such as projections of the text, as a
                graph of its own, ``prologue.onnx``, to be run once for a picture: its results,
                ``hoisted_0`` and so on, are inputs of the other two. Left out where there is
                nothing of the kind.
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
            NoCutError, DepthError: there is nothing to cut at this depth.
        """
        dispatcher = self._dispatcher
        settings = dispatcher.settings
        if self.module.training:
            raise ExportError("the network is in training mode: call .eval() before the export")
        if len(settings.depths) > 1:
            raise ExportError(
                "an export is one full and one shallow graph, and this schedule takes more: "
                "cache_compile with another schedule first"
            )
        captures = dispatcher.programs.captures
        current = captures.current_networks(settings.dynamic)
        if args or kwargs:
            with without_autocast(tree_leaves((args, kwargs))):
                network = captured_network(dispatcher, args, kwargs)
        elif current:
            network = current[0]
        elif captures.networks():
            raise NotCompiledError(_NOTHING_CAPTURED.format("export_onnx(folder, sample, ...)"))
        else:
            network = self._captured_again("export_onnx(folder, sample, timestep, ...)")
        target = Path(folder).expanduser().resolve()
        export(
            network,
            self.module,
            dispatcher.original,
            settings.depths[0],
            settings.schedule,
            prologue,
            target,
            Display(type(self.module).__name__, settings.verbose),
        )
        return target

    def _switch(self, enabled: bool) -> None:
        self._dispatcher.enabled = enabled
        for companion in self._dispatcher.companions:
            companion.follow_users()

    def _captured_again(self, example: str) -> CapturedNetwork:
        """Capture a call that a loaded program serves: such a program is code, and has no graph.

        Raises:
            NotCompiledError: there is none; the message suggests ``example``.
        """
        loaded = self.signatures
        if not loaded:
            raise NotCompiledError(_NOTHING_CAPTURED.format(example))
        args, kwargs, _ = example_of(loaded[0], device_of(self.module))
        return captured_network(self._dispatcher, args, kwargs)


class JointHandle(Handle):
    """The handle of a pipeline with several denoisers: one for much noise and one for little.

    Switches, counts, warm-up and saving are those of all. What is about one graph is the first
    one's: ``module``, ``explain``; ``handle(pipe.<name>)`` is another one's.

    Args:
        handles: one for each, by the name of the pipeline's component.
    """

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        super().__init__(next(iter(handles.values()))._dispatcher)
        self._handles = dict(handles)

    @property
    def enabled(self) -> bool:
        """Whether calls of all of them are cached."""
        return all(one.enabled for one in self._handles.values())

    @property
    def stats(self) -> Stats:
        """Counts since the last ``cache_compile``, of all of them together."""
        return Stats.total([one.stats for one in self._handles.values()])

    def report(self) -> str:
        return "\n".join(f"{name}: {one.report()}" for name, one in self._handles.items())

    def enable(self) -> None:
        for one in self._handles.values():
            one.enable()

    def disable(self) -> None:
        for one in self._handles.values():
            one.disable()

    def reset(self, *, programs: bool = False) -> None:
        for one in self._handles.values():
            one.reset(programs=programs)

    def remove(self) -> None:
        for one in self._handles.values():
            one.remove()

    @property
    def signatures(self) -> list[str]:
        return list(dict.fromkeys(s for one in self._handles.values() for s in one.signatures))

    def warmup(self, *calls: str | Mapping[str, Any] | Sequence[Any]) -> None:
        for one in self._handles.values():
            one.warmup(*calls)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the programs of each into a folder of its name in ``folder``, one after another."""
        target = Path(folder).expanduser().resolve()
        for name, one in self._handles.items():
            one.save(target / name)
        return target

    def export_onnx(
        self, folder: str | os.PathLike[str], /, *args: Any, prologue: bool = False, **kwargs: Any
    ) -> Path:
        """Write the graphs of each into a folder of its name in ``folder``, one after another."""
        target = Path(folder).expanduser().resolve()
        for name, one in self._handles.items():
            one.export_onnx(target / name, *args, prologue=prologue, **kwargs)
        return target


_NOTHING_CAPTURED = (
    "nothing is captured of the network as it is now: call the network or its pipeline once, or "
    "give an example call: handle(unet).{}"
)


def _artifact_of(dispatcher: Dispatcher) -> Artifact:
    """Everything compiled so far for the network and the settings as they are now."""
    settings = dispatcher.settings
    programs = dispatcher.programs.programs_to_save(settings.target)
    captures = dispatcher.programs.captures
    return Artifact(
        network=type(dispatcher.module).__name__,
        backend=(settings.backend.name, dict(getattr(settings.backend, "options", {}))),
        cuts=settings.target.spec,
        dynamic=settings.dynamic.as_argument() if settings.dynamic is not None else False,
        cuda_graphs=settings.cuda_graphs,
        channels_last=settings.channels_last,
        schedule=settings.schedule,
        forecasts=tuple(map(name_of, settings.forecasts)),
        structure=portable(captures.structure()),
        written=tuple(sorted(captures.written)),
        programs=programs,
    )


def device_of(network: nn.Module) -> torch.device:
    """The device of its first parameter or buffer; the CPU if it has none."""
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
