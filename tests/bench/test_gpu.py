"""The GPU suite without a GPU: a dry run, what it keeps, and the page it makes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
import typer
from gpu_page import BARS, NOT_YET, WAYS, ShapeResults, key, page
from rich.console import Console
from shapes import GPU_SHAPES
from typer.testing import CliRunner, Result

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "svd": 1_524_623_082}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM_SECONDS", "TIMED_SECONDS", "HOST_SECONDS"):
        monkeypatch.setattr(gpu, name, 0)
    for name in ("deepcache", "dcompile-eager"):
        monkeypatch.setitem(WAYS, name, replace(WAYS[name], intervals=(3,)))


def dry_run(out: Path, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(gpu.main)
    options = ["--device", "cpu", "--tiny", "--steps", "4", "--out", str(out), *arguments]
    return CliRunner().invoke(app, options)


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way takes some milliseconds, another number each time it is measured."""
    measured = iter(range(1, 1000))
    fake = SimpleNamespace(run=lambda *_: {"step_ms": float(next(measured))}, facts=dict)
    monkeypatch.setattr(gpu.Suite, "_subject", lambda *_: fake)


def read(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "gpu-dry-run.json").read_text())
    return results


def test_a_dry_run_measures_every_shape(tmp_path: Path) -> None:
    found = dry_run(tmp_path, "--ways", "eager,deepcache,dcompile-eager")
    assert found.exit_code == 0, found.output
    assert "everything asked for is measured" in found.output
    results = read(tmp_path)
    expected = {"eager@1", "deepcache@3", "dcompile-eager@3"}
    for name in GPU_SHAPES:
        shape = results["shapes"][name]
        assert set(shape["rows"]) == expected
        assert 0 < shape["ratio"] < 1 < shape["flops"]
        for row in shape["rows"].values():
            assert "failed" not in row
            assert row["step_ms"] > 0
            assert row["error"] < 1e-3
        assert shape["rows"]["deepcache@3"]["timed_steps"] == 6  # whole cycles, two at least
        assert ShapeResults(shape).of_limit("dcompile-eager", 3) is not None
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "a dry run" in text
    assert f"| dcompile, inductor, CUDA graphs | 3 | {NOT_YET} |" in text


@pytest.mark.usefixtures("no_networks")
def test_a_second_run_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--shapes", "sd15", "--ways")
    dry_run(tmp_path, *arguments, "eager")
    first = read(tmp_path)
    found = dry_run(tmp_path, *arguments, "eager,deepcache")
    assert "going on" in found.output
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert rows["eager@1"] == first["shapes"]["sd15"]["rows"]["eager@1"]
    assert len(rows) == 2

    dry_run(tmp_path, *arguments, "eager", "--fresh")
    assert list(read(tmp_path)["shapes"]["sd15"]["rows"]) == ["eager@1"]

    monkeypatch.setattr(gpu, "versions", lambda: {**first["versions"], "torch": "9.9"})
    dry_run(tmp_path, *arguments, "deepcache")
    assert "eager@1" not in read(tmp_path)["shapes"]["sd15"]["rows"]
    (earlier,) = tmp_path.glob("gpu-dry-run-*.json")  # another version's results are kept
    assert "eager@1" in earlier.read_text()


@pytest.mark.usefixtures("no_networks")
def test_changed_code_is_measured_again_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--shapes", "sd15", "--ways", "eager,dcompile-eager")
    dry_run(tmp_path, *arguments)
    before = read(tmp_path)["shapes"]["sd15"]["rows"]
    monkeypatch.setattr(gpu, "code_version", lambda: "other")
    dry_run(tmp_path, *arguments)
    after = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert after["eager@1"] == before["eager@1"]
    assert after["dcompile-eager@3"]["code"] == "other"


def test_a_way_that_fails_is_noted_and_the_suite_goes_on(tmp_path: Path) -> None:
    found = dry_run(tmp_path, "--shapes", "sd15", "--ways", "dcompile-graphs,deepcache")
    assert found.exit_code == 0
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    if not torch.cuda.is_available():
        for interval in WAYS["dcompile-graphs"].intervals:
            failed = rows[key("dcompile-graphs", interval)]["failed"]
            assert failed.startswith("BackendError: cuda_graphs=True")
            assert "\n" not in failed
        assert "failed: BackendError" in (tmp_path / "gpu-dry-run.md").read_text()
    assert "step_ms" in rows["deepcache@3"]


