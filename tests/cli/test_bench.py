"""``dcompile bench``: its table, its numbers, and what it says where something is missing."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from typer.testing import CliRunner, Result

import dcompile
from dcompile.cli.app import app
from dcompile.cli.bench import run_bench
from dcompile.cli.bench_result import FORMAT, BenchResult, BenchRow
from dcompile.cli.bench_tables import bench_tables
from dcompile.cli.clock import StepClock
from dcompile.cli.console import console
from dcompile.cli.settings import BenchSettings, read_prompts
from dcompile.cli.subjects import NetworkSubject, PipelineSubject
from dcompile.cli.ways import UNCACHED, Way, planned_ways

QUICK = ("--steps", 6, "--repeat", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DDPM of 16x16 pictures with four skip connections."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-ddpm"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def failing_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend of torch.compile that compiles nothing."""
    from dcompile import backends

    def compiler(graph_module: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction\nand more")

    monkeypatch.setattr(backends, "registered_names", lambda: ["fails"])
    monkeypatch.setattr(backends, "lookup_backend", lambda name: compiler)
    return "fails"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def refused(*arguments: object) -> str:
    """The message of a call that has to end with exit code 2 and without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "vs un-" not in result.output
    return " ".join(result.output.split())


def rows(file: Path) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in json.loads(file.read_text())["rows"]}


def test_table_and_numbers(ddpm: Path, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = run(ddpm, *QUICK, "--interval", 2, "--interval", 3, "--count", 2, "--json", file)
    assert result.exit_code == 0, result.output
    assert "tiny-ddpm: 2 pictures, 6 steps" in result.output
    for way in ("uncached", "eager N=1", "eager N=2", "eager N=3"):
        assert len([line for line in result.output.splitlines() if line.startswith(f" {way}")]) == 2
    assert f"wrote {file}" in result.output

    content = json.loads(file.read_text())
    assert (content["format"], content["kind"], content["network"]) == (
        *(FORMAT, "pipeline", "UNet2DModel"),
    )
    assert (content["device"]["type"], content["dtype"]) == ("cpu", "float32")
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"]["backends"] == ["eager"]
    assert content["settings"]["count"] == 2
    found, r = rows(file), content["ratio"]
    uncached, first = found["uncached"], found["eager N=1"]
    assert uncached["over_uncached"] == 1
    assert uncached["refresh_steps"] is uncached["psnr"] is uncached["cached_bytes"] is None
    assert first["identical"]
    assert first["psnr"] is None
    assert first["ssim"] == pytest.approx(1)
    for way, n in (("eager N=1", 1), ("eager N=2", 2), ("eager N=3", 3)):
        row = found[way]
        assert (row["status"], row["reason"], row["runs"], row["interval"]) == (
            *("measured", None, 1, n),
        )
        assert row["steps_per_second"] == pytest.approx(1000 / row["step_ms"])
        assert row["over_uncached"] == pytest.approx(uncached["step_ms"] / row["step_ms"])
        assert row["over_backend"] == pytest.approx(first["step_ms"] / row["step_ms"])
        assert row["speed_limit"] == pytest.approx(n / (1 + (n - 1) * r))
        assert (row["refresh_steps"], row["reuse_steps"]) == (6 / n, 6 - 6 / n)
        assert (row["forced_steps"], row["uncached_calls"]) == (0, 0)
        assert row["cached_bytes"] > 0
        assert row["refresh_ms"] > 0
        assert row["peak_reserved_bytes"] is row["memory_over_uncached"] is None
        if n > 1:
            assert row["of_limit"] == pytest.approx(row["over_backend"] / row["speed_limit"])
            assert row["reuse_ms"] > 0
            assert 0 < row["psnr"] < 60
            assert not row["identical"]
    assert first["reuse_ms"] is first["of_limit"] is None


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_a_terminal(columns: int) -> None:
    numbers: dict[str, Any] = {
        "runs": 3,
        "step_ms": 12345.6,
        "steps_per_second": 0.081,
        "refresh_ms": 23456.7,
        "reuse_ms": 1234.5,
        "over_uncached": 12.34,
        "over_backend": 4.56,
        "speed_limit": 4.73,
        "of_limit": 0.998,
        "psnr": 24.3,
        "ssim": 0.735,
        "identical": False,
        "compile_seconds": 227.8,
        "cached_bytes": 10240 * 1024,
        "refresh_steps": 30,
        "peak_reserved_bytes": 12 * 2**30,
        "memory_over_uncached": 1.02,
        "reuse_steps": 120,
    }
    result = BenchResult(
        *("model", "pipeline", "UNet", "float16", "DDIMScheduler", ("a cat",), BenchSettings()),
        *({"type": "cuda", "name": "NVIDIA H200"}, {"torch": "2.11.0"}, "2026-01-01", 1, 0.0145),
        *(12.3, ("a remark",)),
        rows=(
            BenchRow("uncached", None, None, "measured", None, **numbers),
            BenchRow("inductor N=10", "inductor", 10, "measured", None, **numbers),
            BenchRow("inductor N=20", "inductor", 20, "not measured", "why [not]"),
            BenchRow("torch.compile", None, None, "failed", "why [not]"),
        ),
    )
    screen = console()
    screen.width = columns
    with screen.capture() as captured:
        screen.print(bench_tables(result))
    output = captured.get()
    assert "…" not in output
    assert all(len(line.rstrip()) <= columns for line in output.splitlines())
    assert "inductor N=20: not measured: why [not]" in output
    assert "torch.compile: failed: why [not]" in output
    assert "12,288" in output
    assert "note: a remark" in output


@pytest.mark.full
def test_a_bundled_model_on_own_prompts(tmp_path: Path) -> None:
    file, prompts = tmp_path / "numbers.json", tmp_path / "prompts.txt"
    prompts.write_text("rocket\n\n  pizza \n")
    arguments = ("--prompt", "red apple", "--prompts-file", prompts, "--interval", 2)
    result = run("sd", "--steps", 2, *QUICK[2:], *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["prompts"] == ["red apple", "rocket", "pizza"]
    assert content["model"] == "emoji-sd"
    assert rows(file)["eager N=2"]["psnr"] > 10


def test_no_time_is_said_and_the_uncached_way_measured(ddpm: Path, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = run(ddpm, *QUICK, "--repeat", 2, "--interval", 2, "--budget", 0, "--json", file)
    assert result.exit_code == 0, result.output
    assert "eager N=1, eager N=2: not measured: the budget of 0 s was used up" in result.output
    assert "uncached: 1 of 2 runs" in result.output
    found = rows(file)
    assert [row["status"] for row in found.values()] == ["measured", *["not measured"] * 2]
    assert found["eager N=2"]["step_ms"] is None
    assert found["eager N=2"]["runs"] == 0


def test_a_way_that_fails_is_a_row(ddpm: Path, tmp_path: Path, failing_backend: str) -> None:
    file = tmp_path / "numbers.json"
    result = run(
        *(ddpm, *QUICK, "--backend", failing_backend, "--backend", "eager", "--interval", 2),
        *("--json", file),
    )
    assert result.exit_code == 0, result.output
    found = rows(file)
    for way in ("fails N=1", "fails N=2"):
        assert found[way]["status"] == "failed"
        assert "no such instruction" in found[way]["reason"]
        assert "\n" not in found[way]["reason"]
        assert found[way]["step_ms"] is None
    assert found["eager N=2"]["over_backend"] is not None
    assert "fails N=1, fails N=2: failed: BackendError" in result.output


def test_without_the_uncached_way_there_is_nothing_to_compare_with(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = PipelineSubject.use

    def use_own(self: PipelineSubject, network: Any) -> None:
        if network is not self.network:
            raise RuntimeError("out of memory")
        use(self, network)

    monkeypatch.setattr(PipelineSubject, "use", use_own)
    file = tmp_path / "numbers.json"
    result = run(ddpm, *QUICK, "--interval", 2, "--json", file)
    assert result.exit_code == 1, result.output
    found = rows(file)
    assert found["uncached"]["reason"] == "RuntimeError: out of memory"
    assert found["eager N=2"]["status"] == "measured"
    assert found["eager N=2"]["over_uncached"] is None
    assert found["eager N=2"]["psnr"] is None
    assert found["eager N=2"]["over_backend"] > 0


def test_torch_compile_as_a_peer(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def compiled(module: Any, mode: str) -> Any:
        assert "forward" not in module.__dict__  # the network, not dcompile
        if mode == "max-autotune":
            raise RuntimeError("no compiler here")
        module.register_forward_hook(lambda *_: calls.append(mode))
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    file = tmp_path / "numbers.json"
    peers = ("torch.compile", "torch.compile:reduce-overhead", "torch.compile:max-autotune")
    arguments = [argument for peer in peers for argument in ("--peer", peer)]
    result = run(ddpm, *QUICK, "--interval", 2, *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    found = rows(file)
    assert list(found)[-3:] == list(peers)
    assert found["torch.compile"]["identical"]
    assert found["torch.compile"]["interval"] is found["torch.compile"]["over_backend"] is None
    assert found["torch.compile"]["compile_seconds"] >= 0
    assert found["torch.compile:max-autotune"]["reason"] == "RuntimeError: no compiler here"
    assert "default" in calls
    assert "reduce-overhead" in calls


def test_what_did_not_go_as_planned_is_in_the_row(
    ddpm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = PipelineSubject.run

    def in_training_mode(self: Any, steps: int, clock: Any = None) -> Any:
        with torch.enable_grad():
            self.network.train(steps == 7)
            logging.getLogger("dcompile").warning("dcompile: %s", "a warning\nand more")
            pictures, seconds = sample(self, steps, clock)
            return pictures.detach(), seconds

    monkeypatch.setattr(PipelineSubject, "run", in_training_mode)
    settings = BenchSettings(
        str(ddpm), steps=7, device="cpu", intervals=(5,), backends=("eager",), repeat=1
    )
    monkeypatch.setattr(DDIMPipeline, "__call__", DDIMPipeline.__call__.__wrapped__)
    (uncached, _, row) = run_bench(settings).rows
    assert row.uncached_calls == 7
    assert row.refresh_ms is row.reuse_ms is None
    assert sum(row.uncached_reasons.values()) == 7
    assert any(notice.startswith("7 calls ran uncached: ") for notice in row.notices)
    assert any("7 steps are no whole cycles of 5: at most" in notice for notice in row.notices)
    assert "a warning" in row.notices
    assert "a warning" in uncached.notices


def test_a_bare_network_runs_on_random_inputs(ddpm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ddpm / "unet" / "config.json").read_text())
    file = tmp_path / "numbers.json"
    result = run(tmp_path, *QUICK, "--interval", 3, "--size", 8, "--count", 2, "--json", file)
    assert result.exit_code == 0, result.output
    assert "2 samples, 6 steps" in result.output
    assert "note: a bare network on random inputs" in result.output
    assert "note: random weights" in result.output
    assert "PSNR" not in result.output
    assert json.loads(file.read_text())["kind"] == "network"
    row = rows(file)["eager N=3"]
    assert (row["psnr"], row["identical"]) == (None, None)
    assert (row["refresh_steps"], row["reuse_steps"]) == (2, 4)
    assert row["cached_bytes"] == 2 * 8 * 8 * 8 * 4
    assert "takes no prompt and no guidance" in refused(tmp_path, "--prompt", "a cat")


def test_a_bare_network_has_the_weights_in_its_folder(ddpm: Path) -> None:
    subject = NetworkSubject(BenchSettings(str(ddpm / "unet")), torch.device("cpu"))
    expected = UNet2DModel.from_pretrained(ddpm / "unet")
    assert torch.equal(subject.network.conv_in.weight, expected.conv_in.weight)
    assert len(subject.remarks) == 1


def test_a_bare_network_with_text(tmp_path: Path) -> None:
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    network.save_config(tmp_path)
    subject = NetworkSubject(BenchSettings(str(tmp_path), count=2), torch.device("cpu"))
    clock = StepClock(torch.device("cpu"))
    pictures, seconds = subject.run(3, clock)
    assert pictures is None
    assert len(clock.milliseconds()) == 3
    assert sum(clock.milliseconds()) <= 1000 * seconds
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchNetwork"}')
    assert "cannot load" in refused(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", 0], "interval: expected an int of at least 1, got 0"),
        (["--depth", 4], "depth 4 is out of range"),
        (["--depth", -1], "depth: expected an int of at least 0, got -1"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--peer", "nonsense"], "unknown peer 'nonsense': expected torch.compile"),
        (["--peer", "torch.compile:fast"], "with a mode of default, reduce-overhead"),
        (["--device", "nonsense"], "unknown device"),
        (["--prompt", "a cat"], "takes no prompt"),
        (["--prompt", "a", "--prompt", "b", "--count", 1], "count: expected at least 2"),
        (["--size", 17], "size: expected a multiple of 2"),
        (["--steps", 1], "--steps"),
        (["--budget", -1], "--budget"),
        (["--prompts-file", "no-such-file"], "cannot read prompts from no-such-file"),
    ],
)
def test_refuses(ddpm: Path, arguments: list[object], message: str) -> None:
    assert message in refused(ddpm, *QUICK, *arguments)


def test_refuses_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown model 'nonsense'" in refused("nonsense")
    from dcompile.cli import bench

    monkeypatch.setattr(bench, "load_subject", lambda *_: pytest.fail("it began to work"))
    assert "there is no folder" in refused("sd", "--json", tmp_path / "no" / "x.json")
    assert "is a folder" in refused("sd", "--json", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        assert "no permission" in refused("sd", "--json", tmp_path / "x.json")
    assert "interval" in refused("sd", "--interval", 0)
    (tmp_path / "prompts").write_text(" \n")
    with pytest.raises(dcompile.DcompileError, match="has no prompts"):
        read_prompts(tmp_path / "prompts")


def test_the_ways_and_their_order() -> None:
    settings = BenchSettings(
        backends=("inductor", "eager", "inductor"),
        intervals=(3, 1, 3),
        peers=("torch.compile:default", "torch.compile:reduce-overhead"),
    )
    ways = planned_ways(settings)
    assert ways[0] == UNCACHED
    assert ways[1:3] == [Way("inductor", 1), Way("inductor", 3)]
    assert [way.label for way in ways] == [
        *("uncached", "inductor N=1", "inductor N=3", "eager N=1", "eager N=3"),
        *("torch.compile", "torch.compile:reduce-overhead"),
    ]


def test_pictures_are_one_for_each_prompt() -> None:
    assert BenchSettings("sd").pictures == 8
    assert BenchSettings("ddpm").pictures == 1
    assert BenchSettings(prompts=("a", "b", "c")).pictures == 3
    assert BenchSettings(prompts=("a", "b"), count=4).pictures == 4


def test_a_clock_leaves_out_what_happens_between_steps() -> None:
    seen = iter(range(3))
    clock = StepClock(torch.device("cpu"), lambda: next(seen))
    clock.begin()
    for _ in range(3):
        clock.end_step()
    assert clock.seen == [0, 1, 2]
    times = clock.milliseconds()
    assert len(times) == 3
    assert all(time >= 0 and math.isfinite(time) for time in times)


def test_a_clock_on_cuda_waits_when_the_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")

        def elapsed_time(self, other: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{device}'s stream")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append("wait"))
    clock = StepClock(torch.device("cuda", 0))
    clock.begin()
    clock.end_step()
    clock.end_step()
    assert set(log) == {"record on cuda:0's stream"}
    assert clock.milliseconds() == [2.0, 2.0]
    assert log[-1] == "wait"
