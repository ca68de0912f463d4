"""The best nested refresh steps for several cuts at once, by dynamic programming.

What a step costs and how far it is off follows from which cut it reads and how long ago that cut,
and each deeper one, was refreshed. So the ages of the cuts are the state, a step's level is the
decision, and a price on compute (a Lagrange multiplier, found by bisection) keeps to the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from dcompile.policy.tuned import Levels

Array = np.ndarray[Any, Any]

LONGEST = 12
"""The most steps between two refreshes of one cut."""

_BISECTIONS = 22


def best_nested_levels(
    errors: Mapping[int, Array], ratios: Mapping[int, float], cuts: Sequence[int], budget: float
) -> Levels | None:
    """The refresh steps of these cuts with the least predicted error.

    Args:
        errors: depth -> squared error of the result if a step reads that cut, by the cut's age,
            shape (steps, LONGEST + 1).
        ratios: depth -> r, FLOPs of its reuse step over FLOPs of a refresh step.
        cuts: depths, ascending.
        budget: FLOPs of the run over FLOPs of a refresh step.

    Returns:
        The levels, or None if these cuts do not keep to the budget, or not all of them are read.
    """
    steps, deepest = len(errors[cuts[0]]), len(cuts)
    costs = np.array([*(ratios[depth] for depth in cuts), 1.0])
    ages = list(combinations_with_replacement(range(1, LONGEST + 1), deepest))
    next_state, allowed = _transitions(ages, deepest)
    step_errors = _step_errors([errors[depth] for depth in cuts], np.array(ages))

    def chosen(price: float) -> tuple[list[int], float]:
        """Each step's level, and the run's compute."""
        ahead = np.zeros(len(ages))
        decisions = np.zeros((steps, len(ages)), dtype=int)
        for step in range(steps - 1, 0, -1):
            options = step_errors[step] + price * costs[:, None] + ahead[next_state] + allowed
            decisions[step] = options.argmin(axis=0)
            ahead = options.min(axis=0)
        state, levels = 0, [deepest]  # all ages are 1 after the first step
        for step in range(1, steps):
            levels.append(int(decisions[step, state]))
            state = next_state[levels[-1], state]
        return levels, float(costs[levels].sum())

    # Errors are compared with prices, so their scale is where to search.
    scale = max(float(step_errors[1:].max(initial=0.0)), 1e-300)
    low, high = np.log(scale * 1e-12), np.log(scale * steps * 10)
    found: list[int] | None = None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        levels, compute = chosen(float(np.exp(middle)))
        if compute > budget:
            low = middle
        else:
            high, found = middle, levels
    if found is None or not set(range(deepest)) <= set(found[1:]):
        return None
    return tuple(
        (depth, tuple(step for step, level in enumerate(found) if level > number))
        for number, depth in enumerate(cuts)
    )


def _transitions(ages: Sequence[tuple[int, ...]], deepest: int) -> tuple[Array, Array]:
    """For each level and state the next state, and 0 where a cut would not get too old."""
    numbers = {age: number for number, age in enumerate(ages)}
    after = np.zeros((deepest + 1, len(ages)), dtype=int)
    allowed = np.zeros((deepest + 1, len(ages)))
    for level in range(deepest + 1):
        for number, age in enumerate(ages):
            older = tuple(1 if cut < level else age[cut] + 1 for cut in range(deepest))
            after[level, number] = numbers.get(older, 0)
            allowed[level, number] = 0.0 if older in numbers else np.inf
    return after, allowed


def _step_errors(errors: Sequence[Array], ages: Array) -> Array:
    """The error of each step at each level in each state, shape (steps, levels, states).

    A step that reads one cut also has what that cut was computed from: for each deeper cut, what
    it errs more for being older.
    """
    deepest = len(errors)
    found = np.zeros((len(errors[0]), deepest + 1, len(ages)))
    for level in range(deepest):
        found[:, level] = errors[level][:, ages[:, level]]
        for deeper in range(level + 1, deepest):
            own = errors[deeper]
            more = own[:, ages[:, deeper]] - own[:, ages[:, deeper - 1]]
            found[:, level] += np.maximum(more, 0.0)
    return found


__all__ = ["LONGEST", "best_nested_levels"]