def test_the_gpu_tests_are_run_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = ["..F", "FAILED tests/test_state.py::test_threads[cuda] - boom", "1 failed, 2 passed"]

    def run(command: list[str], timeout: float, **_: Any) -> SimpleNamespace:
        assert command[1:5] == ["-m", "pytest", "-m", "gpu"]
        if timeout < 5:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(stdout="\n".join(printed), stderr="", returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    record = gpu.Record(tmp_path, "gpu", identity(), fresh=False)
    later, soon = time.monotonic() + 60, time.monotonic() + 2
    for deadline, summary in ((later, printed[-1]), (soon, "stopped after 2 s")):
        suite = gpu.Suite(
            record, gpu.Device(torch.device("cpu")), torch.float32, True, 4, deadline, 60, True,
            Console(),
        )  # fmt: skip
        suite.run_tests()
        assert json.loads((tmp_path / "gpu.json").read_text())["tests"]["summary"] == summary
    assert "boom" in (tmp_path / "gpu-tests.log").read_text()


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


def test_a_way_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(subject: gpu.Subject, way: str, interval: int) -> dict[str, Any]:
        if way == "deepcache":
            with contextlib.suppress(Exception):  # compilers do so with what they try
                time.sleep(60)
        return {"step_ms": 1.0}

    monkeypatch.setattr(gpu.Subject, "run", run)
    arguments = ("--shapes", "sd15", "--ways", "eager,deepcache,dcompile-eager")
    monkeypatch.setattr(gpu.Subject, "facts", lambda self: {})
    dry_run(tmp_path, *arguments, "--way-minutes", "0.005")
    rows = read(tmp_path)["shapes"]["sd15"]["rows"]
    assert rows["deepcache@3"]["failed"] == "took over 0.005 minutes"
    assert "step_ms" in rows["dcompile-eager@3"]


def test_out_of_time_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Subject, "run", lambda *_: time.sleep(60))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    found = dry_run(tmp_path, "--shapes", "sd15", "--ways", "eager", "--minutes", "0.02")
    assert found.exit_code == 0
    assert "out of time" in found.output
    assert not read(tmp_path)["shapes"].get("sd15", {}).get("rows")


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu.Subject._step

    def wrong(subject: gpu.Subject, network: Any) -> gpu.Step:
        step = original(subject, network)
        return (lambda t: (step(t)[0] * float("nan"),)) if subject._references else step

    monkeypatch.setattr(gpu.Subject, "_step", wrong)
    dry_run(tmp_path, "--shapes", "sd15", "--ways", "eager")
    failed = read(tmp_path)["shapes"]["sd15"]["rows"]["eager@1"]["failed"]
    assert "the first step differs from diffusers' by nan" in failed


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    assert "expected some of sd15, sdxl, svd" in " ".join(
        dry_run(tmp_path, "--shapes", "sd16").output.replace("│", " ").split()
    )


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
    device = gpu.Device(torch.device("cuda"))

    def launch(ms: float) -> None:
        launched[0] += ms

    runs = [lambda ms=ms: launch(ms) for ms in (5.0, 1.0, 2.0)]
    assert device.timed(runs) == [5.0, 1.0, 2.0]
    assert len(waits) == 2  # before the first and after the last

    scheduler = SimpleNamespace(set_timesteps=lambda steps, device: None)
    scheduler.timesteps = torch.arange(6)
    loop = gpu.Loop(lambda t: launch(5.0 if int(t) % 3 == 0 else 1.0), scheduler, 6, 3, device)
    assert loop.step_times() == [[5.0, 1.0, 1.0]] * 2  # one run
    assert (loop.refreshes, loop.reuses) == (2, 4)
    waits.clear()
    assert len(loop.host_times()) == 4
    assert len(waits) == 3  # before each refresh step, and at the end


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
    assert len(judged) == len(BARS) == 5
    assert not any("reached" in line or "missed" in line for line in judged)
    rows = sum(len(way.intervals) for way in WAYS.values()) * len(GPU_SHAPES)
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
        "1.6x, reached",
        "40 us, reached",
        "1.2x, **missed**",
    ]
    assert BARS[1].judged("sdxl", results) == "–"
    shape["rows"]["dcompile-graphs@3"] = {"failed": "out of memory | there"}  # type: ignore[index]
    assert {bar.judged("sd15", ShapeResults(shape)) for bar in BARS} == {NOT_YET}
