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

from dcompile.compiler.signature import example_of
from dcompile.errors import CaptureError, ExportError, NotCompiledError
from dcompile.progress import Display
from dcompile.report.explain import Explanation, explain
from dcompile.runtime.dispatcher import Dispatcher, Stats
from dcompile.storage.artifact import write
from dcompile.storage.onnx import export, without_autocast


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
        for standin in self._dispatcher.companions:
            standin.follow_users()

    def disable(self) -> None:
        """Run uncached, as before ``cache_compile``, and drop what is cached."""
        self._dispatcher.enabled = False
        for standin in self._dispatcher.companions:
            standin.follow_users()
        self._dispatcher.release()

    def reset(self) -> None:
        """Drop what is cached: the next step of every running generation refreshes."""
        self._dispatcher.reset()

    def remove(self) -> None:
        """Give the module its own forward back. Afterwards it is no longer a compiled one."""
        self.disable()
        self._dispatcher.uninstall()
        self._dispatcher.detach(self._dispatcher.companions)

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
        device = device_of(self.module)
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
        device = device_of(self.module)
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
            args, kwargs, _ = example_of(dispatcher.signatures()[0], device_of(self.module))
        if args or kwargs:
            network = dispatcher.network_for(args, kwargs)
        elif networks:
            network = networks[0]
        else:
            raise NotCompiledError(
                "nothing is captured yet: call the network or its pipeline once, or give an "
                "example call: handle(unet).explain(sample, timestep, ...)"
            )
        least = [parts[0] for parts in (one.parts() for one in dispatcher.companions) if parts]
        companions = tuple(part for part in least if part.results < part.of)
        name = type(self.module).__name__
        return explain(network, dispatcher.settings.depths[0], name, companions)

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
                args, kwargs, _ = example_of(dispatcher.signatures()[0], device_of(self.module))
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
