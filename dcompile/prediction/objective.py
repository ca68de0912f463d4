"""The error a schedule would cause at one depth, predicted from recordings of uncached runs.

The inner products of a run's boundaries, for all pairs of steps (a Gram matrix), give the distance
of any forecast, from any refreshes, to the true boundary. Multiplied by how strongly the network's
output reacts to its boundary, and by the sampler's error gain at that step, it is the error that a
step adds to the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dcompile.policy.forecast import Damped, Forecast, coefficients_of

Array = np.ndarray[Any, Any]

_LOCAL_SWEEPS = 12


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
    # For each reuse step, its forecast minus the truth: coefficients of the boundaries of steps.
    combinations: list[Array] = []
    sources: list[list[int]] = []
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
        combinations.append(row)
        sources.append([*past, *past[-1:] * (forecast.history - len(past)), step])
    found = np.zeros((*lead, steps))
    if combinations:
        at, rows = np.array(sources), np.stack(combinations, axis=-2)
        blocks = gram[..., at[:, :, None], at[:, None, :]]
        squares = ((rows[..., None, :] @ blocks)[..., 0, :] * rows).sum(axis=-1)
        found[..., at[:, -1]] = np.maximum(0.0, squares)
    return found


def _residuals(gram: Array, given: Sequence[float], steps: Sequence[int]) -> tuple[Array, Array]:
    """The sums of a damped forecast's least squares that the last of ``steps`` contributes.

    Args:
        gram: inner products of the boundaries, shape (..., steps, steps).
        given: the forecast's coefficients.
        steps: earlier refreshes, the latest first, and the refresh that is compared with.
    """
    block = gram[..., steps, :][..., steps]
    added, change = np.array([*given, 0.0]), np.zeros(len(steps))
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
        """Inner products of all recordings, shape (recordings, steps, steps)."""
        return np.stack([recording.gram for recording in self.recordings])

    @cached_property
    def _scale(self) -> Array:
        """Squared error of the result for a squared error of the boundary of 1.

        Shape (recordings, steps).
        """
        reactions = np.stack([recording.reaction for recording in self.recordings])
        squares: Array = (self.gains * reactions) ** 2
        return squares

    @cached_property
    def _between(self) -> dict[tuple[Forecast, tuple[int, ...], int], float]:
        """(Forecast, refreshes with the latest first, next refresh) -> error in between."""
        return {}

    def __call__(self, forecast: Forecast, refreshed: Sequence[int]) -> float:
        """Predicted squared error of the result, up to a factor.

        The squares of the steps' errors are added: errors of different steps are taken to be
        orthogonal.
        """
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

    def errors_by_age(self, forecast: Forecast, longest: int) -> Array:
        """The squared error of the result that each step adds, by the age of its boundary.

        A forecast from several boundaries is given earlier refreshes at equal intervals, the
        shortest at which the boundary gets that old.

        Returns:
            Shape (steps, longest + 1). Older boundaries err no less; those from before the run's
            first step are taken to err as its first one does.
        """
        found = np.zeros((self.steps, longest + 1))
        for step in range(1, self.steps):
            for age in range(1, longest + 1):
                if age <= step:
                    past = range(step - age, -1, -(age + 1))[: forecast.history]
                    given = np.array([*coefficients_of(forecast, step, past)[: len(past)], -1.0])
                    at = np.array([*past, step])
                    squares = given @ self._gram[:, at[:, None], at[None, :]] @ given
                    found[step, age] = float((np.maximum(squares, 0) * self._scale[:, step]).sum())
                found[step, age] = max(found[step, age], found[step, age - 1])
        return found

    def best_by_dynamic_programming(self, count: int) -> tuple[int, ...]:
        """The ``count`` refresh steps with the least predicted error of plain reuse."""
        steps = self.steps
        # cost[j, k]: error of the steps between refreshes at j and k, where k = steps is the end.
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
        """Move single refreshes by up to three steps as long as that reduces the error."""
        current = list(start)
        least = self(forecast, current)
        for _ in range(_LOCAL_SWEEPS):
            before = least
            for n in range(1, len(current)):
                low = current[n - 1] + 1
                high = current[n + 1] if n + 1 < len(current) else self.steps
                for moved in range(max(low, current[n] - 3), min(high, current[n] + 4)):
                    trial = [*current[:n], moved, *current[n + 1 :]]
                    error = self(forecast, trial)
                    if error < least:
                        least, current = error, trial
            if least >= before * (1 - 1e-9):
                break
        return tuple(current)
