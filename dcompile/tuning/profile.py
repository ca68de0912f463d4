"""``profile``: how much a network's deep features change from step to step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcompile.errors import TuneError
from dcompile.report.plots import plot_profile
from dcompile.tuning.harness import Harness
from dcompile.tuning.measurement import Measurement
from dcompile.tuning.runs import runs_of


@dataclass(frozen=True, eq=False)
class DepthProfile:
    """The profile of one depth.

    Attributes:
        depth: index of the cut.
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        similarity: cosine similarity of the boundaries of each pair of steps, mean over samples and
            lanes, shape (steps, steps).
        change: L2 distance of the boundary from that of the step before, relative to its own norm,
            shape (steps,); the first is 0.
    """

    depth: int
    ratio: float
    similarity: np.ndarray[Any, Any]
    change: np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Profile:
    """The result of ``dcompile.profile``.

    Attributes:
        network: name of the network's class.
        steps: number of steps of a run.
        depths: one profile for each depth.
        gains: the sampler's error gain at each step, shape (steps,), up to a factor; None without
            a sampler that has noise levels.
    """

    network: str
    steps: int
    depths: tuple[DepthProfile, ...]
    gains: np.ndarray[Any, Any] | None

    def plot(self, file: str | os.PathLike[str]) -> Path:
        """Draw a heatmap for each depth, and the changes, as a PNG. Returns the full path.

        Raises:
            DcompileError: matplotlib is not installed.
        """
        return plot_profile(self.network, self.depths, self.gains, file)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "network": self.network,
            "steps": self.steps,
            "gains": None if self.gains is None else self.gains.tolist(),
            "depths": [
                {
                    "depth": depth.depth,
                    "ratio": depth.ratio,
                    "similarity": depth.similarity.round(6).tolist(),
                    "change": depth.change.round(6).tolist(),
                }
                for depth in self.depths
            ],
        }

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it as JSON. Returns the file's full path."""
        target = Path(file).expanduser().resolve()
        target.write_text(json.dumps(self.as_dict()) + "\n")
        return target


def profile(
    module: Any,
    run: Callable[..., Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    samples: int = 1,
    depths: Sequence[int] | None = None,
    backend: str = "eager",
    sampler: Any = None,
    memory: int = 2 * 1024**3,
    verbose: bool = True,
) -> Profile:
    """Measure how similar a network's deep features are from step to step, at each depth.

    This similarity is what DeepCache is based on (Ma et al., CVPR 2024, arXiv 2312.00858), measured
    on your network and sampler. Takes one uncached run for each sample and one more, and keeps
    their features until they are compared.

    Args:
        module: the network, or a pipeline. It is left as it was.
        run: generates one sample, the same at each call, as for ``dcompile.tune``; called with a
            sample's number if it takes an argument. None to call the pipeline itself.
        arguments: of these calls.
        samples: number of samples, unless ``run`` takes no number.
        depths: which cuts; None for all.
        backend: runs the graphs; see ``cache_compile``.
        sampler: the sampler, unless ``module`` is a pipeline that has one.
        memory: bytes of features to keep in memory; more go to a temporary file.
        verbose: show progress on standard error.

    Raises:
        TuneError: ``run`` is not repeatable, calls the network less than twice, at timesteps that
            are not elements of one tensor, or changes its number of steps.
        DepthError: a depth the network does not have.
    """
    if type(samples) is not int or samples < 1:
        raise TuneError(f"samples: expected an int of at least 1, got {samples!r}")
    if depths is not None and not depths:
        raise TuneError("depths must not be empty")
    runs = runs_of(module, run, samples, arguments)
    with Harness(module, runs, backend, sampler, verbose) as harness:
        measurement = Measurement(harness, memory)
        measurement.record(depths, every=True)
    found = []
    for depth, objective in sorted(measurement.objectives.items()):
        similar, change = [], []
        for recording in objective.recordings:
            gram = recording.gram
            norm = np.sqrt(np.maximum(np.diag(gram), 1e-30))
            similar.append((gram / norm[:, None] / norm[None, :]).clip(-1.0, 1.0))
            moved = np.diag(gram)[1:] + np.diag(gram)[:-1] - 2 * np.diag(gram, 1)
            change.append(np.concatenate([[0.0], np.sqrt(np.maximum(moved, 0.0)) / norm[1:]]))
        mean = np.mean(similar, axis=0), np.mean(change, axis=0)
        found.append(DepthProfile(depth, objective.ratio, *mean))
    return Profile(
        network=type(harness.network).__name__,
        steps=len(found[0].change),
        depths=tuple(found),
        gains=objective.gains if measurement.has_gains else None,
    )
