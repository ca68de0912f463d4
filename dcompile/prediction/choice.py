"""What self-tuning chooses, from predicted errors: cuts, their refresh steps and the forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from dcompile.policy.aim import Aim
from dcompile.prediction.levels import Choice, best_levels, compute_of, predicted_error
from dcompile.prediction.objective import Objective

# A forecast's errors are predicted from true features, which reuse steps do not see: it has to be
# so many times better than reuse, in squared errors, to be taken.
MARGIN = 1.5
# By so much, in dB, pictures are farther from the uncached ones than predicted step by step, at the
# mean of bench/results/predicted_psnr.json: guidance multiplies what its halves err differently,
# and nothing in the network says how strong it is.
GUIDED, UNGUIDED = 10.0, 7.0
# Schedules that are tried to find the fastest one at a PSNR.
TRIALS = 8
LEAST_GAIN = 1.02  # a schedule that saves less is none
SMALLEST_ERROR = 1e-12  # of the sample's squared span: at most 120 dB are predicted


class Sample(NamedTuple):
    """The sample at a step, as far as predictions need it.

    Attributes:
        span: its largest value minus its least.
        elements: how many it has.
        is_guided: whether it is two halves that are equal, as for two conditionings of one sample.
    """

    span: float
    elements: int
    is_guided: bool

    @staticmethod
    def of(sample: torch.Tensor) -> Sample:
        low, high = (float(end) for end in torch.aminmax(sample.detach().float()))
        half = len(sample) // 2 if sample.dim() > 1 else 0
        is_guided = half > 0 and len(sample) == 2 * half
        is_guided = is_guided and torch.equal(sample[:half], sample[half:])
        return Sample(high - low, sample.numel(), is_guided)

    @staticmethod
    def together(samples: Sequence[Sample]) -> Sample:
        """Of all lanes. An even number of them may be pairs of two conditionings."""
        return Sample(
            max(one.span for one in samples),
            sum(one.elements for one in samples),
            len(samples) % 2 == 0 or any(one.is_guided for one in samples),
        )


class Chosen(NamedTuple):
    """What was chosen for a kind of run.

    Attributes:
        choice: cuts, their refresh steps, and the name of the forecast.
        speedup: FLOPs of an uncached run over FLOPs of such a one.
        psnr: predicted, of the final sample, in dB; None if that is not known.
    """

    choice: Choice
    speedup: float
    psnr: float | None


def choose(
    objectives: Mapping[int, Objective],
    names: tuple[str, ...],
    aim: Aim,
    sample: Sample | None,
) -> Chosen | None:
    """The best that reaches the aim; None if nothing does.

    Args:
        objectives: depth -> its predicted errors.
        names: of forecasts; those after the first have to be better by ``MARGIN``.
        aim: see there.
        sample: at the end of the run.
    """
    steps = next(iter(objectives.values())).steps
    ratios = {depth: objective.ratio for depth, objective in objectives.items()}

    def at(speedup: float) -> Chosen | None:
        choice = best_choice(objectives, names, steps / speedup)
        if choice is None:
            return None
        error = predicted_error(objectives, choice)
        reached = steps / compute_of(choice[0], steps, ratios)
        return Chosen(choice, reached, None if sample is None else predicted_psnr(error, sample))

    if aim.psnr is None:
        return at(aim.speedup)
    best: Chosen | None = None
    low, high = math.log(LEAST_GAIN), math.log(min(float(steps), 1 / min(ratios.values())))
    for _ in range(TRIALS):
        middle = (low + high) / 2
        found = at(math.exp(middle))
        if found is not None and found.psnr is not None and found.psnr >= aim.psnr:
            low = middle
            best = found if best is None or found.speedup >= best.speedup else best
        else:
            high = middle
    return best


def predicted_psnr(error: float, sample: Sample) -> float:
    """PSNR of the final sample against the uncached one, in dB, by the sample's own span.

    Args:
        error: see ``levels.predicted_error``.
        sample: at the end of the run.
    """
    elements = sample.elements / 2 if sample.is_guided else sample.elements
    share = error / max(elements * sample.span**2, 1e-300)
    return -10 * math.log10(max(share, SMALLEST_ERROR)) - (GUIDED if sample.is_guided else UNGUIDED)


def best_choice(
    objectives: Mapping[int, Objective], names: tuple[str, ...], budget: float
) -> Choice | None:
    """The levels and the forecast with the least predicted error.

    Args:
        objectives: depth -> its predicted errors.
        names: see ``choose``.
        budget: FLOPs of the run over FLOPs of a refresh step.
    """
    error: Callable[[Choice], float] = lambda choice: predicted_error(objectives, choice)  # noqa: E731
    best: Choice | None = None
    for name in names:
        found = min(best_levels(objectives, (name,), budget), key=error, default=None)
        if found is not None and (best is None or MARGIN * error(found) < error(best)):
            best = found
    return best


__all__ = ["Chosen", "Sample", "best_choice", "choose", "predicted_psnr"]
