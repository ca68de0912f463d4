"""What a schedule would cost in fidelity, predicted from one uncached run.

The inner products of a run's boundaries, all pairs of steps (a Gram matrix), tell how far any
forecast from any refreshes would be from the true boundary. Multiplied with how strongly the
network's output reacts to its boundary, and with what becomes of an error at that step, that is the
error a step adds to the result.

Such predictions compare depths and forecasts badly: guidance, say, multiplies what differs between
its two calls and nothing else. So ``Predictor`` learns from every schedule that is tried how its
predictions are to be scaled.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations, pairwise, product
from typing import Any

import numpy as np

from dcompile.policy.forecast import Damped, Forecast, coefficients_of, resolve_forecast
from dcompile.policy.placement import by_load, evenly
from dcompile.policy.tuned import Levels

Array = np.ndarray[Any, Any]

Choice = tuple[Levels, str]
"""ProgramSpec, and the name of the forecast they go with."""

_LOCAL_SWEEPS = 12
# How many times as often as the next deeper cut each cut of several is refreshed.
_TIMES = {
    1: ((),),
    2: tuple((n,) for n in (2, 3, 4, 5, 6, 8)),
    3: tuple(product((2, 3, 4), (2, 3))),
}
# Half of a prediction's error is attributed to depths and forecasts, half to the combination of
# depths at hand.
_SHARED = 0.5
# The least part of an error that is attributed to a depth never tried before.
_LEAST_SHARE = 0.05


# What a recorded run says -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recording:
    """An uncached run at one depth.

    Attributes:
        gram: inner products of the boundaries, shape (steps, steps).
        reaction: how much the output moves for one unit of error in the boundary, shape (steps,).
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
    """

    gram: Array
    reaction: Array
    ratio: float

    def errors(self, forecast: Forecast, refreshed: Sequence[int]) -> Array:
        """The boundary's squared error at every step if these are the refresh steps."""
        return boundary_errors(self.gram, forecast, refreshed)


def boundary_errors(gram: Array, forecast: Forecast, refreshed: Sequence[int]) -> Array:
    """Squared distance of the forecast from the true boundary at every step, 0 at refreshes.

    Args:
        gram: inner products of the boundaries, shape (..., steps, steps).
        refreshed: ascending steps, the first of them 0.

    Returns:
        Shape (..., steps).
    """
    lead, steps = gram.shape[:-2], gram.shape[-1]
    known = set(refreshed)
    past: list[int] = []
    right, size, damping = np.zeros(lead), np.zeros(lead), np.zeros(lead)
    rows: list[Array] = []  # for each reuse step, what its forecast and the truth are made of
    places: list[list[int]] = []
    for step in range(steps):
        given = coefficients_of(forecast, step, past)[: len(past)] if past else ()
        if step in known:
            if isinstance(forecast, Damped) and len(past) > 1:
                now_right, now_size = _residuals(gram, given, [*past, step])
                right = now_right + Damped.MEMORY * right
                size = now_size + Damped.MEMORY * size
                damping = np.clip(right / np.maximum(size, 1e-300), 0.0, 1.0)
            past = [step, *past][: forecast.history]
            continue
        row = np.zeros((*lead, forecast.history + 1))
        if isinstance(forecast, Damped):
            row[..., 0] = 1.0 + damping * (given[0] - 1.0)
            row[..., 1 : len(given)] = damping[..., None] * np.array(given[1:])
        else:
            row[..., : len(given)] = given
        row[..., -1] = -1.0
        rows.append(row)
        places.append([*past, *past[-1:] * (forecast.history - len(past)), step])
    found = np.zeros((*lead, steps))
    if rows:
        at, weights = np.array(places), np.stack(rows, axis=-2)
        blocks = gram[..., at[:, :, None], at[:, None, :]]
        squares = ((weights[..., None, :] @ blocks)[..., 0, :] * weights).sum(axis=-1)
        found[..., at[:, -1]] = np.maximum(0.0, squares)
    return found


