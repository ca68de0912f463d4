"""Candidate schedules: cuts, refresh steps and forecasts that reach a given speed-up."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, combinations, pairwise, product

from dcompile.policy.forecast import resolve_forecast
from dcompile.policy.placement import by_load, evenly
from dcompile.policy.tuned import Levels
from dcompile.prediction.levels import Choice, best_levels, compute_of, undamped
from dcompile.prediction.objective import Objective

# Number of cuts -> how many times as often as the next deeper one each of them is refreshed.
_MULTIPLES = {
    1: ((),),
    2: tuple((n,) for n in (2, 3, 4, 5, 6, 8)),
    3: tuple(product((2, 3, 4), (2, 3))),
}


def choices(
    objectives: Mapping[int, Objective], names: Sequence[str], speedup: float, power: float
) -> list[Choice]:
    """Candidate schedules that reach this speed-up, with one cut or several.

    With one cut: as many refreshes as the speed-up allows, placed evenly, by the sampler's error
    gains, and by the recorded features. With each combination of two or three depths: constant
    intervals, as many refreshes as the speed-up allows, and the levels with the least predicted
    error.

    Args:
        objectives: depth -> its predicted errors.
        names: of forecasts.
        speedup: of the run, in FLOPs.
        power: exponent of the error gains.
    """
    depths = sorted(objectives)
    ratios = {depth: objective.ratio for depth, objective in objectives.items()}
    steps = objectives[depths[0]].steps
    found: list[Choice] = []
    for depth in depths:
        count = most_refreshes(speedup, steps, ratios[depth])
        if count:
            best = single_cuts(objectives[depth], names, count, power)
            found += [(((depth, own),), name) for _, name, own in best]
            found += [(((depth, evenly(steps, count)),), name) for name in names]
    for number in range(1, min(3, len(depths)) + 1):
        for cuts, multiples in product(combinations(depths, number), _MULTIPLES[number]):
            for levels in _nested(cuts, multiples, objectives, ratios, speedup, power):
                found += [(levels, name) for name in names]
    found += best_levels(objectives, names, steps / speedup)
    return list(dict.fromkeys(found))


def most_refreshes(speedup: float, steps: int, ratio: float) -> int:
    """The most refreshes with which a run with one cut reaches the speed-up; 0 if none do."""
    if ratio >= 1:
        return steps if speedup <= 1 else 0
    count = math.floor(steps * (1 / speedup - ratio) / (1 - ratio) + 1e-9)
    return min(steps, max(0, count))


def _nested(
    cuts: Sequence[int],
    multiples: Sequence[int],
    objectives: Mapping[int, Objective],
    ratios: Mapping[int, float],
    speedup: float,
    power: float,
) -> Iterator[Levels]:
    """Schedules with cuts at these depths.

    Args:
        cuts: depths, ascending.
        multiples: how many times as often as the next deeper cut each one is refreshed.
    """
    steps = objectives[cuts[0]].steps
    loads = [gain**power for gain in objectives[cuts[0]].gains]
    regular = _constant_intervals(cuts, multiples, steps, ratios, speedup)
    if regular is not None:
        yield regular
    if len(cuts) > 1:
        for placed in (evenly, lambda _, count: by_load(loads, count)):
            fullest = _most_nested(cuts, multiples, steps, ratios, speedup, placed)
            if fullest is not None:
                yield fullest


def _constant_intervals(
    cuts: Sequence[int],
    multiples: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
) -> Levels | None:
    """The shortest constant intervals that reach the speed-up; None if none do.

    Where features oscillate from step to step, constant intervals have less error than more
    refreshes at changing intervals.
    """
    for outermost in range(2, steps):
        intervals = list(accumulate(multiples, operator.mul, initial=outermost))
        if intervals[-1] >= steps:
            return None
        levels = tuple(
            (depth, tuple(range(0, steps, every)))
            for depth, every in zip(cuts, intervals, strict=True)
        )
        if steps / compute_of(levels, steps, ratios) >= speedup:
            return levels
    return None


def _most_nested(
    cuts: Sequence[int],
    multiples: Sequence[int],
    steps: int,
    ratios: Mapping[int, float],
    speedup: float,
    placed: Callable[[int, int], tuple[int, ...]],
) -> Levels | None:
    """The most full refreshes, at least two, that reach the speed-up; None if none do."""
    for count in range(steps // math.prod(multiples), 1, -1):
        own = placed(steps, count)
        levels = [(cuts[-1], own)]
        for depth, n in zip(reversed(cuts[:-1]), reversed(multiples), strict=True):
            gaps = pairwise((*own, steps))
            between = [a + round(k * (b - a) / n) for a, b in gaps for k in range(n)]
            own = tuple(sorted(set(between)))
            levels.insert(0, (depth, own))
        if any(len(outer) <= len(inner) for (_, outer), (_, inner) in pairwise(levels)):
            continue
        if steps / compute_of(tuple(levels), steps, ratios) >= speedup:
            return tuple(levels)
    return None


def single_cuts(
    objective: Objective, names: Sequence[str], count: int, power: float
) -> list[tuple[float, str, tuple[int, ...]]]:
    """Schedules with one cut and ``count`` refreshes, the least predicted error first.

    Returns:
        (predicted error, name of the forecast, refresh steps) of each.
    """
    steps = objective.steps
    starts = {
        evenly(steps, count),
        by_load([gain**power for gain in objective.gains], count),
        objective.best_by_dynamic_programming(count),
    }
    found: dict[tuple[str, tuple[int, ...]], float] = {}
    for name in names:
        forecast, searched = resolve_forecast(name), undamped(name)
        for start in sorted(starts):
            chosen = objective.improved(searched, start)
            found[name, chosen] = objective(forecast, chosen)
    return sorted((error, name, chosen) for (name, chosen), error in found.items())
