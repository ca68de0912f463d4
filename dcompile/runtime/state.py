"""The dispatcher's state: replaced as a whole by ``cache_compile``, never changed in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dcompile.compiler.call import CallForms
from dcompile.compiler.reader import Call, CallReader
from dcompile.notices import Notices
from dcompile.runtime.binder import Binder, Runner
from dcompile.runtime.counters import Counters
from dcompile.runtime.lanes import Lane
from dcompile.runtime.planner import Planner
from dcompile.runtime.settings import Settings
from dcompile.runtime.tracking import StepTracker


class RefreshRecord(NamedTuple):
    """A refresh, as an observer sees it.

    Attributes:
        step: of the call.
        steps: from the run's first call to the end of its timesteps, if known.
        lane: whose cache was refreshed.
        program: what ran.
        leaves: the call's leaves.
        sample: one of them, or the first of several.
        result: what the network returned.
        cached: what the lane now has cached, laid out by ``program.cached``.
    """

    step: int
    steps: int | None
    lane: Lane
    program: Runner
    leaves: Sequence[Any]
    sample: torch.Tensor
    result: Any
    cached: Any


@dataclass(frozen=True)
class State:
    """Everything a call needs, read once at its start.

    A call that is under way while another thread calls ``cache_compile`` goes on with the state it
    began with.

    Attributes:
        settings: what was asked for.
        enabled: whether calls are cached at all.
        reader: reads calls.
        tracker: finds the run, lane and step of a call; owns, through them, all that is cached.
        planner: plans runs.
        binder: binds programs; owns the buffers of CUDA graphs.
        counters: counts calls.
        notices: shows messages to the user.
        observer: sees every refresh; None for nobody.
        prepare: is given the arguments of the next call that can be cached, and returns the state
            that runs it, and the call as that reads it.
    """

    settings: Settings
    enabled: bool
    reader: CallReader
    tracker: StepTracker
    planner: Planner
    binder: Binder
    counters: Counters
    notices: Notices
    observer: Callable[[RefreshRecord], None] | None = None
    prepare: Callable[[tuple[Any, ...], dict[str, Any]], tuple[State, Call]] | None = None

    @staticmethod
    def of(module: nn.Module, forms: CallForms, settings: Settings) -> State:
        """The state right after ``cache_compile``: nothing cached, nothing counted."""
        notices = Notices()
        return State(
            settings=settings,
            enabled=True,
            reader=CallReader(forms, timestep_to_device=settings.cuda_graphs is not False),
            tracker=StepTracker(),
            planner=Planner(settings, notices),
            binder=Binder(module, settings, notices),
            counters=Counters(),
            notices=notices,
        )
