"""The one place where tests reach behind the public API. Names what they look at."""

from __future__ import annotations

from typing import Any

import dcompile
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.program import Program
from dcompile.runtime.cuda_graphs import RecordedProgram
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.partial_programs import PartialProgram
from dcompile.runtime.run import Run
from dcompile.runtime.settings import Settings
from dcompile.runtime.warmup import captured_network


def dispatcher_of(module: Any) -> Dispatcher:
    """Of a compiled network or pipeline."""
    return dcompile.handle(module)._dispatcher


def settings_of(module: Any) -> Settings:
    """What ``cache_compile`` was asked for."""
    return dispatcher_of(module).settings


def original_of(module: Any) -> Any:
    """The network's own forward."""
    return dispatcher_of(module).original


def networks_of(module: Any) -> list[CapturedNetwork]:
    """All that was captured."""
    return dispatcher_of(module).programs.captures.networks()


def captured(module: Any, *args: Any, **kwargs: Any) -> CapturedNetwork:
    """The network as it is captured for such a call."""
    return captured_network(dispatcher_of(module), args, kwargs)


def programs_of(module: Any) -> list[Program]:
    """All that was compiled."""
    return list(dispatcher_of(module).programs._programs.values())


def recorded_of(module: Any) -> list[RecordedProgram]:
    """All that was recorded as CUDA graphs."""
    return list(dispatcher_of(module).state.binder._recorded.values())


def is_recorded(recorded: RecordedProgram) -> bool:
    """Whether it has graphs: its recording has not failed."""
    return bool(recorded._graphs)


def runs_of(module: Any) -> list[Run]:
    """The runs that are tracked now."""
    tracker = dispatcher_of(module).state.tracker
    runs = [track.run for track in tracker._by_storage.values()]
    return runs + tracker._by_value.runs


def cached_of(module: Any) -> list[Any]:
    """What all lanes have cached now."""
    return [lane.cached for lane in dispatcher_of(module).state.tracker.lanes()]


def companions_of(module: Any) -> list[LazyNetwork]:
    """The wrappers of the networks whose results the denoiser reads."""
    return dispatcher_of(module).companions


def partial_programs_of(companion: LazyNetwork) -> list[PartialProgram]:
    """All that was captured of a companion."""
    return list(companion.programs._programs.values())
