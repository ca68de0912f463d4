"""Find the refresh steps, depths and forecast that suit one network, sampler and number of steps.

What a schedule costs in fidelity is predicted before it is tried (``dcompile.tuning.prediction``):
uncached runs record the boundaries of all cuts at every step. The most promising schedules are
tried in real runs, and every one that was tried makes the predictions of the others better. The
best that was tried is returned.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.api import cache_compile, handle
from dcompile.compiler.build import choose_skip
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.fingerprint import identity_of
from dcompile.errors import DepthError, ScheduleError, TuneError
from dcompile.handles import Handle
from dcompile.integrations.pipelines import denoiser_name, is_pipeline, network_of
from dcompile.policy.adaptive import Adaptive
from dcompile.policy.checks import require_speedup
from dcompile.policy.fixed import Uniform
from dcompile.policy.forecast import Forecast, Reuse, resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.multi_level import MultiLevel
from dcompile.policy.placement import evenly
from dcompile.policy.sampler import error_gains
from dcompile.policy.tuned import Levels, Trial, Tuned
from dcompile.runtime.dispatcher import Dispatcher, dispatcher_of
from dcompile.runtime.install import detach
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.state import RefreshRecord
from dcompile.runtime.wrapper import wrapper_of
from dcompile.tuning.prediction import (
    Choice,
    Objective,
    Predictor,
    Recording,
    choices,
    compute_of,
)

FORMAT = 1
# Beyond any sum of weighted drifts: nothing but max_interval refreshes.
_LARGEST_THRESHOLD = 1e30
FORECASTS = ("reuse", "damped", "linear", "taylor")
# Two uncached runs that differ by more than this (PSNR, dB) are no measure for a third.
_LEAST_REPEATABLE = 50.0
_UNCACHED = (
    "run called the network in training mode or for gradients, where it is never cached: call "
    "eval(), and sample under torch.no_grad()"
)
_IDENTICAL = 100.0  # dB, of a picture that is equal among others that are not
# A cut whose reuse step takes more of a refresh step than this is not tried unless it is asked for,
# and of the others no more than so many.
_LARGEST_RATIO = 0.6
_MOST_DEPTHS = 6
_MOST_PSNR = 1000  # dB; more than any result but an equal one
_HOPELESS = 10.0  # times the error wanted: such a prediction is not tried
# Parts of a run whose errors are weighed by themselves.
_PARTS = 6
# Speed-ups among which the fastest schedule of a quality is looked for.
_SPEEDS = 8


# Recording ----------------------------------------------------------------------------------------


class _Memory:
    """How many bytes of features are kept before they go to a file."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def takes(self, size: int) -> bool:
        """Whether there is room for so many more, which are then taken."""
        self._left -= size
        return self._left >= 0


class _Features:
    """Boundaries of one run and depth: in memory as far as there is room, then in files."""

    def __init__(self, memory: _Memory) -> None:
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
class _Watched:
    """What was seen of one lane: for each depth, boundaries and reactions; all it cached last."""

    lane: Any  # held, so that no other is mistaken for it
    features: list[_Features]
    reactions: list[list[float]]
    cached: Any = None


