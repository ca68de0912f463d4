"""One pass over a sampler's timesteps: its plan, its lanes, and what is doubtful about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcompile.compat.export import capturing_threads
from dcompile.compiler.watch import Watch
from dcompile.compiler.weight_identities import WeightIdentities
from dcompile.policy.forecast import Forecast
from dcompile.policy.schedule import Plan
from dcompile.runtime.lanes import Anchor, Lane

# Calls at one timestep that are distinguished, where memory allows; then the oldest goes.
MAX_LANES = 1024


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
        watch: tells whether the module is what it was when its programs were bound.
        weights: the parameters they were bound to.
        captures: how many there were for this run after its first step.
        swaps_weights: others were put in their places in this run.
        lanes: the calls of a step, each with what it cached.
        ended: known to be at its last step although ``steps`` is not known.
        reused: whether any step reused features.
        forced: how many calls refreshed though the plan did not want it.
        latest_reason: why the latest of them did.
    """

    steps: int | None
    step: int = -1
    ended: bool = False
    reused: bool = False
    forced: int = 0
    latest_reason: str = ""
    due: list[int] = field(default_factory=lambda: [0])
    programs: dict[Any, Any] = field(default_factory=dict)
    plan: Plan | None = None
    forecasts: tuple[Forecast, ...] = ()
    watch: Watch | None = None
    weights: WeightIdentities | None = None
    captures: int = 0
    swaps_weights: bool = False
    lanes: list[Lane] = field(default_factory=list)
    _served: set[int] = field(default_factory=set)  # lanes called at the present step, by id
    # Two runs may go over one timesteps tensor (a loop that is begun again, or a server that
    # interleaves requests). Then the next call may belong to either, and until it is clear, nothing
    # is reused. _open_ends are the steps at which an abandoned pass might go on.
    _doubtful: bool = False
    _reason: str = ""  # for the latest doubt
    _open_ends: set[int] = field(default_factory=set)

    def enter(self, step: int, conditioning: Sequence[torch.Tensor], signature: Any = None) -> Lane:
        """Register a call and return its lane; a lane without a program has to be refreshed."""
        if (
            len(self.lanes) == len(self._served) == 1  # the common case, in short
            and step == self.step + 1
            and not self._doubtful
            and step not in self._open_ends
            and not self.lanes[0].contradicts(conditioning, signature)
        ):
            self.step = step
            self._reason = ""
            self.lanes[0].note_steady()
            return self.lanes[0]
        if step == self.step:
            # Another lane, if its conditioning says so; else it may as well be another run.
            if any(
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
            self._make_room()
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

    def has_changed(self) -> bool:
        """Whether the module was changed since its programs were bound: then none is left."""
        if self.watch is not None and not self.watch.attributes_unchanged():
            self.invalidate_programs()
            return True
        return self.follow_weights(thoroughly=True)

    def follow_weights(self, thoroughly: bool = False) -> bool:
        """Whether others were put in the parameters' places: then nothing cached is used again.

        Args:
            thoroughly: look at all of them, not only at some. Once any were replaced, always.
        """
        thoroughly = thoroughly or self.swaps_weights
        if self.weights is None or not self.weights.changed(thoroughly):
            return False
        # Or has a capture in another thread done that?
        if capturing_threads or not self.weights.changed(thoroughly):
            return False
        self.swaps_weights = True
        self.invalidate_programs()
        for lane in self.lanes:
            lane.release()
        self.doubt("other weights were put in the place of the network's")
        return True

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

    def doubt(self, reason: str) -> None:
        """Reuse nothing at the next step."""
        self._doubtful = True
        self._reason = reason

    def why_forced(self, lane: Lane) -> str:
        """Why a call of this lane has to refresh though the plan does not want it."""
        self.forced += 1
        self.latest_reason = self._reason or (
            "what is cached missed a refresh"
            if lane.cached
            else "its conditioning is no tensor that a call of the step before had"
        )
        return self.latest_reason

    def drop(self) -> None:
        """Free all that is cached; the run itself goes on."""
        self.lanes = []
        self._served = set()
        self.invalidate_programs()

    def doubt_at(self, steps: set[int]) -> None:
        """At these steps another pass over the same timesteps may go on, at any time."""
        self._open_ends = steps

    @property
    def open_ends(self) -> set[int]:
        """Steps at which this pass, or an earlier one over the same timesteps, may go on."""
        return {*self._open_ends, self.step + 1}

    def count_again(self, steps: int) -> None:
        """It has another number of steps than was thought: it is planned again, after a refresh."""
        self.steps = steps
        self.plan = None
        self.doubt("its timesteps go in another stride than those of the run before")

    def _make_room(self) -> None:
        """Drop the oldest lanes, where there are too many, or too little memory for one more."""
        while self.lanes and (
            len(self.lanes) >= MAX_LANES or self.lanes[-1].is_more_than_there_is_room_for()
        ):
            oldest = self.lanes.pop(0)
            self._served.discard(id(oldest))

    def _advance(self) -> None:
        """Keep the lanes that were called at the step before, unless it is doubtful whose."""
        if not self._doubtful:
            self._reason = ""
            if len(self._served) == len(self.lanes):
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
        self.doubt("another pass over the same timesteps may be under way")
        self.due = [min(due, step) for due in self.due]
