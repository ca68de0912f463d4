"""Searches for the best schedule: predicted errors say which to try, and real runs decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from dcompile.compiler.fingerprint import identity_of
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.placement import evenly
from dcompile.policy.tuned import Trial, Tuned
from dcompile.tuning.candidates import Choice, choices, compute_of
from dcompile.tuning.measurement import Measurement, squared_error
from dcompile.tuning.predictor import Predictor

# Times the error wanted: a schedule with a larger predicted error is not tried.
HOPELESS = 10.0
# Speed-ups among which the fastest schedule of a quality is looked for.
SPEEDS = 8


class Search:
    """Tries schedules in real runs, those with the least predicted error first.

    Args:
        measurement: what is known of the network.

    Attributes:
        predictor: predicts errors; learns from every trial.
        trials: what was tried, in that order.
    """

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._objectives = measurement.objectives
        self._harness = measurement.harness
        self.predictor = Predictor(measurement.objectives)
        self.trials: list[Trial] = []

    def search_at(self, speedup: float, forecasts: Sequence[str], trials: int) -> None:
        """Of all schedules with this speed-up, try those with the least predicted error."""
        pool = choices(self._objectives, forecasts, speedup, self._measurement.power)
        if not pool:  # a run of a few steps gets one refresh at least
            depth, objective = next(iter(self._objectives.items()))
            count = GainWeighted(speedup=speedup).refreshes(objective.steps, objective.ratio)
            pool = [(((depth, evenly(objective.steps, count)),), name) for name in forecasts]
        advance = self._harness.task("trying", trials)
        while len(self.trials) < trials:
            untried = self._untried(pool)
            choice = None
            if 2 * len(self.trials) < trials:  # one of each kind, to learn how to predict
                choice = self._unknown(untried, forecasts, self.predictor)
            elif 4 * len(self.trials) >= 3 * trials:  # the rest: neighbours of the best so far
                choice = self._untried_neighbour(max(self.trials, key=lambda trial: trial.psnr))
            choice = choice or self.predictor.best(untried)
            if choice is None:
                break
            self._try(choice)
            advance()

    def search_for(self, psnr: float, forecasts: Sequence[str], trials: int) -> None:
        """Find the fastest schedule that reaches ``psnr``."""
        ratios = {depth: objective.ratio for depth, objective in self._objectives.items()}
        depth, objective = next(iter(self._objectives.items()))
        limit = 1 / max(min(ratios.values()), 1 / objective.steps)
        speeds = [limit ** ((n + 0.5) / SPEEDS) for n in range(SPEEDS)]
        pool: dict[Choice, float] = {}
        for speed in speeds:
            for choice in choices(self._objectives, forecasts, speed, self._measurement.power):
                pool[choice] = objective.steps / compute_of(choice[0], objective.steps, ratios)
        wanted = 10.0 ** (-psnr / 10)
        advance = self._harness.task("trying", trials)

        def off(choice: Choice) -> float:
            """Distance of the predicted error from the one wanted, as a logarithm."""
            return abs(math.log(max(self.predictor(choice), 1e-300) / wanted))

        while len(self.trials) < trials:
            fastest = max((t.speedup for t in self.trials if t.psnr >= psnr), default=1.0)
            untried = [c for c in self._untried(pool) if pool[c] > fastest]
            found = None
            if not self.trials:
                middle = [c for c in untried if len(c[0]) == 1 and c[0][0][0] == depth] or untried
                found = min(middle, key=lambda c: abs(pool[c] - math.sqrt(limit)), default=None)
            elif 2 * len(self.trials) < trials:
                found = self._unknown(untried, forecasts, off)
            if found is None:
                enough = [c for c in untried if self.predictor(c) <= wanted]
                found = max(enough, key=pool.__getitem__, default=None)
            if found is None:  # predictions err: try the most likely
                found = self.predictor.best(c for c in untried if pool[c] >= 1.02 * fastest)
                if found is None or self.predictor(found) > HOPELESS * wanted:
                    break
            self._try(found)
            advance()
        if not any(trial.psnr >= psnr for trial in self.trials):
            everything = tuple(range(objective.steps))
            self.trials.append(Trial(everything, depth, "reuse", 1.0, math.inf, 1))

    def compare(self, intervals: Sequence[int], forecasts: Sequence[str]) -> None:
        """Try DeepCache's schedules, and for each the best predicted one that is as fast."""
        first, objective = next(iter(self._objectives.items()))
        ratios = {depth: objective.ratio for depth, objective in self._objectives.items()}
        queue: list[Choice] = []
        for interval in dict.fromkeys(intervals):
            even = tuple(range(0, objective.steps, interval))
            queue += [(((depth, even),), "reuse") for depth in self._objectives]
            speedup = objective.steps / compute_of(((first, even),), objective.steps, ratios)
            pool = choices(self._objectives, forecasts, speedup, self._measurement.power)
            best = self.predictor.best(self._untried(pool))
            queue += [best] if best is not None else []
        queue = self._untried(dict.fromkeys(queue))
        advance = self._harness.task("comparing", len(queue))
        for choice in queue:
            self._try(choice)
            advance()

    def _untried(self, pool: Iterable[Choice]) -> list[Choice]:
        tried = {trial.key for trial in self.trials}
        return [choice for choice in pool if choice not in tried]

    def _unknown(
        self, untried: Sequence[Choice], forecasts: Sequence[str], key: Callable[[Choice], float]
    ) -> Choice | None:
        """The best by ``key`` with a depth, a forecast or else a choice of depths never tried.

        Of depths and forecasts, one whose refreshes are evenly spaced: predictions ignore what
        errors do to later features, and overrate uneven placement.
        """
        for depth in (d for d in self._objectives if not self.predictor.knows(d)):
            having = [c for c in untried if depth in (d for d, _ in c[0]) and self._is_even(c)]
            # With one cut, or with others that are known, an error can be attributed.
            known = {d for d in self._objectives if self.predictor.knows(d)}
            for others in (set(), known):
                clear = [c for c in having if {d for d, _ in c[0]} - {depth} <= others]
                if clear:
                    return min(clear, key=key)
        outermost = next(iter(self._objectives))
        plain = [c for c in untried if [d for d, _ in c[0]] == [outermost] and self._is_even(c)]
        tried = {trial.forecast for trial in self.trials if trial.depth == outermost}
        for name in (n for n in forecasts if n not in tried):
            named = [choice for choice in plain if choice[1] == name]
            named = named or [choice for choice in untried if choice[1] == name]
            if named:
                return min(named, key=key)
        chains = {tuple(depth for depth, _ in trial.levels) for trial in self.trials}
        new = [c for c in untried if tuple(depth for depth, _ in c[0]) not in chains]
        return min(new, key=key, default=None)

    def _is_even(self, choice: Choice) -> bool:
        levels, _ = choice
        steps = self._objectives[levels[0][0]].steps
        even = [range(0, steps, (*own[1:], steps)[0]) for _, own in levels]
        return all(
            own in (tuple(expected), evenly(steps, len(own)))
            for (_, own), expected in zip(levels, even, strict=True)
        )

    def _untried_neighbour(self, best: Trial) -> Choice | None:
        """The best predicted schedule that differs from the best in one refresh by one step."""
        steps = self._objectives[best.depth].steps
        found: list[Choice] = []
        for step in best.levels[0][1][1:]:
            for moved in (step - 1, step + 1):
                if moved in best.levels[0][1] or moved == steps:
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
        psnr = self._harness.psnr(levels, forecast, self._measurement.timesteps)
        steps = self._objectives[depth].steps
        spent = compute_of(levels, steps, {d: o.ratio for d, o in self._objectives.items()})
        interval = (*chosen[1:], steps)[0]
        even = forecast == "reuse" and chosen == tuple(range(0, steps, interval)) and not outer
        trial = Trial(
            chosen,
            depth,
            forecast,
            steps / spent,
            psnr,
            interval if even else None,
            tuple(outer),
        )
        self.trials.append(trial)
        self.predictor.learn(choice, squared_error(psnr))
        return trial

    def result(self, speedup: float | None, psnr: float | None) -> Tuned:
        """The best that was tried."""
        if psnr is None:
            assert speedup is not None
            # A run of few steps may refresh once at most, and miss what was asked for by a little.
            most = max(trial.speedup for trial in self.trials)
            fast = [t for t in self.trials if t.speedup >= min(speedup, most) - 1e-9]
            best = max(fast, key=lambda trial: trial.psnr)
        else:
            enough = [trial for trial in self.trials if trial.psnr >= psnr]
            if enough:
                best = max(enough, key=lambda trial: (trial.speedup, trial.psnr))
            else:  # interrupted before any was close enough
                best = max(self.trials, key=lambda trial: trial.psnr)
        return Tuned(
            refresh_steps=best.refresh_steps,
            steps=self._measurement.timesteps,
            depth=best.depth,
            forecast=best.forecast,
            network=identity_of(self._harness.network),
            speedup=best.speedup,
            psnr=best.psnr,
            trials=tuple(self.trials),
            outer=best.outer,
        )
