"""Which run, lane and step a call of the network belongs to.

The timestep's *value* is never read where that can be avoided: on a GPU reading it waits for the
device, and second-order samplers visit the same value twice. Samplers iterate over
``scheduler.timesteps``, so each ``t`` is a view of it: the storage behind the view identifies the
run, the view's offset the step. A timestep that is a number, or a tensor of its own, is identified
by its value instead (see ``_ValueTrack``).

One rule governs all that is uncertain: when in doubt, refresh. A wrong refresh costs time, a
wrong reuse costs the picture.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcompile.compat.storages import storage_of, weak_storage
from dcompile.compiler.fingerprint import ToggleSnapshot
from dcompile.policy.forecast import Forecast
from dcompile.policy.schedule import Plan
from dcompile.runtime.lanes import Anchor, Lane

# Runs identified by timestep value that are kept; interleaving more only refreshes more often.
MAX_VALUE_TRACKS = 8
# Calls at one timestep that are distinguished; no sampler makes more.
MAX_LANES = 8
# Of the first value of a run identified by value: a second one further away begins another run.
FIRST_GAP = 0.3


@dataclass(eq=False)
class Run:
    """One pass over a sampler's timesteps.

    Attributes:
        steps: number of steps from the first call to the end of the timesteps, if known.
        step: the step of the latest call, counted from this run's first call.
        due: for each cut the latest step at which the plan wanted it refreshed.
        programs: the bound programs of lanes that begin, by call signature.
        plan: chosen when the run begins; None until then.
        forecasts: one for each cut, chosen with the plan.
        toggles: the module's switches as they were when its programs were bound.
        lanes: the calls of a step, each with what it cached.
    """

    steps: int | None
    step: int = -1
    due: list[int] = field(default_factory=lambda: [0])
    programs: dict[Any, Any] = field(default_factory=dict)
    plan: Plan | None = None
    forecasts: tuple[Forecast, ...] = ()
    toggles: ToggleSnapshot | None = None
    lanes: list[Lane] = field(default_factory=list)
    _served: set[int] = field(default_factory=set)  # lanes called at the present step, by id
    # Two runs may go over one timesteps tensor (a loop that is begun again, or a server that
    # interleaves requests). Then the next call may belong to either, and until it is clear, nothing
    # is reused. _open_ends are the steps at which an abandoned pass might go on.
    _doubtful: bool = False
    _open_ends: set[int] = field(default_factory=set)

    @property
    def last_step(self) -> int | None:
        """The number of the last step, if known."""
        return None if self.steps is None else self.steps - 1

    def enter(self, step: int, conditioning: Sequence[torch.Tensor], signature: Any = None) -> Lane:
        """Register a call and return its lane; a lane without a program has to be refreshed."""
        if step == self.step:
            # Another lane, if its conditioning says so; else it may as well be another run.
            if len(self.lanes) >= MAX_LANES or any(
                id(lane) in self._served and not lane.contradicts(conditioning, signature)
                for lane in self.lanes
            ):
                self._begin_again(step)
        elif step == self.step + 1 and step not in self._open_ends:
            self._advance()
        elif self.step >= 0:
            self._begin_again(step)
        self.step = step
        fitting = [
            lane
            for lane in self.lanes
            if id(lane) not in self._served and not lane.contradicts(conditioning, signature)
        ]
        if len(fitting) > 1:  # any of them, and others may have paused
            self.lanes = [lane for lane in self.lanes if lane not in fitting]
        if len(fitting) == 1:
            (lane,) = fitting
            lane.note_steady()
        else:
            lane = Lane(tuple(map(Anchor.of, conditioning)))
            self.lanes.append(lane)
            if step == 0:  # perhaps another run's first step: the module may have changed
                self.programs.clear()
        self._served.add(id(lane))
        return lane

    def begin(self, plan: Plan, forecasts: tuple[Forecast, ...]) -> None:
        """Go by this plan, with one forecast for each cut."""
        self.due = [0] * len(forecasts)
        self.forecasts = forecasts
        self.plan = plan

    def toggled(self) -> bool:
        """Whether a switch of the module was flipped since its programs were bound."""
        return self.toggles is not None and self.toggles.changed()

    def note_due(self, step: int, level: int) -> None:
        """The plan wants the ``level`` outermost cuts refreshed at this step."""
        for cut in range(level):
            self.due[cut] = step

    def knows(self, conditioning: Sequence[torch.Tensor], signature: Any = None) -> bool:
        """Whether a call like this may be one of the lanes'."""
        return any(not lane.contradicts(conditioning, signature) for lane in self.lanes)

    def takes_another(self, conditioning: Sequence[torch.Tensor], signature: Any = None) -> bool:
        """Whether a call at the present step may belong to a lane that was not called yet."""
        return all(
            lane.contradicts(conditioning, signature)
            for lane in self.lanes
            if id(lane) in self._served
        )

    def invalidate_programs(self) -> None:
        """The module may have changed since its programs were bound."""
        self.programs.clear()
        for lane in self.lanes:
            lane.bound = None

    def doubt(self) -> None:
        """Reuse nothing at the next step."""
        self._doubtful = True

    def drop(self) -> None:
        """Free all that is cached; the run itself goes on."""
        self.lanes = []
        self._served = set()
        self.invalidate_programs()

    def inherit_doubts(self, earlier: Run, shift: int) -> None:
        """Another pass over the same timesteps, ``shift`` steps behind, may go on at any time."""
        self._open_ends = {end + shift for end in (*earlier._open_ends, earlier.step + 1)}

    def _advance(self) -> None:
        """Keep the lanes that were called at the step before, unless it is doubtful whose."""
        if len(self._served) == len(self.lanes) and not self._doubtful:
            self._served.clear()
            return
        self.lanes = [
            lane for lane in self.lanes if id(lane) in self._served and not self._doubtful
        ]
        self._served = set()
        self._doubtful = False

    def _begin_again(self, step: int) -> None:
        self._open_ends.add(self.step + 1)
        self.lanes = []
        self.invalidate_programs()
        self._served = set()
        self._doubtful = True
        self.due = [min(due, step) for due in self.due]


