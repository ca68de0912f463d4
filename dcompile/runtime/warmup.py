"""Captures and compiles ahead of traffic, without a run."""

from __future__ import annotations

from typing import Any

import torch

from dcompile.compiler.capture import CapturedNetwork
from dcompile.errors import CaptureError
from dcompile.progress import Display
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.hoisting import followed_by_hoisted
from dcompile.runtime.lanes import on_device


def captured_network(
    dispatcher: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CapturedNetwork:
    """Capture the network for a call like this one, without compiling or running it.

    Raises:
        CaptureError: it cannot be captured.
    """
    state, programs = dispatcher.state, dispatcher.programs
    call = state.reader.read(args, kwargs)
    if call.form is None:
        raise CaptureError("expected a call with a sample and a timestep")
    if call.refusal is not None:
        raise CaptureError(f"a call like this is never cached: {call.refusal}")
    with programs.lock:
        display = Display(type(dispatcher.module).__name__, state.settings.verbose)
        standard = dispatcher.runners.forms.standard(call.form, call.leaves)
        try:
            return programs.captures.captured(standard, state.settings.dynamic, display)
        finally:
            state.counters.built(display)


def warm_up(dispatcher: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compile for calls like this one, and run each graph once.

    No run notices. Where there are CUDA graphs, they are recorded.

    Raises:
        CaptureError: the call would run uncached, or cannot be captured.
        BackendError, DepthError, NoCutError: see ``compiler.build.build``.
    """
    state = dispatcher.state
    if state.prepare is not None:
        state.notices.warn(
            "warmup: with speedup=, cuts are chosen when the first run is over, and what is "
            "compiled now is not what will run: make one run, then warm up"
        )
    call = state.reader.read(args, kwargs)
    if call.form is None:
        raise CaptureError("warmup: expected a call with a sample and a timestep")
    reason = call.refusal or dispatcher.reason_not_to_cache(call)
    if reason is not None:
        raise CaptureError(f"warmup: {reason}, so such a call runs uncached")
    runner = dispatcher.runners.runner_for(state, call)
    with torch.no_grad():
        leaves, _ = followed_by_hoisted(call.leaves, runner.prologue, None, thoroughly=False)
        _, cached = runner.refresh(leaves)
        for level, layout in enumerate(runner.program.cached):
            latest = None
            if layout.history > 1:
                latest = on_device((1.0,) + (0.0,) * (layout.history - 1), call.device)
            if level == 0:
                runner.reuse(leaves, cached, latest)
            else:
                _, cached = runner.refresh(leaves, cached, level, latest)
