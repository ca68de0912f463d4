"""One process of the GPU suite: a network, the ways of one job on it, a row for each interval.

gpu.py starts it with the job as JSON, waits for "ready" on its standard output, and answers "go"
when nothing else is running. What it compiles is compiled before "ready", beside other jobs.
"""

from __future__ import annotations

import contextlib
import cProfile
import fcntl
import gc
import io
import json
import logging
import math
import os
import pstats
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peers import cache_dit_masked, compile_blocks
from shapes import GPU_SHAPES, Call, Shape

import dcompile
from dcompile.backends.inductor import Inductor
from dcompile.runtime import cuda_graphs
from dcompile.runtime.cuda_recorder import RECORDERS

WARM_SECONDS = 0.4  # until clocks are up, apart from everything lazy
TIMED_SECONDS = 0.8  # at least one whole run
HOST_SECONDS = 0.2  # likewise
WORST_ERROR = 0.1  # of a step against the eager reference; a wrong result is off by more than 1
SHALLOW_NODES = 400  # graphs with fewer nodes are autotuned thoroughly; full graphs have 1,500

TORCH_MODES = {
    "torch-compile": None,
    "torch-graphs": "reduce-overhead",
    "torch-graphs-last": "reduce-overhead",
}
UNCOMPILED = ("eager", "deepcache", "cache-dit", "dcompile-eager")

