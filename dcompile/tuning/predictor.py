"""Predicts the error of any schedule, and learns from those that were tried.

Objectives compare schedules of one depth and forecast well, and depths and forecasts badly:
guidance, for example, multiplies what differs between its two calls and nothing else. So every
schedule that is tried corrects the scale of the predictions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from dcompile.policy.forecast import resolve_forecast
from dcompile.prediction.levels import Choice
from dcompile.prediction.objective import Objective

# Half of a prediction's error is attributed to depths and forecast, half to their combination.
_SHARED = 0.5
# The least part of an error that is attributed to a depth that was never tried before.
_LEAST_SHARE = 0.05


class Predictor:
    """Predicts the mean squared error of a result, and learns from real runs.

    The prediction is a sum over the cuts, each as if it were the only one, times a factor for its
    depth, one for the forecast, and one for the combination of depths and forecast. All are 1
    until something was tried.

    Args:
        objectives: depth -> its predicted errors.
    """

    def __init__(self, objectives: Mapping[int, Objective]) -> None:
        self._objectives = objectives
        self._known: dict[tuple[int, str, tuple[int, ...]], float] = {}
        # Logarithms of factors.
        self._depths: dict[int, float] = {}
        self._forecasts: defaultdict[str, float] = defaultdict(float)
        self._combinations: defaultdict[tuple[tuple[int, ...], str], float] = defaultdict(float)

    def __call__(self, choice: Choice) -> float:
        """The predicted mean squared error of the result."""
        return sum(self._parts(choice))

    def knows(self, depth: int) -> bool:
        """Whether a schedule with a cut at this depth was tried."""
        return depth in self._depths

    def best(self, among: Iterable[Choice]) -> Choice | None:
        """The choice with the least predicted error; None if there are none."""
        return min(among, key=self, default=None)

    def learn(self, choice: Choice, error: float) -> None:
        """Correct the factors by the mean squared error of a real run, which is more than 0."""
        levels, name = choice
        parts = self._parts(choice)
        new = [n for n, (depth, _) in enumerate(levels) if depth not in self._depths]
        if new:
            rest = error - sum(part for n, part in enumerate(parts) if n not in new)
            expected = sum(parts[n] for n in new)
            factor = max(rest, _LEAST_SHARE * error) / expected if expected else 1.0
            typical = self._typical
            for n in new:
                self._depths[levels[n][0]] = typical + math.log(factor)
            return
        total = sum(parts)
        if not total:  # exact, as predicted
            return
        residual = math.log(error / total)
        shares = [part / total for part in parts]
        step = _SHARED * residual / (1 + sum(share**2 for share in shares))
        for (depth, _), share in zip(levels, shares, strict=True):
            self._depths[depth] += step * share
        self._forecasts[name] += step
        self._combinations[self._combination(choice)] += residual * (1 - _SHARED)

    @property
    def _typical(self) -> float:
        """The factor assumed for a depth that was never tried, as a logarithm."""
        return sum(self._depths.values()) / max(1, len(self._depths))

    @staticmethod
    def _combination(choice: Choice) -> tuple[tuple[int, ...], str]:
        return tuple(depth for depth, _ in choice[0]), choice[1]

    def _parts(self, choice: Choice) -> list[float]:
        levels, name = choice
        common = self._forecasts[name] + self._combinations[self._combination(choice)]
        return [
            self._of_one_cut(depth, name, own)
            * math.exp(common + self._depths.get(depth, self._typical))
            for depth, own in levels
        ]

    def _of_one_cut(self, depth: int, name: str, own: tuple[int, ...]) -> float:
        key = depth, name, own
        if key not in self._known:
            self._known[key] = self._objectives[depth](resolve_forecast(name), own)
        return self._known[key]