def _residuals(gram: Array, given: Sequence[float], places: Sequence[int]) -> tuple[Array, Array]:
    """How far a forecast was right about the last of ``places``: a damped forecast's sums."""
    block = gram[..., places, :][..., places]
    added, change = np.array([*given, 0.0]), np.zeros(len(places))
    added[0] -= 1.0
    change[0], change[-1] = -1.0, 1.0
    return change @ block @ added, added @ block @ added


@dataclass(frozen=True)
class Objective:
    """Predicts the error of the result, from recordings at one depth.

    Attributes:
        recordings: all of them with the same number of steps.
        gains: the sampler's error gain at each step, shape (steps,).
    """

    recordings: tuple[Recording, ...]
    gains: Array

    @property
    def steps(self) -> int:
        return len(self.gains)

    @property
    def ratio(self) -> float:
        return self.recordings[0].ratio

    @cached_property
    def _gram(self) -> Array:
        """Of all recordings, shape (recordings, steps, steps)."""
        return np.stack([recording.gram for recording in self.recordings])

    @cached_property
    def _scale(self) -> Array:
        """What a squared error of the boundary comes to, shape (recordings, steps)."""
        reactions = np.stack([recording.reaction for recording in self.recordings])
        squares: Array = (self.gains * reactions) ** 2
        return squares

    @cached_property
    def _between(self) -> dict[tuple[Forecast, tuple[int, ...], int], float]:
        """Of refreshes, the latest first, and the step of the next one: the error in between."""
        return {}

    def __call__(self, forecast: Forecast, refreshed: Sequence[int]) -> float:
        """Predicted squared error, up to a factor: of errors that neither add up nor cancel."""
        if isinstance(forecast, Damped):  # damping depends on all earlier refreshes
            return float((boundary_errors(self._gram, forecast, refreshed) * self._scale).sum())
        total = 0.0
        for number, (latest, after) in enumerate(pairwise((*refreshed, self.steps)), start=1):
            past = tuple(refreshed[max(0, number - forecast.history) : number][::-1])
            key = forecast, past, after
            if key not in self._between:
                self._between[key] = self._error_between(forecast, past, latest, after)
            total += self._between[key]
        return total

    def _error_between(
        self, forecast: Forecast, past: tuple[int, ...], latest: int, after: int
    ) -> float:
        steps = range(latest + 1, after)
        if not steps:
            return 0.0
        given = np.array([(*coefficients_of(forecast, s, past)[: len(past)], -1.0) for s in steps])
        at = np.array([(*past, s) for s in steps])
        blocks = self._gram[:, at[:, :, None], at[:, None, :]]
        squares = np.maximum(0.0, np.einsum("si,rsij,sj->rs", given, blocks, given, optimize=True))
        return float((squares * self._scale[:, latest + 1 : after]).sum())

    def best_by_dynamic_programming(self, count: int) -> tuple[int, ...]:
        """The refresh steps, ``count`` of them, that make the error of plain reuse least."""
        steps = self.steps
        # cost[j, k]: error of the steps between refreshes at j and k; k = steps is the end.
        square = np.diagonal(self._gram, axis1=-2, axis2=-1)
        distance = square[:, :, None] + square[:, None, :] - 2 * self._gram
        distance = (np.maximum(distance, 0.0) * self._scale[:, None, :]).sum(axis=0)
        cost = np.full((steps, steps + 1), np.inf)
        for j in range(steps):
            cost[j, j + 1 :] = np.concatenate([[0.0], np.cumsum(distance[j, j + 1 :])])
        best = np.full(steps, np.inf)
        best[0] = 0.0
        origin = []
        for _ in range(count - 1):
            total = best[:, None] + cost[:, :steps]
            origin.append(total.argmin(axis=0))
            best = total.min(axis=0)
        chosen = [int((best + cost[:, steps]).argmin())]
        for earlier in reversed(origin):
            chosen.append(int(earlier[chosen[-1]]))
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


# What there is to choose from ---------------------------------------------------------------------


