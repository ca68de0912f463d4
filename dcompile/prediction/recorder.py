"""Records the boundaries of uncached runs, and how strongly the output reacts to them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dcompile.errors import TuneError
from dcompile.prediction.choice import Sample
from dcompile.prediction.objective import Recording
from dcompile.runtime.state import RefreshRecord


class FeatureMemory:
    """Counts the bytes of features in memory, up to a limit.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    def takes(self, size: int) -> bool:
        """Reserve ``size`` bytes. Returns whether they are within the limit."""
        self._left -= size
        return self._left >= 0


class Features:
    """Boundaries of one run and depth: in memory up to the limit, then in temporary files."""

    def __init__(self, memory: FeatureMemory) -> None:
        self._memory = memory
        self._rows: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, tensors: Iterable[torch.Tensor]) -> None:
        row = torch.cat([t.detach().float().flatten() for t in tensors]).cpu().numpy()
        if not self._memory.takes(row.nbytes):
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="dcompile-tune-")
            file = Path(self._folder.name) / f"{len(self._rows)}.npy"
            np.save(file, row)
            row = np.load(file, mmap_mode="r")
        self._rows.append(row)

    def gram(self) -> np.ndarray[Any, Any]:
        """Inner products of all pairs, shape (steps, steps)."""
        count, length = len(self._rows), len(self._rows[0])
        total = np.zeros((count, count))
        for start in range(0, length, 1 << 18):
            block = np.stack([row[start : start + (1 << 18)] for row in self._rows])
            block = block.astype(np.float64)
            total += block @ block.T
        return total

    def close(self) -> None:
        if self._folder is not None:
            self._rows.clear()
            self._folder.cleanup()


@dataclass
class LaneRecord:
    """One lane of a run: for each depth, boundaries and reactions; its latest cache and sample."""

    lane: Any  # referenced, so that its id is not that of another one
    features: list[Features]
    reactions: list[list[float]]
    cached: Any = None
    sample: Sample | None = None


class Recorder:
    """Observes the refreshes of uncached runs; see ``runtime.state.RefreshRecord``.

    Args:
        depths: number of cuts.
        limit: bytes of features to keep in memory.
        every: the reaction is measured at every step of this distance, and between them what the
            neighbours suggest; each takes a step of each smaller graph.
        elements: of a boundary, about as many are kept; None for all. Evenly spaced ones give
            nearly the same distances.

    Attributes:
        steps: numbers of timesteps of the runs seen.
    """

    def __init__(
        self, depths: int, limit: int, every: int = 1, elements: int | None = None
    ) -> None:
        self._depths = depths
        self._memory = FeatureMemory(limit)
        self._every = every
        self._elements = elements
        self._lanes: dict[int, LaneRecord] = {}
        self._ratios: tuple[float, ...] = ()
        self.steps: set[int] = set()

    def __call__(self, seen: RefreshRecord) -> None:
        if seen.steps is None:
            raise TuneError(
                "the network's timesteps are not elements of one tensor, such as "
                "scheduler.timesteps, or are just one: its runs cannot be distinguished well "
                "enough to tune for them"
            )
        self.steps.add(seen.steps)
        record = self._lanes.setdefault(
            id(seen.lane),
            LaneRecord(
                seen.lane,
                [Features(self._memory) for _ in range(self._depths)],
                [[] for _ in range(self._depths)],
            ),
        )
        program = seen.program.program
        self._ratios = program.ratios
        # Recorded graphs would run in their buffers, which hold the run's own features.
        unrecorded = getattr(seen.program, "unrecorded", None)
        runner = unrecorded or seen.program
        measured = (seen.step - 1) % self._every == 0
        for level, cut in enumerate(program.cached):
            boundary = seen.cached[cut.latest]
            tensors = [b for b in boundary if isinstance(b, torch.Tensor) and b.is_floating_point()]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise TuneError(
                    f"features of step {seen.step} are not finite: nothing can be tuned"
                )
            reaction = 0.0 if measured else math.nan
            if measured and record.cached is not None:
                if level == 0:
                    stale, _ = runner.reuse(seen.leaves, record.cached)
                else:
                    stale, _ = runner.refresh(seen.leaves, record.cached, level)
                moved = _distance(tree_leaves(stale), tree_leaves(seen.result))
                changed = _distance(record.cached[cut.latest], boundary)
                reaction = math.sqrt(moved / changed) if changed > 0 else 0.0
            record.features[level].append(self._sample_of(tensors))
            record.reactions[level].append(reaction)
        record.sample = Sample.of(seen.sample)
        record.cached = seen.cached if unrecorded is None else tuple(map(_copy, seen.cached))

    def recordings(self) -> list[list[Recording]]:
        """For each depth, one for each lane of the run."""
        found: list[list[Recording]] = [[] for _ in range(self._depths)]
        for record in self._lanes.values():
            for level, features in enumerate(record.features):
                scale = np.array(record.reactions[level])
                if len(scale) < 2:
                    continue
                scale[0] = scale[1]
                found[level].append(Recording(features.gram(), _filled(scale), self._ratios[level]))
                features.close()
        return found

    def sample(self) -> Sample | None:
        """The latest samples of all lanes."""
        found = [record.sample for record in self._lanes.values() if record.sample is not None]
        return Sample.together(found) if found else None

    def _sample_of(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of each tensor evenly spaced elements, scaled so that distances stay what they are."""
        if self._elements is None:
            return tensors
        found = []
        for tensor in tensors:
            apart = max(1, tensor.numel() // self._elements) | 1  # odd: over all channels
            found.append(tensor.detach().flatten()[::apart].float() * math.sqrt(apart))
        return found


def _filled(scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Positive numbers along a run, where they are missing interpolated in their logarithms."""
    known = np.flatnonzero(np.isfinite(scale) & (scale > 0))
    if not len(known):
        return np.zeros_like(scale)
    missing = np.flatnonzero(np.isnan(scale))
    filled = scale.copy()
    filled[missing] = np.exp(np.interp(missing, known, np.log(scale[known])))
    return filled


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _distance(one: Iterable[Any], other: Iterable[Any]) -> float:
    """Squared distance of two lists of tensors."""
    return sum(
        float((a.float() - b.float()).square().sum())
        for a, b in zip(one, other, strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    )
