"""Which run, lane and step a call of the network belongs to.

The timestep's *value* is never read where that can be avoided: on a GPU reading it waits for the
device, and second-order samplers visit the same value twice. Samplers iterate over
``scheduler.timesteps``, so each ``t`` is a view of it: the storage behind the view identifies the
run, the view's offset the step, in whatever stride the sampler goes over it (see
``_StorageTrack``). Where the network gets a number, or a tensor such as ``t / 1000``, the
view is looked for in the sampling loop (see ``LoopTimesteps``); if there is none, the value
identifies the run instead (see ``RunsByValue``).

One rule governs all that is uncertain: when in doubt, refresh. A wrong refresh costs time, a
wrong reuse costs the picture.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.compat.storages import row_stride_of, storage_of, weak_storage
from dcompile.runtime.by_value import RunsByValue, sketch_of
from dcompile.runtime.callers import LoopTimesteps
from dcompile.runtime.lanes import Lane
from dcompile.runtime.run import Run

# Storages that died after one call, one after another, before values are looked at.
MAX_ORPHANS = 2


@dataclass(eq=False)
class _StorageTrack:
    """A run over timesteps that share one storage, such as ``scheduler.timesteps``.

    Samplers go through it element by element, or every second one (``timesteps[::2]``), or
    backwards, or down one column of a table. The first two calls tell the stride; if it is not
    the one that was expected, the second step is refreshed, because it may be another run's first.

    Attributes:
        storage: held weakly.
        run: the run.
        size: elements of the storage.
        first: offset of the first call.
        stride: offset from one step to the next.
        is_guess: nothing has shown the stride yet.
        is_orphan: nobody went on with it.
        row: how far apart the rows are, if it is a table, of which runs go down one column each.
    """

    storage: weakref.ref[Any]
    run: Run
    size: int
    first: int
    stride: int
    is_guess: bool = True
    is_orphan: bool = False
    row: int = 1

    @property
    def steps(self) -> int:
        """How many there are from the first one to the end of the storage."""
        if self.stride > 0:
            return -(-(self.size - self.first) // self.stride)
        return self.first // -self.stride + 1

    def step_of(self, offset: int) -> int | None:
        """The step at an offset; None if this run never comes there."""
        step, rest = divmod(offset - self.first, self.stride)
        return None if rest or step < 0 or not self.is_in_column(offset) else step

    def is_in_column(self, offset: int) -> bool:
        """Whether a run that goes down one column of a table may come to an offset."""
        return (offset - self.first) % self.row == 0

    def learn_stride(self, offset: int) -> None:
        """Take the second call's offset for the second step's."""
        if self.run.step == 0 and offset != self.first and self.is_in_column(offset):
            if offset != self.first + self.stride:
                self.stride = offset - self.first
                self.run.count_again(self.steps)
            self.is_guess = False

    def open_steps_in(self, other: _StorageTrack) -> set[int]:
        """Steps of another track at which a pass over this one's timesteps may go on."""
        found = {other.step_of(self.first + end * self.stride) for end in self.run.open_ends}
        return {step for step in found if step is not None}


