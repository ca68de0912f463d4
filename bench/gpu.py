"""The GPU suite: every way to run a denoising step, on one NVIDIA GPU, in one command.

    python bench/gpu.py

It runs the gpu-marked tests, measures the card's matrix rate, and then one way after another, the
most important first, each in a process of its own (gpu_job.py): several compile at a time, one is
measured at a time. After every measurement it writes gpu.json and gpu.md (see gpu_page.py);
tracebacks and what processes printed go to gpu.log, tables of kernels to gpu-profiles.txt. It ends
in time (--budget), and the same command again goes on with what is missing. What it needs: torch,
diffusers, DeepCache, cache-dit, typer, rich, pytest; no network, no installed dcompile. Full-size
transformers compile beside each other: 140 GiB of GPU memory, or --at-once 2. A rehearsal of
everything but CUDA, on tiny networks:

    python bench/gpu.py --rehearse --out /tmp/rehearsal
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]  # a bare checkout will do

import torch  # noqa: E402
import typer  # noqa: E402
from gpu_job import Device, Job, Row  # noqa: E402
from gpu_page import BARS, INTERVALS, WAYS, ShapeResults, key, page, ways_of  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shapes import GPU_SHAPES, TRANSFORMERS  # noqa: E402
from training import replace_file  # noqa: E402

import dcompile  # noqa: E402

RESULTS = ROOT / "bench/results"
TESTS_SECONDS = 240  # while networks compile
PREPARE_SECONDS = 300  # of a job: building, capturing, compiling
MEASURE_SECONDS = 90  # of a job
LEAST_SECONDS = 12  # no measurement is begun with less time left
LEAST_SECONDS_TO_PREPARE = 60  # nothing is compiled with less time left
ROW_SECONDS = 10  # that measuring a row of a full-size network takes, about


@dataclass(frozen=True)
class Planned:
    """A job of the plan: ways that share a process, in the order they are measured in."""

    shape: str
    ways: tuple[str, ...]
    intervals: tuple[int, ...] = (3, 1, 2, 5)
    makes_references: bool = False
    profiled: bool = False


# Rounds: what the bars need comes first. Jobs of a round compile side by side, up to two minutes,
# and are measured in this order.
PLAN: tuple[tuple[Planned, ...], ...] = (
    (
        Planned("flux", ("eager", "dcompile-eager"), (1, 3), True),
        Planned("flux", ("dcompile-graphs",), (3, 1), profiled=True),
        Planned("flux", ("torch-graphs",)),
        Planned("flux", ("dcompile-regions",)),
        *(
            job
            for shape in ("sdxl", "sd15")
            for job in (
                Planned(shape, ("eager", "dcompile-eager"), (1, 3), makes_references=True),
                Planned(shape, ("dcompile-graphs",), profiled=True),
                Planned(shape, ("deepcache",)),
                Planned(shape, ("torch-graphs",)),
            )
        ),
        Planned("wan", ("eager", "dcompile-eager"), (1, 3), True),
        Planned("wan", ("dcompile-graphs",), (3, 1), profiled=True),
        Planned("wan", ("torch-graphs",)),
    ),
    (
        Planned("svd", ("eager", "dcompile-eager"), (1, 3), makes_references=True),
        Planned("svd", ("dcompile-graphs",), (3, 1), profiled=True),
        Planned("svd", ("torch-graphs",)),
        Planned("sdxl", ("dcompile-regions",)),
        Planned("wan", ("dcompile-regions",)),
        Planned("sd15", ("torch-graphs-last",)),
        Planned("sdxl", ("torch-graphs-last",)),
        Planned("flux", ("cache-dit-blocks",)),  # autotunes: minutes
        Planned("wan", ("cache-dit-blocks",)),
        Planned("flux", ("cache-dit",)),
        Planned("wan", ("cache-dit",)),
    ),
    (
        Planned("svd", ("deepcache",), (3,)),
        Planned("sd15", ("dcompile-inductor",)),
        Planned("sd15", ("dcompile-autotuned",)),
        Planned("sdxl", ("dcompile-autotuned",)),
        Planned("sd15", ("torch-compile",)),
        Planned("sdxl", ("torch-compile",)),
    ),
)


def gpu_tests() -> list[str]:
    """Files with tests that run on a GPU, too."""
    marks = re.compile(r'mark\.gpu|usefixtures\("graphs"\)|\bgraphs: str')
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(file) for file in files if marks.search(file.read_text())]


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
    for package in ("torch", "triton", "diffusers", "DeepCache", "cache-dit"):
        try:
            found[package.lower()] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package.lower()] = "missing"
    found["torch"] = str(torch.__version__)
    return {**found, "dcompile": dcompile.__version__}


class Record:
    """The results, on disk after every change: gpu.json and gpu.md.

    Results of an earlier call are taken up, from the same folder or from ``earlier``.
    """

    def __init__(
        self, folder: Path, stem: str, identity: Row, fresh: bool, earlier: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json = folder / f"{stem}.json"
        self.markdown = folder / f"{stem}.md"
        self.log = folder / f"{stem}.log"
        self.profiles = folder / f"{stem}-profiles.txt"
        self.code = code_version()
        self.results: Row = {**identity, "shapes": {}}
        self.resumed = False
        if fresh:
            return
        if self.json.is_file():
            found = json.loads(self.json.read_text())
            if _identity(found) == _identity(identity):
                self.results, self.resumed = found, True
            else:  # another card's, or made with other versions: kept
                name = re.sub(r"[^a-z0-9]+", "-", found["card"]["name"].lower()).strip("-")
                os.replace(self.json, folder / f"{stem}-{name}.json")
        elif earlier is not None and earlier.is_file():
            found = json.loads(earlier.read_text())
            if _identity(found) == _identity(identity):
                self.results, self.resumed = found, True

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

    def note(self, file: Path, title: str, text: str) -> None:
        """Append to the log, or to the profiles."""
        with file.open("a") as out:
            out.write(f"=== {title}\n{text.rstrip()}\n\n")


def _identity(results: Row) -> tuple[Any, ...]:
    return results["card"]["name"], results["versions"], results["settings"]


def _write(path: Path, text: str) -> None:
    path.write_text(text if text.endswith("\n") else f"{text}\n")


@dataclass
class Running:
    """A job's process.

    Attributes:
        job: what it does.
        process: which does it.
        started: when, by the monotonic clock.
        log: what it prints.
        state: "preparing", "ready", "measuring" or "done".
    """

    job: Job
    process: subprocess.Popen[str]
    started: float
    log: Path
    state: str = "preparing"
    awaited: set[tuple[str, int]] = field(default_factory=set)

    def stop(self) -> None:
        """With all processes it has started, compilers among them."""
        self.state = "done"
        stop_group(self.process)


def _seconds_to_measure(running: Sequence[Running]) -> float:
    """Time that the jobs that wait for the device will need, by and large."""
    rows = sum(len(one.awaited) for one in running if one.state == "ready")
    return LEAST_SECONDS + ROW_SECONDS * rows if rows else 0.0


def stop_group(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Suite:
    """One run of the command."""

    record: Record
    device: Device
    base: Job
    deadline: float
    at_once: int
    retry: bool
    profiles: bool
    console: Console
    scratch: Path
    messages: queue.Queue[tuple[Running, Row]] = field(default_factory=queue.Queue)
    tests: subprocess.Popen[Any] | None = None
    tests_started: float = 0.0

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"{self.left():4.0f} s left  {text}", style=style, markup=False)

    # The gpu-marked tests

    def start_tests(self) -> None:
        """In processes of their own, while networks compile."""
        known = self.record.results.get("tests")
        if known is not None and known["code"] == self.record.code and not self.retry:
            return
        several = importlib.util.find_spec("xdist") is not None
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--color=no", "--tb=short", "-v"]
        command += ["-n", "8"] if several and (os.cpu_count() or 1) >= 8 else []
        self.tests_started = time.monotonic()
        with self.tests_log.open("w") as log:
            self.tests = subprocess.Popen(
                [*command, *gpu_tests()],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def tests_log(self) -> Path:
        return self.record.json.with_name("gpu-tests.log")

    def finish_tests(self) -> None:
        """Wait for them, and note what they said, also where they did not come to their end."""
        if self.tests is None:
            return
        seconds = min(self.tests_started + TESTS_SECONDS, self.deadline) - time.monotonic()
        try:
            code: int | None = self.tests.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        stop_group(self.tests)
        took = time.monotonic() - self.tests_started
        lines = [line for line in self.tests_log.read_text().splitlines() if line.strip()]
        found = {
            "summary": (lines or ["no output"])[-1].strip("= ")
            if code is not None
            else f"stopped after {took:.0f} s",
            "passed": code == 0,
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        }
        self.tests = None
        self.record.results["tests"] = {**found, "seconds": took, "code": self.record.code}
        self.record.save()
        self.say(f"gpu-marked tests: {found['summary']}", "" if found["passed"] else "bold red")
        for line in found["failed"][:10]:
            self.say(line)

    def measure_matrix_rate(self, size: int) -> None:
        if "matrix_tflops" in self.record.results:
            return
        rate = self.device.matrix_tflops(size, getattr(torch, self.base.dtype))
        self.device.clear()
        self.record.results["matrix_tflops"] = rate
        self.record.save()
        self.say(f"matrix rate: {rate:.4g} TFLOP/s")

    # Jobs

    def run_round(self, planned: Sequence[Planned]) -> bool:
        """Compile side by side, then measure one after the other; whether there was time for it."""
        jobs = [job for job in map(self._job, planned) if job.ways]
        if not jobs:
            self.finish_tests()
            return True
        if self.left() < LEAST_SECONDS_TO_PREPARE:
            return False
        running: list[Running] = []
        try:
            for job in jobs:
                while sum(one.state == "preparing" for one in running) >= self.at_once:
                    self._handle_next(running)
                running.append(self._start(job))
            while any(one.state == "preparing" for one in running):
                if self.left() < _seconds_to_measure(running):  # those that are late are given up
                    break
                self._handle_next(running)
            for one in running:
                if one.state == "preparing":
                    self.say(f"{one.job.name}: not compiled in time", "bold yellow")
                    one.stop()
            self.finish_tests()
            for one in running:
                if one.state == "ready":
                    if self.left() < LEAST_SECONDS:
                        return False
                    self._measure(one, running)
            return all(not one.awaited for one in running)
        finally:
            for one in running:
                self._close(one)

    def _job(self, planned: Planned) -> Job:
        """What is missing of it."""
        ways = {}
        for way in planned.ways:
            offered = [n for n in planned.intervals if n in ways_of(planned.shape)[way].intervals]
            missing = [n for n in offered if not self.record.has(planned.shape, way, n, self.retry)]
            if missing:
                ways[way] = missing
        known = self.record.results["shapes"].get(planned.shape, {})
        references = self.scratch / f"{planned.shape}.pt"
        if planned.makes_references and known.get("code") != self.record.code:
            ways = ways or {"eager": [1]}
        return replace(
            self.base,
            shape=planned.shape,
            ways=ways,
            references=str(references),
            makes_references=planned.makes_references and not references.exists(),
            profiles=planned.ways[:1] if planned.profiled and self.profiles else (),
        )

    def _start(self, job: Job) -> Running:
        log = self.scratch / re.sub(r"[^a-z0-9-]+", "-", f"{job.name}.log")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4" if self.at_once > 2 else "1")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("gpu_job.py")), job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        running = Running(job, process, time.monotonic(), log)
        running.awaited = {(way, n) for way, intervals in job.ways.items() for n in intervals}

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.messages.put((running, json.loads(line)))
            self.messages.put((running, {"kind": "ended"}))

        threading.Thread(target=listen, daemon=True).start()
        return running

    def _measure(self, one: Running, running: Sequence[Running]) -> None:
        assert one.process.stdin is not None
        one.state, one.started = "measuring", time.monotonic()
        one.process.stdin.write("go\n")
        one.process.stdin.flush()
        while one.state == "measuring":
            self._handle_next(running)

    def _handle_next(self, running: Sequence[Running]) -> None:
        """Take in one message, or give up what takes too long."""
        try:
            one, message = self.messages.get(timeout=0.2)
        except queue.Empty:
            self._give_up_late(running)
            return
        if one.state != "done":
            self._handle(one, message)
        self._give_up_late(running)

    def _handle(self, one: Running, message: Row) -> None:
        job, kind = one.job, message.pop("kind")
        if kind == "ready":
            one.state = "ready"
            self.say(f"{job.name}: ready after {message['seconds']:.0f} s")
        elif kind == "facts":
            self.record.shape(job.shape).update(message["facts"], code=self.record.code)
        elif kind == "row":
            way, interval = message["way"], message["interval"]
            one.awaited.discard((way, interval))
            self.record.put(job.shape, way, interval, message["row"])
            self.say(self._line(job.shape, way, interval))
        elif kind == "profile":
            title = f"{job.shape} {WAYS[message['way']].label}, one cycle"
            self.record.note(self.record.profiles, title, message["text"])
        elif kind == "failed":
            self.record.note(self.record.log, f"{job.name}: {message['way']}", message["traceback"])
            self._failed(one, message["reason"], message["way"])
        elif kind in ("done", "ended"):
            if one.awaited:
                self._failed(one, f"the process ended with {one.process.poll()}")
            one.stop()

    def _give_up_late(self, running: Sequence[Running]) -> None:
        now = time.monotonic()
        for one in running:
            limit = {"preparing": PREPARE_SECONDS, "measuring": MEASURE_SECONDS}.get(one.state)
            if limit is None:
                continue
            if now - one.started > limit:
                self._failed(one, f"{one.state} took over {limit} s")
                one.stop()
            elif now > self.deadline - LEAST_SECONDS / 4:
                self.say(f"{one.job.name}: no time left while {one.state}", "bold yellow")
                one.stop()

    def _failed(self, one: Running, reason: str, way: str | None = None) -> None:
        """What fails at one interval would at the others."""
        if way in one.job.ways or not way:
            gone = {item for item in one.awaited if not way or item[0] == way}
            one.awaited -= gone
            for each, interval in sorted(gone):
                self.record.put(one.job.shape, each, interval, {"failed": reason})
        self.say(f"{one.job.name}, {way or 'all'} failed: {reason}", "bold red")

    def _close(self, one: Running) -> None:
        one.stop()
        printed = one.log.read_text(errors="replace")
        if printed.strip():
            self.record.note(self.record.log, f"{one.job.name}: printed", printed[-20_000:])

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


def rehearsed(plan: Sequence[Sequence[Planned]]) -> Iterator[list[Planned]]:
    """Every way on one shape, and some on all: compiling for a CPU takes its time."""
    on_all = {"eager", "dcompile-eager", "deepcache"}
    shape_of: dict[tuple[str, bool], str] = {}
    for part in plan:
        jobs = []
        for job in part:
            kind = job.shape in TRANSFORMERS
            ways = tuple(
                way
                for way in job.ways
                if way in on_all
                or shape_of.setdefault((way, kind and way == "dcompile-graphs"), job.shape)
                == job.shape
            )
            if ways:
                jobs.append(replace(job, ways=ways))
        yield jobs


def chosen(
    plan: Sequence[Sequence[Planned]],
    shapes: Sequence[str],
    ways: Sequence[str],
    intervals: Sequence[int],
) -> Iterator[list[Planned]]:
    """The plan without what was not asked for; N=1 is always asked for."""
    for part in plan:
        yield [
            replace(
                job,
                ways=tuple(way for way in job.ways if way in ways),
                intervals=tuple(n for n in job.intervals if n == 1 or n in intervals),
            )
            for job in part
            if job.shape in shapes and any(way in ways for way in job.ways)
        ]


def main(
    budget: Annotated[float, typer.Option(help="Be done within, in seconds.")] = 530,
    shapes: Annotated[str, typer.Option(help="What to measure.")] = ",".join(GPU_SHAPES),
    ways: Annotated[str, typer.Option(help="How to run it.")] = ",".join(WAYS),
    intervals: Annotated[str, typer.Option(help="Refresh intervals.")] = ",".join(
        map(str, INTERVALS)
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run, at least.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder for what it writes.")] = RESULTS,
    device: Annotated[
        str | None, typer.Option(help="cuda, or cpu for a rehearsal.", show_default="cuda")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny networks: a dry run.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Every way, tiny, as short as can be, on the CPU.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier results.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    tests: Annotated[bool, typer.Option(help="Run the gpu-marked tests, too.")] = True,
    profiles: Annotated[bool, typer.Option(help="Tables of kernels and functions.")] = True,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Networks that compile at a time.")
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page", help="Only write gpu.md from gpu.json.")
    ] = False,
) -> None:
    deadline = time.monotonic() + budget
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    plan = list(
        chosen(
            PLAN,
            names_of(shapes, list(GPU_SHAPES), "--shapes"),
            names_of(ways, list(WAYS), "--ways"),
            [int(n) for n in names_of(intervals, list(map(str, INTERVALS)), "--intervals")],
        )
    )
    if page_only:
        source = out / "gpu.json"
        results = json.loads(source.read_text()) if source.is_file() else {}
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "gpu.md", lambda path: _write(path, page(results)))
        return
    if rehearse:
        device, tiny, steps = device or "cpu", True, min(steps, 6)
        plan = list(rehearsed(plan))
    device = device or "cuda"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --rehearse does without, --page as well")

    place = Device(torch.device(device))
    dtype = "float16" if place.is_cuda else "float32"
    size = 8192 if place.is_cuda and not tiny else 256
    identity = {
        "card": card_of(place),
        "versions": versions(),
        "settings": {
            "dtype": dtype,
            "matrix": f"{size}x{size}x{size} {dtype}",
            "steps": steps,
            "tiny": tiny,
        },
    }
    stem = "gpu" if place.is_cuda and not tiny else "gpu-dry-run"
    record = Record(out, stem, identity, fresh, RESULTS / f"{stem}.json")
    base = Job("", {}, "", device, dtype, tiny, steps, quick=rehearse, simulate=not place.is_cuda)
    at_once = at_once or max(2, min(12, (os.cpu_count() or 2) - 4))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        suite = Suite(
            record=record,
            device=place,
            base=base,
            deadline=deadline,
            at_once=at_once,
            retry=retry,
            profiles=profiles,
            console=console,
            scratch=Path(scratch),
        )
        suite.say(f"{identity['card']['name']}, torch {torch.__version__}")
        if record.resumed:
            suite.say(f"going on with what is missing in {record.json}")
        suite.measure_matrix_rate(size)
        if tests and place.is_cuda:
            suite.start_tests()
        try:
            in_time = all(suite.run_round(part) for part in plan)
        finally:
            suite.finish_tests()
    if in_time:
        suite.say("everything asked for is measured")
    else:
        suite.say("out of time: the same command goes on with what is missing", "bold yellow")
    record.save()
    console.print(bars(record.results))
    console.print(f"wrote {record.json} and {record.markdown}", markup=False)
    failed = [
        f"{name} {way}"
        for name, shape in record.results["shapes"].items()
        for way, row in shape["rows"].items()
        if "failed" in row
    ]
    if rehearse and (failed or not in_time):
        console.print(f"not rehearsed: {', '.join(failed) or 'out of time'}", style="bold red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
