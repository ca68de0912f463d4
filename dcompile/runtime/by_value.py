"""Runs that are identified by the values of their timesteps, for lack of anything better.

Loops that pass numbers, or a new tensor at each step, leave no trace of whose step a call is: only
that values go one way, in steps of similar size, and that a sample is much like it was at the step
before. Runs that are alike in both may be under way in turns; then nothing is reused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcompile.runtime.run import Run

# Runs that are kept; interleaving more only refreshes more often.
MAX_VALUE_TRACKS = 8
# Runs that come to their ends before one that pauses counts as given up.
MAX_MISSED = 2
# Of the first value of a run: a second one further away proves less.
FIRST_GAP = 0.3
# How long a gap between values may be, as a share of the one before it, after such a wide one.
ALIKE = (0.4, 1.6)
# Elements of a sample that are compared, and samples of a run: those of a step's lanes.
SKETCH = 4096
SKETCHES = 64
# Least cosine between a sample and one of the step before. Noise of its own has about 0.
SIMILAR = 0.4
# How much more alike a run's sample has to be than those of others that it might be.
CLEARLY = 0.25
BY_VALUE = (
    "its timestep is a number or a tensor of its own, no view of the sampler's timesteps, and the "
    "values so far do not tell whose step it is"
)
ANOTHER_SAMPLE = (
    "its timestep is a number or a tensor of its own, and its sample has little in common with "
    "that of the step before"
)


def sketch_of(sample: torch.Tensor | None) -> torch.Tensor | None:
    """Some elements of a sample, of length 1; None if it has no values to read.

    Waits for the device, as reading a timestep's value does.
    """
    if sample is None or sample.is_meta or sample.numel() == 0 or sample.is_complex():
        return None
    flat = sample.detach().reshape(-1)
    some = flat[:: -(-len(flat) // SKETCH)].to("cpu", torch.float32)
    length = some.norm()
    return some / length if 0 < float(length) < float("inf") else None


@dataclass(eq=False)
class _ValueTrack:
    """A run identified by timestep values: they go one way, in steps of similar size.

    A new run that begins just where an interrupted one would have gone on cannot be distinguished
    from it by values; its conditioning does, where there is any.

    Attributes:
        run: the run.
        value: of the latest step.
        step: its number.
        gap: from the value before.
        shared: two runs may be under way in turns, whose values are taken for those of one: a value
            came twice, and nothing told the two calls apart, or came next in another run as well.
        missed: runs that have begun and ended since its latest call.
        is_wide: the latest gap is so wide that it takes another like it to show that this is a run.
    """

    run: Run
    value: float
    step: int = 0
    gap: float | None = None
    shared: bool = False
    is_wide: bool = False
    missed: int = 0
    _sketches: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=SKETCHES))

    def likeness(self, sketch: torch.Tensor | None) -> float:
        """The cosine between a sample and the most similar one of late; 1 if that is not known."""
        if sketch is None:
            return 1.0
        alike = [float(sketch @ other) for other in self._sketches if len(other) == len(sketch)]
        return max(alike, default=1.0)

    def is_unlike(self, sketch: torch.Tensor | None) -> bool:
        """Whether a sample is nearly uncorrelated with this run's latest ones."""
        return self.likeness(sketch) < SIMILAR

    def forget_samples(self) -> None:
        """What this run is called with next is like none of those it was called with."""
        self._sketches.clear()

    def remember(self, sketch: torch.Tensor | None) -> None:
        """A sample that this run was called with."""
        if sketch is not None:
            self._sketches.append(sketch)

    def may_reach(self, value: float) -> bool:
        """Whether a value lies ahead, however far."""
        if self.gap is None:
            return self.misfit(value) is not None
        return not self.run.ended and (value - self.value) * self.gap > 0

    def misfit(self, value: float) -> float | None:
        """How far ``value`` is from this track's next one; None if it cannot be that."""
        if value == self.value:
            return 0.0
        gap = value - self.value
        if self.gap is None:  # towards zero, or up to twice as far from it
            return abs(gap) if abs(value - self.value / 2) <= 1.5 * abs(self.value) else None
        if gap * self.gap < 0 or abs(gap) > 2 * abs(self.gap):
            return None
        return abs(gap - self.gap)

    def move_to(self, value: float) -> None:
        """The run's latest timestep has this value."""
        if value != self.value:
            self.is_wide = not self._shows_a_run(value)
            self.gap = value - self.value
            self.value = value
            self.step += 1
            # Timesteps and noise levels end near zero: one more gap, even half as wide, would
            # be beyond.
            self.run.ended = abs(value) < abs(self.gap) / 2 and value * self.gap <= 0

    def _shows_a_run(self, value: float) -> bool:
        """Whether a value is as near as a next step's is, or as far as the one before was."""
        gap = abs(value - self.value)
        if self.gap is None:
            return gap <= FIRST_GAP * abs(self.value)
        least, most = ALIKE
        return not self.is_wide or least * abs(self.gap) <= gap <= most * abs(self.gap)

    def proves_little(self, value: float) -> bool:
        """Whether a value may as well begin another run: nothing is to be reused for it."""
        return self.gap is None or (value != self.value and not self._shows_a_run(value))


