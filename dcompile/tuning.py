"""Find the refresh steps, depth and forecast that suit one network, sampler and number of steps.

What a schedule costs in fidelity is predicted before it is tried. One uncached run records the
boundary at every step, which gives a Gram matrix: the inner products of all pairs of boundaries.
From it follows how far any forecast from any refreshes would be from the true boundary, without
another run. Multiplied with how strongly the network's output reacts to its boundary (measured once
for each step) and with what the sampler makes of an error (``samplers.step_weights``), that is the
error a step adds to the result. Dynamic programming and local search find the refresh steps that
make the sum least; the best few are then tried in real runs, and the best of those is returned.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, combinations, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile import schedule as schedules
from dcompile.dispatch import Dispatcher, Refreshed, dispatcher_of
from dcompile.errors import DepthError, ScheduleError, TuneError
from dcompile.forecast import Checked, Forecast, factors, resolve_forecast
from dcompile.samplers import step_weights
from dcompile.schedule import Adaptive, Sigma, Steps, Uniform, placed, require_speedup, spread

if TYPE_CHECKING:
    from dcompile.api import Handle

Levels = tuple[tuple[int, tuple[int, ...]], ...]
"""Cuts, the outermost first: (depth, the steps that refresh it). A step that refreshes one of them
refreshes all outer ones too."""

FORMAT = 1
# Beyond any sum of weighted drifts: nothing but max_interval refreshes.
_LARGEST_THRESHOLD = 1e30
FORECASTS = ("reuse", "checked", "linear", "taylor")
# Two uncached runs that differ by more than this (PSNR, dB) are no measure for a third.
_LEAST_REPEATABLE = 50.0
_UNCACHED = (
    "run called the network in training mode or for gradients, where it is never cached: call "
    "eval(), and sample under torch.no_grad()"
)
_IDENTICAL = 100.0  # dB, of a picture that is equal among others that are not
_LOCAL_SWEEPS = 12
# How many times as often as the next deeper cut each cut of several is refreshed.
_SPLITS = ((2,), (3,), (4,), (2, 2), (2, 3), (3, 2))


@dataclass(frozen=True)
class Trial:
    """One schedule that was tried in real runs.

    Attributes:
        refresh_steps, depth, forecast, outer: what was tried; see ``Tuned``.
        speedup: of a run, in FLOPs.
        psnr: mean over the samples against the uncached result, in dB; infinite if all are equal
            to it, else one that is counts as 100.
        interval: N, if this is DeepCache: every N-th step refreshes, plain reuse.
    """

    refresh_steps: tuple[int, ...]
    depth: int
    forecast: str
    speedup: float
    psnr: float
    interval: int | None = None
    outer: Levels = ()

    @property
    def levels(self) -> Levels:
        """All cuts, the outermost first."""
        return (*self.outer, (self.depth, self.refresh_steps))

    @property
    def key(self) -> tuple[Levels, str]:
        """What tells it from others."""
        return self.levels, self.forecast


@dataclass(frozen=True)
class Tuned:
    """A schedule with everything needed to use it: ``cache_compile(unet, schedule=tuned)``.

    Attributes:
        refresh_steps: which steps run the whole network.
        steps: the number of timesteps of the runs it was tuned for.
        depth, forecast: to use it with; ``cache_compile`` takes them from here.
        outer: further cuts outside of ``depth``, as a ``Pyramid`` has them, the outermost first:
            (depth, the steps that refresh it). At a step that is in ``outer`` and not in
            ``refresh_steps``, only what lies outside of the next deeper cut runs.
        network: the network's class and number of parameters.
        speedup: of a run, in FLOPs.
        psnr: mean over the samples against the uncached result, in dB.
        trials: all that was tried, in that order.
    """

    refresh_steps: tuple[int, ...]
    steps: int
    depth: int
    forecast: str
    network: tuple[str, int]
    speedup: float
    psnr: float
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    outer: Levels = ()

    @property
    def depths(self) -> tuple[int, ...]:
        """Of all cuts, the outermost first."""
        return tuple(depth for depth, _ in self.levels)

    @property
    def levels(self) -> Levels:
        """All cuts, the outermost first."""
        return (*self.outer, (self.depth, self.refresh_steps))

    def partly(self, step: int, steps: int | None) -> int:
        """How many of the outer cuts are refreshed at a step that does not refresh all."""
        return max((n for n, (_, own) in enumerate(self.outer, 1) if step in own), default=0)

    def refresh(self, step: int, steps: int | None) -> bool:
        if steps is not None and steps != self.steps:
            raise ScheduleError(
                f"tuned for runs of {self.steps} steps, this one has {steps}: tune for that, or "
                "use Sigma(speedup=...)"
            )
        return step >= self.steps or step in self.refresh_steps

    def require_fit(self, network: nn.Module) -> None:
        """Check that ``network`` is like the one it was tuned for.

        Raises:
            ScheduleError: it has another class or number of parameters.
        """
        here = _identity(network)
        if here != self.network:
            (name, count), (one, other) = self.network, here
            raise ScheduleError(
                f"tuned for a {name} with {count:,} parameters, this is a {one} with {other:,}"
            )

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it as JSON. Returns the file's full path."""
        target = Path(file).expanduser().resolve()
        content = {"format": FORMAT, **asdict(self)}
        for entry in (content, *content["trials"]):
            if math.isinf(entry["psnr"]):
                entry["psnr"] = None  # JSON knows no infinity
        target.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return target

    def plot(self, file: str | os.PathLike[str]) -> Path:
        """Draw all that was tried, PSNR over speed-up, as a PNG. Returns the file's full path.

        With the Pareto front, this schedule marked, and DeepCache's own (refresh every N-th step,
        reuse as it is), of which ``tune(intervals=...)`` tries some.

        Raises:
            DcompileError: matplotlib is not installed.
        """
        from dcompile.plots import plot_tuned

        return plot_tuned(self, file)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> Tuned:
        """Read what ``save`` wrote.

        Raises:
            ScheduleError: the file is missing, or is not that.
        """
        source = Path(file).expanduser()
        try:
            entry = json.loads(source.read_text())
            if entry.pop("format") != FORMAT:
                raise ValueError("unknown format")
            return Tuned.of_fields(**entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScheduleError(f"{source} holds no tuned schedule: {error}") from error

    @staticmethod
    def of_fields(**fields: Any) -> Tuned:
        """From fields as JSON has them.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, ScheduleError: they are none.
        """
        given = fields.pop("trials")
        for entry in (fields, *given):
            entry["psnr"] = math.inf if entry["psnr"] is None else entry["psnr"]
        for entry in (fields, *given):
            entry["outer"] = tuple((depth, tuple(own)) for depth, own in entry.get("outer", ()))
        trials = tuple(
            Trial(**{**trial, "refresh_steps": tuple(trial["refresh_steps"])}) for trial in given
        )
        steps = tuple(fields.pop("refresh_steps"))
        name, count = fields.pop("network")
        Steps(steps)
        levels = (*fields["outer"], (fields["depth"], steps))
        for (outer, more), (inner, fewer) in pairwise(levels):
            Steps(more)
            if not (0 <= outer < inner and set(more) > set(fewer) and more[-1] < fields["steps"]):
                raise ValueError(f"the cut at depth {outer} does not go with the one at {inner}")
        resolve_forecast(fields["forecast"])
        for key, least in (("steps", steps[-1] + 1), ("depth", 0)):
            if type(fields[key]) is not int or fields[key] < least:
                raise ValueError(f"{key} is {fields[key]!r}")
        return Tuned(refresh_steps=steps, network=(name, count), trials=trials, **fields)


schedules.KINDS["Tuned"] = Tuned.of_fields  # so that saved programs may name one


# What a recorded run says -------------------------------------------------------------------------


@dataclass
class Recording:
    """An uncached run at one depth.

    Attributes:
        gram: inner products of the boundaries, shape (steps, steps).
        reaction: how much the output moves for one unit of error in the boundary, shape (steps,).
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
    """

    gram: np.ndarray[Any, Any]
    reaction: np.ndarray[Any, Any]
    ratio: float

    def errors(self, forecast: Forecast, refreshed: Sequence[int]) -> np.ndarray[Any, Any]:
        """The boundary's squared error at every step if these are the refresh steps."""
        steps = len(self.gram)
        found = np.zeros(steps)
        known = set(refreshed)
        past: list[int] = []
        trust = 0.0
        for step in range(steps):
            given = factors(forecast, step, past)[: len(past)] if past else ()
            if step in known:
                if isinstance(forecast, Checked) and len(past) > 1:
                    trust = self._share(given, step, past)
                past = [step, *past][: forecast.history]
                continue
            if isinstance(forecast, Checked):
                given = forecast.share(given, trust)
            weights, places = np.array([*given, -1.0]), [*past, step]
            found[step] = max(0.0, weights @ self.gram[np.ix_(places, places)] @ weights)
        return found

    def _share(self, given: Sequence[float], step: int, past: Sequence[int]) -> float:
        """How far a forecast was right about a refresh, as ``forecast.Checked`` finds it."""
        gram = self.gram[np.ix_([*past, step], [*past, step])]
        added, change = np.array([*given, 0.0]), np.zeros(len(past) + 1)
        added[0] -= 1.0
        change[0], change[-1] = -1.0, 1.0
        claimed = float(added @ gram @ added)
        return min(1.0, max(0.0, float(change @ gram @ added) / claimed)) if claimed > 0 else 0.0


class _Features:
    """Boundaries of one run: in memory, or in a file if they take more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: list[Any] = []
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, tensors: Iterable[torch.Tensor]) -> None:
        row = torch.cat([t.detach().float().flatten() for t in tensors]).cpu().numpy()
        self._bytes += row.nbytes
        if self._bytes > self._limit:
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


class _Recorder:
    """Watches the refreshes of uncached runs; see ``Dispatcher.watch``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lanes: dict[int, tuple[_Features, list[float], Any]] = {}
        self._kept: list[Any] = []  # lanes, so that none is mistaken for another
        self.ratio = 0.0
        self.steps: set[int] = set()

    def __call__(self, seen: Refreshed) -> None:
        if seen.steps is None:
            raise TuneError(
                "the network's timesteps are not elements of one tensor, such as "
                "scheduler.timesteps, or are just one: its runs cannot be told apart well enough "
                "to tune for them"
            )
        self.steps.add(seen.steps)
        key = id(seen.lane)
        if key not in self._lanes:
            self._kept.append(seen.lane)
            self._lanes[key] = (_Features(self._limit), [], None)
        features, reactions, previous = self._lanes[key]
        boundary = seen.boundary
        tensors = [b for b in boundary if isinstance(b, torch.Tensor) and b.is_floating_point()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise TuneError(f"features of step {seen.step} are not finite: nothing can be tuned")
        reaction = 0.0
        if previous is not None:
            stale, _ = seen.program.reuse(seen.leaves, previous)
            moved = _distance(tree_leaves(stale), tree_leaves(seen.result))
            changed = _distance(previous, boundary)
            reaction = math.sqrt(moved / changed) if changed > 0 else 0.0
        features.append(tensors)
        reactions.append(reaction)
        self._lanes[key] = (features, reactions, boundary)
        self.ratio = seen.program.program.ratio

    def recordings(self) -> list[Recording]:
        """One for each lane of each run."""
        found = []
        for features, reactions, _ in self._lanes.values():
            if len(reactions) < 2:
                continue
            scale = np.array(reactions)
            scale[0] = scale[1]
            found.append(Recording(features.gram(), scale, self.ratio))
            features.close()
        return found


def _distance(one: Iterable[Any], other: Iterable[Any]) -> float:
    """Squared distance of two lists of tensors."""
    return sum(
        float((a.float() - b.float()).square().sum())
        for a, b in zip(one, other, strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    )


# Search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """Predicts the error of the result, from recordings at one depth.

    Attributes:
        recordings: all of them with the same number of steps.
        weights: what the sampler makes of an error at each step, shape (steps,).
    """

    recordings: tuple[Recording, ...]
    weights: np.ndarray[Any, Any]

    @property
    def steps(self) -> int:
        return len(self.weights)

    @property
    def ratio(self) -> float:
        return self.recordings[0].ratio

    def __call__(self, forecast: Forecast, refreshed: Sequence[int]) -> float:
        """Predicted squared error, up to a factor: of errors that neither add up nor cancel."""
        return float(
            sum(
                (r.errors(forecast, refreshed) * (self.weights * r.reaction) ** 2).sum()
                for r in self.recordings
            )
        )

    def best_by_dynamic_programming(self, count: int) -> tuple[int, ...]:
        """The refresh steps, ``count`` of them, that make the error of plain reuse least."""
        steps = self.steps
        # cost[j, k]: error of the steps between refreshes at j and k; k = steps is the end.
        cost = np.zeros((steps, steps + 1))
        for recording in self.recordings:
            gram = recording.gram
            square = np.diag(gram)
            distance = np.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0)
            distance = distance * ((self.weights * recording.reaction) ** 2)[None, :]
            for j in range(steps):
                cost[j, j + 1 :] += np.concatenate([[0.0], np.cumsum(distance[j, j + 1 :])])
        cost[np.tril_indices(steps, 0, steps + 1)] = np.inf
        best = np.full(steps, np.inf)
        best[0] = 0.0
        origin = []
        for _ in range(count - 1):
            total = best[:, None] + cost[:, :steps]
            origin.append(total.argmin(axis=0))
            best = total.min(axis=0)
        chosen = [int((best + cost[:, steps]).argmin())]
        for places in reversed(origin):
            chosen.append(int(places[chosen[-1]]))
        return tuple(reversed(chosen))

    def improved(self, forecast: Forecast, start: Sequence[int]) -> tuple[int, ...]:
        """Move single refreshes by a step or a few, as long as that helps."""
        current = list(start)
        least = self(forecast, current)
        for _ in range(_LOCAL_SWEEPS):
            before = least
            for place in range(1, len(current)):
                low = current[place - 1] + 1
                high = current[place + 1] if place + 1 < len(current) else self.steps
                for moved in range(max(low, current[place] - 3), min(high, current[place] + 4)):
                    trial = [*current[:place], moved, *current[place + 1 :]]
                    error = self(forecast, trial)
                    if error < least:
                        least, current = error, trial
            if least >= before * (1 - 1e-9):
                break
        return tuple(current)


def compute_of(levels: Levels, steps: int, ratios: Mapping[int, float]) -> float:
    """FLOPs of a run, in those of a refresh step."""
    known = [set(own) for _, own in levels]
    total = 0.0
    for step in range(steps):
        refreshed = max((n for n, own in enumerate(known, 1) if step in own), default=0)
        total += 1.0 if refreshed == len(levels) else ratios[levels[refreshed][0]]
    return total


def nested(
    objectives: Mapping[int, Objective], names: Sequence[str], speedup: float, power: float
) -> list[tuple[Levels, str]]:
    """Schedules with several cuts that take so much less compute, the most promising first.

    Two for each choice of depths that begins with the outermost: one with an even beat, one with as
    many refreshes as the speed-up leaves room for.
    """
    depths = sorted(objectives)
    ratios = {depth: objective.ratio for depth, objective in objectives.items()}
    steps = objectives[depths[0]].steps
    loads = [w**power for w in objectives[depths[0]].weights]

    def first(candidates: Iterable[tuple[Levels | None, str]]) -> list[Any]:
        """The one whose cuts, as if each were the only one, promise the least error."""
        return sorted(
            (sum(objectives[d](resolve_forecast(name), own) for d, own in levels), levels, name)
            for levels, name in set(candidates)
            if levels is not None
        )[:1]

    even, fitted = [], []
    for chain in (c for n in (2, 3) for c in combinations(depths, n) if c[0] == depths[0]):
        splits = [split for split in _SPLITS if len(split) == len(chain) - 1]
        even += first(
            (_beats(chain, split, steps, ratios, speedup), name)
            for split in splits
            for name in names
        )
        fitted += first(
            (_as_many(chain, split, steps, ratios, speedup, place), name)
            for split in splits
            for place in (spread, lambda _, count: placed(loads, count))
            for name in names
        )
    turns = zip_longest(sorted(even), sorted(fitted))
    found = [(one[1], one[2]) for turn in turns for one in turn if one is not None]
    return list(dict.fromkeys(found))


def _beats(
    chain: Sequence[int],
    split: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
) -> Levels | None:
    """As a ``Pyramid``, the most frequent one that is fast enough; None if none is.

    Where features swing from step to step, an unbroken beat is closer than more refreshes.
    """
    for outermost in range(2, steps):
        beats = list(accumulate(split, lambda beat, times: beat * times, initial=outermost))
        if beats[-1] >= steps:
            return None
        levels = tuple(
            (depth, tuple(range(0, steps, beat))) for depth, beat in zip(chain, beats, strict=True)
        )
        if steps / compute_of(levels, steps, ratios) >= speedup:
            return levels
    return None


def _as_many(
    chain: Sequence[int],
    split: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
    place: Callable[[int, int], tuple[int, ...]],
) -> Levels | None:
    """With as many refreshes as the speed-up leaves room for; None if that is not even two."""
    for count in range(steps // math.prod(split), 1, -1):
        own = place(steps, count)
        levels = [(chain[-1], own)]
        for depth, times in zip(reversed(chain[:-1]), reversed(split), strict=True):
            gaps = pairwise((*own, steps))
            between = [a + round(k * (b - a) / times) for a, b in gaps for k in range(times)]
            own = tuple(sorted(set(between)))
            levels.insert(0, (depth, own))
        if any(len(set(outer)) <= len(inner) for (_, outer), (_, inner) in pairwise(levels)):
            continue
        if steps / compute_of(tuple(levels), steps, ratios) >= speedup:
            return tuple(levels)
    return None


def candidates(
    objective: Objective, names: Sequence[str], count: int, power: float
) -> list[tuple[float, str, tuple[int, ...]]]:
    """Schedules with ``count`` refreshes, those first that promise the least error.

    Returns:
        Predicted error, forecast, refresh steps.
    """
    steps = objective.steps
    starts = {
        spread(steps, count),
        placed([w**power for w in objective.weights], count),
        objective.best_by_dynamic_programming(count),
    }
    found: dict[tuple[str, tuple[int, ...]], float] = {}
    for name in names:
        forecast = resolve_forecast(name)
        for start in sorted(starts):
            chosen = objective.improved(forecast, start)
            found[name, chosen] = objective(forecast, chosen)
    return sorted((error, name, chosen) for (name, chosen), error in found.items())


# Real runs ----------------------------------------------------------------------------------------


def pictures_of(output: Any) -> torch.Tensor:
    """What a run returned, as one float32 tensor on the CPU.

    Takes tensors, arrays, PIL images, and nests of them such as a pipeline's output.

    Raises:
        TuneError: there is none of that in it.
    """
    output = getattr(output, "images", getattr(output, "frames", output))
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf.detach().float().cpu().flatten())
        elif isinstance(leaf, np.ndarray):
            found.append(torch.from_numpy(np.ascontiguousarray(leaf)).float().flatten())
        elif hasattr(leaf, "getbands") and hasattr(leaf, "tobytes"):  # a PIL image
            found.append(torch.from_numpy(np.asarray(leaf).astype("float32") / 255).flatten())
    if not found:
        raise TuneError(
            f"run returned {type(output).__name__}: expected tensors, arrays or pictures to compare"
        )
    pictures = torch.cat(found)
    if not bool(torch.isfinite(pictures).all()):
        raise TuneError("run returned values that are not finite: nothing can be compared")
    return pictures


def psnr_between(found: torch.Tensor, expected: torch.Tensor) -> float:
    """PSNR in dB, over the range of what is expected; infinite if equal."""
    if found.shape != expected.shape:
        raise TuneError(
            f"run returned {found.numel()} values where it had returned {expected.numel()} before"
        )
    error = float((found - expected).square().mean())
    span = float(expected.max() - expected.min()) or 1.0
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def samples_of(run: Callable[..., Any], samples: int) -> list[Callable[[], Any]]:
    """``run`` for each sample: called with its number if it takes an argument."""
    takes_number = any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        for parameter in inspect.signature(run).parameters.values()
    )
    if not takes_number:
        return [run]
    return [lambda number=number: run(number) for number in range(samples)]  # type: ignore[misc]


def tune(
    module: Any,
    run: Callable[..., Any],
    *,
    speedup: float | None = None,
    psnr: float | None = None,
    samples: int = 4,
    depths: Sequence[int] = (0, 1, 2, 3),
    forecasts: Sequence[str] = FORECASTS,
    trials: int = 12,
    intervals: Sequence[int] = (),
    backend: str = "eager",
    scheduler: Any = None,
    memory: int = 2 * 1024**3,
    verbose: bool = True,
) -> Tuned:
    """Find the refresh steps, depths and forecast for one network, sampler and number of steps.

    Takes one uncached run for each sample and depth, and one cached run for each sample and trial.
    The same arguments give the same result. Interrupted (Ctrl-C), it returns the best so far.

    Args:
        module: the network, or a pipeline. It is left as it was.
        run: generates something with it, always the same: ``lambda: pipe(prompt,
            generator=torch.Generator().manual_seed(0))``; or, with an argument, the sample of that
            number: ``lambda i: pipe(prompts[i], generator=torch.Generator().manual_seed(i))``.
            Returns pictures, tensors, or a pipeline's output.
        speedup: find the closest result that takes this much less compute (FLOPs); or
        psnr: the fastest whose mean PSNR against the uncached result is at least this, in dB.
        samples: how many there are, if ``run`` takes a number. Use others to judge the result.
        depths: which cuts to try, by themselves and several at once (as a ``Pyramid``); those the
            network does not have are left out.
        forecasts: which to try.
        trials: how many schedules to try in real runs; with ``psnr``, at most, for each depth and
            forecast.
        intervals: DeepCache's, tried besides at every depth to compare with, as are the most
            promising schedules with as many refreshes; see ``Tuned.plot``.
        backend: what to try them with. Which is faster does not matter here.
        scheduler: the sampler, if ``module`` is no pipeline that has one.
        memory: bytes of recorded features to keep in memory; more go to a temporary file.
        verbose: show progress on standard error.

    Raises:
        TuneError: ``run`` is not repeatable, calls the network less than twice, at timesteps that
            are not elements of one tensor, or changes its number of steps.
        ScheduleError: neither or both of ``speedup`` and ``psnr``; a speed-up beyond reach.
        DepthError: none of ``depths`` exists.
    """
    if (speedup is None) == (psnr is None):
        raise ScheduleError(f"give speedup or psnr, got speedup={speedup!r} and psnr={psnr!r}")
    if psnr is not None and not math.isfinite(psnr):
        raise ScheduleError(f"psnr: expected a number of dB, got {psnr!r}")
    if speedup is not None:
        require_speedup(speedup)
    if not callable(run):
        raise TuneError(f"run: expected a function, got {run!r}")
    if not depths or not forecasts:
        raise TuneError("depths and forecasts must not be empty")
    for what, number in (("trials", trials), ("samples", samples)):
        if type(number) is not int or number < 1:
            raise TuneError(f"{what}: expected an int of at least 1, got {number!r}")
    for name in forecasts:
        resolve_forecast(name)
    for interval in intervals:
        Uniform(interval)
    session = Session(module, samples_of(run, samples), backend, scheduler, memory, verbose)
    with session:
        session.measure(depths)
        try:
            if speedup is not None:
                session.search_at(speedup, forecasts, trials)
            else:
                assert psnr is not None
                session.search_for(psnr, forecasts, trials)
            session.compare(intervals, forecasts)
        except KeyboardInterrupt:
            if not session.trials:
                raise
    return session.result(speedup, psnr)


def calibrate(
    module: Any,
    run: Callable[..., Any],
    *,
    speedup: float,
    samples: int = 4,
    depth: int = 0,
    forecast: str | Forecast = "reuse",
    min_interval: int = 1,
    max_interval: int | None = None,
    probe: str = "l1",
    power: float = 1.0,
    trials: int = 12,
    backend: str = "eager",
    scheduler: Any = None,
) -> Adaptive:
    """The ``Adaptive`` schedule whose runs take that much less compute, on average.

    What a threshold costs depends on the network, sampler and number of steps. This finds it by
    halving: one cached run for each sample and trial, and none that is uncached. What else it
    takes, ``dcompile.tune`` and ``Adaptive`` describe.

    Args:
        module: the network, or a pipeline. It is left as it was.
        run: generates something with it; called with a sample's number if it takes an argument.
        speedup: how much less compute (FLOPs), at least.
        samples: how many there are, if ``run`` takes a number.
        depth, forecast: what it will be used with: drifts are measured against the forecast, so
            the threshold is right for no other.
        min_interval, max_interval, probe, power: of the schedule.
        trials: thresholds to try, at most.
        backend: what to try them with. Which is faster does not matter here.
        scheduler: the sampler, if ``module`` is no pipeline that has one.

    Returns:
        The one with the smallest threshold tried that reaches ``speedup``.

    Raises:
        ScheduleError: no threshold takes that much less: ``max_interval``, the depth or the number
            of steps forbid it; the message says how much they allow.
        TuneError: ``run`` never calls the network.
    """
    require_speedup(speedup)
    if not callable(run):
        raise TuneError(f"run: expected a function, got {run!r}")
    for what, number in (("trials", trials), ("samples", samples)):
        if type(number) is not int or number < 1:
            raise TuneError(f"{what}: expected an int of at least 1, got {number!r}")
    session = Session(module, samples_of(run, samples), backend, scheduler, 0, verbose=False)

    def reached(threshold: float) -> float:
        adaptive = Adaptive(threshold, min_interval, max_interval, probe, power)
        return session.spent(schedule=adaptive, depth=depth, forecast=forecast)

    with session, warnings.catch_warnings():
        # That a threshold is never reached, or always, is what halving starts from.
        warnings.filterwarnings("ignore", message=r"dcompile: Adaptive\(")
        most = reached(_LARGEST_THRESHOLD)
        enough = speedup * (1 - 1e-6)  # counts are sums of fractions
        if most < enough:
            raise ScheduleError(
                f"no threshold takes {speedup:g} times less compute: at most {most:.2f} times at "
                f"depth {depth} with max_interval={max_interval} in runs of this many steps"
            )
        low, high = 0.0, _LARGEST_THRESHOLD
        middle = 0.05  # of the order that drifts are of
        for _ in range(trials):
            if reached(middle) >= enough:
                high = middle
            else:
                low = middle
            middle = (
                math.sqrt(low * high)
                if low and high < _LARGEST_THRESHOLD
                else (low * 8 if low else high / 8)
            )
    return Adaptive(high, min_interval, max_interval, probe, power)


class Session:
    """One call of ``tune``, ``calibrate`` or ``profile``.

    Attributes:
        network: what is measured.
        objectives: what was recorded, by depth.
        weighted: whether the sampler told what it makes of errors.
        trials: what was tried.
    """

    def __init__(
        self,
        module: Any,
        runs: list[Callable[[], Any]],
        backend: str,
        scheduler: Any,
        memory: int,
        verbose: bool,
    ) -> None:
        self._module = module
        self._runs = runs
        self._settings = {"backend": backend, "scheduler": scheduler, "verbose": False}
        self._memory = memory
        self._verbose = verbose
        self._expected: list[torch.Tensor] = []
        self.objectives: dict[int, Objective] = {}
        self.weighted = False
        self._power = 0.5
        self._timesteps: set[int] = set()
        self.trials: list[Trial] = []

    def __enter__(self) -> Session:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from dcompile.api import _denoiser_name, _is_pipeline, _network_of

        # cache_compile takes torch.compile's wrapper off a pipeline's network.
        self._component = None
        if _is_pipeline(self._module):
            name = _denoiser_name(self._module)
            self._component = name, getattr(self._module, name)
        self.network = _network_of(self._module)
        dispatcher = dispatcher_of(self.network)
        self._before = (dispatcher.settings, dispatcher.enabled) if dispatcher else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            disable=not self._verbose,
            console=_console(),
            transient=True,
        )
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        from dcompile.api import Handle

        self._progress.stop()
        if self._component is not None:
            setattr(self._module, *self._component)
        dispatcher = dispatcher_of(self.network)
        if dispatcher is None:  # what was asked for could not be installed
            return
        dispatcher.watch = None
        if self._before is None:
            Handle(dispatcher).remove()
            return
        settings, enabled = self._before
        dispatcher.configure(settings)
        dispatcher.enabled = enabled

    # Recording

    def measure(self, depths: Sequence[int] | None, *, strict: bool = False) -> None:
        """Record uncached runs at these depths or at all, and check that they repeat.

        Raises:
            DepthError: the network has none of them; or, if ``strict``, lacks one.
        """
        bar = self._progress.add_task("recording", total=None)
        waiting = [0] if depths is None else list(dict.fromkeys(depths))
        for place, depth in enumerate(waiting):
            self._progress.update(bar, total=len(waiting) * len(self._runs))
            recordings: list[Recording] = []
            try:
                for number in range(len(self._runs)):
                    recordings += self._recorded(depth, number)
                    self._progress.advance(bar)
            except DepthError:
                if strict or (place + 1 == len(waiting) and not self.objectives):
                    raise
                self._progress.advance(bar, len(self._runs))
                continue
            self.objectives[depth] = self._objective(recordings)
            if depths is None and not place:  # now it is known how many there are
                waiting += range(1, len(self._handle().explain().depths))
        if len(self.objectives) == 1:
            self._recorded(next(iter(self.objectives)), 0)

    def _recorded(self, depth: int, number: int) -> list[Recording]:
        recorder = _Recorder(self._memory)
        dispatcher = self._compiled(schedule=Uniform(1), depth=depth)
        dispatcher.watch = recorder
        try:
            found = pictures_of(self._runs[number]())
        finally:
            dispatcher.watch = None
        stats = dispatcher.stats()
        if stats.refresh_steps < 2 and stats.uncached_calls:
            raise TuneError(_UNCACHED)
        if stats.refresh_steps < 2:
            raise TuneError("run called the network less than twice: there is nothing to cache")
        self._timesteps |= recorder.steps
        if number == len(self._expected):
            self._expected.append(found)
            return recorder.recordings()
        repeated = psnr_between(found, self._expected[number])
        if not repeated >= _LEAST_REPEATABLE:
            raise TuneError(
                f"run does not repeat: two uncached runs of sample {number} differ ({repeated:.1f} "
                "dB). Seed everything it draws: generator=torch.Generator().manual_seed(...)"
            )
        return recorder.recordings()

    def _objective(self, recordings: list[Recording]) -> Objective:
        lengths = {len(recording.gram) for recording in recordings}
        if len(lengths) != 1:
            raise TuneError(
                f"run makes runs of {', '.join(map(str, sorted(lengths))) or 'no'} steps: a "
                "schedule is tuned for one number of steps"
            )
        (steps,) = lengths
        if len(self._timesteps) != 1:
            raise TuneError(
                f"run makes runs over {sorted(self._timesteps)} timesteps: tune for one"
            )
        (timesteps,) = self._timesteps
        ahead = self._dispatcher().run_ahead(timesteps, recordings[0].ratio)
        weights = np.ones(steps)
        if ahead.weights is not None and len(ahead.weights) >= timesteps:
            # A run may end before its timesteps do.
            weights = np.array(ahead.weights[-timesteps:][:steps])
            self.weighted = step_weights(self._sampler()) is not None
            self._power = ahead.power
        return Objective(tuple(recordings), weights)

    # Trying

    def search_at(self, speedup: float, forecasts: Sequence[str], trials: int) -> None:
        """Try the most promising schedules of this speed-up, then what lies around the best."""
        promising: list[tuple[float, int, str, tuple[int, ...]]] = []
        unreachable: list[ScheduleError] = []
        plain: list[tuple[Levels, str]] = []
        for depth, objective in self.objectives.items():
            try:
                count = Sigma(speedup=speedup).refreshes(objective.steps, objective.ratio)
            except ScheduleError as error:
                unreachable.append(error)
                continue
            if not plain:
                even = spread(objective.steps, count)
                plain = [(((depth, even),), name) for name in forecasts]
            promising += [
                (error, depth, name, chosen)
                for error, name, chosen in candidates(objective, forecasts, count, self._power)
            ]
        if not promising:
            raise unreachable[0]
        bar = self._progress.add_task("trying", total=trials)
        # Predictions compare schedules well within a depth and forecast, less well across them.
        leaders: dict[tuple[int, str], list[tuple[int, ...]]] = {}
        for _, depth, name, chosen in sorted(promising):
            leaders.setdefault((depth, name), []).append(chosen)
        single: list[tuple[Levels, str]] = []
        for rank in range(max(map(len, leaders.values()))):
            single += [
                (((d, sets[rank]),), n) for (d, n), sets in leaders.items() if rank < len(sets)
            ]
        # Predictions know nothing of what errors do to later features: so even refreshes, too.
        several = nested(self.objectives, forecasts, speedup, self._power)
        turns = zip_longest(several, single[1:])
        queue = [*single[:1], *plain, *(one for turn in turns for one in turn if one is not None)]
        for levels, name in list(dict.fromkeys(queue))[: max(1, 2 * trials // 3)]:
            self._try(levels, name)
            self._progress.advance(bar)
        while len(self.trials) < trials:
            best = max(self.trials, key=lambda trial: trial.psnr)
            neighbour = self._untried_neighbour(best)
            if neighbour is None:
                break
            self._try(neighbour, best.forecast)
            self._progress.advance(bar)

    def search_for(self, psnr: float, forecasts: Sequence[str], trials: int) -> None:
        """Of each depth and forecast, the fewest refreshes that reach ``psnr``."""
        pairs = [(depth, name) for depth in self.objectives for name in forecasts]
        each = min(trials, math.ceil(math.log2(max(o.steps for o in self.objectives.values()))))
        bar = self._progress.add_task("trying", total=each * len(pairs))
        for depth, name in pairs:
            objective = self.objectives[depth]
            low, high = 1, objective.steps
            for _ in range(each):
                if low >= high:
                    break
                count = (low + high) // 2
                _, _, chosen = candidates(objective, [name], count, self._power)[0]
                self._progress.advance(bar)
                if self._try(((depth, chosen),), name).psnr >= psnr:
                    high = count
                else:
                    low = count + 1
        self._search_beyond(psnr, forecasts, trials)
        depth, objective = next(iter(self.objectives.items()))
        everything = tuple(range(objective.steps))
        if not any(trial.psnr >= psnr for trial in self.trials):
            self.trials.append(Trial(everything, depth, "reuse", 1.0, math.inf, 1))

    def _search_beyond(self, psnr: float, forecasts: Sequence[str], trials: int) -> None:
        """Whether schedules with several cuts are faster still."""
        bar = self._progress.add_task("trying several cuts", total=trials)
        fastest = max((t.speedup for t in self.trials if t.psnr >= psnr), default=1.0)
        least = min(objective.ratio for objective in self.objectives.values())
        low, high = fastest, 1 / least
        for _ in range(trials):
            wanted = math.sqrt(low * high)
            several = nested(self.objectives, forecasts, wanted, self._power)
            untried = [one for one in several if one not in {t.key for t in self.trials}]
            self._progress.advance(bar)
            if not untried or wanted < low * 1.02:
                return
            reached = [self._try(*one) for one in untried[:2]]
            enough = [trial.speedup for trial in reached if trial.psnr >= psnr]
            low, high = (max(enough), high) if enough else (low, wanted)

    def compare(self, intervals: Sequence[int], forecasts: Sequence[str]) -> None:
        """Try what DeepCache does, and the most promising with as many refreshes."""
        tried = {trial.key for trial in self.trials}
        first, objective = next(iter(self.objectives.items()))
        counts = [len(range(0, objective.steps, interval)) for interval in dict.fromkeys(intervals)]
        best = [candidates(objective, forecasts, count, self._power)[0] for count in counts]
        queue: list[tuple[Levels, str]] = [
            (((first, chosen),), forecast) for _, forecast, chosen in best
        ]
        queue += [
            (((depth, tuple(range(0, objective.steps, interval))),), "reuse")
            for depth, objective in self.objectives.items()
            for interval in dict.fromkeys(intervals)
        ]
        queue = [one for one in dict.fromkeys(queue) if one not in tried]
        bar = self._progress.add_task("comparing", total=len(queue))
        for levels, forecast in queue:
            self._try(levels, forecast)
            self._progress.advance(bar)

    def _untried_neighbour(self, best: Trial) -> Levels | None:
        """The most promising schedule that differs from the best in one refresh by one step."""
        forecast = resolve_forecast(best.forecast)
        tried = {trial.key for trial in self.trials}
        steps = self.objectives[best.depth].steps
        found = []
        for step in best.levels[0][1][1:]:
            for moved in (step - 1, step + 1):
                if moved in best.levels[0][1] or moved == steps:
                    continue
                near = tuple(
                    (depth, tuple(sorted(moved if own == step else own for own in steps_of)))
                    for depth, steps_of in best.levels
                )
                if (near, best.forecast) not in tried:
                    error = sum(self.objectives[depth](forecast, own) for depth, own in near)
                    found.append((error, near))
        return min(found)[1] if found else None

    def spent(self, **settings: Any) -> float:
        """How much less compute these settings take, over all samples."""
        dispatcher = self._compiled(**settings)
        for run in self._runs:
            run()
        stats = dispatcher.stats()
        if not stats.refresh_steps and stats.uncached_calls:
            raise TuneError(_UNCACHED)
        if not stats.refresh_steps:
            raise TuneError("run never called the network: there is nothing to cache")
        return stats.flops_speedup

    def _try(self, levels: Levels, forecast: str) -> Trial:
        *outer, (depth, chosen) = levels
        (timesteps,) = self._timesteps
        schedule = Tuned(
            chosen, timesteps, depth, forecast, _identity(self.network), 1.0, 0.0, (), tuple(outer)
        )
        self._compiled(schedule=schedule)
        values = [
            psnr_between(pictures_of(one()), expected)
            for one, expected in zip(self._runs, self._expected, strict=True)
        ]
        steps = self.objectives[depth].steps
        spent = compute_of(levels, steps, {d: o.ratio for d, o in self.objectives.items()})
        if all(math.isinf(value) for value in values):
            mean = math.inf
        else:  # one equal picture must not make up for all others
            mean = sum(min(value, _IDENTICAL) for value in values) / len(values)
        interval = (*chosen[1:], steps)[0]
        even = forecast == "reuse" and chosen == tuple(range(0, steps, interval)) and not outer
        trial = Trial(
            chosen,
            depth,
            forecast,
            steps / spent,
            mean,
            interval if even else None,
            tuple(outer),
        )
        self.trials.append(trial)
        return trial

    def result(self, speedup: float | None, psnr: float | None) -> Tuned:
        """The best that was tried."""
        if psnr is None:
            assert speedup is not None
            # A run of few steps may refresh once at most, and miss what was asked for by a little.
            most = max(trial.speedup for trial in self.trials)
            fast = [t for t in self.trials if t.speedup >= min(speedup, most) - 1e-9]
            best = max(fast, key=lambda trial: trial.psnr)
        else:
            enough = [trial for trial in self.trials if trial.psnr >= psnr]
            if enough:
                best = max(enough, key=lambda trial: (trial.speedup, trial.psnr))
            else:  # interrupted before any was close enough
                best = max(self.trials, key=lambda trial: trial.psnr)
        return Tuned(
            refresh_steps=best.refresh_steps,
            steps=next(iter(self._timesteps)),
            depth=best.depth,
            forecast=best.forecast,
            network=_identity(self.network),
            speedup=best.speedup,
            psnr=best.psnr,
            trials=tuple(self.trials),
            outer=best.outer,
        )

    def _compiled(self, **settings: Any) -> Dispatcher:
        from dcompile.api import cache_compile

        cache_compile(self._module, cuda_graphs=False, **{**self._settings, **settings})
        return self._dispatcher()

    def _sampler(self) -> Any:
        find = self._dispatcher().settings.sampler
        return find() if find is not None else None

    def _handle(self) -> Handle:
        from dcompile.api import handle

        return handle(self.network)

    def _dispatcher(self) -> Dispatcher:
        return self._handle()._dispatcher


def _identity(network: nn.Module) -> tuple[str, int]:
    return type(network).__name__, sum(parameter.numel() for parameter in network.parameters())


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
