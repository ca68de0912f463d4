"""The per-step hot path: read the call, find its step, ask the plan, run one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from dcompile.compat.functorch import what_transforms
from dcompile.compiler.capture import capturing_in_this_thread
from dcompile.compiler.capture_cache import IN_TRAINING_MODE
from dcompile.compiler.program_cache import ProgramCache
from dcompile.compiler.reader import Call
from dcompile.policy.schedule import Plan
from dcompile.runtime.binder import Refusal, Runner
from dcompile.runtime.counters import Stats
from dcompile.runtime.lanes import Lane
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.readback import Readback
from dcompile.runtime.run import Run
from dcompile.runtime.runners import Runners
from dcompile.runtime.settings import Settings
from dcompile.runtime.state import RefreshRecord, State
from dcompile.runtime.wrapper import ForwardWrapper, wrapper_of

_NOTHING = nullcontext()
# Calls in a row that seem to be first steps of runs, before it is said.
MANY_FIRST_STEPS = 16


def dispatcher_of(module: Any) -> Dispatcher | None:
    """The dispatcher that replaces the module's forward, if one does."""
    found = wrapper_of(module)
    return found if isinstance(found, Dispatcher) else None


class Dispatcher(ForwardWrapper):
    """Replaces the denoiser's ``forward``.

    Holds no weights: they are looked up in the live module when a run begins.

    Attributes:
        state: what calls need; replaced as a whole, never changed in place.
        runners: what has been captured and compiled; survives ``configure``.
        companions: the pipeline's networks whose results this one reads, such as ControlNets.
    """

    __slots__ = ("companions", "runners", "state")

    def __init__(self, module: nn.Module, original: Callable[..., Any], settings: Settings) -> None:
        super().__init__(module, original)
        self.runners = Runners(module, lambda: self.original, settings.roles)
        self.companions: list[LazyNetwork] = []
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other settings from the next call on; keeps compiled programs that still fit."""
        self.runners.configure(settings)
        self.state = State.of(self.module, self.runners.forms, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if is_compiling() and capturing_in_this_thread():
            return self.original(*args, **kwargs)
        if (copy := self.copy_that_is_called()) is not None:
            return self._run_copy(state, copy, args, kwargs)
        if not state.enabled:
            return call_original(self, args, kwargs)
        if (reason := what_transforms()) is not None:
            return self._run_uncached(state, reason, args, kwargs)
        call = state.reader.read(args, kwargs)
        if (reason := call.refusal or self.reason_not_to_cache(call)) is not None:
            return self._run_uncached(state, reason, args, kwargs)
        if state.prepare is not None:
            state, call = state.prepare(args, kwargs)
        run, lane, step = state.tracker.enter(*call.whose)
        try:
            run.follow_weights()
            bound = lane.bound if call.signature is lane.signature else None
            if bound is None:
                bound = run.programs.get(call.signature) or self.runners.bind(state, run, call)
                if isinstance(bound, Refusal):
                    return self._run_uncached(state, bound.reason, args, kwargs, bound.result)
            plan = run.plan or self._plan(state, run, bound, call)
            if lane.program is not bound.program or lane.signature is not call.signature:
                lane.release()
            wanted = plan.level(step)
            run.note_due(step, wanted)
            level = lane.required_level(wanted, run.due)
            # A refresh step has the time to see whether a switch was flipped meanwhile.
            if level == len(run.due) and step and run.has_changed():
                bound = self.runners.bind(state, run, call)
                if isinstance(bound, Refusal):
                    return self._run_uncached(state, bound.reason, args, kwargs, bound.result)
                if lane.program is not bound.program:
                    lane.release()
            # Autocast, if on, stays on: the graph was captured without its conversions.
            with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
                result = self._execute(state, bound, run, lane, step, level, call)
        except BaseException:  # an interrupt too: nothing of this run may be used again
            state.tracker.forget(run)
            raise
        if level:
            self._count_refresh(state, run, lane, bound, level, wanted)
        else:
            run.reused = True
            state.counters.reuse(bound.program.ratio)
        if step + 1 == run.steps or run.ended:
            finish(state, run, lane)
        return result

    def _execute(
        self, state: State, bound: Runner, run: Run, lane: Lane, step: int, level: int, call: Call
    ) -> Any:
        """Run one graph from what the lane has cached, and cache what it computed."""
        layouts = bound.program.cached
        leaves = lane.leaves(bound, call.leaves, refreshes=level > 0)
        coefficients = None
        if level < len(layouts) and layouts[level].history > 1:
            coefficients = lane.coefficients(
                run.forecasts[level], level, layouts[level].history, step, call.device
            )
        if level == 0:
            result, drift = bound.reuse(leaves, lane.cached, coefficients)
            if drift is not None and run.plan is not None:
                run.plan.observe(step, Readback(drift))
            return result
        result = lane.refresh(
            lambda: bound.refresh(leaves, lane.cached, level, coefficients),
            run.forecasts,
            layouts,
            level,
            step,
        )
        if any(layout.history > 1 for layout in layouts) and not lane.check_finite(layouts, level):
            state.notices.warn("features are not finite: nothing is extrapolated from them")
        lane.program, lane.signature, lane.bound = bound.program, call.signature, bound
        if state.observer is not None:
            held = getattr(lane.cached, "tensors", lane.cached)
            told = (step, run.steps, lane, bound, leaves, call.sample, result, held)
            state.observer(RefreshRecord(*told))
        return result

    def reason_not_to_cache(self, call: Call) -> str | None:
        """Why this call runs uncached, as far as it is not its arguments'; None if it does not."""
        grad = torch.is_grad_enabled()
        if (grad or self.runners.training_matters) and self.module.training:
            return IN_TRAINING_MODE
        if grad and any(isinstance(x, torch.Tensor) and x.requires_grad for x in call.leaves):
            return "an input requires grad"
        return None

    def _run_uncached(
        self,
        state: State,
        reason: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: tuple[Any, ...] = (),
    ) -> Any:
        """Call the module's own forward, unless it was called already and returned ``result``."""
        state.counters.uncached(reason.splitlines()[0])
        suffix = "" if "uncached" in reason else f"; {type(self.module).__name__} runs uncached"
        state.notices.warn(reason + suffix)
        return result[0] if result else call_original(self, args, kwargs)

    def _count_refresh(
        self, state: State, run: Run, lane: Lane, bound: Runner, level: int, wanted: int
    ) -> None:
        forced = run.why_forced(lane) if level > wanted else None
        state.counters.refresh(bound.program.cost(level), full=level == len(run.due), forced=forced)
        note_first_steps(state, lane)

    def _run_copy(
        self, state: State, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reason = (
            f"a shallow copy of {type(copy).__name__} is not compiled: call cache_compile on it"
        )
        state.counters.uncached(reason)
        state.notices.warn(f"{reason}; it runs uncached")
        return type(copy).forward(copy, *args, **kwargs)

    # Cold: once for each run and kind of call

    def _plan(self, state: State, run: Run, bound: Runner, call: Call) -> Plan:
        earlier = state.tracker.latest_planned(run)
        if earlier is not None:
            note_if_nothing_was_reused(state, earlier)
        timestep = call.timestep
        if run.steps is not None:
            timestep = state.tracker.element(timestep)
        plan, forecasts = state.planner.plan(run.steps, bound.program.ratio, timestep)
        run.begin(plan, forecasts)
        return plan

    # Steering; see ``handles.Handle``

    @property
    def programs(self) -> ProgramCache:
        """Everything captured and compiled so far."""
        return self.runners.programs

    @property
    def settings(self) -> Settings:
        """What was asked for."""
        return self.state.settings

    @property
    def enabled(self) -> bool:
        return self.state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.state = replace(self.state, enabled=value)

    @property
    def observer(self) -> Callable[[RefreshRecord], None] | None:
        """Sees every refresh; None for nobody."""
        return self.state.observer

    @observer.setter
    def observer(self, value: Callable[[RefreshRecord], None] | None) -> None:
        self.state = replace(self.state, observer=value)

    def stats(self) -> Stats:
        """Counts since the last ``configure``."""
        tracker = self.state.tracker
        held = {id(t): t.nbytes for lane in tracker.lanes() for t in lane.tensors()}
        reason = self.programs.captures.last_reason
        return self.state.counters.stats(tracker.runs, sum(held.values()), reason)

    def release(self) -> None:
        """Drop all that is cached, and the buffers of CUDA graphs."""
        self.state.tracker.reset()
        self.state.binder.release()


def call_original(dispatcher: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the network's own forward, while it is not captured in another thread."""
    with dispatcher.programs.captures.gate.call():
        return dispatcher.original(*args, **kwargs)


def finish(state: State, run: Run, lane: Lane) -> None:
    """Free what is cached at the last step: what follows, such as decoding, needs memory."""
    lane.release()
    note_if_nothing_was_reused(state, run)


def note_first_steps(state: State, lane: Lane) -> None:
    """Say that no call of late was taken for the second step of a run."""
    if state.tracker.first_steps != MANY_FIRST_STEPS:
        return
    form = lane.signature[0]
    state.notices.warn(
        f"{MANY_FIRST_STEPS} calls in a row were each taken for the first step of a run, so none "
        f"reused anything: their timesteps, {form.roles.timestep!r}, do not go one way like "
        "those of a sampling loop. If another argument is the timestep, give its name to "
        "cache_compile(timestep=...); or pass elements of one tensor of timesteps"
    )


def note_if_nothing_was_reused(state: State, run: Run) -> None:
    """Say so, once for each run, where the plan had wanted reuse."""
    if run.forced and not run.reused:
        state.notices.warn(
            f"a run of {run.step + 1} steps reused nothing, though its schedule wanted it at "
            f"{run.forced} calls: {run.latest_reason}"
        )
        run.forced = 0
