"""``speedup=`` and ``psnr=``: the first run of a kind is watched, later ones run what was found.

1. At the first call the network is captured, and its cuts are known. The first run refreshes at
   every step, on the eager backend, which compiles nothing, with all cuts worth trying. So its
   result is the uncached one.
2. An observer records the boundaries of all cuts, and at every fourth step how strongly the output
   reacts to them (``prediction.recorder``).
3. At the run's last step the levels with the least predicted error are found by dynamic
   programming (``prediction.choice``), for ``psnr=`` at several speed-ups. The dispatcher is
   configured for their cuts and the backend that was asked for, which compiles at the next run.
4. Another kind of run, with other steps or another sampler, is watched in the same way later on,
   with the cuts that were chosen.

Whatever prevents this, such as features that are not finite, leaves a schedule by the sampler's
error gains, or a refresh at every step where a ``psnr`` is asked for. One message says so: a
warning if nothing is gained, or ``autotune="first"`` asked for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dcompile.backends import resolve
from dcompile.compiler.reader import Call
from dcompile.errors import DcompileError
from dcompile.policy.aim import Aim
from dcompile.policy.forecast import Reuse, resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.schedule import RunInfo
from dcompile.policy.self_tuned import Kind, Placed, SelfTuned
from dcompile.prediction.choice import choose
from dcompile.prediction.objective import Objective
from dcompile.prediction.recorder import Recorder
from dcompile.progress import Display
from dcompile.report.explain import explain
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.lanes import Lane
from dcompile.runtime.settings import Settings
from dcompile.runtime.state import RefreshRecord, State
from dcompile.runtime.warmup import captured_network
from dcompile.storage.tuned_cache import TunedCache

# Cuts with at most this ratio of reuse to refresh FLOPs are watched, the outermost MOST_CUTS.
LARGEST_RATIO = 0.6
MOST_CUTS = 6
# Steps from one measurement of the output's reaction to the next, elements kept of a boundary,
# and bytes of them kept in memory.
EVERY = 8
ELEMENTS = 1 << 16
MEMORY = 1 << 30
# A run that is watched has so many steps at least; it may end before its timesteps do, as that of
# one of two denoisers.
LEAST_STEPS = 3
# So many runs that cannot be watched, or calls that cannot be captured, and none other, are enough.
MOST_UNCLEAR = 3
# So many runs of fewer than LEAST_STEPS, and none other: these are no warm-up.
MOST_SHORT = 24
# So many kinds are watched; where no run is like another, watching is all that would happen.
MOST_KINDS = 16
# The network corrects an error of the first step by about exp(-1) until the last one.
CORRECTED = 1.0


class SelfTuner:
    """Watches the runs of one network, and places its refreshes.

    Args:
        dispatcher: of the network.
        settings: what was asked for; they stay where nothing can be watched.
        aim: see there.
        asked_for: whether the first run has to be watched, even if another process has watched
            one, and a warning says so where it cannot.
    """

    def __init__(
        self, dispatcher: Dispatcher, settings: Settings, aim: Aim, *, asked_for: bool
    ) -> None:
        self._dispatcher = dispatcher
        self._asked = settings
        self._aim = aim
        self._asked_for = asked_for
        self._cache: TunedCache
        self._display = Display(type(dispatcher.module).__name__, settings.verbose)
        self._lock = threading.RLock()
        self._watched = _Watched()
        self._installed = settings.schedule
        self._is_prepared = False
        self._schedule: SelfTuned | None = None  # once cuts are chosen
        self._settled: set[Kind | None] = set()  # kinds for which there is something, or nothing
        self._all_cuts: tuple[int, ...] = ()
        self._chosen_by: Kind | None = None  # the run that the cuts were chosen by
        self._unclear = 0  # runs that cannot be watched
        self._short = 0  # runs of too few steps
        self._parts = _PartialRuns()

    def begin(self) -> None:
        """Have the first call prepare for watching."""
        state = self._dispatcher.state
        self._dispatcher.state = replace(state, prepare=self._prepare)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, Call]:
        state = self._prepared(args, kwargs)
        return state, state.reader.read(args, kwargs)

    def _prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        """At the first call that can be cached: find the cuts, and watch all that are worth it."""
        with self._lock:
            dispatcher = self._dispatcher
            if self._is_prepared or dispatcher.settings.schedule is not self._installed:
                return dispatcher.state  # another thread came first
            try:
                network = captured_network(dispatcher, args, kwargs)
                rows = explain(network, (0,), type(dispatcher.module).__name__).depths
            except DcompileError:  # the call itself says why; the next one may be a better one
                self._unclear += 1
                if self._unclear >= MOST_UNCLEAR:
                    dispatcher.state = replace(dispatcher.state, prepare=None)
                return dispatcher.state
            self._is_prepared, self._unclear = True, 0
            dispatcher.state = replace(dispatcher.state, prepare=None)
            structure = dispatcher.programs.captures.structure()
            self._cache = TunedCache(dispatcher.module, structure, args, kwargs, self._aim)
            known = None if self._asked_for else self._cache.read([row.depth for row in rows])
            if known is not None:
                self._go_on_with(known)
                return dispatcher.state
            # Beyond reach: raised now, and not when the run is over.
            GainWeighted(speedup=self._aim.speedup).refreshes(1000, rows[0].ratio)
            worth = [row.depth for row in rows if row.ratio <= LARGEST_RATIO][:MOST_CUTS]
            cuts = tuple(worth or [row.depth for row in rows[:1]])
            self._all_cuts = cuts
            self._watch_all_cuts()
            return dispatcher.state

    def _watch_all_cuts(self) -> None:
        """Have the next run of each kind watched, with all cuts that are worth it."""
        self._watched = _Watched()
        self._configure(
            replace(
                self._asked,
                schedule=SelfTuned(self._aim, self._all_cuts, "reuse", watch=self._begins),
                depths=self._all_cuts,
                forecasts=(Reuse(),) * len(self._all_cuts),
                backend=resolve("eager", None),
                cuda_graphs=False,
            )
        )

    def _go_on_with(self, found: SelfTuned) -> None:
        """Use what another process has found."""
        self._settled = set(found.known)
        self._schedule = replace(found, watch=self._begins)
        forecasts = (resolve_forecast(found.forecast),) * len(found.cuts)
        self._configure(
            replace(self._asked, schedule=self._schedule, depths=found.cuts, forecasts=forecasts)
        )
        for line in found.describe():
            self._display.note(line)

    def _configure(self, settings: Settings, *, watches: bool = True) -> None:
        """Keeps what was counted. Does nothing once somebody has asked for other settings."""
        dispatcher = self._dispatcher
        if dispatcher.settings.schedule is not self._installed:
            return
        self._installed = settings.schedule
        counters, runs = dispatcher.state.counters, dispatcher.state.tracker.runs
        dispatcher.configure(settings)
        dispatcher.state.tracker.runs = runs
        observer = self._observe if watches else None
        dispatcher.state = replace(dispatcher.state, counters=counters, observer=observer)

    def _begins(self, run: RunInfo) -> bool:
        """A run of an unknown kind begins: whether it refreshes at every step."""
        with self._lock:
            kind = Kind.of(run)
            if kind is None or kind.steps < LEAST_STEPS:
                self._short += kind is not None
                self._unclear += kind is None
                is_enough = self._unclear >= MOST_UNCLEAR or self._short >= MOST_SHORT
                if is_enough and not self._settled:
                    self._give_up(
                        f"runs of less than {LEAST_STEPS} steps, or over timesteps that are not "
                        "elements of one tensor, cannot be watched"
                    )
                return False
            if self._aim.psnr is not None and not run.has_noise_levels:
                self._give_up("the sampler's noise levels cannot be read, so no PSNR is predicted")
                return False
            if kind in self._settled or len(self._settled) >= MOST_KINDS:
                return False
            lanes = self._dispatcher.state.tracker.lanes()
            if self._watched.is_under_way():
                if self._watched.is_among(lanes):
                    return True  # two runs at a time: the second one is not watched
                self._has_ended_early()
            # Of a run that is interrupted by other settings, a part goes on as a run of its own.
            whole = run.gains is None or len(run.gains) <= kind.steps
            if whole or self._parts.again(kind, 0):
                self._watched.begin(run, lanes)
            return True

    def _has_ended_early(self) -> None:
        """A run ended before its timesteps did: it was interrupted, or they all do."""
        run, length = self._watched.run, self._watched.length
        kind = Kind.of(run) if run is not None else None
        if kind is not None and length >= LEAST_STEPS and self._parts.again(kind, length):
            self._finish()
        self._watched = _Watched()

    def _observe(self, seen: RefreshRecord) -> None:
        with self._lock:
            try:
                self._forget_what_is_too_short(seen)
                self._watched.take(seen)
            except Exception as error:  # watching may fail, a picture may not
                self._give_up(str(error) or type(error).__name__)
            if self._watched.is_complete():
                self._finish()

    def _forget_what_is_too_short(self, seen: RefreshRecord) -> None:
        """A run that goes further than the one that was watched is watched next time."""
        known = self._schedule.known if self._schedule is not None else {}
        for kind, placed in list(known.items()):
            if kind.steps == seen.steps and placed.length == seen.step:
                del known[kind]
                self._settled.discard(kind)
                self._parts.outrun(kind, placed.length)
                if kind == self._chosen_by:  # so were the cuts
                    self._schedule, self._settled = None, set()
                    self._watch_all_cuts()

    def _finish(self) -> None:
        """Place the refreshes of the kind of run that was watched."""
        try:
            self._place()
        except Exception as error:
            self._give_up(str(error) or type(error).__name__)

    def _place(self) -> None:
        if self._dispatcher.settings.schedule is not self._installed:
            self._watched = _Watched()
            return
        run, recorder = self._watched.run, self._watched.recorder
        kind = Kind.of(run) if run is not None else None
        assert kind is not None
        assert recorder is not None
        settings = self._dispatcher.settings
        recordings = recorder.recordings()
        length = len(recordings[0][0].gram)
        weights = np.exp(CORRECTED * (np.arange(length) - (length - 1)) / length)
        objectives = {
            depth: Objective(tuple(own), np.array(kind.gains[:length]) * weights)
            for depth, own in zip(settings.depths, recordings, strict=True)
        }
        self._watched = _Watched()
        names = ("reuse", "damped") if self._schedule is None else (self._schedule.forecast,)
        chosen = choose(objectives, names, self._aim, recorder.sample())
        self._settled.add(kind)
        if chosen is None:
            reason = (
                f"no refresh steps of the cuts at depths {', '.join(map(str, settings.depths))} "
                f"give a run of {length} steps {self._aim}"
            )
            if self._schedule is None:
                self._give_up(reason)
            else:
                self._display.note(f"{reason}: they are refreshed as other unknown runs are")
            return
        levels, name = chosen.choice
        found = ", ".join(f"depth {depth} refreshed {len(own)} times" for depth, own in levels)
        about = "" if chosen.psnr is None else f", about {chosen.psnr:.0f} dB"
        self._display.note(
            f"tuned for runs of {kind.steps} steps: {found}, forecast {name}, "
            f"{chosen.speedup:.2f}x fewer FLOPs{about}"
        )
        if self._schedule is not None:
            own = dict(levels)
            outer = tuple(range(length))
            refresh: list[tuple[int, ...]] = []
            for depth in self._schedule.cuts:  # one that was not chosen is refreshed with the outer
                outer = own.get(depth, outer)
                refresh.append(outer)
            self._schedule.known[kind] = Placed(tuple(refresh), length, chosen.psnr)
            self._keep()
            return
        cuts = tuple(depth for depth, _ in levels)
        placed = Placed(tuple(own for _, own in levels), length, chosen.psnr)
        self._schedule = SelfTuned(self._aim, cuts, name, {kind: placed}, self._begins)
        self._chosen_by = kind
        self._keep()
        forecasts = (resolve_forecast(name),) * len(cuts)
        self._configure(
            replace(self._asked, schedule=self._schedule, depths=cuts, forecasts=forecasts)
        )

    def _keep(self) -> None:
        """On disk, for other processes."""
        assert self._schedule is not None
        self._cache.write(self._schedule, self._dispatcher.programs.captures.structure())

    def _give_up(self, reason: str) -> None:
        """Place refreshes by the sampler's error gains; where a PSNR is wanted, at every step."""
        self._watched = _Watched()
        is_slow = self._aim.psnr is not None
        instead = "every step is refreshed" if is_slow else "refreshes are placed by the sampler"
        message = f"autotune: {reason}; {instead} instead"
        if self._asked_for or is_slow:
            self._dispatcher.state.notices.warn(message)
        else:
            self._display.note(message)
        self._configure(self._asked, watches=False)