@dataclass(eq=False)
class _ValueTrack:
    """A run identified by timestep values: they go one way, in steps of similar size.

    A new run that begins just where an interrupted one would have gone on cannot be distinguished
    from it by values; its conditioning does, where there is any.
    """

    run: Run
    value: float
    step: int = 0
    gap: float | None = None

    def misfit(self, value: float) -> float | None:
        """How far ``value`` is from this track's next one; None if it cannot be that."""
        if value == self.value:
            return 0.0
        gap = value - self.value
        if self.gap is None:
            return abs(gap) if abs(gap) <= FIRST_GAP * abs(self.value) else None
        if gap * self.gap < 0 or abs(gap) > 2 * abs(self.gap):
            return None
        return abs(gap - self.gap)

    def move_to(self, value: float) -> None:
        """The run's latest timestep has this value."""
        if value != self.value:
            self.gap = value - self.value
            self.value = value
            self.step += 1


class StepTracker:
    """Finds the run and lane of each call. Safe to call from several threads.

    Attributes:
        runs: how many were seen.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for bookkeeping only, never while anything computes
        self._by_storage: dict[int, tuple[weakref.ref[Any], Run, int]] = {}
        self._by_value: list[_ValueTrack] = []
        self.runs = 0

    def enter(
        self, timestep: Any, conditioning: Sequence[torch.Tensor], signature: Any = None
    ) -> tuple[Run, Lane, int]:
        """The run, lane and step of a call.

        Args:
            timestep: as the network got it: a tensor or a number.
            conditioning: the call's other tensors, without the sample.
            signature: the call's; calls of one step that differ in it are different lanes.
        """
        with self._lock:
            if isinstance(timestep, torch.Tensor):
                storage = storage_of(timestep)
                if storage.nbytes() > timestep.element_size() * _own_elements(timestep):
                    run, step = self._step_by_storage(timestep, storage)
                    if step == 0 < run.step:  # another run over the same timesteps
                        self.runs += 1
                    return run, run.enter(step, conditioning, signature), step
            run, step = self._step_by_value(_value(timestep), conditioning, signature)
            return run, run.enter(step, conditioning, signature), step

    def forget(self, run: Run) -> None:
        """Drop a run: something went wrong in the middle of it."""
        with self._lock:
            self._by_value = [track for track in self._by_value if track.run is not run]
            for key, (_, known, _) in list(self._by_storage.items()):
                if known is run:
                    del self._by_storage[key]

    def reset(self) -> None:
        """Drop all that is cached; runs go on, and refresh at their next step."""
        with self._lock:
            for _, run, _ in list(self._by_storage.values()):
                run.drop()
            self._by_value.clear()

    def cached(self) -> list[Any]:
        """What all lanes have cached at present."""
        with self._lock:
            known = [run for _, run, _ in list(self._by_storage.values())]
            known += [track.run for track in self._by_value]
            return [lane.cached for run in known for lane in run.lanes]

    def _step_by_storage(self, timestep: torch.Tensor, storage: Any) -> tuple[Run, int]:
        key = id(storage)
        offset = int(timestep.storage_offset())
        entry = self._by_storage.get(key)
        if entry is None or entry[0]() is not storage or offset < entry[2]:
            steps = storage.nbytes() // timestep.element_size() - offset
            run = Run(steps)
            if entry is not None and entry[0]() is storage:
                run.inherit_doubts(entry[1], entry[2] - offset)
            # The storage dies with scheduler.timesteps, and its run with it. Dictionary operations
            # are atomic, so the callback needs no lock (it may run while this thread holds it).
            table = self._by_storage
            reference = weak_storage(timestep, lambda _: table.pop(key, None))
            entry = table[key] = (reference, run, offset)
            self.runs += 1
        _, run, first = entry
        return run, offset - first

    def _step_by_value(
        self, value: float, conditioning: Sequence[torch.Tensor], signature: Any
    ) -> tuple[Run, int]:
        # A run that is over stays where it ended. A value it was called with is its own again only
        # if the call is another lane's; of equal fits, the latest.
        fits = [
            (track.run.knows(conditioning, signature), -misfit, position, track)
            for position, track in enumerate(self._by_value)
            if (misfit := track.misfit(value)) is not None
            and (
                value != track.value
                or track is self._by_value[-1]
                or track.run.takes_another(conditioning, signature)
            )
        ]
        if fits:
            known, _, _, track = max(fits, key=lambda fit: fit[:3])
            others = sum(fit[0] == known for fit in fits) > 1
            # A first gap proves little, and so does a track that others were called in between, or
            # one of several that the call fits equally well.
            if track.gap is None or track is not self._by_value[-1] or others:
                track.run.doubt()
            track.move_to(value)
            self._by_value.remove(track)
            self._by_value.append(track)
            return track.run, track.step
        track = _ValueTrack(Run(None), value)
        self._by_value = [*self._by_value[-(MAX_VALUE_TRACKS - 1) :], track]
        self.runs += 1
        return track.run, 0


def _own_elements(timestep: torch.Tensor) -> int:
    """How many different elements a timestep addresses: 1 for ``t`` and ``t.expand(batch)``."""
    return 1 if not any(timestep.stride()) else timestep.numel()


def _value(timestep: Any) -> float:
    if isinstance(timestep, torch.Tensor):
        return float(timestep.reshape(-1)[0])
    return float(timestep)
