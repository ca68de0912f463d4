"""The per-step hot path: find the step, ask the schedule, run one of the compiled graphs."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from dcompile.backends import Backend
from dcompile.compiler.build import build, rebound
from dcompile.compiler.capture import CapturedNetwork, DynamicSizes, capture, capturing_threads
from dcompile.compiler.fingerprint import (
    Structure,
    ToggleSnapshot,
    changed_by_running,
    difference,
    portable,
    structure_of,
    tensors_in_containers,
)
from dcompile.compiler.lazy import materialize
from dcompile.compiler.program import (
    BoundProgram,
    CacheLayout,
    CompiledGraph,
    Constant,
    Program,
    ProgramSpec,
    weights_of,
)
from dcompile.compiler.signature import (
    CallForm,
    CallForms,
    Signature,
    StandardCall,
    portable_signature,
    signature_of,
)
from dcompile.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    DcompileError,
    NotCompiledError,
)
from dcompile.passes.base import is_random
from dcompile.policy.forecast import Damped, Forecast, Reuse, factors, name_of
from dcompile.policy.sampler import default_forecast, default_power, error_gains, is_stochastic
from dcompile.policy.schedule import Plan, RunInfo, Schedule
from dcompile.progress import Display
from dcompile.report.explain import gains_little
from dcompile.runtime.cuda_graphs import RECORDERS, HeldBoundary, RecordedProgram, Reordered
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.readback import Readback
from dcompile.runtime.tracking import Lane, Run, StepTracker
from dcompile.runtime.wrapper import ForwardWrapper, wrapper_of
from dcompile.storage.artifact import Artifact, SavedProgram

# Call signatures whose CUDA graphs are kept; each has buffers and a memory pool of its own.
MAX_RECORDED = 16
# Boundaries that a shallow graph takes while its forecast is not chosen yet.
AUTO_HISTORY = 2

_NUMBER = re.compile(r"[0-9.]+")

Runner = BoundProgram | RecordedProgram | Reordered
_Place = tuple[int, ProgramSpec, Backend]
"""What a loaded program is good for: number of the structure, cuts, backend."""


@dataclass(frozen=True)
class Settings:
    """What ``cache_compile`` was asked for.

    Attributes:
        depths: of the cuts, ascending.
        forecasts: one for each of them; "auto" is chosen at the start of each run.
        sampler: where to find the sampler then.
    """

    schedule: Schedule
    depths: tuple[int, ...]
    backend: Backend
    dynamic: DynamicSizes | None
    verbose: bool
    cuda_graphs: bool | Literal["auto"] = "auto"
    forecasts: tuple[Forecast | Literal["auto"], ...] = (Reuse(),)
    sampler: Callable[[], Any] | None = None

    @functools.cached_property
    def cuts(self) -> ProgramSpec:
        """What programs are built for."""
        histories = tuple(
            AUTO_HISTORY if forecast == "auto" else forecast.history for forecast in self.forecasts
        )
        return ProgramSpec(self.depths, histories, self.schedule.probe)


@dataclass(frozen=True)
class Stats:
    """Counts since the last ``cache_compile``.

    Attributes:
        refresh_steps: calls that ran the full graph.
        partial_steps: calls that ran a graph in between, of a ``MultiLevel``.
        reuse_steps: calls that ran the shallow graph.
        uncached_calls: calls that went to the module itself (training, gradients).
        runs: sampling runs seen.
        captures: networks captured.
        compile_seconds: spent capturing and compiling.
        cache_bytes: bytes of cached tensors held now.
        flops_speedup: how much less compute (FLOPs) all these calls took than refreshing at each.
    """

    refresh_steps: int
    partial_steps: int
    reuse_steps: int
    uncached_calls: int
    runs: int
    captures: int
    compile_seconds: float
    cache_bytes: int
    flops_speedup: float


@functools.lru_cache(maxsize=1024)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A small tensor that is copied to its device once, however often it is used."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


class RefreshRecord(NamedTuple):
    """A refresh that somebody watches.

    Attributes:
        step, lane: where it belongs.
        steps: from the generation's first call to the end of its timesteps, if known.
        program: what ran.
        leaves: the call's leaves.
        result: what it gave.
        cached: what the lane now has cached, as ``program.cached`` orders it.
    """

    step: int
    steps: int | None
    lane: Lane
    program: Runner
    leaves: list[Any]
    result: Any
    cached: Any


def dispatcher_of(module: Any) -> Dispatcher | None:
    """The dispatcher that stands in for the module's forward, if one does."""
    found = wrapper_of(module)
    return found if isinstance(found, Dispatcher) else None