def compute_of(levels: Levels, steps: int, ratios: Mapping[int, float]) -> float:
    """FLOPs of a run, in those of a refresh step."""
    counts = [steps, *(len(own) for _, own in levels)]
    costs = [*(ratios[depth] for depth, _ in levels), 1.0]
    # A step costs what the deepest of the cuts it refreshes leaves to be computed.
    return costs[-1] * counts[-1] + sum(
        cost * (count - fewer)
        for cost, (count, fewer) in zip(costs, pairwise(counts), strict=False)
    )


def choices(
    objectives: Mapping[int, Objective], names: Sequence[str], speedup: float, power: float
) -> list[Choice]:
    """Schedules with this speed-up that may be good, at one depth or at several.

    At one depth: as many refreshes as there is room for, placed evenly, by the sampler's error
    gains and by what was recorded. At several, for all choices of two or three depths: constant
    intervals, and as many refreshes as there is room for.
    """
    depths = sorted(objectives)
    ratios = {depth: objective.ratio for depth, objective in objectives.items()}
    steps = objectives[depths[0]].steps
    found: list[Choice] = []
    for depth in depths:
        count = most_refreshes(speedup, steps, ratios[depth])
        if count:
            best = candidates(objectives[depth], names, count, power)
            found += [(((depth, own),), name) for _, name, own in best]
            found += [(((depth, evenly(steps, count)),), name) for name in names]
    for number in range(1, min(3, len(depths)) + 1):
        for chain, times in product(combinations(depths, number), _TIMES[number]):
            for levels in _fitting(chain, times, objectives, ratios, speedup, power):
                found += [(levels, name) for name in names]
    return list(dict.fromkeys(found))


def most_refreshes(speedup: float, steps: int, ratio: float) -> int:
    """How many refreshes a run with one cut has room for; 0 if not even one."""
    if ratio >= 1:
        return steps if speedup <= 1 else 0
    count = math.floor(steps * (1 / speedup - ratio) / (1 - ratio) + 1e-9)
    return min(steps, max(0, count))


def _fitting(
    chain: Sequence[int],
    times: Sequence[int],
    objectives: Mapping[int, Objective],
    ratios: Mapping[int, float],
    speedup: float,
    power: float,
) -> Iterator[Levels]:
    """Cuts at these depths, each refreshed ``times`` as often as the next deeper one."""
    steps = objectives[chain[0]].steps
    loads = [w**power for w in objectives[chain[0]].gains]
    regular = _constant_intervals(chain, times, steps, ratios, speedup)
    if regular is not None:
        yield regular
    if len(chain) > 1:
        for place in (evenly, lambda _, count: by_load(loads, count)):
            fitted = _as_many(chain, times, steps, ratios, speedup, place)
            if fitted is not None:
                yield fitted


def _constant_intervals(
    chain: Sequence[int],
    times: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
) -> Levels | None:
    """The shortest intervals that are fast enough, as a ``MultiLevel``; None if none are.

    Where features swing from step to step, constant intervals are closer than more refreshes.
    """
    for outermost in range(2, steps):
        intervals = list(accumulate(times, operator.mul, initial=outermost))
        if intervals[-1] >= steps:
            return None
        levels = tuple(
            (depth, tuple(range(0, steps, every)))
            for depth, every in zip(chain, intervals, strict=True)
        )
        if steps / compute_of(levels, steps, ratios) >= speedup:
            return levels
    return None