class StepTracker:
    """Finds the run and lane of each call. Safe to call from several threads.

    Attributes:
        runs: how many were seen.
        first_steps: calls in a row that were each taken for a run's first step, and only call.
    """

    def __init__(self) -> None:
        self.first_steps = 0
        self._lock = threading.Lock()  # held for bookkeeping only, never while anything computes
        self._loops = LoopTimesteps()
        self._by_storage: dict[int, _StorageTrack] = {}
        self._latest: weakref.ref[Run] | None = None
        self._stride = 1  # of the latest run that has shown one
        # How many timesteps in a row were views of storages that nobody went on with, such as
        # ``timesteps.flip(0)[i]``: after some of them, values identify the step. Its storage has
        # died then, or the next call is at another place of another storage of that size.
        self._orphans = 0
        self._begun: _StorageTrack | None = None  # the latest over timesteps not seen before
        self._by_value = RunsByValue()
        self.runs = 0

    def enter(
        self,
        timestep: Any,
        conditioning: Sequence[torch.Tensor],
        signature: Any = None,
        sample: torch.Tensor | None = None,
    ) -> tuple[Run, Lane, int]:
        """The run, lane and step of a call.

        Args:
            timestep: as the network got it: a tensor or a number.
            conditioning: the call's other tensors, without the sample.
            signature: the call's; calls of one step that differ in it are different lanes.
            sample: the call's, which is looked at only where nothing else tells runs apart.
        """
        storage, value, sketch = None, 0.0, None
        if isinstance(timestep, torch.Tensor):
            found = storage_of(timestep)
            is_known = timestep.dim() == 0 and id(found) in self._by_storage
            if is_known or _is_part(timestep, found):
                storage = found
        if storage is None:
            element = self._loops.element(timestep)
            if element is not None:
                timestep, storage = element, storage_of(element)
        by_value = storage is None or (
            self._orphans >= MAX_ORPHANS and id(storage) not in self._by_storage
        )
        if by_value:
            # These may wait for the device: not under the lock.
            value, sketch = _value(timestep), sketch_of(sample)
        with self._lock:
            if by_value:
                run, step = self._by_value.step(value, sketch, conditioning, signature)
                if step == 0 > run.step:
                    self.runs += 1
                if storage is not None:  # in case that the next call is a view of it, too
                    self._begin(timestep, storage, int(timestep.storage_offset()), None)
            else:
                run, step = self._step_by_storage(timestep, storage)
                if step == 0 < run.step:  # another run over the same timesteps
                    self.runs += 1
            lane = run.enter(step, conditioning, signature)
            if step:
                self.first_steps = 0
            elif len(run.lanes) == 1 and run.steps != 1:
                self.first_steps += 1
            return run, lane, step

    def element(self, timestep: Any) -> Any:
        """The element of the sampler's timesteps that a timestep was computed from, or itself."""
        if isinstance(timestep, torch.Tensor) and _is_part(timestep, storage_of(timestep)):
            return timestep
        element = self._loops.element(timestep)
        return timestep if element is None else element

    def latest_planned(self, run: Run) -> Run | None:
        """The run that was planned before this one, which is now the latest."""
        with self._lock:
            earlier, self._latest = self._latest, weakref.ref(run)
        return earlier() if earlier is not None else None

    def forget(self, run: Run) -> None:
        """Drop a run: something went wrong in the middle of it."""
        with self._lock:
            self._by_value.forget(run)
            for key, known in list(self._by_storage.items()):
                if known.run is run:
                    del self._by_storage[key]

    def reset(self) -> None:
        """Drop all that is cached; runs go on, and refresh at their next step."""
        with self._lock:
            for track in list(self._by_storage.values()):
                track.run.drop()
            self._by_value.clear()

    def lanes(self) -> list[Lane]:
        """Those of all runs at present."""
        with self._lock:
            known = [track.run for track in list(self._by_storage.values())]
            known += self._by_value.runs
            return [lane for run in known for lane in run.lanes]

    def _step_by_storage(self, timestep: torch.Tensor, storage: Any) -> tuple[Run, int]:
        key = id(storage)
        offset = int(timestep.storage_offset())
        track = self._by_storage.get(key)
        if track is not None and track.storage() is not storage:
            track = None
        step = None
        if track is not None:
            self._orphans = 0
            if track.is_guess:
                track.learn_stride(offset)
            step = track.step_of(offset)
            if step is not None and step > 1:
                self._stride = track.stride
        if track is None or step is None:
            track, step = self._begin(timestep, storage, offset, track), 0
            self.runs += 1
        return track.run, step

    def _begin(
        self, timestep: torch.Tensor, storage: Any, offset: int, earlier: _StorageTrack | None
    ) -> _StorageTrack:
        # The storage dies with scheduler.timesteps, and its run with it. Dictionary operations are
        # atomic, so the callback needs no lock (it may run while this thread holds it).
        key = id(storage)
        reference = weak_storage(timestep, lambda _: self._storage_died(key))
        size = storage.nbytes() // timestep.element_size()
        row = row_stride_of(timestep)
        stride = row if self._stride % row else self._stride
        track = _StorageTrack(reference, Run(None), size, offset, stride, row=row)
        if track.steps < 2:  # the stride of other runs makes no sense here
            track.stride = row
        track.run.steps = track.steps
        if earlier is not None:
            track.run.doubt_at(earlier.open_steps_in(track))
        begun = self._begun
        if begun is not None and begun.size == size and begun.first != offset:
            self._note_if_orphan(begun)  # the loop goes on in another storage
        self._begun = track
        self._by_storage[key] = track
        return track

    def _storage_died(self, key: int) -> None:
        track = self._by_storage.pop(key, None)
        if track is not None:
            self._note_if_orphan(track)

    def _note_if_orphan(self, track: _StorageTrack) -> None:
        if track.run.step < 1 and track.steps > 1 and not track.is_orphan:
            track.is_orphan = True
            self._orphans += 1


def _is_part(timestep: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether the storage has more elements than ``t``, ``t.expand(batch)`` or so addresses."""
    own = timestep.numel() if any(timestep.stride()) else 1
    return storage.nbytes() > own * timestep.element_size()


def _value(timestep: Any) -> float:
    if isinstance(timestep, torch.Tensor):
        return 0.0 if timestep.is_meta else float(timestep.reshape(-1)[0])
    return float(timestep)
