"""The GPU suite without a GPU: its jobs, what it keeps, and the page it makes."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_job
import pytest
import torch
import typer
from gpu_page import BARS, NOT_YET, WAYS, ShapeResults, key, page, ways_of
from rich.console import Console
from shapes import GPU_SHAPES, TRANSFORMERS
from typer.testing import CliRunner, Result

PARAMETERS = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "svd": 1_524_623_082,
    "flux": 11_901_408_320,
    "wan": 1_418_996_800,
}


# --- one job --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM_SECONDS", "TIMED_SECONDS", "HOST_SECONDS"):
        monkeypatch.setattr(gpu_job, name, 0)


def job(tmp_path: Path, shape: str, **ways: list[int]) -> gpu_job.Job:
    named = {way.replace("_", "-"): intervals for way, intervals in ways.items()}
    return gpu_job.Job(shape, named, str(tmp_path / "references.pt"), "cpu", "float32", True, 6)


def done(one: gpu_job.Job) -> list[dict[str, Any]]:
    """What a job tells, in this process."""
    told: list[dict[str, Any]] = []
    gpu_job.run(one, lambda kind, **fields: told.append({"kind": kind, **fields}), lambda: True)
    return told


@pytest.mark.full
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("shape", list(GPU_SHAPES))
def test_a_job_measures_what_it_was_given(shape: str, tmp_path: Path) -> None:
    one = job(tmp_path, shape, eager=[1], dcompile_eager=[3])
    told = done(replace(one, makes_references=True, profiles=("dcompile-eager",)))
    kinds = [message["kind"] for message in told]
    assert kinds == ["facts", "ready", "row", "row", "profile"]
    assert 0 < told[0]["facts"]["ratio"] < 1 < told[0]["facts"]["flops"]
    for message in told[2:4]:
        assert message["row"]["error"] < 1e-5
        assert message["row"]["step_ms"] > 0
    assert told[3]["row"]["reuse_error"] < 1e-5
    assert told[3]["row"]["timed_steps"] == 6
    assert "reuse step" in told[4]["text"]

    # Another process of the same shape.
    peer = {"cache-dit": [3]} if shape in TRANSFORMERS else {"deepcache": [3, 2]}
    later = done(job(tmp_path, shape, **peer))
    rows = [message for message in later if message["kind"] == "row"]
    assert [[row["interval"] for row in rows]] == list(peer.values())
    assert all(row["row"]["reuse_error"] < 1e-3 for row in rows)


@pytest.mark.usefixtures("quick")
def test_a_way_that_fails_leaves_the_others(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it does not fail where there is a GPU")
    told = done(job(tmp_path, "sd15", dcompile_graphs=[3], deepcache=[3]))
    failed = [message for message in told if message["kind"] == "failed"]
    assert {message["way"] for message in failed} == {"dcompile-graphs"}
    assert failed[0]["reason"].startswith("BackendError: cuda_graphs=")
    assert "Traceback" in failed[0]["traceback"]
    assert "\n" not in failed[0]["reason"]
    assert [m["way"] for m in told if m["kind"] == "row"] == ["deepcache"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", [0, 1])
def test_a_wrong_result_is_not_timed(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(replace(job(tmp_path, "sd15", eager=[1]), makes_references=True))
    original = gpu_job.Loop.first_two

    def wrong(loop: gpu_job.Loop) -> Any:
        results, seconds = original(loop)
        results[step] = results[step] * float("nan")
        return results, seconds

    monkeypatch.setattr(gpu_job.Loop, "first_two", wrong)
    (_, failed) = done(job(tmp_path, "sd15", deepcache=[3]))
    assert failed["kind"] == "failed"
    what = ("refresh", "reuse")[step]
    assert failed["reason"] == f"RuntimeError: a {what} step's result is off by nan of its norm"


def test_a_job_waits_for_the_word(tmp_path: Path) -> None:
    told: list[str] = []
    gpu_job.run(
        job(tmp_path, "sd15", deepcache=[3]), lambda kind, **_: told.append(kind), lambda: False
    )
    assert told == ["ready"]


def test_steps_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a GPU, played by one that counts what was launched."""
    launched = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = launched[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    device = gpu_job.Device(torch.device("cuda"))

    def launch(ms: float) -> None:
        launched[0] += ms

    runs = [lambda ms=ms: launch(ms) for ms in (5.0, 1.0, 2.0)]
    assert device.timed(runs) == [5.0, 1.0, 2.0]
    assert len(waits) == 2  # before the first and after the last

    for name in ("WARM_SECONDS", "TIMED_SECONDS", "HOST_SECONDS"):
        monkeypatch.setattr(gpu_job, name, 0)
    scheduler = SimpleNamespace(set_timesteps=lambda steps, device: None)
    scheduler.timesteps = torch.arange(6)
    loop = gpu_job.Loop(lambda t: launch(5.0 if int(t) % 3 == 0 else 1.0), scheduler, 6, 3, device)
    assert loop.step_times() == [[5.0, 1.0, 1.0]] * 2  # one run
    assert (loop.refreshes, loop.reuses) == (2, 4)
    waits.clear()
    assert len(loop.host_times()) == 4
    assert len(waits) == 3  # before each refresh step, and at the end


# --- the suite ------------------------------------------------------------------------------------


class PlayedJobs:
    """Stand in for processes: every row takes some milliseconds, another number each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[gpu_job.Job] = []
        self.stopped: list[gpu_job.Job] = []
        self.trouble: dict[str, str] = {}
        self._numbers = iter(range(1, 1000))
        jobs = self

        def start(suite: gpu.Suite, one: gpu_job.Job) -> gpu.Running:
            jobs.started.append(one)
            log = suite.scratch / "log"
            log.write_text("printed by a library")
            process: Any = SimpleNamespace(poll=lambda: -9)
            running = gpu.Running(one, process, time.monotonic(), log)
            running.awaited = {(way, n) for way, all_n in one.ways.items() for n in all_n}
            process.stdin = SimpleNamespace(
                write=lambda _: jobs._measured(suite.messages, running), flush=lambda: None
            )
            trouble = jobs.trouble.get(next(iter(one.ways)), "")
            if trouble == "dies":
                suite.messages.put((running, {"kind": "ended"}))
            elif trouble != "hangs":
                suite.messages.put((running, {"kind": "ready", "seconds": 1.0}))
            return running

        monkeypatch.setattr(gpu.Suite, "_start", start)
        monkeypatch.setattr(gpu, "stop_group", lambda process: None)
        monkeypatch.setattr(
            gpu.Running,
            "stop",
            lambda one: (jobs.stopped.append(one.job), setattr(one, "state", "done")),
        )

    def _measured(self, messages: queue.Queue[Any], running: gpu.Running) -> None:
        for way, intervals in running.job.ways.items():
            if self.trouble.get(way) == "fails":
                fields = {"way": way, "reason": "Boom: no", "traceback": "Traceback: line 1"}
                messages.put((running, {"kind": "failed", **fields}))
                continue
            for n in intervals:
                row = {"step_ms": float(next(self._numbers))}
                messages.put((running, {"kind": "row", "way": way, "interval": n, "row": row}))
        messages.put((running, {"kind": "done"}))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedJobs:
    return PlayedJobs(monkeypatch)


def suite_run(out: Path, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(gpu.main)
    options = ["--device", "cpu", "--tiny", "--steps", "4", "--out", str(out), *arguments]
    return CliRunner().invoke(app, options)


def read(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "gpu-dry-run.json").read_text())
    return results


def test_all_of_the_plan_is_run(tmp_path: Path, played: PlayedJobs) -> None:
    found = suite_run(tmp_path)
    assert found.exit_code == 0, found.output
    assert "everything asked for is measured" in found.output
    rows = read(tmp_path)["shapes"]["flux"]["rows"]
    measured = {"eager", "torch-graphs", "cache-dit", "cache-dit-blocks", "dcompile-eager"}
    measured |= {"dcompile-graphs", "dcompile-regions"}
    assert {one.partition("@")[0] for one in rows} == measured
    assert "deepcache@3" in read(tmp_path)["shapes"]["svd"]["rows"]
    first = [one for one in played.started if one.makes_references]
    assert {one.shape for one in first} == set(GPU_SHAPES)
    assert len(played.stopped) >= len(played.started)
    assert "printed by a library" in (tmp_path / "gpu-dry-run.log").read_text()


def test_a_second_run_goes_on_with_what_is_missing(
    tmp_path: Path, played: PlayedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--shapes", "sd15", "--ways")
    suite_run(tmp_path, *arguments, "torch-graphs")
    first = read(tmp_path)
    found = suite_run(tmp_path, *arguments, "torch-graphs,deepcache", "--intervals", "3")
    assert "going on" in found.output
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert rows["torch-graphs@1"] == first["shapes"]["sd15"]["rows"]["torch-graphs@1"]
    assert set(rows) == {"torch-graphs@1", "deepcache@3"}

    other = tmp_path / "other"  # results in the repository are taken up as well
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    suite_run(other, *arguments, "torch-graphs,deepcache", "--intervals", "2,3")
    assert read(other)["shapes"]["sd15"]["rows"]["deepcache@3"] == rows["deepcache@3"]
    assert "deepcache@2" in read(other)["shapes"]["sd15"]["rows"]

    suite_run(tmp_path, *arguments, "torch-graphs", "--fresh")
    assert list(read(tmp_path)["shapes"]["sd15"]["rows"]) == ["torch-graphs@1"]

    monkeypatch.setattr(gpu, "versions", lambda: {**first["versions"], "torch": "9.9"})
    suite_run(tmp_path, *arguments, "deepcache")
    assert "torch-graphs@1" not in read(tmp_path)["shapes"]["sd15"]["rows"]
    (earlier,) = tmp_path.glob("gpu-dry-run-*.json")  # another version's results are kept
    assert "torch-graphs@1" in earlier.read_text()


def test_changed_code_is_measured_again_and_only_that(
    tmp_path: Path, played: PlayedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--shapes", "sd15", "--ways", "torch-graphs,dcompile-graphs")
    suite_run(tmp_path, *arguments)
    before = read(tmp_path)["shapes"]["sd15"]["rows"]
    monkeypatch.setattr(gpu, "code_version", lambda: "other")
    suite_run(tmp_path, *arguments)
    after = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert after["torch-graphs@1"] == before["torch-graphs@1"]
    assert after["dcompile-graphs@3"]["code"] == "other"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("fails", "Boom: no"),
        ("dies", "the process ended with -9"),
        ("hangs", "preparing took over 0.3 s"),
    ],
)
def test_trouble_of_one_job_is_noted_and_the_suite_goes_on(
    trouble: str, reason: str, tmp_path: Path, played: PlayedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PREPARE_SECONDS", 0.3)
    played.trouble = {"dcompile-graphs": trouble}
    arguments = ("--shapes", "sd15", "--ways", "dcompile-graphs,deepcache")
    found = suite_run(tmp_path, *arguments)
    assert found.exit_code == 0
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    for n in WAYS["dcompile-graphs"].intervals:
        assert rows[key("dcompile-graphs", n)]["failed"] == reason
    assert f"failed: {reason}" in (tmp_path / "gpu-dry-run.md").read_text()
    assert "step_ms" in rows["deepcache@3"]
    if trouble == "fails":
        assert "Traceback: line 1" in (tmp_path / "gpu-dry-run.log").read_text()

    played.trouble = {}
    suite_run(tmp_path, *arguments)  # it is not tried again unless that is asked for
    assert "failed" in read(tmp_path)["shapes"]["sd15"]["rows"]["dcompile-graphs@3"]
    suite_run(tmp_path, *arguments, "--retry")
    assert "step_ms" in read(tmp_path)["shapes"]["sd15"]["rows"]["dcompile-graphs@3"]


def test_out_of_time_is_no_failure(
    tmp_path: Path, played: PlayedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS_TO_PREPARE", 0)
    played.trouble = {"torch-graphs": "hangs"}
    arguments = ("--shapes", "sd15", "--ways", "torch-graphs")
    found = suite_run(tmp_path, *arguments, "--budget", "3.5")
    assert found.exit_code == 0
    assert "no time left while preparing" in found.output
    assert not read(tmp_path)["shapes"].get("sd15", {}).get("rows")
    assert played.stopped


def test_what_compiles_too_long_does_not_keep_the_rest_from_being_measured(
    tmp_path: Path, played: PlayedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS_TO_PREPARE", 0)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    monkeypatch.setattr(gpu, "ROW_SECONDS", 1)
    played.trouble = {"torch-graphs": "hangs"}
    arguments = ("--shapes", "sd15", "--ways", "torch-graphs,deepcache", "--intervals", "3")
    found = suite_run(tmp_path, *arguments, "--budget", "5")
    assert found.exit_code == 0
    assert "torch-graphs: not compiled in time" in found.output
    assert set(read(tmp_path)["shapes"]["sd15"]["rows"]) == {"deepcache@3"}
    assert "goes on with what is missing" in found.output


@pytest.mark.full
def test_processes_are_really_processes(tmp_path: Path) -> None:
    """End to end: what CI rehearses in full."""
    command = [sys.executable, gpu.__file__, "--rehearse", "--shapes", "sd15", "--out", tmp_path]
    command += ["--ways", "eager,dcompile-eager,deepcache", "--intervals", "3"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert set(rows) == {"eager@1", "dcompile-eager@3", "deepcache@3"}
    assert rows["deepcache@3"]["reuse_error"] < 1e-3


@pytest.mark.parametrize(("seconds", "summary"), [(60, "1 failed, 2 passed"), (1, "stopped after")])
def test_the_gpu_tests_are_run_and_noted(
    seconds: int, summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "print('FAILED tests/test_state.py::test_threads[cuda] - boom', flush=True);"
    script += "import time; time.sleep({}); print('1 failed, 2 passed'); raise SystemExit(1)"
    original = subprocess.Popen

    def played_tests(command: list[str], **options: Any) -> Any:
        assert command[1:5] == ["-m", "pytest", "-m", "gpu"]
        code = script.format(0 if seconds > 5 else 60)
        return original([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", played_tests)
    record = gpu.Record(tmp_path, "gpu", identity(), fresh=False)
    base = job(tmp_path, "")
    place = gpu_job.Device(torch.device("cpu"))
    suite = gpu.Suite(
        record=record,
        device=place,
        base=base,
        deadline=time.monotonic() + seconds,
        at_once=2,
        retry=True,
        profiles=True,
        console=Console(),
        scratch=tmp_path,
    )
    suite.start_tests()
    suite.finish_tests()
    noted = json.loads((tmp_path / "gpu.json").read_text())["tests"]
    assert noted["summary"].startswith(summary)
    assert not noted["passed"]
    assert len(noted["failed"]) == 1  # what was printed until then
    assert "boom" in (tmp_path / "gpu-tests.log").read_text()


def test_all_files_with_gpu_tests_are_run() -> None:
    files = {Path(file).name for file in gpu.gpu_tests()}
    assert {"test_cuda_graphs.py", "test_hoisting.py", "test_on_a_gpu.py", "test_pipelines.py"} <= (
        files
    )
    assert "test_gpu.py" not in files


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    assert "expected some of sd15, sdxl, svd" in " ".join(
        suite_run(tmp_path, "--shapes", "sd16").output.replace("│", " ").split()
    )


def identity() -> dict[str, Any]:
    card = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.2, "driver": "580.1"}
    settings = {"dtype": "float16", "matrix": "8192x8192x8192", "steps": 30, "tiny": False}
    return {"card": card, "versions": gpu.versions(), "settings": settings}


def test_the_page_names_the_card(tmp_path: Path) -> None:
    record = gpu.Record(tmp_path, "gpu", identity(), fresh=False)
    record.put("sdxl", "eager", 1, {"step_ms": 55.0, "peak_reserved_bytes": 6 * 2**30})
    text = (tmp_path / "gpu.md").read_text()
    assert "NVIDIA H100 80GB HBM3, 79 GiB, driver 580.1, CUDA" in text
    assert "| diffusers, eager | 1 | 55.0 | – | – | 1.00x | – | – | – | – | 6.00 | – | – |" in text
    assert "dry run" not in text


def test_the_shapes_are_the_real_ones() -> None:
    for name, shape in GPU_SHAPES.items():
        with torch.device("meta"):
            network = shape.network(**shape.config)
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


# --- the page -------------------------------------------------------------------------------------


def row(ms: float, **more: float) -> dict[str, float]:
    return {"step_ms": ms, **more}


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    text = page({})
    judged = [line for line in text.splitlines() if "| <= " in line or "| >= " in line]
    assert len(judged) == len(BARS) == 10
    assert not any("reached" in line or "missed" in line for line in judged)
    rows = sum(len(way.intervals) for name in GPU_SHAPES for way in ways_of(name).values())
    assert sum(line.count(f"| {NOT_YET} |  |") for line in text.splitlines()) == rows
    app = typer.Typer()
    app.command()(gpu.main)
    assert CliRunner().invoke(app, ["--page", "--out", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "gpu.md").read_text() == text


def test_the_bars_are_judged() -> None:
    shape = {
        "flops": 2e12,
        "ratio": 0.1,  # the limit at N=3 is 2.5x
        "rows": {
            "eager@1": row(20.0),
            "deepcache@2": row(6.4),
            "deepcache@3": row(7.0),
            "torch-graphs@1": row(10.0, peak_reserved_bytes=1000),
            "dcompile-graphs@1": row(9.6),
            "dcompile-graphs@2": row(4.0),
            "dcompile-graphs@3": row(
                4.0, peak_reserved_bytes=1200, host_us=40.0, refresh_ms=9.7, reuse_ms=1.2
            ),
        },
    }
    results = ShapeResults(shape)
    assert results.of_limit("dcompile-graphs", 3) == pytest.approx(0.96)
    assert results.reuse_of_flop_share("dcompile-graphs", 3) == pytest.approx(1.25)
    # 2 TFLOP / 2.5 in 4 ms are 200 TFLOP/s.
    assert results.roofline("dcompile-graphs", 3, 800.0) == pytest.approx(0.25)
    assert results.roofline("eager", 1, 800.0) == pytest.approx(0.125)
    assert [bar.judged("sd15", results) for bar in BARS] == [
        "0.96, reached",
        "5x, reached",
        "–",
        "2.5x, reached",
        "–",
        "1.6x, reached",
        "–",
        "–",
        "40 us, **missed**",
        "1.2x, **missed**",
    ]
    assert BARS[1].judged("sdxl", results) == "–"
    shape["rows"]["dcompile-graphs@3"] = {"failed": "out of memory | there"}  # type: ignore[index]
    assert {bar.judged("sd15", ShapeResults(shape)) for bar in BARS} == {NOT_YET, "–"}
