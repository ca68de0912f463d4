"""``dcompile bench``: the same pipeline run in several ways, in turns, in one process."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from dcompile.api import cache_compile, handle
from dcompile.backends import resolve
from dcompile.cli.bench_result import BenchResult, Facts, Measured, TimedRun, result_of
from dcompile.cli.clock import StepClock, synchronize
from dcompile.cli.demo import require_torchmetrics
from dcompile.cli.sampling import Progress
from dcompile.cli.settings import BenchSettings
from dcompile.cli.subjects import Subject, load_subject
from dcompile.cli.ways import UNCACHED, Installer, Way, planned_ways
from dcompile.errors import ModelError, first_line
from dcompile.models.loading import resolve_device
from dcompile.policy.fixed import Uniform
from dcompile.report.explain import Explanation
from dcompile.runtime.counters import Stats

Counters = Callable[[], Stats] | None

SHORT_RUN = 2  # steps: one refresh and one reuse
WARM_SECONDS = 0.5  # on a GPU, until its clocks are up again after compiling


def run_bench(
    settings: BenchSettings, progress: Progress = lambda stage, done, of: None
) -> BenchResult:
    """Measure a model uncached, cached at each interval with each backend, and compiled by torch.

    Each round runs every way once. The first one compiles before it times; what is reported are
    medians over all rounds. A way that fails does not keep the others from being measured.

    Args:
        settings: the model and the ways.
        progress: called at the begin and the end of every run of a way.

    Raises:
        DcompileError: invalid settings; a model that cannot be found, loaded, captured or cut at
            this depth; torchmetrics is not installed.
    """
    started = time.monotonic()
    device = resolve_device(settings.device)
    if not settings.backends:
        settings = replace(settings, backends=("inductor" if device.type == "cuda" else "eager",))
    ways = planned_ways(settings)
    _check(settings, ways)
    subject = load_subject(settings, device, progress)
    if subject.draws:
        require_torchmetrics()
    bench = _Bench(settings, subject, device, started, progress)
    facts = bench.look()
    measured = [Measured(way) for way in ways]
    for number in range(settings.repeat):
        bench.round(number, measured)
    return result_of(settings, facts, measured)


def _check(settings: BenchSettings, ways: list[Way]) -> None:
    """Refuse what can be refused before anything is loaded."""
    for interval in settings.intervals:
        Uniform(interval)
    for backend in {way.backend for way in ways} - {None}:
        resolve(str(backend), None)
    settings.require_a_picture_for_each_prompt()


@dataclass
class _Bench:
    """Runs ways.

    Attributes:
        settings: what to measure.
        subject: what runs.
        device: where it runs.
        started: when the budget began, as ``time.monotonic`` tells it.
        progress: see ``run_bench``.
        installer: makes the subject run in one of the ways.
    """

    settings: BenchSettings
    subject: Subject
    device: torch.device
    started: float
    progress: Progress
    installer: Installer = field(init=False)

    def __post_init__(self) -> None:
        self.installer = Installer(self.subject, self.settings.depth)

    def look(self) -> Facts:
        """Capture the network, which all ways share, and see what a cut saves.

        Raises:
            DcompileError: it cannot be captured, has no cut or none at this depth, or
                the pipeline refuses its arguments.
        """
        self.progress("capturing", 0, 1)
        cache_compile(
            self.subject.cacheable,
            depth=self.settings.depth,
            backend="eager",
            on_error="raise",
            verbose=False,
        )
        self.subject.run(SHORT_RUN)
        found = handle(self.subject.network)
        explanation: Explanation = found.explain()
        seconds = found.stats.compile_seconds
        found.disable()
        return Facts(self.subject, self.device, explanation, seconds)

    def round(self, number: int, measured: list[Measured]) -> None:
        """Run every way once that did not fail before, while there is time."""
        for done, one in enumerate(measured):
            wanted = one.way == UNCACHED and not number  # nothing can be compared without it
            if one.failure is not None or (self._is_late() and not wanted):
                continue
            stage = f"round {number + 1} of {self.settings.repeat}: {one.way.label}"
            self.progress(stage, done, len(measured))
            with _warnings_into(one.warnings):
                try:
                    self._turn(one)
                except Exception as error:  # whatever compilers raise; the others go on
                    one.failure = first_line(error)
            self.progress(stage, done + 1, len(measured))

    def _is_late(self) -> bool:
        budget = self.settings.budget
        return budget is not None and time.monotonic() - self.started >= budget

    def _turn(self, one: Measured) -> None:
        """Install one way, warm it up, and time one run of it.

        Raises:
            ModelError: the pipeline does not update its sample step by step.
        """
        first = not one.runs
        with self.installer.installed(one.way) as counters:
            cold, warm = self._warm_up(one, counters)
            _clear(self.device)
            clock = StepClock(self.device, counters or (lambda: None))
            before = counters() if counters else None
            pictures, seconds = self.subject.run(self.settings.steps, clock)
            times = clock.milliseconds()
            if not times:
                raise ModelError(
                    f"{type(self.subject.cacheable).__name__} never called its scheduler's step: "
                    "its steps cannot be timed"
                )
            one.runs.append(TimedRun(seconds, times, before, clock.seen))
            if first:
                one.pictures = pictures
                one.memory |= _peaks(self.device)
                if one.way != UNCACHED:
                    one.compile_seconds = max(0.0, cold - warm)

    def _warm_up(self, one: Measured, counters: Counters) -> tuple[float, float]:
        """Short runs, the first of which compiles and records: seconds of the first and the last.

        On the way it is seen how much is cached between the steps.
        """
        clock = StepClock(self.device, counters or (lambda: None))
        _, cold = self.subject.run(SHORT_RUN, clock)
        if counters is not None:
            one.memory["cached_bytes"] = max((stats.cache_bytes for stats in clock.seen), default=0)
        until = time.monotonic() + (0.0 if self.device.type == "cpu" else WARM_SECONDS)
        while True:
            _, warm = self.subject.run(SHORT_RUN)
            if time.monotonic() >= until:
                return cold, warm


def _clear(device: torch.device) -> None:
    """Free all that nobody holds, and begin to watch for the peak of memory."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device) -> dict[str, int]:
    """Peaks since ``_clear``, in bytes; reserved memory includes the pools of CUDA graphs."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


class _Collector(logging.Handler):
    def __init__(self, messages: dict[str, None]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages[record.getMessage().removeprefix("dcompile: ").splitlines()[0]] = None


@contextmanager
def _warnings_into(messages: dict[str, None]) -> Iterator[None]:
    """Collect dcompile's warnings, each once, instead of printing them over the progress bar."""
    logger, collector = logging.getLogger("dcompile"), _Collector(messages)
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
