"""What ``dcompile bench`` found: times, fidelity and memory of each way, as plain data."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import diffusers
import torch

from dcompile.cli.demo import fidelity, short_name
from dcompile.cli.settings import BenchSettings
from dcompile.cli.subjects import Subject
from dcompile.cli.ways import UNCACHED, Way
from dcompile.report.explain import Explanation
from dcompile.runtime.counters import Stats
from dcompile.version import __version__

FORMAT = 1
CLOSE = 0.95  # of the limit: runs that can come this close are not worth a notice
PIPELINE, NETWORK = "pipeline", "network"
MEASURED, FAILED, NOT_MEASURED = "measured", "failed", "not measured"


@dataclass(frozen=True)
class Facts:
    """What holds for all ways.

    Attributes:
        subject: what ran.
        device: where.
        explanation: what each depth saves.
        capture_seconds: what capturing took, once for all ways.
    """

    subject: Subject
    device: torch.device
    explanation: Explanation
    capture_seconds: float


@dataclass(frozen=True)
class TimedRun:
    """One timed run.

    Attributes:
        seconds: all of it, with text encoders and decoder.
        milliseconds: of each step.
        before: dcompile's counters at its begin; None for ways without.
        after: the counters after each step.
    """

    seconds: float
    milliseconds: list[float]
    before: Stats | None
    after: list[Stats | None]

    def refreshed(self) -> Iterator[tuple[float, bool]]:
        """Milliseconds of each cached step, and whether it was a refresh; no uncached ones."""
        earlier = self.before
        for time, later in zip(self.milliseconds, self.after, strict=True):
            if earlier is not None and later is not None:
                refreshes = later.refresh_steps - earlier.refresh_steps
                reuses = later.reuse_steps - earlier.reuse_steps
                if later.uncached_calls == earlier.uncached_calls and bool(refreshes) ^ bool(
                    reuses
                ):
                    yield time, bool(refreshes)
            earlier = later


@dataclass
class Measured:
    """What is known of one way so far.

    Attributes:
        way: see there.
        runs: its timed runs.
        pictures: of the first of them, ``(count, channels, height, width)`` in [0, 1]; None if it
            makes none.
        memory: in bytes, of the first of them.
        compile_seconds: see ``BenchRow``.
        warnings: what dcompile warned of, each once.
        failure: first line of the error that ended it.
    """

    way: Way
    runs: list[TimedRun] = field(default_factory=list)
    pictures: torch.Tensor | None = None
    memory: dict[str, int] = field(default_factory=dict)
    compile_seconds: float | None = None
    warnings: dict[str, None] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class BenchRow:
    """One way. None is what was not measured, or does not apply.

    Attributes:
        way: its name.
        backend, interval: of dcompile; None for the uncached network and for torch.compile.
        status: "measured", "failed" or "not measured".
        reason: why it was not measured: first line of the error, or that the time was used up.
        runs: number of timed runs; all times are medians over them.
        run_seconds: of a whole run, with text encoders and decoder.
        step_ms: mean step of a run in ms: the network, guidance and the sampler's update.
        steps_per_second: 1000 / ``step_ms``.
        refresh_ms, reuse_ms: median refresh and reuse step in ms.
        over_uncached: speed-up in mean steps over the uncached network without compiler.
        over_backend: the same over this backend at N=1, which refreshes at every step.
        speed_limit: N / (1 + (N - 1) r), with r in FLOPs.
        of_limit: ``over_backend`` / ``speed_limit``, for N > 1.
        psnr: in dB, of all pictures against the uncached ones; None if they are identical, or if
            some are not finite.
        ssim: the same; None below 11 pixels.
        identical: whether all pictures equal the uncached ones bit for bit.
        compile_seconds: what the first short run took longer than the second: compiling, and
            recording CUDA graphs. About 0 where another row compiled the same graphs.
        cached_bytes: of cached features between two steps.
        peak_allocated_bytes, peak_reserved_bytes: of the first timed run, on CUDA.
        memory_over_uncached: ``peak_reserved_bytes`` over the uncached way's.
        refresh_steps, reuse_steps, forced_steps, uncached_calls: calls of all timed runs together;
            see ``dcompile.Stats``.
        forced_reasons, uncached_reasons: how many of them for which reason.
        notices: what a reader of this row has to know.
    """

    way: str
    backend: str | None
    interval: int | None
    status: str
    reason: str | None
    runs: int = 0
    run_seconds: float | None = None
    step_ms: float | None = None
    steps_per_second: float | None = None
    refresh_ms: float | None = None
    reuse_ms: float | None = None
    over_uncached: float | None = None
    over_backend: float | None = None
    speed_limit: float | None = None
    of_limit: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    identical: bool | None = None
    compile_seconds: float | None = None
    cached_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    memory_over_uncached: float | None = None
    refresh_steps: int | None = None
    reuse_steps: int | None = None
    forced_steps: int | None = None
    uncached_calls: int | None = None
    forced_reasons: Mapping[str, int] = field(default_factory=dict)
    uncached_reasons: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """The result of ``run_bench``.

    Attributes:
        model: its short name.
        kind: "pipeline" or "network", which draws nothing.
        network: name of the network's class.
        dtype: of its weights.
        sampler: name of the sampler's class, or "random inputs".
        prompts: one for each picture; empty without prompts.
        settings: what was asked for.
        device: its type and name, and on a CPU the number of threads.
        versions: of Python, torch, diffusers and dcompile.
        date: when it was measured, ISO 8601.
        flops: of one uncached call.
        ratio: r, FLOPs of a reuse step over those.
        capture_seconds: what capturing took, once for all ways.
        remarks: what a reader of all rows has to know.
        rows: the uncached way first.
    """

    model: str
    kind: str
    network: str
    dtype: str
    sampler: str
    prompts: tuple[str, ...]
    settings: BenchSettings
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    flops: int
    ratio: float
    capture_seconds: float
    remarks: tuple[str, ...]
    rows: tuple[BenchRow, ...]

    @property
    def uncached(self) -> BenchRow:
        """The row that all others are compared with."""
        return self.rows[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as in the JSON file."""
        settings = {**asdict(self.settings), "count": self.settings.pictures}
        return {"format": FORMAT, **asdict(self), "settings": settings}

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def result_of(settings: BenchSettings, facts: Facts, measured: Sequence[Measured]) -> BenchResult:
    """Compare the ways with each other; the first of them is the uncached one."""
    subject, explanation = facts.subject, facts.explanation
    ratio = explanation.depths[settings.depth].ratio
    return BenchResult(
        model=short_name(settings.model),
        kind=PIPELINE if subject.draws else NETWORK,
        network=explanation.network,
        dtype=str(next(subject.network.parameters()).dtype).removeprefix("torch."),
        sampler=subject.sampler,
        prompts=subject.prompts,
        settings=settings,
        device=_described(facts.device),
        versions={
            "dcompile": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        flops=explanation.flops,
        ratio=ratio,
        capture_seconds=facts.capture_seconds,
        remarks=subject.remarks,
        rows=tuple(_row(one, measured, settings, ratio) for one in measured),
    )


def _described(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    if device.type != "cpu":
        return {"type": device.type, "name": platform.machine()}
    return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    """Its name, where Linux tells it; else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())


def _row(
    one: Measured, measured: Sequence[Measured], settings: BenchSettings, ratio: float
) -> BenchRow:
    way = one.way
    if one.failure is not None or not one.runs:
        status = NOT_MEASURED if one.failure is None else FAILED
        reason = one.failure or _used_up(settings)
        return BenchRow(
            way.label, way.backend, way.interval, status, reason, notices=tuple(one.warnings)
        )
    step_ms = _step_ms(one)
    uncached, same = measured[0], _at_every_step(way, measured)
    over_backend = None if same is None else _step_ms(same) / step_ms
    limit = None if way.interval is None else limit_of(way.interval, ratio)
    steps = [step for run in one.runs for step in run.refreshed()]
    return BenchRow(
        way=way.label,
        backend=way.backend,
        interval=way.interval,
        status=MEASURED,
        reason=None,
        runs=len(one.runs),
        run_seconds=median(run.seconds for run in one.runs),
        step_ms=step_ms,
        steps_per_second=1000 / step_ms,
        refresh_ms=_median([ms for ms, refreshed in steps if refreshed]),
        reuse_ms=_median([ms for ms, refreshed in steps if not refreshed]),
        over_uncached=_step_ms(uncached) / step_ms if _is_measured(uncached) else None,
        over_backend=over_backend,
        speed_limit=limit,
        of_limit=over_backend / limit if over_backend and limit and limit > 1 else None,
        compile_seconds=one.compile_seconds,
        **_fidelity(one, uncached),
        **_memory(one, uncached),
        **_counts(one),
        notices=tuple(_notices(one, over_backend, ratio, settings)),
    )


def _is_measured(one: Measured) -> bool:
    return one.failure is None and bool(one.runs)


def _step_ms(one: Measured) -> float:
    return median(mean(run.milliseconds) for run in one.runs)


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _at_every_step(way: Way, measured: Sequence[Measured]) -> Measured | None:
    """The same backend at N=1, if it was measured."""
    if way.backend is None:
        return None
    same = Way(way.backend, 1)
    return next((one for one in measured if one.way == same and _is_measured(one)), None)


def _fidelity(one: Measured, uncached: Measured) -> dict[str, Any]:
    expected = uncached.pictures if _is_measured(uncached) else None
    if one.pictures is None or expected is None or one.way == UNCACHED:
        return {}
    psnr, ssim = fidelity(one.pictures, expected)
    return {
        "psnr": psnr if math.isfinite(psnr) else None,
        "ssim": ssim if math.isfinite(ssim) else None,
        "identical": torch.equal(one.pictures, expected),
    }


def _memory(one: Measured, uncached: Measured) -> dict[str, Any]:
    name = "peak_reserved_bytes"
    found: dict[str, Any] = dict(one.memory)
    if _is_measured(uncached) and uncached.memory.get(name) and one.memory.get(name):
        found["memory_over_uncached"] = one.memory[name] / uncached.memory[name]
    return found


def _counts(one: Measured) -> dict[str, Any]:
    """Dcompile's counters, of the timed runs alone."""
    pairs = [(run.before, run.after[-1]) for run in one.runs]
    spans = [(begin, end) for begin, end in pairs if begin is not None and end is not None]
    if not spans:
        return {}
    found: dict[str, Any] = {
        name: sum(getattr(end, name) - getattr(begin, name) for begin, end in spans)
        for name in ("refresh_steps", "reuse_steps", "forced_steps", "uncached_calls")
    }
    for name in ("forced_reasons", "uncached_reasons"):
        reasons: Counter[str] = Counter()
        for begin, end in spans:
            reasons += Counter(getattr(end, name)) - Counter(getattr(begin, name))
        found[name] = dict(reasons)
    return found


def _notices(
    one: Measured, over_backend: float | None, ratio: float, settings: BenchSettings
) -> Iterator[str]:
    yield from one.warnings
    counts = _counts(one)
    for reason, count in counts.get("uncached_reasons", {}).items():
        yield f"{count} calls ran uncached: {reason}"
    for reason, count in counts.get("forced_reasons", {}).items():
        yield f"{count} refreshes beyond the interval's: {reason}"
    interval = one.way.interval or 1
    calls = len(one.runs[0].milliseconds)
    cycles = math.ceil(calls / interval)
    most = calls / (cycles + (calls - cycles) * ratio)
    if most < CLOSE * limit_of(interval, ratio):
        yield f"{calls} steps are no whole cycles of {interval}: at most {most:.2f}× is possible"
    if over_backend is not None and over_backend < 1 < interval:
        yield f"slower than the same backend uncached ({over_backend:.2f}×): caching does not pay"
    if len(one.runs) < settings.repeat:
        yield f"{len(one.runs)} of {settings.repeat} runs: {_used_up(settings)}"


def limit_of(interval: int, ratio: float) -> float:
    """The most that caching alone can gain: N / (1 + (N - 1) r)."""
    return interval / (1 + (interval - 1) * ratio)


def _used_up(settings: BenchSettings) -> str:
    return f"the budget of {settings.budget:g} s was used up"
