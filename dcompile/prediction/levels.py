"""Cuts with their refresh steps: what they cost, and the best for each combination of cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

from dcompile.policy.forecast import Damped, Forecast, resolve_forecast
from dcompile.policy.tuned import Levels
from dcompile.prediction.nested_levels import LONGEST, best_nested_levels
from dcompile.prediction.objective import Objective

Choice = tuple[Levels, str]
"""Cuts with their refresh steps, and the name of the forecast used at all of them."""


def compute_of(levels: Levels, steps: int, ratios: Mapping[int, float]) -> float:
    """FLOPs of a run over FLOPs of a refresh step.

    Args:
        levels: cuts and their refresh steps.
        steps: number of steps of the run.
        ratios: depth -> r, FLOPs of its reuse step over FLOPs of a refresh step.
    """
    counts = [steps, *(len(own) for _, own in levels)]
    costs = [*(ratios[depth] for depth, _ in levels), 1.0]
    # A step computes everything outside the next cut deeper than those it refreshes.
    return costs[-1] * counts[-1] + sum(
        cost * (count - fewer)
        for cost, (count, fewer) in zip(costs, pairwise(counts), strict=False)
    )


def best_levels(
    objectives: Mapping[int, Objective], names: Sequence[str], budget: float
) -> list[Choice]:
    """For each combination of up to three depths the levels with the least predicted error.

    Args:
        objectives: depth -> its predicted errors.
        names: of forecasts.
        budget: FLOPs of the run over FLOPs of a refresh step.
    """
    ratios = {depth: objective.ratio for depth, objective in objectives.items()}
    cuts = [c for number in (1, 2, 3) for c in combinations(sorted(ratios), number)]
    found: dict[Forecast, list[Levels]] = {}
    for forecast in map(undamped, names):
        if forecast not in found:
            errors = {
                depth: objective.errors_by_age(forecast, LONGEST)
                for depth, objective in objectives.items()
            }
            levels = [best_nested_levels(errors, ratios, own, budget) for own in cuts]
            found[forecast] = [own for own in levels if own is not None]
    return [(levels, name) for name in names for levels in found[undamped(name)]]


def undamped(name: str) -> Forecast:
    """How far damping goes depends on all earlier refreshes; without it, on the latest few."""
    forecast = resolve_forecast(name)
    return forecast.forecast if isinstance(forecast, Damped) else forecast


def predicted_error(objectives: Mapping[int, Objective], choice: Choice) -> float:
    """The sum over the cuts, each as if it were the only one, up to a factor."""
    levels, name = choice
    forecast = resolve_forecast(name)
    return sum(objectives[depth](forecast, own) for depth, own in levels)