class _PartialRuns:
    """Runs that are parts of others, with the number of steps after which they ended, 0 for all."""

    def __init__(self) -> None:
        self._seen: set[tuple[Kind, int]] = set()
        self._outrun: set[tuple[Kind, int]] = set()

    def again(self, kind: Kind, length: int) -> bool:
        """Whether there was such a run before, and none went further; from now on there was one."""
        known = (kind, length) in self._seen
        self._seen.add((kind, length))
        return known and (kind, length) not in self._outrun

    def outrun(self, kind: Kind, length: int) -> None:
        """One went further: those that ended there were interrupted."""
        self._outrun.add((kind, length))


class _Watched:
    """The run that is watched: its lanes, each from the first step on."""

    def __init__(self) -> None:
        self.run: RunInfo | None = None
        self.recorder: Recorder | None = None
        self._latest: dict[int, int] = {}  # step, by the lane's id; the recorder keeps the lane

    @property
    def length(self) -> int:
        """Steps that all lanes have taken."""
        return min(self._latest.values(), default=-1) + 1

    def begin(self, run: RunInfo, lanes: Sequence[Lane]) -> None:
        """Watch this run from its first step on; if one like it begins just now, both.

        Args:
            run: it.
            lanes: of all runs at present.
        """
        begins = self.length == 1 and self._latest.keys() <= set(map(id, lanes))
        if not begins or self.run is None or Kind.of(self.run) != Kind.of(run):
            self.run = run
            self.recorder = Recorder(run.cuts, MEMORY, EVERY, ELEMENTS)
            self._latest = {}

    def is_under_way(self) -> bool:
        """Whether it is past its first step."""
        return any(self._latest.values())

    def is_among(self, lanes: Sequence[Lane]) -> bool:
        """Whether one of its lanes is one of these."""
        return not self._latest.keys().isdisjoint(map(id, lanes))

    def take(self, seen: RefreshRecord) -> None:
        """Record a refresh, if it is this run's."""
        if self.recorder is None or self.run is None or seen.steps != self.run.steps:
            return
        latest = self._latest.get(id(seen.lane))
        if latest is not None and seen.step == 0:  # another run over the same timesteps
            self._latest = {}
            self.begin(self.run, ())
        elif latest is None and (seen.step or self.is_under_way()):
            return  # of a run that is not watched
        elif latest is not None and seen.step != latest + 1:
            return
        self.recorder(seen)
        self._latest[id(seen.lane)] = seen.step

    def is_complete(self) -> bool:
        """Whether all lanes have come to the run's last step."""
        return self.run is not None and self.length == self.run.steps


def self_tune(dispatcher: Dispatcher, settings: Settings, aim: Aim, *, asked_for: bool) -> None:
    """Have a network place its refreshes by what it sees of its first runs.

    Args:
        dispatcher: installed with ``settings``.
        aim: see there.
        asked_for: whether the first run has to be watched, even if another process has watched
            one, and a warning says so where it cannot.
    """
    SelfTuner(dispatcher, settings, aim, asked_for=asked_for).begin()


__all__ = ["SelfTuner", "self_tune"]
