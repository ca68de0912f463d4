"""``calibrate``: finds the threshold of an ``Adaptive`` schedule for a speed-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dcompile.errors import ScheduleError, TuneError
from dcompile.notices import muted
from dcompile.policy.adaptive import Adaptive
from dcompile.policy.checks import require_speedup
from dcompile.policy.forecast import Forecast
from dcompile.tuning.harness import Harness
from dcompile.tuning.runs import runs_of

# More than any sum of weighted drifts: only max_interval causes refreshes.
LARGEST_THRESHOLD = 1e30


def calibrate(
    module: Any,
    run: Callable[..., Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
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
    """Find the ``Adaptive`` schedule that reaches a speed-up, on average over the samples.

    How often a threshold is reached depends on the network, the sampler and the number of steps.
    The threshold is found by bisection, with one cached run for each sample and trial.

    Args:
        module: the network, or a pipeline. It is left as it was.
        run: generates one sample; called with the sample's number if it takes an argument. None
            to call the pipeline itself, as ``dcompile.tune`` does.
        arguments: of these calls.
        speedup: the least speed-up in FLOPs.
        samples: number of samples, unless ``run`` takes no number.
        depth, forecast: those the schedule will be used with. Drifts are measured against the
            forecast, so the threshold is valid for these only.
        min_interval, max_interval, probe, power: see ``Adaptive``.
        trials: the most thresholds to try.
        backend: runs the trials. Its speed does not affect the result.
        sampler: the sampler, unless ``module`` is a pipeline that has one.

    Returns:
        The schedule with the smallest threshold tried that reaches ``speedup``.

    Raises:
        ScheduleError: no threshold reaches it with this ``max_interval``, depth and number of
            steps; the message gives the highest speed-up they allow.
        TuneError: ``run`` never calls the network.
    """
    require_speedup(speedup)
    for what, number in (("trials", trials), ("samples", samples)):
        if type(number) is not int or number < 1:
            raise TuneError(f"{what}: expected an int of at least 1, got {number!r}")
    harness = Harness(
        module, runs_of(module, run, samples, arguments), backend, sampler, verbose=False
    )

    def reached(threshold: float) -> float:
        adaptive = Adaptive(threshold, min_interval, max_interval, probe, power)
        return harness.flops_speedup(schedule=adaptive, depth=depth, forecast=forecast)

    # Bisection starts from a threshold that is never reached.
    with harness, muted(r"Adaptive\("):
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