def _as_many(
    chain: Sequence[int],
    times: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
    place: Callable[[int, int], tuple[int, ...]],
) -> Levels | None:
    """With as many refreshes as the speed-up leaves room for; None if that is not even two."""
    for count in range(steps // math.prod(times), 1, -1):
        own = place(steps, count)
        levels = [(chain[-1], own)]
        for depth, n in zip(reversed(chain[:-1]), reversed(times), strict=True):
            gaps = pairwise((*own, steps))
            between = [a + round(k * (b - a) / n) for a, b in gaps for k in range(n)]
            own = tuple(sorted(set(between)))
            levels.insert(0, (depth, own))
        if any(len(outer) <= len(inner) for (_, outer), (_, inner) in pairwise(levels)):
            continue
        if steps / compute_of(tuple(levels), steps, ratios) >= speedup:
            return tuple(levels)
    return None


def candidates(
    objective: Objective, names: Sequence[str], count: int, power: float
) -> list[tuple[float, str, tuple[int, ...]]]:
    """Schedules with one cut and ``count`` refreshes, the least predicted error first.

    Returns:
        Predicted error, forecast, refresh steps.
    """
    steps = objective.steps
    starts = {
        evenly(steps, count),
        by_load([w**power for w in objective.gains], count),
        objective.best_by_dynamic_programming(count),
    }
    found: dict[tuple[str, tuple[int, ...]], float] = {}
    for name in names:
        forecast = resolve_forecast(name)
        searched = forecast.forecast if isinstance(forecast, Damped) else forecast
        for start in sorted(starts):
            chosen = objective.improved(searched, start)
            found[name, chosen] = objective(forecast, chosen)
    return sorted((error, name, chosen) for (name, chosen), error in found.items())


# Learning from what was tried ---------------------------------------------------------------------


class Predictor:
    """Predicts the mean squared error of the result, and learns from real runs.

    The prediction is a sum over cuts, each as if it were the only one, times factors for its depth,
    the forecast, and the choice of depths. All are 1 until something was tried.
    """

    def __init__(self, objectives: Mapping[int, Objective]) -> None:
        self._objectives = objectives
        self._known: dict[tuple[int, str, tuple[int, ...]], float] = {}
        self._depths: dict[int, float] = {}  # logarithms of factors
        self._forecasts: defaultdict[str, float] = defaultdict(float)
        self._chains: defaultdict[tuple[tuple[int, ...], str], float] = defaultdict(float)

    def __call__(self, choice: Choice) -> float:
        return sum(self._parts(choice))

    def knows(self, depth: int) -> bool:
        """Whether anything with a cut at this depth was tried."""
        return depth in self._depths

    def best(self, among: Iterable[Choice]) -> Choice | None:
        """The one of least predicted error."""
        return min(among, key=self, default=None)

    def learn(self, choice: Choice, error: float) -> None:
        """A real run of ``choice`` had this mean squared error, more than 0."""
        levels, name = choice
        parts = self._parts(choice)
        new = [n for n, (depth, _) in enumerate(levels) if depth not in self._depths]
        if new:
            rest = error - sum(part for n, part in enumerate(parts) if n not in new)
            expected = sum(parts[n] for n in new)
            share = max(rest, _LEAST_SHARE * error) / expected if expected else 1.0
            typical = self._typical
            for n in new:
                self._depths[levels[n][0]] = typical + math.log(share)
            return
        total = sum(parts)
        if not total:  # exact, as was known
            return
        surprise = math.log(error / total)
        shares = [part / total for part in parts]
        step = _SHARED * surprise / (1 + sum(share**2 for share in shares))
        for (depth, _), share in zip(levels, shares, strict=True):
            self._depths[depth] += step * share
        self._forecasts[name] += step
        self._chains[self._chain(choice)] += surprise * (1 - _SHARED)

    @property
    def _typical(self) -> float:
        return sum(self._depths.values()) / max(1, len(self._depths))

    @staticmethod
    def _chain(choice: Choice) -> tuple[tuple[int, ...], str]:
        return tuple(depth for depth, _ in choice[0]), choice[1]

    def _parts(self, choice: Choice) -> list[float]:
        levels, name = choice
        common = self._forecasts[name] + self._chains[self._chain(choice)]
        return [
            self._alone(depth, name, own)
            * math.exp(common + self._depths.get(depth, self._typical))
            for depth, own in levels
        ]

    def _alone(self, depth: int, name: str, own: tuple[int, ...]) -> float:
        key = depth, name, own
        if key not in self._known:
            self._known[key] = self._objectives[depth](resolve_forecast(name), own)
        return self._known[key]