class RunsByValue:
    """Finds the run of a call by its timestep's value. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._tracks: list[_ValueTrack] = []  # the latest last

    @property
    def runs(self) -> list[Run]:
        """Those that may go on."""
        return [track.run for track in self._tracks]

    def forget(self, run: Run) -> None:
        """Drop a run."""
        self._tracks = [track for track in self._tracks if track.run is not run]

    def clear(self) -> None:
        """Drop all runs."""
        self._tracks.clear()

    def step(
        self,
        value: float,
        sketch: torch.Tensor | None,
        conditioning: Sequence[torch.Tensor],
        signature: Any,
    ) -> tuple[Run, int]:
        """The run and step of a call; a run that has not been called yet if none fits.

        Args:
            value: its timestep's.
            sketch: of its sample, see ``sketch_of``.
            conditioning: its other tensors.
            signature: the call's.
        """
        # A run that is over stays where it ended. A value it was called with is its own again only
        # if the call is another lane's; of equal fits, the latest.
        fits = [
            (track.run.knows(conditioning, signature), track.likeness(sketch), -misfit, n, track)
            for n, track in enumerate(self._tracks)
            if (misfit := track.misfit(value)) is not None
            and not (value != track.value and self._begins_another(track, value, sketch))
            and (
                value != track.value
                or track is self._tracks[-1]
                or track.run.takes_another(conditioning, signature)
            )
        ]
        if not fits:
            track = _ValueTrack(Run(None), value)
            track.remember(sketch)
            self._tracks = [*self._tracks[-(MAX_VALUE_TRACKS - 1) :], track]
            return track.run, 0
        known, likeness, _, _, track = max(fits, key=lambda fit: fit[:4])
        rivals = [
            other
            for other in self._tracks
            if other is not track
            and other.may_reach(value)
            and other.run.knows(conditioning, signature) == known
            and other.likeness(sketch) > likeness - CLEARLY
        ]
        for each in (track, *rivals) if rivals else ():
            each.shared = True
        # A first gap proves little, and so does a run that others were called in between, unless
        # samples tell them apart.
        if track.proves_little(value) or (sketch is None and track is not self._tracks[-1]):
            track.run.doubt(BY_VALUE)
        if track.is_unlike(sketch) and value != track.value:
            track.run.doubt(ANOTHER_SAMPLE)
            track.forget_samples()  # from here on it is this one's run
        if value == track.value and not track.run.takes_another(conditioning, signature):
            track.shared = True
        elif track.shared and value != track.value:
            track.run.doubt(BY_VALUE)
        track.move_to(value)
        track.remember(sketch)
        track.missed = 0
        self._tracks.remove(track)
        self._tracks.append(track)
        if track.run.ended:
            self._forget_given_up()
        return track.run, track.step

    def _begins_another(
        self, track: _ValueTrack, value: float, sketch: torch.Tensor | None
    ) -> bool:
        """Whether a second value is more likely another run's first, for several are open."""
        several = any(other is not track and other.may_reach(value) for other in self._tracks)
        return track.gap is None and several and track.is_unlike(sketch)

    def _forget_given_up(self) -> None:
        """Drop runs that were not called while ``MAX_MISSED`` others came to their ends."""
        for track in self._tracks[:-1]:
            track.missed += 1
        self._tracks = [track for track in self._tracks if track.missed <= MAX_MISSED]


__all__ = ["BY_VALUE", "MAX_VALUE_TRACKS", "RunsByValue", "sketch_of"]
