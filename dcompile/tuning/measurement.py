"""Measures a network: recordings at all depths, and the cost of early and late errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dcompile.errors import TuneError
from dcompile.policy.forecast import Reuse
from dcompile.policy.multi_level import MultiLevel
from dcompile.policy.tuned import Levels
from dcompile.prediction.objective import Objective, Recording
from dcompile.prediction.recorder import Recorder
from dcompile.tuning.harness import Harness
from dcompile.tuning.images import squared_error

# By default, cuts with at most this ratio of reuse to refresh FLOPs are tried, the outermost
# MOST_DEPTHS of them.
LARGEST_RATIO = 0.6
MOST_DEPTHS = 6
# Parts of a run whose errors are measured separately.
PARTS = 6


class Measurement:
    """Measures one network with one sampler and number of steps. Also a ``search.Runner``.

    Args:
        harness: runs the network.
        memory: bytes of features to keep in memory; more go to a temporary file.

    Attributes:
        harness: see above.
        objectives: depth -> its predicted errors, the outermost first; complete after ``record``.
        has_gains: whether the sampler has noise levels, and so error gains.
        power: default exponent of the error gains.
        timesteps: number of timesteps of a run; known after ``record``.
    """

    def __init__(self, harness: Harness, memory: int) -> None:
        self.harness = harness
        self.objectives: dict[int, Objective] = {}
        self.has_gains = False
        self.power = 0.5
        self._memory = memory
        self._timesteps: set[int] = set()

    @property
    def timesteps(self) -> int:
        """The number of timesteps of a run."""
        (timesteps,) = self._timesteps
        return timesteps

    def record(self, depths: Sequence[int] | None, *, every: bool = False) -> None:
        """Record uncached runs, at all these depths at once, and check that they repeat.

        Args:
            depths: which cuts; None for those worth trying.
            every: require every one of ``depths``, and take None for all cuts.

        Raises:
            DepthError: the network has none of them; or, if ``every``, lacks one.
            TuneError: runs do not repeat, or differ in their number of steps.
        """
        harness = self.harness
        advance = harness.task("recording", 1 + len(harness.runs))
        ratios = harness.first_run()
        advance()
        chosen = list(ratios)
        if depths is not None:
            chosen = sorted({depth for depth in depths if depth in ratios})
            missing = [depth for depth in depths if depth not in ratios]
            if missing and (every or not chosen):
                harness.refuse_depth(missing[0])
        elif not every:
            worth = [depth for depth in chosen if ratios[depth] <= LARGEST_RATIO]
            chosen = worth[:MOST_DEPTHS] or chosen[:1]
        found: list[list[Recording]] = [[] for _ in chosen]
        for number in range(len(harness.runs)):
            for own, new in zip(found, self._recorded(chosen, number), strict=True):
                own += new
            advance()
        for depth, recordings in zip(chosen, found, strict=True):
            self.objectives[depth] = self._objective(recordings)

    def correct_gains(self) -> None:
        """Scale the error gains by how errors made early and late affect the result.

        The sampler's error gains say how an error at a step enters the sample, not how the network
        reacts to it at later steps, where it corrects most early errors. So in one part of the run
        after the other, every second step reuses, and the error that causes is compared with its
        prediction. From then on predictions are mean squared errors of the result.

        Half of the difference between the parts is used (of the logarithm): with refreshes further
        apart than here, the network corrects less.
        """
        depth, objective = next(iter(self.objectives.items()))
        steps = objective.steps
        parts = [part for part in np.array_split(np.arange(steps), PARTS) if len(part) > 1]
        centres, factors = [], []
        advance = self.harness.task("correcting", len(parts))
        for part in parts:
            reused = set(part[1::2].tolist())
            own = tuple(step for step in range(steps) if step not in reused)
            error = squared_error(self.psnr(((depth, own),), "reuse"))
            predicted = objective(Reuse(), own)
            if predicted > 0:
                centres.append(part.mean())
                factors.append(max(error, 1e-12) / predicted)
            advance()
        if not factors:
            return
        logarithms = np.log(factors)
        used = 0.5 * (logarithms + logarithms.mean())
        along = np.exp(np.interp(np.arange(steps), centres, used))
        for depth, objective in self.objectives.items():
            gains = objective.gains * np.sqrt(along)
            self.objectives[depth] = Objective(objective.recordings, gains)

    def psnr(self, levels: Levels, forecast: str) -> float:
        """Mean PSNR in dB of all samples with these cuts; infinite if all are exact."""
        return self.harness.psnr(levels, forecast, self.timesteps)

    def task(self, name: str, total: int) -> Callable[[], None]:
        """A progress bar; see ``Harness.task``."""
        return self.harness.task(name, total)

    def _recorded(self, depths: Sequence[int], number: int) -> list[list[Recording]]:
        """The recordings of one sample, for each depth."""
        recorder = Recorder(len(depths), self._memory)
        schedule = MultiLevel([(depth, 1) for depth in depths])
        picture = self.harness.uncached(number, schedule, recorder)
        self._timesteps |= recorder.steps
        self.harness.expect(number, picture)
        return recorder.recordings()

    def _objective(self, recordings: list[Recording]) -> Objective:
        lengths = {len(recording.gram) for recording in recordings}
        if len(lengths) != 1:
            raise TuneError(
                f"run makes runs of {', '.join(map(str, sorted(lengths))) or 'no'} steps: a "
                "schedule is tuned for one number of steps"
            )
        (steps,) = lengths
        if len(self._timesteps) != 1:
            raise TuneError(
                f"run makes runs over {sorted(self._timesteps)} timesteps: tune for one"
            )
        run = self.harness.describe_run(self.timesteps, recordings[0].ratio)
        gains = np.ones(steps)
        if run.gains is not None and len(run.gains) >= self.timesteps:
            # A run may end before its timesteps do.
            gains = np.array(run.gains[-self.timesteps :][:steps])
            self.has_gains = self.harness.has_gains()
            self.power = run.power
        return Objective(tuple(recordings), gains)


def finite_number(value: object) -> bool:
    """Whether this is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