def _in_this_thread() -> bool:
    """Whether it is this thread that torch compiles or exports in, as far as can be told."""
    return not capturing_threads or threading.get_ident() in capturing_threads


def _steady(held: Any) -> contextlib.AbstractContextManager[tuple[Any, ...]]:
    """What a lane has cached, to look at: recorded graphs share their buffers between lanes."""
    return held.steady() if isinstance(held, HeldBoundary) else contextlib.nullcontext(held)


_IN_TRAINING_MODE = "the network is in training mode (call .eval())"


class _TrainingMattersError(CaptureError):
    """What the network computes depends on whether it is in training mode, and it is."""


class _Claim(NamedTuple):
    """What a forecast says of one value before its refresh.

    Attributes:
        place: among the values of its cut.
        base: the latest refresh's.
        added: what the forecast adds to it, in float32.
    """

    place: int
    base: torch.Tensor
    added: torch.Tensor


def _foretold(
    forecast: Any, held: Any, cut: CacheLayout, step: int, refreshed: Sequence[int]
) -> list[_Claim]:
    """What a checked forecast says of the values that are about to be refreshed."""
    if not isinstance(forecast, Damped) or len(refreshed) < 2:
        return []
    given = factors(forecast, step, refreshed)
    claims = []
    with _steady(held) as kept:
        values = kept[cut.all]
        for place in range(cut.size):
            latest = values[place]
            if not isinstance(latest, torch.Tensor) or not latest.is_floating_point():
                continue
            # Recorded graphs write the new values over the old ones.
            base = latest.float().clone()
            added = (given[0] - 1.0) * base
            for age, factor in enumerate(given[1:], start=1):
                if factor:
                    added = added + factor * values[age * cut.size + place].float()
            claims.append(_Claim(place, base, added))
    return claims


def _check(lane: Lane, number: int, cut: CacheLayout, claims: Sequence[_Claim]) -> None:
    """Trust a forecast from now on as far as these claims, and those before, were right."""
    with _steady(lane.cached) as kept:
        values = kept[cut.latest]
        right = sum(((values[c.place].float() - c.base) * c.added).sum() for c in claims)
    claimed = sum(c.added.square().sum() for c in claims)
    tally = torch.stack([cast(torch.Tensor, right), cast(torch.Tensor, claimed)])
    tally = tally.nan_to_num(0.0, 0.0, 0.0)  # what overflowed says nothing, now and later
    before = lane.tally[number]
    if before is not None:
        tally = tally + Damped.MEMORY * before
    lane.tally = (*lane.tally[:number], tally, *lane.tally[number + 1 :])
    share = (tally[0] / tally[1]).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
    news = Readback(share)
    known, waiting = (lane.news[number], news) if news.late else (news, None)
    # Rounded, so that few coefficient tensors are ever made.
    trust = round(float(known) * 32) / 32 if known is not None else 0.0
    lane.trust = (*lane.trust[:number], trust, *lane.trust[number + 1 :])
    lane.news = (*lane.news[:number], waiting, *lane.news[number + 1 :])


def _place_of(timestep: Any, timesteps: Any) -> int:
    """Where among a sampler's timesteps a run told by their values begins."""
    if timestep is None:
        return 0
    value = float(timestep if not isinstance(timestep, torch.Tensor) else timestep.flatten()[0])
    return next((place for place, own in enumerate(timesteps) if float(own) == value), 0)