Step = Callable[[torch.Tensor], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """Where it runs. On a CPU, for rehearsals, host clocks stand in for events."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free all that nobody holds, and begin to watch for the memory peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
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
        self,
        step: Step,
        scheduler: Any,
        steps: int,
        interval: int,
        device: Device,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._step = step
        self.scheduler = scheduler  # where a pipeline has it
        self._steps = steps
        self._interval = interval
        self._device = device
        self._begin = begin
        self.refreshes = self.reuses = 0  # as they should be

    def generation(self) -> list[Callable[[], Any]]:
        """The calls of one; begin it once it is clear that it will be run."""
        self.scheduler.set_timesteps(self._steps, device=self._device.device)
        self._begin()

        def call(index: int, t: torch.Tensor) -> Any:
            if index % self._interval:
                self.reuses += 1
            else:
                self.refreshes += 1
            return self._step(t)

        return [
            lambda index=index, t=t: call(index, t)
            for index, t in enumerate(self.scheduler.timesteps)
        ]

    def first_two(self) -> tuple[list[torch.Tensor], list[float]]:
        """Results of the first two steps, and the seconds they took, with compiling."""
        results, seconds = [], []
        for run in self.generation()[:2]:
            self._device.synchronize()
            started = time.perf_counter()
            results.append(run()[0].float())  # a recorded graph's output is overwritten
            self._device.synchronize()
            seconds.append(time.perf_counter() - started)
        return results, seconds

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

    def host_times(self, around: Callable[[], Any] = contextlib.nullcontext) -> list[float]:
        """Seconds each reuse call keeps the CPU, while the device works on the refresh step.

        It waits for the device before each refresh step only: what is measured is neither idle
        time nor a full launch queue. Where nothing is cached, every third call is left out.

        Args:
            around: makes a context that these calls are in, and none else.
        """
        seconds: list[float] = []
        cycle = self._interval if self._interval > 1 else 3
        until = time.monotonic() + HOST_SECONDS
        while not seconds or time.monotonic() < until:
            for index, run in enumerate(self.generation()):
                if index % cycle == 0:
                    self._device.synchronize()
                    run()
                    continue
                with around():
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
        seconds = self.host_times()
        row["host_us"] = 1e6 * statistics.median(seconds)
        later = max(self._interval, 3) - 1  # calls between two refreshes
        row["host_us_each"] = [1e6 * statistics.median(seconds[n::later]) for n in range(later)]
        return row

    def host_parts(self) -> list[float]:
        """Microseconds of a reuse call in copies of inputs, launching, and copies of results."""
        with Parts() as parts:
            self.host_times(parts.of_call)
        return [1e6 * statistics.median(seconds) for seconds in zip(*parts.calls, strict=True)]

    def host_profile(self) -> str:
        """The Python functions that reuse calls spend most time in."""
        profiler = cProfile.Profile()
        taken = len(self.host_times(lambda: profiler))
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(40)
        return f"{taken} reuse calls\n{text.getvalue()}"


class Parts:
    """Times the parts of recorded programs that call CUDA, in calls inside of ``of_call``.

    Attributes:
        calls: for each, the seconds in copies of inputs, launching, and copies of results.
    """

    def __init__(self) -> None:
        self.calls: list[list[float]] = []
        self._spent = [0.0, 0.0, 0.0]

    def __enter__(self) -> Parts:
        recorder: Any = RECORDERS.get("cpu", RECORDERS["cuda"])
        parts = (
            (cuda_graphs.compat_cuda, "copy_all"),
            (recorder, "replay"),
            (cuda_graphs, "_copy"),
        )
        self._patches = contextlib.ExitStack()
        for part, (owner, name) in enumerate(parts):
            timed = self._timed(getattr(owner, name), part)
            self._patches.enter_context(mock.patch.object(owner, name, timed))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    @contextmanager
    def of_call(self) -> Iterator[None]:
        """One call."""
        self._spent[:] = 0.0, 0.0, 0.0
        yield
        self.calls.append(self._spent.copy())

    def _timed(self, function: Callable[..., Any], part: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self._spent[part] += time.perf_counter() - started
            return result

        return call


def shallow_autotuned(graph_module: Any, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, with max-autotune for small graphs only: most steps run those."""
    small = len(graph_module.graph.nodes) < SHALLOW_NODES
    return Inductor({"max_autotune": True} if small else {}).compile(graph_module, inputs)


BACKENDS = {"dcompile-eager": "eager", "dcompile-autotuned": shallow_autotuned}
OPTIONS = {"dcompile-regions": {"regions": True}}


class Subject:
    """One network, for the ways of one job."""

    def __init__(
        self, shape: Shape, steps: int, device: Device, dtype: torch.dtype, tiny: bool
    ) -> None:
        self._shape = shape
        self._least_steps = steps
        self._device = device
        half = dtype if dtype.itemsize == 4 else getattr(torch, shape.half)
        self.network, self._call = shape.build(device.device, half, tiny)
        self._cached = False
        self._cache_dit_mask: list[int] = []
        self.references: dict[str, torch.Tensor] = {}

    def compiled(self, way: str, interval: int) -> list[float]:
        """Install the way and run two steps: the seconds each took."""
        with self._loop(way, interval) as loop:
            return loop.first_two()[1]

    def measured(self, way: str, interval: int) -> Row:
        """Install the way and measure it.

        Raises:
            RuntimeError: a step's result is not the eager reference's, or steps were refreshed
                that should not have been, and whatever the way itself raises.
        """
        with self._loop(way, interval) as loop:
            results, _ = loop.first_two()
            row: Row = {"error": self._error("refresh", interval, results[0])}
            if interval > 1:
                row["reuse_error"] = self._error("reuse", interval, results[1])
            del results
            row |= loop.measure()
            if way.startswith("dcompile") and interval > 1:
                row["host_parts_us"] = loop.host_parts()
            self._check(way, loop)
        if way in TORCH_MODES:
            from torch._dynamo.utils import counters

            row["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        return row

    def profile(self, way: str, interval: int) -> str:
        """Where the time of a refresh and a reuse step goes: tables of kernels."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._device.is_cuda:
            activities.append(ProfilerActivity.CUDA)
        order = "self_device_time_total" if self._device.is_cuda else "self_cpu_time_total"
        tables = []
        with self._loop(way, interval) as loop:
            loop.warm_up()
            if way.startswith("dcompile") and interval > 1:
                tables.append(loop.host_profile())
            titles = ("refresh step", "reuse step")[:interval]
            for title, run in zip(titles, loop.generation(), strict=False):
                self._device.synchronize()
                with profile(activities=activities, acc_events=True) as found:
                    run()
                    self._device.synchronize()
                table = found.key_averages().table(
                    sort_by=order, row_limit=20, max_name_column_width=90
                )
                tables.append(f"{title if interval > 1 else 'step'}\n{table}")
        return "\n".join(tables)

    def make_references(self, interval: int) -> None:
        """Results of the first two steps: diffusers' own, and of dcompile without compiler."""
        with self._loop("eager", 1, self._steps(interval)) as loop:
            untouched = loop.first_two()[0]
        with self._loop("dcompile-eager", interval) as loop:
            cached = loop.first_two()[0]
        steps = self._steps(interval)
        self.references = {f"refresh@{steps}": untouched[0], f"reuse@{steps}": cached[1]}
        error = float((cached[0] - untouched[0]).norm() / untouched[0].norm())
        if not error < WORST_ERROR:
            raise RuntimeError(f"dcompile's eager refresh step is off by {error:.2g} of its norm")

    def facts(self) -> Row:
        """FLOPs of a step, and r; after a dcompile way has run."""
        explanation = dcompile.handle(self.network).explain()
        return {"flops": explanation.flops, "ratio": explanation.depths[0].ratio}

    def _steps(self, interval: int) -> int:
        """Whole cycles, two at least."""
        return interval * max(2, math.ceil(self._least_steps / interval))

    def _step(self, network: Any) -> Step:
        rest: Call = dict(self._call)
        sample, timestep = rest.pop(self._shape.sample), self._shape.timestep
        if self._shape.sample == "sample":  # U-Nets take both by position, as DeepCache expects
            return lambda t: network(sample, timestep(t, sample.dtype), **rest)
        return lambda t: network(sample, timestep=timestep(t, sample.dtype), **rest)

    def _enable_cache_dit(self, interval: int, compiled: bool) -> None:
        """For good: a process with cache-dit has one interval, and no other way after it."""
        import cache_dit

        if self._cached:
            dcompile.handle(self.network).remove()
            self._cached = False
        steps = self._steps(interval)
        mask = [int(step % interval == 0) for step in range(steps)]
        if self._cache_dit_mask:
            return
        self._cache_dit_mask = mask
        cache_dit_masked(self.network, mask, enable_separate_cfg=False)  # one call a step
        if compiled:
            cache_dit.set_compile_configs()
            compile_blocks(self.network)

    def _begin(self) -> None:
        """What somebody who calls a network without a pipeline has to do before a generation."""
        if self._cache_dit_mask:
            import cache_dit

            cache_dit.refresh_context(self.network, num_inference_steps=len(self._cache_dit_mask))

    @contextmanager
    def _loop(self, way: str, interval: int, steps: int | None = None) -> Iterator[Loop]:
        scheduler = self._shape.scheduler()
        # That dcompile runs on without CUDA graphs must not go into a table unseen.
        with _warnings_as_errors(), self._installed(way, interval, scheduler) as step:
            steps = steps or self._steps(interval)
            yield Loop(step, scheduler, steps, interval, self._device, self._begin)

    @contextmanager
    def _installed(self, way: str, interval: int, scheduler: Any) -> Iterator[Step]:
        if way.endswith("-last"):
            self.network.to(memory_format=torch.channels_last)
        if way in TORCH_MODES:
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
        elif way.startswith("cache-dit"):
            self._enable_cache_dit(interval, compiled=way == "cache-dit-blocks")
            yield self._step(self.network)
        elif way.startswith("dcompile"):
            backend: Any = BACKENDS.get(way, "inductor")
            graphs: Any = way not in ("dcompile-eager", "dcompile-inductor")
            if graphs and "cpu" in RECORDERS:
                graphs = "auto"  # simulated
            dcompile.cache_compile(
                self.network,
                interval=interval,
                backend=backend,
                cuda_graphs=graphs,
                options=OPTIONS.get(way),
                verbose=False,
            )
            self._cached = True
            yield self._step(self.network)
        else:
            if self._cached:
                dcompile.handle(self.network).remove()
            self._cached = False
            yield self._step(self.network)

    def _error(self, what: str, interval: int, result: torch.Tensor) -> float | None:
        expected = self.references.get(f"{what}@{self._steps(interval)}")
        if expected is None:
            return None
        expected = expected.to(result.device)
        error = float((result - expected).norm() / expected.norm())
        if not error < WORST_ERROR:  # NaN is wrong, too
            raise RuntimeError(f"a {what} step's result is off by {error:.2g} of its norm")
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


class _Strict(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            raise RuntimeError(record.getMessage())


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    logger, strict = logging.getLogger("dcompile"), _Strict()
    logger.addHandler(strict)
    try:
        yield
    finally:
        logger.removeHandler(strict)


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        shape: key of GPU_SHAPES.
        ways: each with its intervals; compiled and measured in this order.
        references: file of the shape's eager results.
        makes_references: whether this job makes that file.
        profiles: ways to profile at N=3.
        device, dtype, tiny, steps: as for the suite.
        quick: time as little as possible: a rehearsal.
        simulate: CUDA graphs are simulated on the CPU: a rehearsal.
    """

    shape: str
    ways: Mapping[str, Sequence[int]]
    references: str
    device: str
    dtype: str
    tiny: bool
    steps: int
    makes_references: bool = False
    profiles: Sequence[str] = ()
    quick: bool = False
    simulate: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape} {', '.join(self.ways)}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Tell = Callable[..., None]


def run(job: Job, tell: Tell, wait: Callable[[], bool]) -> None:
    """Prepare the job, wait for the word, measure it.

    Args:
        job: what to do.
        tell: takes a kind of message and its fields: ``failed`` (way, reason, traceback),
            ``ready`` (seconds), ``facts``, ``row`` (way, interval, row), ``profile`` (way, text).
        wait: returns whether to go on.
    """
    if job.quick:
        globals().update(WARM_SECONDS=0.0, TIMED_SECONDS=0.0, HOST_SECONDS=0.0)
    if job.simulate:
        _simulate_graphs()
    device = Device(torch.device(job.device))
    failed: set[str] = set()
    seconds: dict[str, list[float]] = {}
    started = time.monotonic()

    @contextmanager
    def noted(way: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed.add(way)
            tell("failed", way=way, reason=one_line(error), traceback=traceback.format_exc())

    with torch.no_grad(), one_autotunes_at_a_time(Path(job.references).parent):
        subject = Subject(
            GPU_SHAPES[job.shape], job.steps, device, getattr(torch, job.dtype), job.tiny
        )
        if job.makes_references:
            with noted("references"):
                subject.make_references(3)
                kept = {name: value.cpu() for name, value in subject.references.items()}
                torch.save(kept, f"{job.references}.part")
                os.replace(f"{job.references}.part", job.references)
                tell("facts", facts=subject.facts())
        for way, intervals in job.ways.items():
            if way in UNCOMPILED:
                continue
            with noted(way):
                seconds[way] = subject.compiled(way, max(intervals))
        device.clear()
        tell("ready", seconds=time.monotonic() - started)
        if not wait():
            return
        with contextlib.suppress(FileNotFoundError):
            subject.references = torch.load(job.references)
        for way, intervals in job.ways.items():
            for interval in intervals:
                if way in failed:
                    break
                with noted(way):
                    row = subject.measured(way, interval)
                    if way in seconds:
                        row["compile_seconds"] = sum(seconds.pop(way))
                    tell("row", way=way, interval=interval, row=row)
            if way in job.profiles and way not in failed:
                with noted(f"{way}, profiled"):
                    tell("profile", way=way, text=subject.profile(way, max(intervals)))


def one_line(error: BaseException) -> str:
    """Type and message of an error, short enough for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:199]}…"


@contextmanager
def one_autotunes_at_a_time(folder: Path) -> Iterator[None]:
    """Inductor picks between kernels by timing them: not beside other jobs that do the same."""
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        benchmark = CachingAutotuner.benchmark_all_configs
    except (ImportError, AttributeError):  # no Triton here, or another version of torch
        yield
        return

    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with open(folder / "autotuning", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return benchmark(self, *args, **kwargs)

    CachingAutotuner.benchmark_all_configs = alone
    try:
        yield
    finally:
        CachingAutotuner.benchmark_all_configs = benchmark


def _simulate_graphs() -> None:
    """Recorded graphs without a GPU, as the tests have them."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
    from simulated_graphs import SimulatedRecorder

    RECORDERS["cpu"] = SimulatedRecorder


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs into the log

    def tell(kind: str, **fields: Any) -> None:
        answers.write(json.dumps({"kind": kind, **fields}) + "\n")

    def wait() -> bool:
        return sys.stdin.readline().strip() == "go"

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Nothing that was compiled before is found again, so that compiling is timed.
        if job.quick:
            folder = str(Path(job.references).parent)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        try:
            run(job, tell, wait)
        except BaseException as error:
            tell("failed", way="", reason=one_line(error), traceback=traceback.format_exc())
    tell("done")
    sys.stderr.flush()
    os._exit(0)  # Inductor's workers would be waited for, with all they have still to compile


if __name__ == "__main__":
    main()
