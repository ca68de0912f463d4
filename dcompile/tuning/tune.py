"""``tune``: finds the refresh steps, depths and forecast for one network, sampler and step count.

The error of a schedule is predicted before it is tried. Uncached runs record the boundaries of all
cuts at every step (``recorder``, ``measurement``), and their inner products give the distance of
any forecast to the true boundary (``objective``). Of the schedules that reach the target
(``candidates``), those with the least predicted error are tried in real runs (``search``), and each
trial corrects the predictions of the others (``predictor``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcompile.compiler.fingerprint import identity_of
from dcompile.errors import DepthError, ScheduleError, TuneError
from dcompile.policy.checks import require_speedup
from dcompile.policy.fixed import Uniform
from dcompile.policy.forecast import resolve_forecast
from dcompile.policy.tuned import Tuned
from dcompile.tuning.harness import Harness
from dcompile.tuning.measurement import Measurement, finite_number
from dcompile.tuning.runs import runs_of
from dcompile.tuning.search import Search

FORECASTS = ("reuse", "damped", "linear", "taylor")
_MOST_PSNR = 1000  # dB; more than that of any result that is not equal


def tune(
    module: Any,
    run: Callable[..., Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    samples: int = 4,
    depths: Sequence[int] | None = None,
    forecasts: Sequence[str] = FORECASTS,
    trials: int = 8,
    intervals: Sequence[int] = (),
    backend: str = "eager",
    sampler: Any = None,
    memory: int = 2 * 1024**3,
    verbose: bool = True,
) -> Tuned:
    """Find the refresh steps, depths and forecast for one network, sampler and number of steps.

    Takes, for each sample, seven runs that cache little or nothing, and one run for each trial.
    The same arguments give the same result. Interrupted (Ctrl-C), it returns the best schedule
    tried so far.

    Args:
        module: the network, or a pipeline. It is left as it was.
        run: generates one sample, the same at each call: ``lambda: pipe(prompt,
            generator=torch.Generator().manual_seed(0))``; or, if it takes an argument, the sample
            of that number: ``lambda i: pipe(prompts[i],
            generator=torch.Generator().manual_seed(i))``. Returns pictures, tensors, or a
            pipeline's output. None to call the pipeline itself, with prompts of dcompile's or class
            labels far apart, a seed for each sample, and its own defaults for all else.
        arguments: of these calls: ``{"num_inference_steps": 20, "prompt": [...]}``. Lists of
            prompts and class labels are taken in turn.
        speedup: find the schedule with the highest PSNR at this speed-up in FLOPs; or
        psnr: find the fastest schedule with at least this mean PSNR against the uncached result,
            in dB.
        samples: number of samples, unless ``run`` takes no number. Judge the result on others.
        depths: cuts to try, alone and several at once (as a ``MultiLevel``); those that the network
            does not have are ignored. None for the outermost six whose reuse step takes at most
            60 % of a refresh step's compute.
        forecasts: names of the forecasts to try.
        trials: number of schedules to try in real runs; with ``psnr``, the most.
        intervals: DeepCache's intervals, also tried at every depth for comparison, as are the best
            predicted schedules of the same speed-up; see ``Tuned.plot``.
        backend: runs the trials. Its speed does not affect the result.
        sampler: the sampler, unless ``module`` is a pipeline that has one.
        memory: bytes of recorded features to keep in memory; more go to a temporary file.
        verbose: show progress on standard error.

    Raises:
        TuneError: ``run`` is not repeatable, calls the network less than twice, at timesteps that
            are not elements of one tensor, or changes its number of steps; or there is none, and
            ``module`` is no pipeline or needs more arguments.
        ScheduleError: neither or both of ``speedup`` and ``psnr``; a speed-up beyond reach.
        DepthError: none of ``depths`` exists.
    """
    _check_target(speedup, psnr)
    _check_choices(depths, forecasts, intervals)
    for what, number, least in (
        ("trials", trials, 1),
        ("samples", samples, 1),
        ("memory", memory, 0),
    ):
        if type(number) is not int or number < least:
            raise TuneError(f"{what}: expected an int of at least {least}, got {number!r}")
    runs = runs_of(module, run, samples, arguments)
    with Harness(module, runs, backend, sampler, verbose) as harness:
        measurement = Measurement(harness, memory)
        measurement.record(depths)
        measurement.correct_gains()
        search = Search(measurement, measurement.objectives, measurement.power)
        try:
            if speedup is not None:
                search.search_at(speedup, forecasts, trials)
            else:
                assert psnr is not None
                search.search_for(psnr, forecasts, trials)
            search.compare(intervals, forecasts)
        except KeyboardInterrupt:
            if not search.trials:
                raise
    best = search.best(speedup, psnr)
    return Tuned(
        refresh_steps=best.refresh_steps,
        steps=measurement.timesteps,
        depth=best.depth,
        forecast=best.forecast,
        network=identity_of(harness.network),
        speedup=best.speedup,
        psnr=best.psnr,
        trials=tuple(search.trials),
        outer=best.outer,
    )


def _check_target(speedup: float | None, psnr: float | None) -> None:
    if (speedup is None) == (psnr is None):
        raise ScheduleError(f"give speedup or psnr, got speedup={speedup!r} and psnr={psnr!r}")
    if psnr is not None and not (finite_number(psnr) and 0 <= psnr <= _MOST_PSNR):
        raise ScheduleError(f"psnr: expected a number of dB, 0 to {_MOST_PSNR}, got {psnr!r}")
    if speedup is not None:
        require_speedup(speedup)


def _check_choices(
    depths: Sequence[int] | None, forecasts: Sequence[str], intervals: Sequence[int]
) -> None:
    if depths is not None:
        _require_listed("depths", depths, int)
        if any(type(depth) is not int or depth < 0 for depth in depths):
            raise DepthError(f"depths: expected ints of at least 0, got {list(depths)!r}")
    _require_listed("forecasts", forecasts, str)
    _require_listed("intervals", intervals, int, empty=True)
    for name in forecasts:
        if not isinstance(name, str):  # ``Tuned.save`` writes names
            raise ScheduleError(f"forecasts: expected names, got {name!r}")
        resolve_forecast(name)
    for interval in intervals:
        Uniform(interval)


def _require_listed(what: str, values: object, kind: type, *, empty: bool = False) -> None:
    """Raise a TuneError unless ``values`` is a list or tuple, not empty unless that is allowed."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TuneError(f"{what}: expected a list of {kind.__name__}, got {values!r}")
    if not values and not empty:
        raise TuneError(f"{what} must not be empty")
