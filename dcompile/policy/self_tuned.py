"""``SelfTuned``: for each kind of run the refresh steps that were found by watching one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from dcompile.errors import ScheduleError
from dcompile.policy.aim import Aim
from dcompile.policy.checks import require_psnr, require_speedup
from dcompile.policy.fixed import Steps, Uniform
from dcompile.policy.forecast import resolve_forecast
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.multi_level import IntervalsPlan
from dcompile.policy.schedule import Plan, RunInfo, Schedule
from dcompile.policy.tuned import TunedPlan


class Placed(NamedTuple):
    """What was found for a kind of run.

    Attributes:
        refresh: for each cut, the outermost first, the steps that refresh it.
        length: steps of the run that was watched, which may end before its timesteps do; later
            steps refresh all cuts.
        psnr: predicted for the final sample against the uncached one, in dB; None if unknown.
    """

    refresh: tuple[tuple[int, ...], ...]
    length: int
    psnr: float | None = None

    def plan(self) -> TunedPlan:
        return TunedPlan(tuple(map(frozenset, self.refresh)), self.length)

    def scaled(self, steps: int) -> Placed:
        """For a run of another length: each cut's share of refreshes, as dense as here."""
        refresh: list[tuple[int, ...]] = []
        inner: set[int] = {0}
        for own in reversed(self.refresh):  # what refreshes a cut refreshes all outer ones
            count = max(1, round(len(own) * steps / self.length))
            ends = (*own, self.length)
            times = [
                ends[int(at)] + (at - int(at)) * (ends[int(at) + 1] - ends[int(at)])
                for at in (number * len(own) / count for number in range(count))
            ]
            inner = _extended(inner, {int(time * steps / self.length) for time in times}, count)
            refresh.insert(0, tuple(sorted(inner)))
        return Placed(tuple(refresh), steps)


def _extended(steps: set[int], others: set[int], count: int) -> set[int]:
    """Up to ``count`` steps: those given, and of the others those that are farthest from them."""
    found, left = set(steps), others - steps
    while left and len(found) < count:
        farthest = max(sorted(left), key=lambda step: min(abs(step - own) for own in found))
        found.add(farthest)
        left.remove(farthest)
    return found


class _UntilFound(Plan):
    """Refreshes at every step; passes over the same timesteps that begin later run what was found.

    Args:
        found: what was found by now.
        run: the run.
    """

    def __init__(self, found: Callable[[], Placed | None], run: RunInfo) -> None:
        self._found = found
        self._plan: Plan = IntervalsPlan((1,) * run.cuts, run.steps)

    def level(self, step: int) -> int:
        if step == 0 and (found := self._found()) is not None:
            self._plan = found.plan()
        return self._plan.level(step)

    def refreshes(self) -> int | None:
        return self._plan.refreshes()


# Error gains are compared to this many decimals: they are computed in float32.
_DECIMALS = 5


@dataclass(frozen=True)
class Kind:
    """Runs that share refresh steps.

    Attributes:
        steps: of a run.
        gains: the sampler's error gains, rounded.
        sampler: its class and settings.
    """

    steps: int
    gains: tuple[float, ...]
    sampler: str = ""

    @staticmethod
    def of(run: RunInfo) -> Kind | None:
        """None where the run's steps are not known."""
        if run.steps is None:
            return None
        gains = run.gains[-run.steps :] if run.gains is not None else ()
        if len(gains) < run.steps:
            gains = (1.0,) * run.steps
        return Kind(run.steps, tuple(round(gain, _DECIMALS) for gain in gains), run.sampler)


