"""Searches for the best schedule: predicted errors say which to try, and real runs decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.placement import evenly
from dcompile.policy.tuned import Levels, Trial
from dcompile.prediction.levels import Choice, compute_of
from dcompile.prediction.objective import Objective
from dcompile.tuning.candidates import choices
from dcompile.tuning.images import squared_error
from dcompile.tuning.predictor import Predictor

# A schedule whose predicted error is more than this times the target, or the least, is not tried.
LARGEST_EXCESS = 10.0
# Number of speed-ups from which candidates are taken when the target is a PSNR.
SPEEDS = 8


class Runner(Protocol):
    """What a search needs of a harness."""

    def psnr(self, levels: Levels, forecast: str) -> float:
        """Mean PSNR in dB of all samples with these cuts; infinite if all are exact."""
        ...

    def task(self, name: str, total: int) -> Callable[[], None]:
        """A progress bar; the function returned is called when one of ``total`` parts is done."""
        ...


class Search:
    """Tries schedules in real runs, those with the least predicted error first.

    Args:
        runner: runs schedules.
        objectives: depth -> its predicted errors, the outermost first.
        power: exponent of the sampler's error gains, for placing refreshes by them.

    Attributes:
        predictor: predicts errors; learns from every trial.
        trials: the schedules that were tried, in that order.
    """

    def __init__(self, runner: Runner, objectives: Mapping[int, Objective], power: float) -> None:
        self._runner = runner
        self._objectives = objectives
        self._power = power
        self._ratios = {depth: objective.ratio for depth, objective in objectives.items()}
        self._outermost, self._first = next(iter(objectives.items()))
        self._steps = self._first.steps
        self.predictor = Predictor(objectives)
        self.trials: list[Trial] = []

    def search_at(self, speedup: float, forecasts: Sequence[str], trials: int) -> None:
        """Of all schedules with this speed-up, try those with the least predicted error."""
        pool = self._candidates(forecasts, speedup)
        if not pool:  # a run of a few steps gets one refresh at least
            depth, objective = self._outermost, self._first
            count = GainWeighted(speedup=speedup).refreshes(objective.steps, objective.ratio)
            pool = [(((depth, evenly(objective.steps, count)),), name) for name in forecasts]
        advance = self._runner.task("trying", trials)
        while len(self.trials) < trials:
            untried = self._untried(pool)
            choice = None
            # The best predicted first; then one of each kind, from which predictions learn.
            if 0 < 2 * len(self.trials) < trials:
                choice = self._other_forecast(forecasts) or self._unexplored(
                    self._promising(untried), forecasts, self.predictor
                )
            elif 4 * len(self.trials) >= 3 * trials:  # the rest: neighbours of the best so far
                choice = self._untried_neighbour(max(self.trials, key=lambda trial: trial.psnr))
            choice = choice or self.predictor.best(untried)
            if choice is None:
                break
            self._try(choice)
            advance()

    def search_for(self, psnr: float, forecasts: Sequence[str], trials: int) -> None:
        """Find the fastest schedule that reaches ``psnr``, in dB."""
        limit = 1 / max(min(self._ratios.values()), 1 / self._steps)
        speeds = [limit ** ((n + 0.5) / SPEEDS) for n in range(SPEEDS)]
        pool: dict[Choice, float] = {}
        for speed in speeds:
            for choice in self._candidates(forecasts, speed):
                pool[choice] = self._speedup(choice[0])
        target = 10.0 ** (-psnr / 10)
        advance = self._runner.task("trying", trials)

        def distance(choice: Choice) -> float:
            """Of the logarithms of the predicted error and the target."""
            return abs(math.log(max(self.predictor(choice), 1e-300) / target))

        while len(self.trials) < trials:
            fastest = max((t.speedup for t in self.trials if t.psnr >= psnr), default=1.0)
            untried = [c for c in self._untried(pool) if pool[c] > fastest]
            found = None
            if not self.trials:
                single = [c for c in untried if [d for d, _ in c[0]] == [self._outermost]]
                found = min(
                    single or untried, key=lambda c: abs(pool[c] - math.sqrt(limit)), default=None
                )
            elif 2 * len(self.trials) < trials:
                found = self._unexplored(untried, forecasts, distance)
            if found is None:
                enough = [c for c in untried if self.predictor(c) <= target]
                found = max(enough, key=pool.__getitem__, default=None)
            if found is None:  # no schedule is predicted to reach it, but predictions err
                found = self.predictor.best(c for c in untried if pool[c] >= 1.02 * fastest)
                if found is None or self.predictor(found) > LARGEST_EXCESS * target:
                    break
            self._try(found)
            advance()
        if not any(trial.psnr >= psnr for trial in self.trials):
            every = tuple(range(self._steps))
            self.trials.append(Trial(every, self._outermost, "reuse", 1.0, math.inf, 1))

    def compare(self, intervals: Sequence[int], forecasts: Sequence[str]) -> None:
        """Try DeepCache's schedules, and for each the best predicted one that is as fast."""
        queue: list[Choice] = []
        for interval in dict.fromkeys(intervals):
            even = tuple(range(0, self._steps, interval))
            queue += [(((depth, even),), "reuse") for depth in self._objectives]
            pool = self._candidates(forecasts, self._speedup(((self._outermost, even),)))
            best = self.predictor.best(self._untried(pool))
            queue += [best] if best is not None else []
        queue = self._untried(dict.fromkeys(queue))
        advance = self._runner.task("comparing", len(queue))
        for choice in queue:
            self._try(choice)
            advance()

    def _candidates(self, forecasts: Sequence[str], speedup: float) -> list[Choice]:
        return choices(self._objectives, forecasts, speedup, self._power)

    def _speedup(self, levels: Levels) -> float:
        return self._steps / compute_of(levels, self._steps, self._ratios)

    def _untried(self, pool: Iterable[Choice]) -> list[Choice]:
        tried = {trial.key for trial in self.trials}
        return [choice for choice in pool if choice not in tried]

    def _promising(self, untried: Sequence[Choice]) -> list[Choice]:
        """Those that are not predicted to be far worse than the best."""
        predicted = {choice: self.predictor(choice) for choice in untried}
        limit = LARGEST_EXCESS * min(predicted.values(), default=0.0)
        return [choice for choice, error in predicted.items() if error <= limit]

    def _other_forecast(self, forecasts: Sequence[str]) -> Choice | None:
        """The best levels so far with a forecast that was never tried."""
        tried = {trial.forecast for trial in self.trials}
        levels = max(self.trials, key=lambda trial: trial.psnr).levels
        return next(((levels, name) for name in forecasts if name not in tried), None)

    def _unexplored(
        self, untried: Sequence[Choice], forecasts: Sequence[str], key: Callable[[Choice], float]
    ) -> Choice | None:
        """The best by ``key`` with a depth, a forecast or a combination of depths never tried.

        Depths and forecasts are tried with evenly spaced refreshes: predictions ignore how errors
        change later features, and overrate uneven placement.
        """
        for depth in (d for d in self._objectives if not self.predictor.knows(d)):
            having = [c for c in untried if depth in (d for d, _ in c[0]) and self._is_even(c)]
            # An error can be attributed to one new depth, alone or with depths that are known.
            known = {d for d in self._objectives if self.predictor.knows(d)}
            for others in (set(), known):
                clear = [c for c in having if {d for d, _ in c[0]} - {depth} <= others]
                if clear:
                    return min(clear, key=key)
        single = [c for c in untried if [d for d, _ in c[0]] == [self._outermost]]
        even = [c for c in single if self._is_even(c)]
        tried = {trial.forecast for trial in self.trials if trial.depth == self._outermost}
        for name in (n for n in forecasts if n not in tried):
            named = [choice for choice in even if choice[1] == name]
            named = named or [choice for choice in untried if choice[1] == name]
            if named:
                return min(named, key=key)
        combinations = {tuple(depth for depth, _ in trial.levels) for trial in self.trials}
        new = [c for c in untried if tuple(depth for depth, _ in c[0]) not in combinations]
        return min(new, key=key, default=None)

    def _is_even(self, choice: Choice) -> bool:
        """Whether every cut is refreshed at a constant interval, or as evenly as possible."""
        levels, steps = choice[0], self._steps
        even = [range(0, steps, (*own[1:], steps)[0]) for _, own in levels]
        return all(
            own in (tuple(expected), evenly(steps, len(own)))
            for (_, own), expected in zip(levels, even, strict=True)
        )

    def _untried_neighbour(self, best: Trial) -> Choice | None:
        """The best predicted schedule that differs from the best in one refresh by one step."""
        found: list[Choice] = []
        for step in best.levels[0][1][1:]:
            for moved in (step - 1, step + 1):
                if moved in best.levels[0][1] or moved == self._steps:
                    continue
                near = tuple(
                    (depth, tuple(sorted(moved if own == step else own for own in steps_of)))
                    for depth, steps_of in best.levels
                )
                found.append((near, best.forecast))
        return self.predictor.best(self._untried(found))

    def _try(self, choice: Choice) -> Trial:
        levels, forecast = choice
        *outer, (depth, chosen) = levels
        psnr, steps = self._runner.psnr(levels, forecast), self._steps
        interval = (*chosen[1:], steps)[0]
        even = forecast == "reuse" and chosen == tuple(range(0, steps, interval)) and not outer
        trial = Trial(
            chosen,
            depth,
            forecast,
            self._speedup(levels),
            psnr,
            interval if even else None,
            tuple(outer),
        )
        self.trials.append(trial)
        self.predictor.learn(choice, squared_error(psnr))
        return trial

    def best(self, speedup: float | None, psnr: float | None) -> Trial:
        """The best schedule that was tried: the closest at ``speedup``, or the fastest at ``psnr``.

        Args:
            speedup: in FLOPs; or
            psnr: in dB.
        """
        if psnr is None:
            assert speedup is not None
            # A run of few steps, with its one refresh, may miss the speed-up by a little.
            most = max(trial.speedup for trial in self.trials)
            fast = [t for t in self.trials if t.speedup >= min(speedup, most) - 1e-9]
            return max(fast, key=lambda trial: trial.psnr)
        enough = [trial for trial in self.trials if trial.psnr >= psnr]
        if enough:
            return max(enough, key=lambda trial: (trial.speedup, trial.psnr))
        # Interrupted before any was close enough.
        return max(self.trials, key=lambda trial: trial.psnr)
