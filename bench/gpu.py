"""The GPU suite: every way to run a denoising step, on one NVIDIA GPU, in one command.

    python bench/gpu.py

It runs the gpu-marked tests, measures the card's matrix rate, and then one way after another, the
most important first. After every measurement it writes gpu.json and gpu.md (see gpu_page.py), and
it ends in time (--minutes); the same command again goes on with what is missing. What it needs:
torch, diffusers, DeepCache, typer, rich, pytest; no network. A dry run of everything but CUDA:

    python bench/gpu.py --device cpu --tiny --out /tmp/dry --ways eager,deepcache,dcompile-eager
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from gpu_page import BARS, WAYS, ShapeResults, key, page
from rich.console import Console
from rich.table import Table
from shapes import GPU_SHAPES, Call, Shape
from training import replace_file

import dcompile

ROOT = Path(__file__).parents[1]
TESTS = ("tests/runtime/test_state.py", "tests/runtime/test_cuda_graphs.py")
TESTS_SECONDS = 150
WARM_SECONDS = 0.6  # until clocks are up, apart from everything lazy
TIMED_SECONDS = 1.0  # at least one whole run
HOST_SECONDS = 0.4  # likewise
LEAST_SECONDS = 15  # nothing is begun with less time left
WORST_ERROR = 0.1  # of a refresh step against diffusers; a wrong result is off by more than 1

# Ways of one group run on one network and share what they compile. Stages: what the bars need
# comes first, for all shapes.
STAGES = (
    (("eager",), ("dcompile-graphs", "dcompile-inductor"), ("deepcache",)),
    (("torch-compile", "torch-graphs"),),
    (("dcompile-eager",),),
    (("torch-max-autotune",),),
)
TORCH_MODES = {
    "torch-compile": None,
    "torch-graphs": "reduce-overhead",
    "torch-max-autotune": "max-autotune",
}

Step = Callable[[torch.Tensor], Any]
Row = dict[str, Any]


class TookTooLongError(BaseException):
    """Raised by the alarm, anywhere. No Exception: compilers swallow those."""


class BrokenDeviceError(RuntimeError):
    """The device answers nothing but errors any more; a new process has to go on."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError inside once the time is up; again and again, should it be lost."""

    def stop(*_: Any) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def empty_caches() -> Iterator[None]:
    """Nothing that was compiled before is found again."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        with mock.patch.dict(os.environ, places):
            yield


@dataclass(frozen=True)
class Device:
    """Where it runs. On a CPU, for dry runs, host clocks stand in for events."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def clear(self, workspaces: bool = False) -> None:
        """Free all that nobody holds, and begin to watch for the memory peak.

        Args:
            workspaces: those of cuBLAS, too, one for each stream that was ever used. Recorded
                CUDA graphs write to them: only where none is replayed any more.
        """
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            if workspaces:
                torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> Row:
        """Reserved memory counts the private pools of CUDA graphs, allocated does not."""
        if not self.is_cuda:
            return {}
        return {
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
        }

    def timed(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each, one right behind the other."""
        if not self.is_cuda:
            marks = [time.perf_counter()]
            for run in runs:
                run()
                marks.append(time.perf_counter())
            return [1e3 * (end - begin) for begin, end in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        self.synchronize()
        events[0].record()
        for run, event in zip(runs, events[1:], strict=True):
            run()
            event.record()
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairwise(events)]

    def matrix_tflops(self, size: int, dtype: torch.dtype) -> float:
        """Rate of a large matrix product, on random numbers: zeros are faster."""
        one, other = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        result = torch.empty_like(one)
        product = [lambda: torch.mm(one, other, out=result)] * 20
        until = time.monotonic() + WARM_SECONDS
        while time.monotonic() < until:
            self.timed(product)
        return 2 * size**3 / statistics.median(self.timed(product)) / 1e9


class Loop:
    """Generations: walks over a scheduler's timesteps, each a tensor of its own, on the device."""

    def __init__(
        self, step: Step, scheduler: Any, steps: int, interval: int, device: Device
    ) -> None:
        self._step = step
        self._scheduler = scheduler
        self._steps = steps
        self._interval = interval
        self._device = device
        self.refreshes = self.reuses = 0  # as they should be

    def generation(self) -> list[Callable[[], Any]]:
        """The calls of one; begin it once it is clear that it will be run."""
        self._scheduler.set_timesteps(self._steps, device=self._device.device)

        def call(index: int, t: torch.Tensor) -> Any:
            if index % self._interval:
                self.reuses += 1
            else:
                self.refreshes += 1
            return self._step(t)

        return [
            lambda index=index, t=t: call(index, t)
            for index, t in enumerate(self._scheduler.timesteps)
        ]

    def first(self) -> tuple[Any, float]:
        """The first step's result, and the seconds it took: with compiling, where there is any."""
        run = self.generation()[0]
        self._device.synchronize()
        started = time.perf_counter()
        result = run()
        self._device.synchronize()
        return result[0], time.perf_counter() - started

    def warm_up(self) -> None:
        until = time.monotonic() + WARM_SECONDS
        while True:
            for done, run in enumerate(self.generation(), start=1):
                run()
                if done % self._interval == 0:
                    self._device.synchronize()
                    if done >= 2 * self._interval and time.monotonic() >= until:
                        return

    def step_times(self) -> list[list[float]]:
        """Milliseconds of each step, cycle by cycle."""
        cycles: list[list[float]] = []
        until = time.monotonic() + TIMED_SECONDS
        while not cycles or time.monotonic() < until:
            times = self._device.timed(self.generation())
            cycles += [times[i : i + self._interval] for i in range(0, len(times), self._interval)]
        return cycles

    def host_times(self) -> list[float]:
        """Seconds each reuse call keeps the CPU, while the device works on the refresh step.

        It waits for the device before each refresh step only: what is measured is neither idle
        time nor a full launch queue.
        """
        seconds: list[float] = []
        until = time.monotonic() + HOST_SECONDS
        while not seconds or time.monotonic() < until:
            for index, run in enumerate(self.generation()):
                if index % self._interval == 0:
                    self._device.synchronize()
                    run()
                    continue
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            self._device.synchronize()
        return seconds

    def measure(self) -> Row:
        """Everything about one way at one interval, compiled before."""
        self.warm_up()
        self._device.clear()
        cycles = self.step_times()
        memory = self._device.peak()
        means = [statistics.mean(cycle) for cycle in cycles]
        row: Row = {
            "step_ms": statistics.median(means),
            "step_ms_least": min(means),
            "step_ms_most": max(means),
            "timed_steps": sum(map(len, cycles)),
            **memory,
        }
        if self._interval > 1:
            row["refresh_ms"] = statistics.median(cycle[0] for cycle in cycles)
            row["reuse_ms"] = statistics.median(ms for cycle in cycles for ms in cycle[1:])
            row["host_us"] = 1e6 * statistics.median(self.host_times())
        return row


class Subject:
    """One network, for the ways of one group."""

    def __init__(self, shape: Shape, steps: int, device: Device, dtype: torch.dtype, tiny: bool):
        self._shape = shape
        self._least_steps = steps
        self._device = device
        self.network, self._call = shape.build(device.device, dtype, tiny)
        self._references: dict[int, torch.Tensor] = {}
        self._cold = True

    def run(self, way: str, interval: int) -> Row:
        """Install the way and measure it.

        Raises:
            RuntimeError: a refresh step's result is not diffusers', or steps were refreshed that
                should not have been, and whatever the way itself raises.
        """
        steps = self._steps(interval)
        scheduler = self._shape.scheduler()
        with warnings.catch_warnings():
            # That dcompile runs on without CUDA graphs must not go into a table unseen.
            warnings.filterwarnings("error", message="dcompile: ")
            with self._installed(way, interval, scheduler) as step:
                self._device.clear(workspaces=True)  # the way before it is gone
                loop = Loop(step, scheduler, steps, interval, self._device)
                result, seconds = loop.first()
                row: Row = {"error": self._error(result, steps)}
                del result  # a recorded graph's output: its memory is used again
                if self._cold and way not in ("eager", "deepcache"):
                    row["compile_seconds"] = seconds
                self._cold = False
                row |= loop.measure()
                self._check(way, loop)
        if way in TORCH_MODES:
            from torch._dynamo.utils import counters

            row["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        return row

    def prepare(self, intervals: Sequence[int]) -> None:
        """Remember what the untouched network returns at the first step."""
        for steps in {self._steps(interval) for interval in intervals}:
            scheduler = self._shape.scheduler()
            loop = Loop(self._step(self.network), scheduler, steps, 1, self._device)
            self._references[steps] = loop.first()[0].float()

    def facts(self) -> Row:
        """FLOPs of a step, and r; after a dcompile way has run."""
        explanation = dcompile.handle(self.network).explain()
        return {"flops": explanation.flops, "ratio": explanation.depths[0].ratio}

    def _steps(self, interval: int) -> int:
        """Whole cycles, two at least."""
        return interval * max(2, math.ceil(self._least_steps / interval))

    def _step(self, network: Any) -> Step:
        sample = self._call["sample"]
        rest: Call = {name: value for name, value in self._call.items() if name != "sample"}
        return lambda t: network(sample, t, **rest)

    @contextmanager
    def _installed(self, way: str, interval: int, scheduler: Any) -> Iterator[Step]:
        if way in TORCH_MODES:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            step = self._step(torch.compile(self.network, mode=TORCH_MODES[way]))

            def marked(t: torch.Tensor) -> Any:
                torch.compiler.cudagraph_mark_step_begin()
                return step(t)

            yield step if way == "torch-compile" else marked
        elif way == "deepcache":
            from DeepCache import DeepCacheSDHelper

            helper = DeepCacheSDHelper(SimpleNamespace(unet=self.network, scheduler=scheduler))
            helper.set_params(cache_interval=interval, cache_branch_id=0)
            helper.enable()
            try:
                yield self._step(self.network)
            finally:
                helper.disable()
        elif way.startswith("dcompile"):
            dcompile.cache_compile(
                self.network,
                interval=interval,
                backend="eager" if way == "dcompile-eager" else "inductor",
                cuda_graphs=way == "dcompile-graphs",
                verbose=False,
            )
            yield self._step(self.network)
        else:
            yield self._step(self.network)

    def _error(self, result: torch.Tensor, steps: int) -> float:
        expected = self._references[steps]
        error = float((result.float() - expected).norm() / expected.norm())
        if not error < WORST_ERROR:  # NaN is wrong, too
            raise RuntimeError(f"the first step differs from diffusers' by {error:.2g} of its norm")
        return error

    def _check(self, way: str, loop: Loop) -> None:
        if not way.startswith("dcompile"):
            return
        stats = dcompile.handle(self.network).stats
        found = (stats.refresh_steps, stats.reuse_steps, stats.uncached_calls)
        expected = (loop.refreshes, loop.reuses, 0)
        if found != expected:
            raise RuntimeError(
                f"expected {expected} refresh, reuse and uncached calls, counted {found}"
            )


def one_line(error: BaseException) -> str:
    """Type and message of an error, short enough for a table."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    return text if len(text) <= 200 else f"{text[:199]}…"


def code_version() -> str:
    """Changes whenever dcompile's own code does."""
    digest = hashlib.sha256()
    for package in ("dcompile", "passes"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def card_of(device: Device) -> Row:
    if not device.is_cuda:
        return {"name": f"CPU ({platform.machine()})", "memory_gib": 0.0, "driver": "none"}
    properties = torch.cuda.get_device_properties(device.device)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        driver = answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
    }


def versions() -> Row:
    found: Row = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in ("torch", "triton", "diffusers", "DeepCache"):
        try:
            found[package.lower()] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package.lower()] = "missing"
    found["torch"] = str(torch.__version__)
    return {**found, "dcompile": dcompile.__version__}


class Record:
    """The results, on disk after every change: gpu.json and gpu.md."""

    def __init__(self, folder: Path, stem: str, identity: Row, fresh: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json = folder / f"{stem}.json"
        self.markdown = folder / f"{stem}.md"
        self.code = code_version()
        self.results: Row = {**identity, "shapes": {}}
        self.resumed = False
        if fresh or not self.json.is_file():
            return
        earlier = json.loads(self.json.read_text())
        if _identity(earlier) == _identity(identity):
            self.results, self.resumed = earlier, True
        else:  # another card's, or made with other versions: kept
            name = re.sub(r"[^a-z0-9]+", "-", earlier["card"]["name"].lower()).strip("-")
            os.replace(self.json, folder / f"{stem}-{name}.json")

    def shape(self, name: str) -> Row:
        found: Row = self.results["shapes"].setdefault(name, {"rows": {}})
        return found

    def has(self, shape: str, way: str, interval: int, retry: bool) -> bool:
        row = self.results["shapes"].get(shape, {}).get("rows", {}).get(key(way, interval))
        if row is None or (retry and "failed" in row):
            return False
        return not way.startswith("dcompile") or row["code"] == self.code

    def put(self, shape: str, way: str, interval: int, row: Row) -> None:
        self.shape(shape)["rows"][key(way, interval)] = {**row, "code": self.code}
        self.save()

    def save(self) -> None:
        self.results["date"] = datetime.date.today().isoformat()
        replace_file(self.json, lambda path: _write(path, json.dumps(self.results, indent=1)))
        replace_file(self.markdown, lambda path: _write(path, page(self.results)))


def _identity(results: Row) -> tuple[Any, ...]:
    return results["card"]["name"], results["versions"], results["settings"]


def _write(path: Path, text: str) -> None:
    path.write_text(text if text.endswith("\n") else f"{text}\n")


@dataclass
class Suite:
    """One run of the command."""

    record: Record
    device: Device
    dtype: torch.dtype
    tiny: bool
    steps: int
    deadline: float
    way_seconds: float
    retry: bool
    console: Console

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"{self.left():4.0f} s left  {text}", style=style, markup=False)

    def run_tests(self) -> None:
        """The gpu-marked tests, in a process of their own."""
        known = self.record.results.get("tests")
        if known is not None and known["code"] == self.record.code and not self.retry:
            return
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--color=no", "--tb=short", *TESTS]
        seconds = max(1.0, min(TESTS_SECONDS, self.left()))
        try:
            process = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
            if process.returncode:
                log = self.record.json.with_name("gpu-tests.log")
                log.write_text(process.stdout + process.stderr)
            lines = [line for line in process.stdout.splitlines() if line.strip()]
            found = {
                "summary": (lines or process.stderr.splitlines() or ["no output"])[-1].strip("= "),
                "passed": process.returncode == 0,
                "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
            }
        except subprocess.TimeoutExpired:
            found = {"summary": f"stopped after {seconds:.0f} s", "passed": False, "failed": []}
        self.record.results["tests"] = {
            **found,
            "seconds": time.monotonic() - started,
            "code": self.record.code,
        }
        self.record.save()
        self.say(f"gpu-marked tests: {found['summary']}", "" if found["passed"] else "bold red")
        for line in found["failed"][:10]:
            self.say(line)

    def measure_matrix_rate(self, size: int) -> None:
        if "matrix_tflops" in self.record.results:
            return
        self.device.clear()
        self.record.results["matrix_tflops"] = self.device.matrix_tflops(size, self.dtype)
        self.record.save()
        self.say(f"matrix rate: {self.record.results['matrix_tflops']:.4g} TFLOP/s")

    def run_group(self, shape: str, ways: Sequence[str]) -> None:
        """Measure what is missing of a group.

        Raises:
            TookTooLongError: no time is left.
            BrokenDeviceError: the device is of no use any more.
        """
        missing = {way: self._missing(shape, way) for way in ways}
        intervals = [interval for each in missing.values() for interval in each]
        if not intervals:
            return
        if self.left() < LEAST_SECONDS:
            raise TookTooLongError
        with torch.no_grad(), empty_caches():
            subject: Subject | None = None
            for way in ways:
                for interval in missing[way]:
                    try:
                        with limited(min(self.way_seconds, self.left())):
                            if subject is None:
                                subject = self._subject(shape, intervals)
                            row = subject.run(way, interval)
                            if way.startswith("dcompile"):
                                self._note_facts(shape, subject)
                    except TookTooLongError:
                        if self.left() < 1:
                            raise
                        self._failed(shape, way, f"took over {self.way_seconds / 60:.3g} minutes")
                        break
                    except Exception as error:
                        self._failed(shape, way, one_line(error))
                        self._check_device()
                        break
                    self.record.put(shape, way, interval, row)
                    self.say(self._line(shape, way, interval))
        del subject
        torch._dynamo.reset()
        self.device.clear(workspaces=True)

    def _missing(self, shape: str, way: str) -> list[int]:
        """Intervals yet to measure, the bars' first."""
        return sorted(
            (n for n in WAYS[way].intervals if not self.record.has(shape, way, n, self.retry)),
            key=lambda n: (n != 3, n),
        )

    def _subject(self, shape: str, intervals: Sequence[int]) -> Subject:
        subject = Subject(GPU_SHAPES[shape], self.steps, self.device, self.dtype, self.tiny)
        subject.prepare(intervals)
        return subject

    def _note_facts(self, shape: str, subject: Subject) -> None:
        known = self.record.shape(shape)
        if known.get("code") != self.record.code:
            known.update(subject.facts(), code=self.record.code)

    def _failed(self, shape: str, way: str, reason: str) -> None:
        """What fails at one interval would at the others."""
        for interval in self._missing(shape, way):
            self.record.put(shape, way, interval, {"failed": reason})
        self.say(f"{shape:5s} {WAYS[way].label} failed: {reason}", "bold red")

    def _check_device(self) -> None:
        try:
            self.device.synchronize()
        except Exception as error:
            raise BrokenDeviceError(one_line(error)) from error

    def _line(self, shape: str, way: str, interval: int) -> str:
        results = ShapeResults(self.record.shape(shape))
        row = results.row(way, interval) or {}
        parts = [f"{shape:5s} {WAYS[way].label}, N={interval}: {row['step_ms']:.3g} ms a step"]
        speed_up, share = results.speed_up("eager", way, interval), results.of_limit(way, interval)
        if speed_up is not None:
            parts.append(f"{speed_up:.2f}x")
        if share is not None:
            parts.append(f"{share:.1%} of the limit")
        if "compile_seconds" in row:
            parts.append(f"{row['compile_seconds']:.0f} s compiling")
        return ", ".join(parts)


def bars(results: Row) -> Table:
    table = Table("what", "bar", *GPU_SHAPES)
    for bar in BARS:
        judged = [
            bar.judged(name, ShapeResults(results["shapes"].get(name, {}))).replace("*", "")
            for name in GPU_SHAPES
        ]
        table.add_row(bar.what, f"{'<=' if bar.at_most else '>='} {bar.bound:g}{bar.unit}", *judged)
    return table


def names_of(text: str, known: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"{option}: got {', '.join(unknown) or 'nothing'}, expected some of {', '.join(known)}"
        )
    return names


def main(
    minutes: Annotated[float, typer.Option(help="Be done within.")] = 8.5,
    shapes: Annotated[str, typer.Option(help="What to measure.")] = ",".join(GPU_SHAPES),
    ways: Annotated[str, typer.Option(help="How to run it.")] = ",".join(WAYS),
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run, at least.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = ROOT
    / "bench/results",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny networks: a dry run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier results.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    max_autotune: Annotated[bool, typer.Option(help="Measure it, too, as the last.")] = True,
    tests: Annotated[bool, typer.Option(help="Run the gpu-marked tests first.")] = True,
    way_minutes: Annotated[float, typer.Option(help="Give a way up after.")] = 4.0,
    page_only: Annotated[
        bool, typer.Option("--page", help="Only write gpu.md from gpu.json.")
    ] = False,
) -> None:
    deadline = time.monotonic() + 60 * minutes
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    chosen_shapes = names_of(shapes, list(GPU_SHAPES), "--shapes")
    chosen_ways = names_of(ways, list(WAYS), "--ways")
    if not max_autotune:
        chosen_ways = [way for way in chosen_ways if way != "torch-max-autotune"]
    if page_only:
        source = out / "gpu.json"
        results = json.loads(source.read_text()) if source.is_file() else {}
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "gpu.md", lambda path: _write(path, page(results)))
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(
            "no CUDA device here; --device cpu --tiny is a dry run, --page writes the page"
        )

    place = Device(torch.device(device))
    dtype = torch.float16 if place.is_cuda else torch.float32
    size = 8192 if place.is_cuda and not tiny else 256
    identity = {
        "card": card_of(place),
        "versions": versions(),
        "settings": {
            "dtype": str(dtype).removeprefix("torch."),
            "matrix": f"{size}x{size}x{size} {str(dtype).removeprefix('torch.')}",
            "steps": steps,
            "tiny": tiny,
        },
    }
    stem = "gpu" if place.is_cuda and not tiny else "gpu-dry-run"
    record = Record(out, stem, identity, fresh)
    suite = Suite(record, place, dtype, tiny, steps, deadline, 60 * way_minutes, retry, console)
    suite.say(f"{identity['card']['name']}, torch {torch.__version__}")
    if record.resumed:
        suite.say(f"going on with what is missing in {record.json}")
    try:
        if tests and place.is_cuda:
            suite.run_tests()
        suite.measure_matrix_rate(size)
        for stage in STAGES:
            for shape in chosen_shapes:
                for group in stage:
                    suite.run_group(shape, [way for way in group if way in chosen_ways])
        suite.say("everything asked for is measured")
    except TookTooLongError:
        suite.say("out of time: the same command goes on with what is missing", "bold yellow")
    except BrokenDeviceError as error:
        suite.say(f"the device gave up ({error}): run the same command again", "bold red")
    record.save()
    console.print(bars(record.results))
    console.print(f"wrote {record.json} and {record.markdown}", markup=False)


if __name__ == "__main__":
    code: Any = 0
    try:
        typer.run(main)
    except SystemExit as done:
        code = done.code
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written; Inductor's workers would be waited for, with all they have still to compile.
    os._exit(code if isinstance(code, int) else 1)