@dataclass(frozen=True, eq=False)
class SelfTuned(Schedule):
    """What ``cache_compile(pipe, speedup=...)`` or ``psnr=`` runs from the second run on.

    A kind of run that it does not know is refreshed at every step and watched. Where nobody
    watches, as after loading it from a file, it runs what is known of the most similar kind.

    Attributes:
        aim: what was asked for.
        cuts: depths, ascending.
        forecast: name of the forecast used at all of them.
        known: kinds of runs, and what was found for them.
        watch: is told of a run that is not known; returns whether it will be watched.
    """

    aim: Aim
    cuts: tuple[int, ...]
    forecast: str
    known: dict[Kind, Placed] = field(default_factory=dict)
    watch: Callable[[RunInfo], bool] | None = field(default=None, repr=False)

    @property
    def depths(self) -> tuple[int, ...]:
        return self.cuts

    @property
    def forecasts(self) -> tuple[str, ...]:
        return (self.forecast,) * len(self.cuts)

    @property
    def uses_sampler(self) -> bool:
        return True

    def describe(self) -> list[str]:
        lines = []
        for kind, found in list(self.known.items()):
            counts = ", ".join(
                f"depth {depth} at {len(own)}"
                for depth, own in zip(self.cuts, found.refresh, strict=True)
            )
            about = "" if found.psnr is None else f"; about {found.psnr:.0f} dB are expected"
            lines.append(
                f"{self.aim}, found by watching a run: of {kind.steps} steps, those "
                f"that refresh are {counts} (forecast {self.forecast}){about}"
            )
        if self.watch is not None:
            lines.append(
                f"{self.aim}: the first run of {'a new' if lines else 'each'} kind "
                "(steps, sampler) is watched, and refreshes at every step"
            )
        else:
            lines.append(
                f"{self.aim}: other runs are refreshed as the most similar of these"
                if lines and self.aim.psnr is None
                else self._unknown().describe()[0]
            )
        return lines

    def plan(self, run: RunInfo) -> Plan:
        kind = Kind.of(run)
        found = self.known.get(kind) if kind is not None else None
        if found is not None:
            return found.plan()
        if self.watch is not None and self.watch(run):
            return _UntilFound(lambda: self.known.get(kind) if kind is not None else None, run)
        if self.known and run.steps is not None and self.aim.psnr is None:
            near = min(list(self.known), key=lambda known: _distance(known, run))
            return self.known[near].scaled(run.steps).plan()
        return self._unknown().plan(run)

    def _unknown(self) -> Schedule:
        """For runs of which nothing is known; what may be too far from uncached is not guessed."""
        return GainWeighted(speedup=self.aim.speedup) if self.aim.psnr is None else Uniform(1)

    def as_json(self) -> dict[str, Any]:
        """Its fields, as JSON has them."""
        known = [
            {
                "steps": kind.steps,
                "gains": list(kind.gains),
                "sampler": kind.sampler,
                "refresh": [list(own) for own in placed.refresh],
                "length": placed.length,
                "psnr": placed.psnr,
            }
            for kind, placed in list(self.known.items())
        ]
        return {
            "speedup": self.aim.speedup,
            "psnr": self.aim.psnr,
            "cuts": list(self.cuts),
            "forecast": self.forecast,
            "known": known,
        }

    @staticmethod
    def of_fields(
        speedup: float,
        psnr: float | None,
        cuts: Sequence[int],
        forecast: str,
        known: Sequence[Mapping[str, Any]],
    ) -> SelfTuned:
        """The schedule with these fields.

        Raises:
            ScheduleError: they do not describe one.
        """
        aim = Aim(require_speedup(speedup), None if psnr is None else require_psnr(psnr))
        resolve_forecast(forecast)
        found: dict[Kind, Placed] = {}
        try:
            ascending = list(cuts) == sorted({_natural(depth) for depth in cuts})
            if not cuts or not ascending:
                raise ValueError(f"cuts are {cuts!r}")
            for entry in known:
                gains = tuple(float(gain) for gain in entry["gains"])
                kind = Kind(_natural(entry["steps"]), gains, str(entry["sampler"]))
                refresh = tuple(Steps(own).refresh_steps for own in entry["refresh"])
                nested = all(set(outer) >= set(inner) for outer, inner in pairwise(refresh))
                length = _natural(entry["length"])
                inside = 0 < length <= kind.steps and all(own[-1] < length for own in refresh)
                if len(refresh) != len(cuts) or not nested or len(kind.gains) != kind.steps:
                    raise ValueError(f"refresh steps are {entry['refresh']!r}")
                if not inside:
                    raise ValueError(f"{entry['refresh']!r} is no part of {length} steps")
                expected = entry["psnr"]
                found[kind] = Placed(refresh, length, expected and float(expected))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ScheduleError(f"SelfTuned: {error}") from error
        return SelfTuned(aim, tuple(cuts), forecast, found)


def _distance(kind: Kind, run: RunInfo) -> tuple[bool, int]:
    """How little a kind says of a run: another sampler's says less than other numbers of steps."""
    return kind.sampler != run.sampler, abs(kind.steps - (run.steps or 0))


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a natural number, got {value!r}")
    return value


__all__ = ["Kind", "Placed", "SelfTuned"]
