"""The compatibility page: made of made-up rows, and kept up to date by ``--check``."""

from __future__ import annotations

import json
from pathlib import Path

import compatibility
import full_size
import pytest
import typer
from compatibility import Row, main, page
from typer.testing import CliRunner

ROWS: list[Row] = [
    {"kind": "network", "name": "Plain", "depths": 4, "ratio": 0.25, "works": True},
    {"kind": "network", "name": "DDPM (UNet2DModel)", "depths": 6, "ratio": 0.204, "works": True},
    {"kind": "pipeline", "name": "SomePipeline", "ratio": 0.1, "works": False},
    {"kind": "scheduler", "name": "PNDMScheduler", "works": True},
    {"kind": "scheduler", "name": "DDIMScheduler", "works": True},
    {"kind": "scheduler", "name": "DDIMScheduler (eta=1)", "works": True},
    {
        "kind": "scheduler",
        "name": "RePaintScheduler",
        "note": "2 of 9 calls refresh",
        "works": True,
    },
    {"kind": "add-on", "name": "LoRA: fuse_lora", "note": "before and after", "works": True},
    {"kind": "full size", "name": "SD 1.5", "depths": 12, "ratio": 0.079, "works": True},
]


def test_every_row_is_in_its_table() -> None:
    text = page(ROWS)
    networks = """| network | depths | r | limit at N=3 | status |
| --- | ---: | ---: | ---: | --- |
| DDPM (UNet2DModel) | 6 | 0.20 | 2.13× | works |
| Plain | 4 | 0.25 | 2.00× | works |
"""
    assert networks in text
    assert "| SomePipeline | 0.10 | 2.50× | **fails** |" in text
    assert "| LoRA: fuse_lora | works; before and after |" in text
    assert "| network | depths | r | limit at N=3 |\n| --- | ---: | ---: | ---: |\n| SD 1.5" in text
    assert (
        """
- DDIMScheduler: `eta=1`
- PNDMScheduler
- RePaintScheduler: 2 of 9 calls refresh
"""
        in text
    )
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Networks",
        "## Pipelines",
        "## Schedulers",
        "## Add-ons",
        "## At full size",
    ]


def test_the_order_of_rows_does_not_matter() -> None:
    assert page(ROWS) == page(ROWS[::-1])


def test_of_two_tests_of_one_name_the_smaller_promise_is_kept() -> None:
    rows: list[Row] = [
        {"kind": "pipeline", "name": "Twice", "ratio": ratio, "works": True}
        for ratio in (0.38, 0.51)
    ]
    for ordered in (rows, rows[::-1]):
        assert "| Twice | 0.51 | 1.49× | works |" in page(ordered)


def test_small_differences_of_machines_do_not_matter() -> None:
    nearly = [{**row, "ratio": row["ratio"] + 1e-4} if "ratio" in row else row for row in ROWS]
    assert page(nearly) == page(ROWS)


def test_several_tests_about_the_same_thing_are_one_row() -> None:
    row = {"kind": "pipeline", "name": "SomePipeline"}
    text = page([{**row, "works": True}, {**row, "works": True, "ratio": 0.5}])
    assert text.count("SomePipeline") == 1
    assert "| SomePipeline | 0.50 | 1.50× | works |" in text
    text = page([{**row, "works": True, "ratio": 0.5}, {**row, "works": False}])
    assert "| SomePipeline | 0.50 | 1.50× | **fails** |" in text


def test_a_section_without_rows_is_left_out() -> None:
    text = page(ROWS[:2])
    assert "## Networks" in text
    assert "## Schedulers" not in text


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "compatibility.md")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    app = typer.Typer()
    app.command()(main)
    return app


def test_check_says_what_is_out_of_date(command: typer.Typer, tmp_path: Path) -> None:
    rows, written = ["--rows", str(tmp_path / "rows.json")], tmp_path / "compatibility.md"
    missing = CliRunner().invoke(command, [*rows, "--check"])
    assert missing.exit_code == 1
    assert not written.exists()

    made = CliRunner().invoke(command, rows)
    assert made.exit_code == 0, made.output
    assert "fails: SomePipeline" in made.output
    assert written.read_text() == page(ROWS)
    assert CliRunner().invoke(command, [*rows, "--check"]).exit_code == 0

    (tmp_path / "rows.json").write_text(json.dumps([*ROWS[1:], {**ROWS[0], "works": False}]))
    stale = CliRunner().invoke(command, [*rows, "--check"])
    assert stale.exit_code == 1
    assert "-| Plain | 4 | 0.25 | 2.00× | works |" in stale.output
    assert "+| Plain | 4 | 0.25 | 2.00× | **fails** |" in stale.output
    assert "out of date: run python bench/compatibility.py" in stale.output
    assert written.read_text() == page(ROWS)


def test_it_runs_the_tests_that_say_what_they_are_about() -> None:
    names = [path.name for path in compatibility.tests()]
    assert {"test_networks.py", "test_outside_networks.py"} <= {*names}
    assert Path(__file__).name not in names


def test_published_configurations_are_measured_without_weights() -> None:
    skips = full_size.PUBLISHED["DDPM CIFAR-10, 32×32"].skips()
    assert len(skips) == 12
    assert skips[0].full.flops / 2e9 == pytest.approx(6.2, abs=0.1)  # GMACs
    assert skips[0].ratio == pytest.approx(0.079, abs=0.001)
