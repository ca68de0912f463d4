"""``calibrate``: finds the threshold of an ``Adaptive`` schedule for a speed-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from dcompile.errors import ScheduleError, TuneError
from dcompile.policy.adaptive import Adaptive
from dcompile.policy.checks import require_speedup
from dcompile.policy.forecast import Forecast
from dcompile.tuning.harness import Harness
from dcompile.tuning.images import samples_of

# More than any sum of weighted drifts: nothing but max_interval refreshes.
LARGEST_THRESHOLD = 1e30


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
    bisection: one cached run for each sample and trial, and none that is uncached. What else it
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
    harness = Harness(module, samples_of(run, samples), backend, sampler, verbose=False)

    def reached(threshold: float) -> float:
        adaptive = Adaptive(threshold, min_interval, max_interval, probe, power)
        return harness.flops_speedup(schedule=adaptive, depth=depth, forecast=forecast)

    with harness, warnings.catch_warnings():
        # Bisection starts from a threshold that is never reached.
        warnings.filterwarnings("ignore", message=r"dcompile: Adaptive\(")
        most = reached(LARGEST_THRESHOLD)
        enough = speedup * (1 - 1e-6)  # counts are sums of fractions
        if most < enough:
            raise ScheduleError(
                f"no threshold takes {speedup:g} times less compute: at most {most:.2f} times at "
                f"depth {depth} with max_interval={max_interval} in runs of this many steps"
            )
        low, high = 0.0, LARGEST_THRESHOLD
        middle = 0.05  # drifts are of this order
        for _ in range(trials):
            if reached(middle) >= enough:
                high = middle
            else:
                low = middle
            middle = (
                math.sqrt(low * high)
                if low and high < LARGEST_THRESHOLD
                else (low * 8 if low else high / 8)
            )
    return Adaptive(high, min_interval, max_interval, probe, power)
