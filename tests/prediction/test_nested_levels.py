"""Dynamic programming over the levels of several cuts, against trying them all."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from dcompile.policy.forecast import Lagrange, Reuse
from dcompile.prediction.levels import compute_of
from dcompile.prediction.nested_levels import LONGEST, best_nested_levels
from dcompile.prediction.objective import Objective, Recording

RATIOS = {0: 0.1, 2: 0.3, 3: 0.55}
SCALES = {0: 1.0, 2: 0.3, 3: 0.02}  # of the errors


def growing(seed: int, steps: int, depths: tuple[int, ...]) -> dict[int, Any]:
    """Errors that grow with age, and are less at deeper cuts."""
    generator = np.random.default_rng(seed)
    found = {}
    for depth in depths:
        grown = generator.random((steps, LONGEST + 1)).cumsum(axis=1) * SCALES[depth]
        grown[:, 0] = grown[0] = 0.0
        found[depth] = grown
    return found


def error_of(levels: Any, errors: dict[int, Any], steps: int) -> float:
    """What the dynamic program minimizes, written out."""
    cuts = [depth for depth, _ in levels]
    latest = dict.fromkeys(cuts, 0)
    total = 0.0
    for step in range(1, steps):
        stale = [depth for depth, own in levels if step not in own]
        if stale:
            total += errors[stale[0]][step, step - latest[stale[0]]]
            for outer, deeper in pairwise(stale):
                own = errors[deeper][step]
                more = own[step - latest[deeper]] - own[step - latest[outer]]
                total += max(0.0, more)
        for depth, own in levels:
            if step in own:
                latest[depth] = step
    return total


def everything(cuts: tuple[int, ...], steps: int) -> list[Any]:
    found = []
    for levels in product(range(len(cuts) + 1), repeat=steps - 1):
        chosen = (len(cuts), *levels)
        found.append(
            tuple(
                (depth, tuple(step for step, level in enumerate(chosen) if level > number))
                for number, depth in enumerate(cuts)
            )
        )
    return found


@pytest.mark.parametrize("cuts", [(0,), (0, 2), (0, 2, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_levels_as_cheap_err_less(cuts: tuple[int, ...], seed: int) -> None:
    """Whatever they cost: a price finds what is best for its own compute."""
    steps = 7
    errors = growing(seed, steps, cuts)
    found = best_nested_levels(errors, RATIOS, cuts, budget=2.6)
    assert found is not None
    compute = compute_of(found, steps, RATIOS)
    assert compute <= 2.6 + 1e-9
    own = error_of(found, errors, steps)
    for other in everything(cuts, steps):
        if compute_of(other, steps, RATIOS) <= compute + 1e-9:
            assert error_of(other, errors, steps) >= own - 1e-9


def test_levels_are_nested_and_begin_with_a_refresh() -> None:
    errors = growing(3, 20, (0, 2))
    levels = best_nested_levels(errors, RATIOS, (0, 2), budget=5.0)
    assert levels is not None
    outer = set(range(20))
    for _, own in levels:
        assert own[0] == 0
        assert set(own) <= outer
        assert max(b - a for a, b in zip(own, (*own[1:], 20), strict=True)) <= LONGEST
        outer = set(own)


def test_a_budget_beyond_reach() -> None:
    assert best_nested_levels(growing(0, 7, (0,)), RATIOS, (0,), budget=1.0) is None


def test_features_that_never_change_cost_no_refresh() -> None:
    errors = {0: np.zeros((9, LONGEST + 1))}
    assert best_nested_levels(errors, RATIOS, (0,), budget=5.0) == ((0, (0,)),)


def test_errors_by_age() -> None:
    features = np.random.default_rng(0).normal(size=(9, 30)).cumsum(axis=0)
    reaction, gains = np.linspace(1, 2, 9), np.linspace(2, 1, 9)
    objective = Objective((Recording(features @ features.T, reaction, 0.1),), gains)
    found = objective.errors_by_age(Reuse(), 4)
    assert found.shape == (9, 5)
    assert not found[:, 0].any()
    scale = (reaction * gains) ** 2
    for step in range(5, 9):
        for age in (1, 4):
            exact = ((features[step] - features[step - age]) ** 2).sum() * scale[step]
            assert found[step, age] >= exact * (1 - 1e-9)
        assert found[step, 1] == pytest.approx(
            ((features[step] - features[step - 1]) ** 2).sum() * scale[step]
        )
    assert (np.diff(found, axis=1) >= 0).all()
    straight = np.arange(9)[:, None] * np.ones((1, 5))
    line = Objective((Recording(straight @ straight.T, np.ones(9), 0.1),), np.ones(9))
    assert line.errors_by_age(Lagrange(1), 1)[3:] == pytest.approx(0, abs=1e-9)
