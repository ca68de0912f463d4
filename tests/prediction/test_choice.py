"""What self-tuning chooses for an aim, from predicted errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dcompile.policy.aim import Aim
from dcompile.prediction.choice import GUIDED, UNGUIDED, Sample, choose, predicted_psnr
from dcompile.prediction.objective import Objective, Recording

STEPS = 20


@pytest.fixture
def objectives() -> dict[int, Objective]:
    """Features that wander, at two cuts; the deeper one moves the output less, and saves less."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 64)), axis=0)
    gains = np.full(STEPS, 0.05)
    return {
        depth: Objective((Recording(walk @ walk.T, np.full(STEPS, reaction), ratio),), gains)
        for depth, reaction, ratio in ((0, 1.0, 0.1), (2, 0.1, 0.5))
    }


SAMPLE = Sample(4.0, 64, is_guided=False)


def test_two_halves_that_are_equal_are_guidance() -> None:
    one = torch.linspace(-1, 3, 48).reshape(1, 3, 4, 4)
    assert Sample.of(one) == (4.0, 48, False)
    assert Sample.of(torch.cat([one, one])) == (4.0, 96, True)
    assert not Sample.of(torch.cat([one, one + 1])).is_guided
    assert not Sample.of(torch.cat([one, one, one])).is_guided
    lanes = [Sample.of(one), Sample.of(2 * one)]
    assert Sample.together(lanes) == (8.0, 96, True)
    assert Sample.together(lanes[:1]) == lanes[0]


def test_predicted_psnr() -> None:
    whole = SAMPLE.elements * SAMPLE.span**2
    assert predicted_psnr(whole, SAMPLE) == pytest.approx(-UNGUIDED)
    assert predicted_psnr(whole / 1000, SAMPLE) == pytest.approx(30 - UNGUIDED)
    guided = Sample(4.0, 128, is_guided=True)  # of which one half is the picture
    assert predicted_psnr(whole / 1000, guided) == pytest.approx(30 - GUIDED)
    assert predicted_psnr(0.0, SAMPLE) == pytest.approx(120 - UNGUIDED)
    assert math.isfinite(predicted_psnr(1.0, Sample(0.0, 64, is_guided=False)))


def test_a_higher_quality_takes_more(objectives: dict[int, Objective]) -> None:
    found = [choose(objectives, ("reuse",), Aim(psnr=psnr), SAMPLE) for psnr in (15, 25, 30)]
    speedups = []
    for psnr, one in zip((15, 25, 30), found, strict=True):
        assert one is not None
        assert one.psnr is not None
        assert one.psnr >= psnr
        speedups.append(one.speedup)
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 1.2 * speedups[-1]
    assert choose(objectives, ("reuse",), Aim(psnr=110.0), SAMPLE) is None
    assert choose(objectives, ("reuse",), Aim(psnr=15.0), None) is None


def test_a_speedup_says_what_is_expected(objectives: dict[int, Objective]) -> None:
    found = choose(objectives, ("reuse",), Aim(2.0), SAMPLE)
    assert found is not None
    assert found.speedup >= 2.0 - 1e-9
    again = choose(objectives, ("reuse",), Aim(psnr=found.psnr), SAMPLE)
    assert again is not None
    assert again.speedup >= found.speedup * 0.95