class Dispatcher(ForwardWrapper):
    """Stands in for the denoiser's ``forward``.

    Owns the captured networks, the compiled programs and, through its step tracker, everything
    that is cached. Holds no weights: they are looked up in the live module when a generation
    begins.
    """

    __slots__ = (
        "_building",
        "_captures",
        "_compile_seconds",
        "_cost",
        "_counting",
        "_counts",
        "_forms",
        "_networks",
        "_programs",
        "_recorded",
        "_saved",
        "_sizes_fixed",
        "_stochastic",
        "_structures",
        "_tracker",
        "_training_matters",
        "_warned",
        "_written",
        "companions",
        "observer",
        "settings",
    )

    def __init__(self, module: nn.Module, original: Callable[..., Any], settings: Settings) -> None:
        super().__init__(module, original)
        self._forms = CallForms(original)
        self.companions: list[
            LazyNetwork
        ] = []  # the pipeline's networks whose results this one reads
        self._counting = threading.Lock()
        self._building = threading.RLock()  # capture and compile; never held on a warm call
        self._structures: list[Structure] = []
        self._written: frozenset[str] = frozenset()
        self._networks: dict[tuple[int, Signature, DynamicSizes | None], CapturedNetwork] = {}
        self._programs: dict[tuple[CapturedNetwork, ProgramSpec, Backend], Program] = {}
        self._saved: list[tuple[_Place, SavedProgram]] = []
        self._recorded: dict[tuple[Program, Signature], RecordedProgram] = {}
        # Dynamic captures that a backend could not compile.
        self._sizes_fixed: set[tuple[CapturedNetwork, Backend]] = set()
        self._warned: set[str] = set()
        self.observer: Callable[[RefreshRecord], None] | None = None  # sees every refresh
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other settings from the next call on; keeps compiled programs that still fit."""
        self.settings = settings
        self.enabled = True
        self._tracker = StepTracker()
        self._recorded.clear()
        self._warned.clear()
        self._counts: Counter[str] = Counter()
        self._cost = 0.0  # of all calls counted, in refresh steps
        self._captures = 0
        self._compile_seconds = 0.0
        self._training_matters = False  # known to draw random numbers or to learn as it runs
        self._stochastic: tuple[weakref.ref[Any], bool] | None = None  # of the sampler tried last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled or (torch.compiler.is_compiling() and _in_this_thread()):
            return self.original(*args, **kwargs)
        leaves, form = self._forms.flatten(args, kwargs)
        if form is None:
            return self._run_uncached("no sample or no timestep is given", args, kwargs)
        reason = self._reason_not_to_cache(leaves, form)
        if reason is not None:
            return self._run_uncached(reason, args, kwargs)
        timestep = leaves[form.timestep]
        signature, conditioning = self._normalize_call(leaves, form)
        tracker = self._tracker
        run, lane, step = tracker.enter(timestep, conditioning, signature)
        try:
            bound = lane.bound
            if signature != lane.signature:  # hardly ever, and sooner told than hashed
                bound = None
            if bound is None:
                try:
                    bound = run.programs.get(signature)
                except TypeError:
                    return self._run_uncached("an argument cannot be hashed", args, kwargs)
            if bound is None:
                try:
                    bound = self._bind(run, signature, leaves, form)
                except _TrainingMattersError as error:
                    return self._run_uncached(str(error), args, kwargs)
            plan = run.plan
            if plan is None:
                plan = self._planned(run, bound.program, timestep)
            if lane.program is not bound.program or lane.signature != signature:
                lane.cached = ()
            level = self._level(run, lane, step, plan)
            # A refresh step has the time to see whether a part was switched on or off meanwhile.
            if level == len(run.beats) and step and run.toggles.changed():
                run.invalidate_programs()
                bound = self._bind(run, signature, leaves, form)
                if lane.program is not bound.program:
                    lane.cached = ()
            # Autocast, if on, stays on: the graph was captured without its conversions.
            if torch.is_grad_enabled():
                with torch.no_grad():
                    result = self._run(bound, run, lane, step, level, leaves, form)
            else:
                result = self._run(bound, run, lane, step, level, leaves, form)
            if level:
                lane.program, lane.signature, lane.bound = bound.program, signature, bound
            return result
        except BaseException:  # an interrupt too: nothing of this generation may be used again
            tracker.forget(run)
            raise

    def _normalize_call(
        self, leaves: list[Any], form: CallForm
    ) -> tuple[Signature, list[torch.Tensor]]:
        """The call's signature and conditioning, with its timestep as a tensor."""
        timestep = leaves[form.timestep]
        if not isinstance(timestep, torch.Tensor):
            leaves[form.timestep] = torch.tensor(timestep)  # not a constant of the graph
        sample = leaves[form.sample]
        if sample.device.type == "cuda" and self.settings.cuda_graphs is not False:
            # A recorded graph reads from its device only. This waits for nothing on the device.
            leaves[form.timestep] = leaves[form.timestep].to(sample.device, non_blocking=True)
        return signature_of(form, leaves)

    def _level(self, run: Run, lane: Lane, step: int, plan: Plan) -> int:
        """How many cuts this call refreshes, the outermost first: 0 reuses, all is the full graph.

        What the schedule asks for, and what the lane lacks.
        """
        beats = run.beats
        level = plan.level(step)
        for cut in range(level):
            beats[cut] = step
        if not lane.cached:
            return len(beats)
        for cut in range(len(beats) - 1, level - 1, -1):
            if lane.refreshed[cut][0] < beats[cut]:
                return cut + 1
        return level

    def _run(
        self,
        bound: Runner,
        run: Run,
        lane: Lane,
        step: int,
        level: int,
        leaves: list[Any],
        form: CallForm,
    ) -> Any:
        cached = bound.program.cached
        coefficients = None
        if level < len(cached) and cached[level].history > 1:
            history = cached[level].history
            forecast = run.forecasts[level]
            given = factors(forecast, step, lane.refreshed[level])
            if isinstance(forecast, Damped):
                given = forecast.share(given, lane.trust[level])
            given += (0.0,) * (history - len(given))
            coefficients = _on_device(given, leaves[form.sample].device)
        if level == 0:
            self._count("reuse", bound.program.ratio)
            result, drift = bound.reuse(leaves, lane.cached, coefficients)
            if drift is not None:
                run.plan.observe(step, Readback(drift))
            return result
        if level == len(cached):
            self._count("refresh", 1.0)
        else:
            self._count("partial", bound.program.ratios[level])
        earlier = lane.refreshed if lane.cached else ((),) * len(cached)
        if not lane.cached:
            lane.trust, lane.news = (0.0,) * len(cached), (None,) * len(cached)
            lane.tally = (None,) * len(cached)
        foretold = [
            _foretold(forecast, lane.cached, cut, step, steps)
            for forecast, cut, steps in zip(run.forecasts[:level], cached, earlier, strict=False)
        ]
        result, lane.cached = bound.refresh(leaves, lane.cached, level, coefficients)
        for number, claims in enumerate(foretold):
            if claims:
                _check(lane, number, cached[number], claims)
        lane.refreshed = tuple(
            (step, *steps[: cut.history - 1]) if number < level else steps
            for number, (cut, steps) in enumerate(zip(cached, earlier, strict=True))
        )
        if any(cut.history > 1 for cut in cached):
            self._check_finite(lane, cached, level)
        if self.observer is not None:
            held = getattr(lane.cached, "tensors", lane.cached)
            self.observer(RefreshRecord(step, run.steps, lane, bound, leaves, result, held))
        return result

    def _check_finite(self, lane: Lane, cached: Sequence[CacheLayout], level: int) -> None:
        """No forecast is made of features that are not finite: the next step refreshes as well.

        On a CPU. From another device the news comes with the next refresh, and until then the
        shallow graph itself passes on the latest features where a forecast is not finite.
        """
        with _steady(lane.cached) as made:
            finite = [
                torch.isfinite(value).all()
                for cut in cached[:level]
                for value in made[cut.latest]
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
        if not finite:
            return
        news = Readback(functools.reduce(torch.logical_and, finite))
        known, lane.finite = (lane.finite, news) if news.late else (news, None)
        if known is not None and not float(known):
            self._warn("features are not finite: nothing is extrapolated from them")
            lane.cached = ()

    def _planned(self, run: Run, program: Program, timestep: Any) -> Plan:
        """Choose this run's plan and forecasts, by its sampler if they ask for that."""
        settings = self.settings
        if settings.schedule.uses_sampler or "auto" in settings.forecasts:
            info = self.describe_run(run.steps, program.ratio, timestep)
        else:
            info = RunInfo(run.steps, len(settings.depths), program.ratio, warn=self._warn)
        plan, forecasts = settings.schedule.plan(info), settings.forecasts
        if "auto" in forecasts:
            chosen = info.forecast
            refreshes = plan.refreshes() if run.steps else None
            if chosen != Reuse() and settings.schedule.probe is None:
                chosen = default_forecast(stochastic=False, steps=run.steps, refreshes=refreshes)
            forecasts = tuple(chosen if item == "auto" else item for item in forecasts)
        run.plan, run.forecasts = plan, forecasts
        run.beats = [0] * len(program.cached)
        return plan

    def describe_run(self, steps: int | None, ratio: float, timestep: Any = None) -> RunInfo:
        """What is known of a run that begins now, with this timestep if it is known."""
        cuts = len(self.settings.depths)
        sampler = self.settings.sampler() if self.settings.sampler is not None else None
        if sampler is None:
            return RunInfo(steps, cuts, ratio, power=0.0, warn=self._warn)
        if steps is not None and isinstance(timestep, torch.Tensor):
            own = getattr(sampler, "timesteps", None)
            shared = isinstance(own, torch.Tensor) and (
                own.untyped_storage() is timestep.untyped_storage()
            )
            if not shared:
                self._warn(
                    f"a run whose timesteps are not those of the {type(sampler).__name__} given to "
                    "cache_compile: its steps count alike, and nothing is extrapolated by 'auto'"
                )
                return RunInfo(steps, cuts, ratio, (1.0,) * steps, power=0.0, warn=self._warn)
        told = error_gains(sampler)
        if told is None:
            self._warn(
                f"{type(sampler).__name__} does not say how noisy its steps are: they count alike"
            )
            known_timesteps = getattr(sampler, "timesteps", None)
            count = steps if known_timesteps is None else len(known_timesteps)
            if count is None:
                return RunInfo(steps, cuts, ratio, power=0.0, warn=self._warn)
            told = [1.0] * count
        elif steps is None:
            told = told[_place_of(timestep, sampler.timesteps) :]
        known = self._stochastic
        if known is None or known[0]() is not sampler:
            known = self._stochastic = (weakref.ref(sampler), is_stochastic(sampler))
        power = default_power(sampler, stochastic=known[1])
        forecast = default_forecast(stochastic=known[1])
        return RunInfo(steps, cuts, ratio, tuple(told), power, forecast, self._warn)

    def detach(self, companions: Iterable[LazyNetwork]) -> None:
        """Read no more of these networks' results."""
        gone = list(companions)
        self.companions = [standin for standin in self.companions if standin not in gone]
        for standin in gone:
            standin.users.discard(self)
            standin.follow_users()

    def reset(self) -> None:
        """Drop all that is cached; the next call of each generation refreshes."""
        self._tracker.reset()

    def release(self) -> None:
        """Drop all that is cached, and the buffers of CUDA graphs."""
        self._tracker.reset()
        self._recorded.clear()

    def stats(self) -> Stats:
        cached = tree_leaves([getattr(c, "tensors", c) for c in self._tracker.cached()])
        held = {id(t): t.nbytes for t in cached if isinstance(t, torch.Tensor)}
        with self._counting:
            calls, cost = self._counts.total(), self._cost
        return Stats(
            refresh_steps=self._counts["refresh"],
            partial_steps=self._counts["partial"],
            reuse_steps=self._counts["reuse"],
            uncached_calls=self._counts["uncached"],
            runs=self._tracker.runs,
            captures=self._captures,
            compile_seconds=self._compile_seconds,
            cache_bytes=sum(held.values()),
            flops_speedup=calls / cost if cost else 1.0,
        )

    def network_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedNetwork:
        """Capture the network for a call like this one, without compiling or running it."""
        leaves, form = self._forms.flatten(args, kwargs)
        if form is None:
            raise CaptureError("expected a call with a sample and a timestep")
        with self._building:
            self._normalize_call(leaves, form)
            call = self._forms.standard(form, leaves)
            return self._captured(call, self._display(), self.settings.dynamic)

    def networks(self) -> list[CapturedNetwork]:
        """The networks captured so far, one for each call signature and structure."""
        return list(self._networks.values())

    def current_networks(self) -> list[CapturedNetwork]:
        """Those of them that fit the module and the settings as they are now."""
        structure = structure_of(self.module, self._written)
        return [
            network
            for (known, _, dynamic), network in list(self._networks.items())
            if dynamic == self.settings.dynamic and self._structures[known] == structure
        ]

    def warm_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile for calls like this one, and run each graph once.

        No generation notices. Where there are CUDA graphs, they are recorded.

        Raises:
            CaptureError: the call would run uncached, or cannot be captured.
        """
        leaves, form = self._forms.flatten(args, kwargs)
        if form is None:
            raise CaptureError("warmup: expected a call with a sample and a timestep")
        reason = self._reason_not_to_cache(leaves, form)
        if reason is not None:
            raise CaptureError(f"warmup: {reason}, so such a call runs uncached")
        signature = self._normalize_call(leaves, form)[0]
        enabled = self.enabled
        try:
            runner = self._bind(Run(None), signature, leaves, form)
        finally:
            self.enabled = enabled  # what is tried ahead of traffic does not end it
        with torch.no_grad():
            _, cached = runner.refresh(leaves)
            for level, cut in enumerate(runner.program.cached):
                latest = None
                if cut.history > 1:
                    as_is = (1.0,) + (0.0,) * (cut.history - 1)
                    latest = _on_device(as_is, leaves[form.sample].device)
                if level == 0:
                    runner.reuse(leaves, cached, latest)
                else:
                    _, cached = runner.refresh(leaves, cached, level, latest)

    def signatures(self) -> list[str]:
        """The call signatures that have a program, loaded or compiled; see portable_signature."""
        with self._building:
            compiled = {network for network, *_ in self._programs}
            found = [call for _, saved in self._saved for call in saved.calls]
            for (_, signature, _), network in self._networks.items():
                call = portable_signature(signature)
                if network in compiled and call is not None:
                    found.append(call)
            return list(dict.fromkeys(found))

    def saved(self) -> Artifact:
        """Everything compiled so far for the module and the settings as they are now."""
        with self._building:
            return self._saved_now()

    def _saved_now(self) -> Artifact:
        settings = self.settings
        structure = structure_of(self.module, self._written)
        number = next((i for i, s in enumerate(self._structures) if s == structure), -1)
        place = (number, settings.cuts, settings.backend)
        programs = {saved.program: saved for where, saved in self._saved if where == place}
        for (known, signature, _), network in self._networks.items():
            key = (network, settings.cuts, settings.backend)
            program = self._programs.get(key)
            call = portable_signature(signature)
            if known != number or program is None:
                continue
            if call is None:
                raise ArtifactError(
                    "a call of this network has arguments that cannot be written to a file"
                )
            calls = programs[program].calls if program in programs else ()
            programs[program] = SavedProgram(
                (*calls, call), network.in_spec, network.guard, program
            )
        if not programs:
            raise NotCompiledError(
                "nothing is compiled yet for the network as it is now: call it or its pipeline "
                "once, or handle(unet).warmup(...)"
            )
        self._refuse_unnamed_state(programs)
        dynamic = settings.dynamic
        return Artifact(
            network=type(self.module).__name__,
            backend=(settings.backend.name, dict(getattr(settings.backend, "options", {}))),
            cuts=settings.cuts,
            dynamic=dynamic.as_argument() if dynamic is not None else False,
            cuda_graphs=settings.cuda_graphs,
            schedule=settings.schedule,
            forecasts=tuple(map(name_of, settings.forecasts)),
            structure=portable(structure),
            written=tuple(sorted(self._written)),
            programs=tuple(programs.values()),
        )

    def _refuse_unnamed_state(self, programs: Iterable[Program]) -> None:
        """A loaded program looks up weights by name; it would use saved values of all else."""
        loose = tensors_in_containers(self.module)
        for program in programs:
            for weight in (w for graph in program.graphs for w in graph.convention.weights):
                where = isinstance(weight, Constant) and loose.get(weight.value.data_ptr())
                if where:
                    raise ArtifactError(
                        f"the network reads {where}, a tensor that has no name of its own, so a "
                        "saved program could not look it up: make it a parameter, buffer or "
                        "attribute of a submodule (modules in a list: use nn.ModuleList)"
                    )

    def adopt(self, artifact: Artifact) -> None:
        """Use loaded programs; they were checked against the module as it is now."""
        self._written |= frozenset(artifact.written)
        number = self._structure(self._display())
        settings = self.settings
        place = (number, settings.cuts, settings.backend)
        self._saved += [(place, program) for program in artifact.programs]

    def _reason_not_to_cache(self, leaves: list[Any], form: CallForm) -> str | None:
        if self.module.training and (torch.is_grad_enabled() or self._training_matters):
            return _IN_TRAINING_MODE
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
        ):
            return "an input requires grad"
        if not isinstance(leaves[form.sample], torch.Tensor):
            return "the sample is no tensor"
        timestep = leaves[form.timestep]
        if not isinstance(timestep, (torch.Tensor, int, float)):
            return "the timestep is neither a tensor nor a number"
        if leaves[form.sample].numel() == 0:
            return "the sample is empty"
        return None

    def _run_uncached(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._count("uncached")
        self._warn(f"{reason}; {type(self.module).__name__} runs uncached")
        return self.original(*args, **kwargs)

    def _bind(self, run: Run, signature: Signature, leaves: list[Any], form: CallForm) -> Runner:
        """A program for this call with the module's weights: found, or captured and compiled."""
        with self._building:
            display = self._display()
            leaves = materialize(leaves)
            try:
                call = self._forms.standard(form, leaves)
                program = self._program(call, display)
            except _TrainingMattersError:
                raise
            except CaptureError:
                args, kwargs = tree_unflatten(leaves, form.spec)
                with torch.no_grad():  # a call the network itself refuses raises its own error
                    self.original(*args, **kwargs)
                self.enabled = False
                raise
            except DcompileError:
                self.enabled = False
                raise
            finally:
                self._compile_seconds += sum(display.seconds.values())
            runner = self._runner(program, call)
        run.programs[signature] = runner
        run.toggles = ToggleSnapshot(self.module)
        return runner

    def _runner(self, program: Program, call: StandardCall) -> Runner:
        """The program with the module's weights; as CUDA graphs where those are wanted."""
        weights = weights_of(self.module)
        device = call.leaves[call.form.sample].device
        if not self._wants_cuda_graphs(device):
            return program.bind(weights, call.order)
        # Recorded once, however the call is written.
        bound = program.bind(weights)
        key = (program, signature_of(call.form, call.leaves)[0])
        recorded = self._recorded.pop(key, None)
        if recorded is None or not recorded.still_fits(bound):
            recorded = RecordedProgram(bound, device)
        self._recorded[key] = recorded  # the latest last
        while len(self._recorded) > MAX_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        in_order = call.order == tuple(range(len(call.order)))
        return recorded if in_order else Reordered(recorded, call.order)

    def _wants_cuda_graphs(self, device: torch.device) -> bool:
        wanted = self.settings.cuda_graphs
        if wanted is False or self.settings.backend.records_cuda_graphs:
            return False
        if device.type not in RECORDERS:
            if wanted is True:
                self._warn(f"cuda_graphs=True, but the sample is on {device}: runs without")
            return False
        # Offloading moves the weights at every run, and each move would mean recording anew.
        return wanted is True or not hasattr(self.module, "_hf_hook")

    def _program(self, call: StandardCall, display: Display) -> Program:
        """The program for a call: loaded from a file, compiled before, or compiled now."""
        settings = self.settings
        if self._saved:
            known = self._structure(display)
            place = (known, settings.cuts, settings.backend)
            signature = portable_signature(signature_of(call.form, call.leaves)[0])
            for where, saved in self._saved:
                if where == place and saved.serves(signature, call.form.spec, call.leaves):
                    return saved.program
        network = self._captured(call, display, settings.dynamic)
        if network.guard is None:
            return self._compiled(network, call.leaves, display)
        if (network, settings.backend) not in self._sizes_fixed:
            try:
                return self._compiled(network, call.leaves, display)
            except BackendError as error:
                self._sizes_fixed.add((network, settings.backend))
                cause = str(error).splitlines()[0]
                self._warn(f"{cause}; compiled for each size by itself instead of dynamic=")
        network = self._captured(call, display, None)
        return self._compiled(network, call.leaves, display)

    def _structure(self, display: Display) -> int:
        """The number of the module's present structure."""
        before = structure_of(self.module, self._written)
        known = next((i for i, other in enumerate(self._structures) if other == before), None)
        if known is None:
            if self._structures:
                display.note(
                    f"the module changed ({difference(self._structures[-1], before)}): new capture"
                )
            self._structures.append(before)
            known = len(self._structures) - 1
        return known

    def _captured(
        self, call: StandardCall, display: Display, dynamic: DynamicSizes | None
    ) -> CapturedNetwork:
        form, leaves = call.form, call.leaves
        signature = signature_of(form, leaves)[0]
        if dynamic is not None and not dynamic.covers(leaves[form.sample]):
            display.note("sizes beyond the dynamic range: a program of their own")
            dynamic = None
        known = self._structure(display)
        network = self._networks.get((known, signature, dynamic))
        if network is not None and network.guard is not None:
            # A compiler may have tied sizes to numbers since.
            network = network if network.accepts(form.spec, leaves) else None
        if network is None and dynamic is not None:
            network = next(
                (
                    other
                    for (structure, _, sizes), other in self._networks.items()
                    if structure == known and sizes == dynamic and other.accepts(form.spec, leaves)
                ),
                None,
            )
        if network is None:
            with display.stage("capturing"):
                network = self._capture(leaves, form, dynamic)
            self._captures += 1
            before = self._structures[known]
            written = changed_by_running(before, structure_of(self.module, self._written))
            if written:  # by the network's own forward: no sign of a changed structure
                self._written |= written
                self._structures[known] = structure_of(self.module, self._written)
        key = (known, signature, dynamic)
        self._networks.pop(key, None)
        self._networks[key] = network  # the latest last
        return network

    def _capture(
        self, leaves: list[Any], form: CallForm, dynamic: DynamicSizes | None
    ) -> CapturedNetwork:
        try:
            network = capture(self.module, self.original, leaves, form.spec, form.sample, dynamic)
        except CaptureError as error:
            if not self.module.training:
                raise
            raise self._in_training() from error
        # Pipelines that make a network of another's parts leave it in training mode.
        if self.module.training and any(map(is_random, network.graph_module.graph.nodes)):
            raise self._in_training()
        return network

    def _in_training(self) -> _TrainingMattersError:
        self._training_matters = True
        return _TrainingMattersError(_IN_TRAINING_MODE)

    def _compiled(self, network: CapturedNetwork, leaves: list[Any], display: Display) -> Program:
        settings = self.settings
        key = (network, settings.cuts, settings.backend)
        program = self._programs.get(key)
        if program is not None:
            program = rebound(program, network, settings.cuts, self.module, leaves, display)
        if program is None:
            program = build(
                network,
                settings.cuts,
                settings.backend,
                self.module,
                leaves,
                display,
                self._full_graph_of(network),
            )
            self._refresh_guard(network)
            if gains_little(network):
                self._warn(
                    "a reuse step takes nearly as much compute as a full one, at every depth: "
                    "caching will not make this network faster"
                )
        self._programs[key] = program
        return program

    def _refresh_guard(self, network: CapturedNetwork) -> None:
        """Forget for which calls a network was found before its compiler tied sizes to numbers."""
        before = network.guard
        network.refresh_guard()
        if network.guard != before:
            for key in [key for key, other in self._networks.items() if other is network][:-1]:
                del self._networks[key]

    def _full_graph_of(self, network: CapturedNetwork) -> CompiledGraph | None:
        """The compiled full graph, if there is one already for forecasts of other lengths."""

        def returned(cuts: ProgramSpec) -> tuple[tuple[int, ...], bool]:
            return cuts.depths, cuts.probe is not None

        settings = self.settings
        for (other, cuts, backend), program in self._programs.items():
            alike = returned(cuts) == returned(settings.cuts) and program.full.folded is None
            if other is network and backend == settings.backend and alike:
                return program.full
        return None

    def _warn(self, message: str) -> None:
        """Once for each message, whatever numbers are in it."""
        kind = _NUMBER.sub("", message)
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"dcompile: {message}", stacklevel=5)

    def _count(self, what: str, cost: float = 1.0) -> None:
        with self._counting:
            self._counts[what] += 1
            self._cost += cost

    def _display(self) -> Display:
        return Display(type(self.module).__name__, self.settings.verbose)
