"""``Tuned``: a schedule that was found by measurement, with everything needed to use it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dcompile.errors import ScheduleError
from dcompile.policy.fixed import Steps
from dcompile.policy.forecast import resolve_forecast
from dcompile.policy.schedule import Plan, RunInfo, Schedule
from dcompile.report.plots import plot_trials

FORMAT = 1

Levels = tuple[tuple[int, tuple[int, ...]], ...]
"""Cuts, the outermost first: (depth, the steps that refresh it). A step that refreshes one of them
also refreshes all outer ones."""


@dataclass(frozen=True)
class Trial:
    """One schedule that was tried in real runs.

    Attributes:
        refresh_steps, depth, forecast, outer: what was tried; see ``Tuned``.
        speedup: of a run, in FLOPs.
        psnr: mean over the samples against the uncached result, in dB; infinite if all are equal
            to it. In a mean with others, an equal sample counts as 100.
        interval: N, if it is a schedule of DeepCache: refreshes at every N-th step, plain reuse.
    """

    refresh_steps: tuple[int, ...]
    depth: int
    forecast: str
    speedup: float
    psnr: float
    interval: int | None = None
    outer: Levels = ()

    @property
    def levels(self) -> Levels:
        """All cuts, the outermost first."""
        return (*self.outer, (self.depth, self.refresh_steps))

    @property
    def key(self) -> tuple[Levels, str]:
        """What distinguishes it from other trials: its cuts and its forecast."""
        return self.levels, self.forecast


@dataclass(frozen=True)
class Tuned(Schedule):
    """A schedule with everything needed to use it: ``cache_compile(unet, schedule=tuned)``.

    Attributes:
        refresh_steps: the steps that run the whole network, ascending from 0.
        steps: the number of timesteps of the runs it was tuned for.
        depth, forecast: used with it; ``cache_compile`` takes them from here.
        outer: further cuts outside ``depth``, as in a ``MultiLevel``, the outermost first: (depth,
            the steps that refresh it). A step that is in ``outer`` and not in ``refresh_steps``
            runs everything outside the next deeper cut.
        network: the network's class and number of parameters.
        speedup: of a run, in FLOPs.
        psnr: mean over the samples against the uncached result, in dB.
        trials: all schedules that were tried, in that order.
    """

    refresh_steps: tuple[int, ...]
    steps: int
    depth: int
    forecast: str
    network: tuple[str, int]
    speedup: float
    psnr: float
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    outer: Levels = ()

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of all cuts, the outermost first."""
        return tuple(depth for depth, _ in self.levels)

    @property
    def levels(self) -> Levels:
        """All cuts, the outermost first."""
        return (*self.outer, (self.depth, self.refresh_steps))

    @property
    def forecasts(self) -> tuple[str, ...]:
        return (self.forecast,) * len(self.levels)

    def plan(self, run: RunInfo) -> Plan:
        if run.steps is not None and run.steps != self.steps:
            raise ScheduleError(
                f"tuned for runs of {self.steps} steps, this one has {run.steps}: tune for that, "
                "or use GainWeighted(speedup=...)"
            )
        return TunedPlan(tuple(frozenset(own) for _, own in self.levels), self.steps)

    def require_fit(self, network: tuple[str, int]) -> None:
        if network != self.network:
            (name, count), (one, other) = self.network, network
            raise ScheduleError(
                f"tuned for a {name} with {count:,} parameters, this is a {one} with {other:,}"
            )

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it as JSON. Returns the file's full path."""
        target = Path(file).expanduser().resolve()
        content = {"format": FORMAT, **asdict(self)}
        for entry in (content, *content["trials"]):
            if math.isinf(entry["psnr"]):
                entry["psnr"] = None  # JSON knows no infinity
        target.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return target

    def plot(self, file: str | os.PathLike[str]) -> Path:
        """Draw PSNR over speed-up of all trials, as a PNG. Returns the file's full path.

        The Pareto front, this schedule, and DeepCache's schedules (``tune(intervals=...)``) are
        marked.

        Raises:
            DcompileError: matplotlib is not installed.
        """
        title = f"{self.network[0]}, {self.steps} steps: {len(self.trials)} schedules tried"
        return plot_trials(self.trials, (self.speedup, self.psnr), title, file)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> Tuned:
        """Read what ``save`` wrote.

        Raises:
            ScheduleError: the file is missing, or holds no tuned schedule.
        """
        source = Path(file).expanduser()
        try:
            entry = json.loads(source.read_text())
            if not isinstance(entry, dict) or entry.pop("format", None) != FORMAT:
                raise ValueError("another format, or none")
            return Tuned.of_fields(**entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ScheduleError(f"{source} holds no tuned schedule: {error}") from error

    @staticmethod
    def of_fields(**fields: Any) -> Tuned:
        """The schedule with these fields, as JSON has them.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, ScheduleError: they do not describe
                one.
        """
        given = [dict(trial) for trial in fields.pop("trials")]
        name, count = fields.pop("network")
        if type(name) is not str or type(count) is not int:
            raise ValueError(f"network is {[name, count]!r}")
        steps = fields["steps"]
        if type(steps) is not int:
            raise ValueError(f"steps is {steps!r}")
        for entry in (fields, *given):
            _check_levels(entry, steps)
        interval = [trial.get("interval") for trial in given]
        if any(one is not None and type(one) is not int for one in interval):
            raise ValueError(f"intervals are {interval!r}")
        trials = tuple(Trial(**trial) for trial in given)
        return Tuned(network=(name, count), trials=trials, **fields)


@dataclass(frozen=True, eq=False)
class TunedPlan(Plan):
    """The plan of a ``Tuned`` schedule.

    Attributes:
        due: for each cut, the outermost first, the steps that refresh it.
        steps: number of steps planned; later steps refresh every cut.
    """

    due: tuple[frozenset[int], ...]
    steps: int

    def level(self, step: int) -> int:
        if step >= self.steps:
            return len(self.due)
        return max((number for number, own in enumerate(self.due, 1) if step in own), default=0)

    def refreshes(self) -> int | None:
        return len(self.due[-1])


def _check_levels(entry: dict[str, Any], steps: int) -> None:
    """Check the fields that schedules and trials share, and convert them from JSON's types.

    Raises:
        ValueError, KeyError, TypeError, ScheduleError: a field is missing or invalid.
    """
    entry["psnr"] = math.inf if entry["psnr"] is None else entry["psnr"]
    for key in ("psnr", "speedup"):
        if entry[key] != math.inf and not _is_finite(entry[key]):
            raise ValueError(f"{key} is {entry[key]!r}")
    entry["refresh_steps"] = tuple(entry["refresh_steps"])
    entry["outer"] = tuple((depth, tuple(own)) for depth, own in entry.get("outer", ()))
    if type(entry["forecast"]) is not str:
        raise ValueError(f"forecast is {entry['forecast']!r}")
    resolve_forecast(entry["forecast"])
    levels = (*entry["outer"], (entry["depth"], entry["refresh_steps"]))
    for depth, own in levels:
        Steps(own)
        if type(depth) is not int or depth < 0 or own[-1] >= steps:
            raise ValueError(f"depth {depth!r} at steps {list(own)!r} of {steps}")
    for (outer, more), (inner, fewer) in pairwise(levels):
        if not (outer < inner and set(more) > set(fewer)):
            raise ValueError(f"the cut at depth {outer} does not go with the one at {inner}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