class _Recorder:
    """Watches the refreshes of uncached runs; see ``Dispatcher.observer``."""

    def __init__(self, depths: int, limit: int) -> None:
        self._depths = depths
        self._memory = _Memory(limit)
        self._lanes: dict[int, _Watched] = {}
        self._ratios: tuple[float, ...] = ()
        self.steps: set[int] = set()

    def __call__(self, seen: RefreshRecord) -> None:
        if seen.steps is None:
            raise TuneError(
                "the network's timesteps are not elements of one tensor, such as "
                "scheduler.timesteps, or are just one: its runs cannot be told apart well enough "
                "to tune for them"
            )
        self.steps.add(seen.steps)
        watched = self._lanes.setdefault(
            id(seen.lane),
            _Watched(
                seen.lane,
                [_Features(self._memory) for _ in range(self._depths)],
                [[] for _ in range(self._depths)],
            ),
        )
        program = seen.program.program
        self._ratios = program.ratios
        for level, cut in enumerate(program.cached):
            boundary = seen.cached[cut.latest]
            tensors = [b for b in boundary if isinstance(b, torch.Tensor) and b.is_floating_point()]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise TuneError(
                    f"features of step {seen.step} are not finite: nothing can be tuned"
                )
            reaction = 0.0
            if watched.cached is not None:
                if level == 0:
                    stale, _ = seen.program.reuse(seen.leaves, watched.cached)
                else:
                    stale, _ = seen.program.refresh(seen.leaves, watched.cached, level)
                moved = _distance(tree_leaves(stale), tree_leaves(seen.result))
                changed = _distance(watched.cached[cut.latest], boundary)
                reaction = math.sqrt(moved / changed) if changed > 0 else 0.0
            watched.features[level].append(tensors)
            watched.reactions[level].append(reaction)
        watched.cached = seen.cached

    def recordings(self) -> list[list[Recording]]:
        """For each depth, one for each lane of the run."""
        found: list[list[Recording]] = [[] for _ in range(self._depths)]
        for watched in self._lanes.values():
            for level, features in enumerate(watched.features):
                scale = np.array(watched.reactions[level])
                if len(scale) < 2:
                    continue
                scale[0] = scale[1]
                found[level].append(Recording(features.gram(), scale, self._ratios[level]))
                features.close()
        return found


def _distance(one: Iterable[Any], other: Iterable[Any]) -> float:
    """Squared distance of two lists of tensors."""
    return sum(
        float((a.float() - b.float()).square().sum())
        for a, b in zip(one, other, strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    )


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
    depths: Sequence[int] | None = None,
    forecasts: Sequence[str] = FORECASTS,
    trials: int = 24,
    intervals: Sequence[int] = (),
    backend: str = "eager",
    sampler: Any = None,
    memory: int = 2 * 1024**3,
    verbose: bool = True,
) -> Tuned:
    """Find the refresh steps, depths and forecast for one network, sampler and number of steps.

    Takes, for each sample, seven runs that cache little or nothing, and one for each trial.
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
        depths: which cuts to try, by themselves and several at once (as a ``MultiLevel``); those
            the network does not have are left out. None for the outermost six whose reuse step
            takes at most 60 % of a refresh step's compute.
        forecasts: which to try.
        trials: how many schedules to try in real runs; with ``psnr``, at most.
        intervals: DeepCache's, tried besides at every depth to compare with, as are the most
            promising schedules with as many refreshes; see ``Tuned.plot``.
        backend: what to try them with. Which is faster does not matter here.
        sampler: the sampler, if ``module`` is no pipeline that has one.
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
    if psnr is not None and not (_is_number(psnr) and 0 <= psnr <= _MOST_PSNR):
        raise ScheduleError(f"psnr: expected a number of dB, 0 to {_MOST_PSNR}, got {psnr!r}")
    if speedup is not None:
        require_speedup(speedup)
    if not callable(run):
        raise TuneError(f"run: expected a function, got {run!r}")
    if depths is not None:
        _require_listed("depths", depths, int)
        if any(type(depth) is not int or depth < 0 for depth in depths):
            raise DepthError(f"depths: expected ints of at least 0, got {list(depths)!r}")
    _require_listed("forecasts", forecasts, str)
    _require_listed("intervals", intervals, int, empty=True)
    for what, number, least in (
        ("trials", trials, 1),
        ("samples", samples, 1),
        ("memory", memory, 0),
    ):
        if type(number) is not int or number < least:
            raise TuneError(f"{what}: expected an int of at least {least}, got {number!r}")
    for name in forecasts:
        if not isinstance(name, str):  # a file could not say which one it was
            raise ScheduleError(f"forecasts: expected names, got {name!r}")
        resolve_forecast(name)
    for interval in intervals:
        Uniform(interval)
    session = Session(module, samples_of(run, samples), backend, sampler, memory, verbose)
    with session:
        session.measure(depths)
        try:
            session.weigh()
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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_listed(what: str, values: object, kind: type, *, empty: bool = False) -> None:
    """Raises a TuneError where ``values`` is no list or tuple of something."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TuneError(f"{what}: expected a list of {kind.__name__}, got {values!r}")
    if not values and not empty:
        raise TuneError(f"{what} must not be empty")


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
    sampler: Any = None,
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
        sampler: the sampler, if ``module`` is no pipeline that has one.

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
    session = Session(module, samples_of(run, samples), backend, sampler, 0, verbose=False)

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
        predictor: of what schedules would cost, by that and by what was tried.
        weighted: whether the sampler told what it makes of errors.
        trials: what was tried.
    """

    def __init__(
        self,
        module: Any,
        runs: list[Callable[[], Any]],
        backend: str,
        sampler: Any,
        memory: int,
        verbose: bool,
    ) -> None:
        self._module = module
        self._runs = runs
        self._settings = {"backend": backend, "sampler": sampler, "verbose": False}
        self._memory = memory
        self._verbose = verbose
        self._expected: list[torch.Tensor] = []
        self.objectives: dict[int, Objective] = {}
        self.predictor = Predictor(self.objectives)
        self.weighted = False
        self._power = 0.5
        self._timesteps: set[int] = set()
        self.trials: list[Trial] = []

    def __enter__(self) -> Session:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        # cache_compile takes torch.compile's wrapper off a pipeline's network.
        self._component = None
        if is_pipeline(self._module):
            name = denoiser_name(self._module)
            self._component = name, getattr(self._module, name)
        self.network = network_of(self._module)
        components = getattr(self._module, "components", {}).values()
        found = [wrapper_of(part) for part in components if isinstance(part, nn.Module)]
        self._companions = {one: one.state() for one in found if isinstance(one, LazyNetwork)}
        dispatcher = dispatcher_of(self.network)
        self._before = (dispatcher.settings, dispatcher.enabled) if dispatcher else None
        self._known_companions = list(dispatcher.companions) if dispatcher else []
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
        self._progress.stop()
        if self._component is not None:
            setattr(self._module, *self._component)
        dispatcher = dispatcher_of(self.network)
        if dispatcher is None:  # what was asked for could not be installed
            return
        dispatcher.observer = None
        if self._before is None:
            Handle(dispatcher).remove()
        else:
            settings, enabled = self._before
            dispatcher.configure(settings)
            dispatcher.enabled = enabled
            detach(
                dispatcher,
                [one for one in dispatcher.companions if one not in self._known_companions],
            )
        for one, state in self._companions.items():
            one.restore(state)

    # Recording

    def measure(self, depths: Sequence[int] | None, *, every: bool = False) -> None:
        """Record uncached runs, at all these depths at once, and check that they repeat.

        Args:
            depths: None for those worth trying.
            every: None stands for all, and no depth may be missing.

        Raises:
            DepthError: the network has none of them; or, if ``every``, lacks one.
        """
        bar = self._progress.add_task("recording", total=1 + len(self._runs))
        self._expected.append(self._uncached(0, Uniform(1)))
        self._progress.advance(bar)
        there = {row.depth: row.ratio for row in self._handle().explain().depths}
        chosen = list(there)
        if depths is not None:
            chosen = sorted({depth for depth in depths if depth in there})
            missing = [depth for depth in depths if depth not in there]
            if missing and (every or not chosen):
                choose_skip(self._current_networks()[-1], missing[0])  # raises
        elif not every:
            worth = [depth for depth in chosen if there[depth] <= _LARGEST_RATIO]
            chosen = worth[:_MOST_DEPTHS] or chosen[:1]
        found: list[list[Recording]] = [[] for _ in chosen]
        for number in range(len(self._runs)):
            for own, new in zip(found, self._recorded(chosen, number), strict=True):
                own += new
            self._progress.advance(bar)
        for depth, recordings in zip(chosen, found, strict=True):
            self.objectives[depth] = self._objective(recordings)

    def weigh(self) -> None:
        """Measure what becomes of errors made early or late in a run.

        The sampler's weights say how an error at a step enters the sample, not what the network
        makes of it at the steps that follow: it corrects most of what goes wrong early. So in one
        part of the run after the other, every second step reuses, and what that costs is compared
        with what was predicted. From then on predictions are mean squared errors of the result.

        Of what the parts differ by, half is believed (of the logarithm): between two refreshes far
        apart nothing is corrected.
        """
        depth, objective = next(iter(self.objectives.items()))
        steps = objective.steps
        parts = [part for part in np.array_split(np.arange(steps), _PARTS) if len(part) > 1]
        centres, factors = [], []
        bar = self._progress.add_task("weighing", total=len(parts))
        for part in parts:
            reused = set(part[1::2].tolist())
            own = tuple(step for step in range(steps) if step not in reused)
            error = self._error(self._run(((depth, own),), "reuse"))
            predicted = objective(Reuse(), own)
            if predicted > 0:
                centres.append(part.mean())
                factors.append(max(error, 1e-12) / predicted)
            self._progress.advance(bar)
        if not factors:
            return
        logarithms = np.log(factors)
        believed = 0.5 * (logarithms + logarithms.mean())
        along = np.exp(np.interp(np.arange(steps), centres, believed))
        for depth, objective in self.objectives.items():
            weights = objective.weights * np.sqrt(along)
            self.objectives[depth] = Objective(objective.recordings, weights)

    def _recorded(self, depths: Sequence[int], number: int) -> list[list[Recording]]:
        """Of one sample, for each depth."""
        recorder = _Recorder(len(depths), self._memory)
        picture = self._uncached(number, MultiLevel([(depth, 1) for depth in depths]), recorder)
        self._timesteps |= recorder.steps
        if number == len(self._expected):
            self._expected.append(picture)
            return recorder.recordings()
        repeated = psnr_between(picture, self._expected[number])
        if not repeated >= _LEAST_REPEATABLE:
            raise TuneError(
                f"run does not repeat: two uncached runs of sample {number} differ ({repeated:.1f} "
                "dB). Seed everything it draws: generator=torch.Generator().manual_seed(...)"
            )
        return recorder.recordings()

    def _uncached(
        self, number: int, schedule: Any, watch: Callable[[RefreshRecord], None] | None = None
    ) -> torch.Tensor:
        """What a run gives that refreshes at every step."""
        dispatcher = self._compiled(schedule=schedule)
        dispatcher.observer = watch
        try:
            picture = pictures_of(self._runs[number]())
        finally:
            dispatcher.observer = None
        stats = dispatcher.stats()
        if stats.refresh_steps < 2 and stats.uncached_calls:
            raise TuneError(_UNCACHED)
        if stats.refresh_steps < 2:
            raise TuneError("run called the network less than twice: there is nothing to cache")
        return picture

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
        ahead = self._dispatcher().state.planner.describe_run(timesteps, recordings[0].ratio)
        weights = np.ones(steps)
        if ahead.gains is not None and len(ahead.gains) >= timesteps:
            # A run may end before its timesteps do.
            weights = np.array(ahead.gains[-timesteps:][:steps])
            self.weighted = error_gains(self._sampler()) is not None
            self._power = ahead.power
        return Objective(tuple(recordings), weights)

    # Trying

    def search_at(self, speedup: float, forecasts: Sequence[str], trials: int) -> None:
        """Of all schedules with this speed-up, try those that promise most."""
        pool = choices(self.objectives, forecasts, speedup, self._power)
        if not pool:  # a run of a few steps gets one refresh at least
            depth, objective = next(iter(self.objectives.items()))
            count = GainWeighted(speedup=speedup).refreshes(objective.steps, objective.ratio)
            pool = [(((depth, evenly(objective.steps, count)),), name) for name in forecasts]
        bar = self._progress.add_task("trying", total=trials)
        while len(self.trials) < trials:
            untried = self._untried(pool)
            choice = None
            if 2 * len(self.trials) < trials:  # a bit of everything, to learn how to predict
                choice = self._unknown(untried, forecasts, self.predictor)
            elif 4 * len(self.trials) >= 3 * trials:  # what is left: around the best so far
                choice = self._untried_neighbour(max(self.trials, key=lambda trial: trial.psnr))
            choice = choice or self.predictor.best(untried)
            if choice is None:
                break
            self._try(choice)
            self._progress.advance(bar)

    def search_for(self, psnr: float, forecasts: Sequence[str], trials: int) -> None:
        """Find the fastest schedule that reaches ``psnr``."""
        ratios = {depth: objective.ratio for depth, objective in self.objectives.items()}
        depth, objective = next(iter(self.objectives.items()))
        limit = 1 / max(min(ratios.values()), 1 / objective.steps)
        speeds = [limit ** ((n + 0.5) / _SPEEDS) for n in range(_SPEEDS)]
        pool: dict[Choice, float] = {}
        for speed in speeds:
            for choice in choices(self.objectives, forecasts, speed, self._power):
                pool[choice] = objective.steps / compute_of(choice[0], objective.steps, ratios)
        wanted = 10.0 ** (-psnr / 10)
        bar = self._progress.add_task("trying", total=trials)

        def off(choice: Choice) -> float:
            """How far from the error wanted, if nothing better is known."""
            return abs(math.log(max(self.predictor(choice), 1e-300) / wanted))

        while len(self.trials) < trials:
            fastest = max((t.speedup for t in self.trials if t.psnr >= psnr), default=1.0)
            untried = [c for c in self._untried(pool) if pool[c] > fastest]
            found = None
            if not self.trials:
                middle = [c for c in untried if len(c[0]) == 1 and c[0][0][0] == depth] or untried
                found = min(middle, key=lambda c: abs(pool[c] - math.sqrt(limit)), default=None)
            elif 2 * len(self.trials) < trials:
                found = self._unknown(untried, forecasts, off)
            if found is None:
                enough = [c for c in untried if self.predictor(c) <= wanted]
                found = max(enough, key=pool.__getitem__, default=None)
            if found is None:  # predictions err: the least unlikely
                found = self.predictor.best(c for c in untried if pool[c] >= 1.02 * fastest)
                if found is None or self.predictor(found) > _HOPELESS * wanted:
                    break
            self._try(found)
            self._progress.advance(bar)
        if not any(trial.psnr >= psnr for trial in self.trials):
            everything = tuple(range(objective.steps))
            self.trials.append(Trial(everything, depth, "reuse", 1.0, math.inf, 1))

    def compare(self, intervals: Sequence[int], forecasts: Sequence[str]) -> None:
        """Try what DeepCache does, and what promises most of all that is as fast."""
        first, objective = next(iter(self.objectives.items()))
        ratios = {depth: objective.ratio for depth, objective in self.objectives.items()}
        queue: list[Choice] = []
        for interval in dict.fromkeys(intervals):
            beat = tuple(range(0, objective.steps, interval))
            queue += [(((depth, beat),), "reuse") for depth in self.objectives]
            speedup = objective.steps / compute_of(((first, beat),), objective.steps, ratios)
            pool = choices(self.objectives, forecasts, speedup, self._power)
            best = self.predictor.best(self._untried(pool))
            queue += [best] if best is not None else []
        queue = self._untried(dict.fromkeys(queue))
        bar = self._progress.add_task("comparing", total=len(queue))
        for choice in queue:
            self._try(choice)
            self._progress.advance(bar)

    def _untried(self, pool: Iterable[Choice]) -> list[Choice]:
        tried = {trial.key for trial in self.trials}
        return [choice for choice in pool if choice not in tried]

    def _unknown(
        self, untried: Sequence[Choice], forecasts: Sequence[str], key: Callable[[Choice], float]
    ) -> Choice | None:
        """The best by ``key`` with a depth, a forecast or else a choice of depths never tried.

        Of depths and forecasts, one whose refreshes are even: predictions know nothing of what
        errors do to later features, and overrate what is cleverly placed.
        """
        for depth in (d for d in self.objectives if not self.predictor.knows(d)):
            having = [c for c in untried if depth in (d for d, _ in c[0]) and self._is_even(c)]
            # With one cut, or else with others that are known, it is clear what an error is from.
            known = {d for d in self.objectives if self.predictor.knows(d)}
            for others in (set(), known):
                clear = [c for c in having if {d for d, _ in c[0]} - {depth} <= others]
                if clear:
                    return min(clear, key=key)
        outermost = next(iter(self.objectives))
        plain = [c for c in untried if [d for d, _ in c[0]] == [outermost] and self._is_even(c)]
        tried = {trial.forecast for trial in self.trials if trial.depth == outermost}
        for name in (n for n in forecasts if n not in tried):
            named = [choice for choice in plain if choice[1] == name]
            named = named or [choice for choice in untried if choice[1] == name]
            if named:
                return min(named, key=key)
        chains = {tuple(depth for depth, _ in trial.levels) for trial in self.trials}
        new = [c for c in untried if tuple(depth for depth, _ in c[0]) not in chains]
        return min(new, key=key, default=None)

    def _is_even(self, choice: Choice) -> bool:
        levels, _ = choice
        steps = self.objectives[levels[0][0]].steps
        beats = [range(0, steps, (*own[1:], steps)[0]) for _, own in levels]
        return all(
            own in (tuple(beat), evenly(steps, len(own)))
            for (_, own), beat in zip(levels, beats, strict=True)
        )

    def _untried_neighbour(self, best: Trial) -> Choice | None:
        """The most promising schedule that differs from the best in one refresh by one step."""
        steps = self.objectives[best.depth].steps
        found: list[Choice] = []
        for step in best.levels[0][1][1:]:
            for moved in (step - 1, step + 1):
                if moved in best.levels[0][1] or moved == steps:
                    continue
                near = tuple(
                    (depth, tuple(sorted(moved if own == step else own for own in steps_of)))
                    for depth, steps_of in best.levels
                )
                found.append((near, best.forecast))
        return self.predictor.best(self._untried(found))

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

    def _try(self, choice: Choice) -> Trial:
        levels, forecast = choice
        *outer, (depth, chosen) = levels
        mean = self._run(levels, forecast)
        steps = self.objectives[depth].steps
        spent = compute_of(levels, steps, {d: o.ratio for d, o in self.objectives.items()})
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
        self.predictor.learn(choice, self._error(mean))
        return trial

    def _run(self, levels: Levels, forecast: str) -> float:
        """Mean PSNR of real runs with these cuts; infinite if all are exact."""
        *outer, (depth, chosen) = levels
        (timesteps,) = self._timesteps
        identity = identity_of(self.network)
        self._compiled(
            schedule=Tuned(chosen, timesteps, depth, forecast, identity, 1.0, 0.0, (), tuple(outer))
        )
        values = [
            psnr_between(pictures_of(one()), expected)
            for one, expected in zip(self._runs, self._expected, strict=True)
        ]
        if all(math.isinf(value) for value in values):
            return math.inf
        # One equal picture must not make up for all others.
        return sum(min(value, _IDENTICAL) for value in values) / len(values)

    @staticmethod
    def _error(psnr: float) -> float:
        """As a mean squared error, of a range of 1."""
        error: float = 10 ** (-min(psnr, _IDENTICAL) / 10)
        return error

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
            network=identity_of(self.network),
            speedup=best.speedup,
            psnr=best.psnr,
            trials=tuple(self.trials),
            outer=best.outer,
        )

    def _compiled(self, **settings: Any) -> Dispatcher:
        cache_compile(self._module, cuda_graphs=False, **{**self._settings, **settings})
        return self._dispatcher()

    def _sampler(self) -> Any:
        find = self._dispatcher().settings.sampler
        return find() if find is not None else None

    def _handle(self) -> Handle:
        return handle(self.network)

    def _current_networks(self) -> list[CapturedNetwork]:
        dispatcher = self._dispatcher()
        return dispatcher.programs.captures.current_networks(dispatcher.settings.dynamic)

    def _dispatcher(self) -> Dispatcher:
        return self._handle()._dispatcher


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
