"""Bulk generation without Ray: rows, chunks, files, resuming; and one real engine."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from dcompile.errors import DcompileError, JobError
from dcompile.serving.bulk import (
    MOST_DEATHS,
    BrokenDeviceError,
    BulkSettings,
    Maker,
    Report,
    Summary,
    Task,
    generate_all,
)
from dcompile.serving.bulk_rows import Chunk, read_prompts
from dcompile.serving.jobs import Job
from dcompile.serving.pictures import Picture, Trace
from dcompile.serving.settings import EngineSettings
from dcompile.storage import folder as folders

SETTINGS = BulkSettings(EngineSettings(model="emoji-sd", backend="eager", steps=4), batch=3)


class FakeEngine:
    """Draws one colour, which depends on the job and on how large its batch is."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.pipeline = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        self.handle = SimpleNamespace(schedule=None)
        self.batches: list[list[str]] = []

    def describe(self) -> dict[str, Any]:
        return {"model": "fake", "prompt": True, "negative_prompt": False, "takes_guidance": True}

    def default_job(self) -> Job:
        return Job("warm up", 0, self.settings.steps, 8, 8)

    def check(self, job: Job) -> None:
        if job.width % 8:
            raise JobError("width", f"expected a multiple of 8, got {job.width}")

    def freeze(self) -> None:
        pass

    def generate(self, jobs: Sequence[Job]) -> list[Picture]:
        assert len({job.kind for job in jobs}) == 1
        self.batches.append([job.prompt for job in jobs])
        if any(job.prompt == "broken" for job in jobs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if any(job.prompt == "impossible" for job in jobs):
            raise RuntimeError("this cannot be drawn\nat all")
        trace = Trace(("refresh", "reuse"), 0, 2.0, {}, len(jobs))
        return [
            Picture(
                Image.new("RGB", (job.width, job.height), (job.seed % 256, len(jobs), job.steps)),
                job.seed,
                trace,
            )
            for job in jobs
        ]


class Local:
    """Makes chunks in this process, and remembers its engines."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.engines: list[FakeEngine] = []
        self.stop_after = stop_after

    def build(self, settings: EngineSettings) -> Any:
        self.engines.append(FakeEngine(settings))
        return self.engines[-1]

    def run(self, task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        maker = Maker(task, self.build)
        for number, chunk in enumerate(chunks):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield maker.make(chunk)

    @property
    def batches(self) -> list[list[str]]:
        return [batch for engine in self.engines for batch in engine.batches[1:]]  # not warm-ups


def written(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(prompts: Path, folder: Path, settings: BulkSettings = SETTINGS, **more: Any) -> Summary:
    return generate_all(prompts, folder, settings, Local(**more).run)


def content(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".lock")
    }


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"p{n}", "steps": 4 + n % 2, "id": f"n{n}"} for n in range(10)]
    return written(tmp_path / "p.jsonl", rows)


def test_rows_are_read_alike_from_all_kinds_of_files(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a, b", "seed": 7, "steps": 5, "guidance": 2.5, "id": "x", "more": "007"},
        {"prompt": "c\nd", "seed": None, "steps": None, "guidance": None, "id": "y", "more": ""},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    written(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.csv").write_text(
        'prompt,seed,steps,guidance,id,more\n"a, b",7,5,2.5,x,007\n"c\nd",,,,y,\n'
    )
    found = [read_prompts(tmp_path / f"p.{kind}", 100) for kind in ("parquet", "jsonl", "csv")]
    assert found[0].rows == found[1].rows == found[2].rows
    assert [row.seed for row in found[0].rows] == [7, 101]
    assert found[0].rows[0].carried == {"id": "x", "more": "007"}
    assert all(one.schema.names == ["id", "more"] for one in found)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"seed": -1}, "seed: expected an int of 0 to"),
        ({"seed": 2**63}, "seed: expected an int of 0 to"),
        ({"seed": float("nan")}, "got nan"),
        ({"seed": float("inf")}, "got inf"),
        ({"seed": True}, "got True"),
        ({"seed": 1.5}, "got 1.5"),
        ({"steps": "many"}, "steps: expected an int of 1 to 1000, got 'many'"),
        ({"steps": 0}, "steps: expected an int of 1 to 1000, got 0"),
        ({"steps": 10**9}, "steps: expected"),
        ({"width": [64]}, "width: expected an int"),
        ({"height": "٣"}, "height: expected an int"),
        ({"guidance": float("nan")}, "guidance: expected a number of 0 to 100, got nan"),
        ({"guidance": "1e999"}, "guidance: expected a number"),
        ({"prompt": 5}, "prompt: expected text, got 5"),
        ({"prompt": "\ud800"}, "prompt: is no valid Unicode"),
        ({"id": "\ud800"}, "row: is no valid Unicode"),
    ],
)
def test_bad_values_make_a_failed_row(tmp_path: Path, row: dict[str, Any], error: str) -> None:
    found = read_prompts(written(tmp_path / "p.jsonl", [{"prompt": "a", **row}, {"prompt": "b"}]))
    assert [good.number for good in found.rows] == [1]
    assert error in found.bad[0].error


def test_a_line_that_is_no_row_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n[1]\n\n{"prompt": "b"}\n')
    found = read_prompts(tmp_path / "p.jsonl")
    assert [row.number for row in found.rows] == [0, 3]
    assert [bad.row for bad in found.bad] == [1, 2]
    (tmp_path / "p.csv").write_text("prompt,id\na,1\nb\nc,3\n")
    found = read_prompts(tmp_path / "p.csv")
    assert [row.number for row in found.rows] == [0, 2]
    assert found.bad[0].error == "row: expected 2 cells as in the first line, got 1"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a", "unknown kind of file; expected one of .csv, .jsonl, .parquet"),
        ("p.parquet", "a", "cannot read rows from"),
        ("p.csv", 'prompt\n"a', "cannot read rows from"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.csv", "", "has no rows"),
        ("p.csv", "prompt,prompt\na,b\n", "several columns 'prompt'"),
        ("p.csv", "prompt,digest\na,b\n", "the output has a column 'digest' of its own"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DcompileError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(DcompileError, match="cannot read rows from"):
        read_prompts(tmp_path / "missing.csv")


def test_chunks_hold_rows_of_one_kind_in_their_order(prompts: Path) -> None:
    chunks = read_prompts(prompts).chunks(3, {})
    numbers = [[row.number for row in chunk.rows] for chunk in chunks]
    assert numbers == [[0, 2, 4], [1, 3, 5], [6, 8], [7, 9]]
    assert chunks == read_prompts(prompts).chunks(3, {})
    assert chunks[0].name != read_prompts(prompts).chunks(3, {"steps": 5})[0].name


@pytest.mark.parametrize("form", ["parquet", "webp", "png"])
def test_a_stopped_run_goes_on_to_the_same_files(prompts: Path, tmp_path: Path, form: str) -> None:
    settings = replace(SETTINGS, form=form)
    whole = made(prompts, tmp_path / "whole", settings)
    assert (whole.made, whole.present, whole.failed, whole.rows) == (10, 0, 0, 10)
    assert whole.flops_speedup == 2.0
    for stop in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            made(prompts, tmp_path / "resumed", settings, stop_after=stop)
    resumed = made(prompts, tmp_path / "resumed", settings)
    assert resumed.made + resumed.present == 10
    assert content(tmp_path / "whole") == content(tmp_path / "resumed")
    again = Local(stop_after=0)
    summary = generate_all(prompts, tmp_path / "resumed", settings, again.run)
    assert (summary.made, summary.present, again.engines) == (0, 10, [])


def test_parquet_parts_and_manifest(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "id": 5, "when": datetime(2020, 1, 2), "tags": ["x", "y"]},
        {"prompt": "b", "id": 6, "when": None, "tags": []},
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "p.parquet")
    summary = made(tmp_path / "p.parquet", tmp_path / "out")
    manifest = pq.read_table(summary.manifest)
    for name in ("id", "when", "tags"):
        assert manifest[name].to_pylist() == table[name].to_pylist()
        assert manifest.schema.field(name).type == table.schema.field(name).type
    (part,) = (tmp_path / "out/parts").glob("*.parquet")
    parts = pq.read_table(part)
    assert parts.column_names[:8] == [
        *("row", "id", "prompt", "seed", "width", "height", "image", "digest")
    ]
    assert parts["image"][1].as_py().startswith(b"\x89PNG")


def test_columns_of_mixed_types_become_json(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": 1, "y": {"z": [1]}}, {"prompt": "b", "x": "one"}]
    prompts = written(tmp_path / "p.jsonl", rows)
    manifest = pq.read_table(made(prompts, tmp_path / "out").manifest)
    assert manifest["x"].to_pylist() == ["1", "one"]
    assert manifest["y"].to_pylist() == ['{"z": [1]}', None]
    files = made(prompts, tmp_path / "files", replace(SETTINGS, form="png")).manifest
    entries = [json.loads(line) for line in files.read_text().splitlines()]
    assert [entry.get("x") for entry in entries] == [1, "one"]
    assert entries[0]["y"] == {"z": [1]}


@pytest.mark.parametrize("form", ["parquet", "png"])
def test_rows_fail_alone_and_are_tried_again(tmp_path: Path, form: str) -> None:
    words = ["a", "impossible", "b", "", "c", "d"]
    rows = [{"prompt": word, "id": n} for n, word in enumerate(words)]
    rows += [{"prompt": "e", "width": 9}, {"prompt": "f", "negative_prompt": "g"}]
    prompts = written(tmp_path / "p.jsonl", [*rows, {"prompt": "h", "seed": "?"}])
    settings = replace(SETTINGS, form=form)
    local = Local()
    summary = generate_all(prompts, tmp_path / "out", settings, local.run)
    assert (summary.made, summary.failed) == (4, 5)
    assert local.batches[:4] == [["a", "impossible", "b"], ["a"], ["impossible"], ["b"]]
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in failed] == [1, 3, 6, 7, 8]
    assert failed[0] == {"row": 1, "id": 1, "error": "RuntimeError: this cannot be drawn"}
    assert failed[1]["error"] == "prompt: expected some text"
    before = content(tmp_path / "out")
    again = Local()
    summary = generate_all(prompts, tmp_path / "out", settings, again.run)
    assert (summary.made, summary.present, summary.failed) == (0, 4, 5)
    assert again.engines[0].batches == [["impossible"]]  # the schedule is known: no warm-up
    assert content(tmp_path / "out") == before


def test_a_row_that_failed_for_the_time_being_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": word} for word in ("a", "sometimes", "b")])
    generate = FakeEngine.generate

    def short_of_memory(self: FakeEngine, jobs: Sequence[Job]) -> list[Picture]:
        if any(job.prompt == "sometimes" for job in jobs):
            raise RuntimeError("CUDA out of memory")
        return generate(self, jobs)

    monkeypatch.setattr(FakeEngine, "generate", short_of_memory)
    assert made(prompts, tmp_path / "out").failed == 1
    monkeypatch.undo()
    summary = made(prompts, tmp_path / "out")
    assert (summary.made, summary.present, summary.failed) == (1, 2, 0)
    assert pq.read_table(summary.manifest)["row"].to_pylist() == [0, 1, 2]
    assert not (tmp_path / "out/failed.jsonl").exists()


def test_a_chunk_that_ends_its_process_fails_after_some(tmp_path: Path) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "broken"}, {"prompt": "a", "steps": 5}])
    reports = []

    def run(task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        for chunk in chunks:
            for _ in range(MOST_DEATHS):
                try:
                    yield Maker(task, Local().build).make(chunk)
                except BrokenDeviceError:
                    continue
                break
            else:
                reports.append(Maker(task, Local().build).make(chunk))
                yield reports[-1]

    summary = generate_all(prompts, tmp_path / "out", SETTINGS, run)
    assert (summary.made, summary.failed) == (1, 1)
    assert reports[0].failures[0].error == "3 processes died while they made this row's chunk"


def test_a_process_that_dies_before_it_can_report(prompts: Path, tmp_path: Path) -> None:
    def run(task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        for chunk in chunks:
            Maker(task, Local().build).make(chunk)  # dies
            yield Maker(task, Local().build).make(chunk)

    summary = generate_all(prompts, tmp_path / "out", SETTINGS, run)
    assert (summary.made, summary.present, summary.failed) == (10, 0, 0)


def test_leftovers_of_crashed_writes_are_removed(prompts: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, form="webp")
    with pytest.raises(KeyboardInterrupt):
        made(prompts, tmp_path / "out", settings, stop_after=1)
    for name in (".manifest.jsonl.1.tmp", "images/.00000001.webp.2.tmp", "parts/.x.attempts"):
        (tmp_path / "out" / name).write_bytes(b"half")
    (tmp_path / "out/images/00000000.webp").unlink()  # and somebody removed a picture
    made(prompts, tmp_path / "out", settings)
    made(prompts, tmp_path / "whole", settings)
    assert content(tmp_path / "whole") == content(tmp_path / "out")


def test_folders_that_are_refused(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(prompts, out)
    engine = replace(SETTINGS.engine, interval=3)
    for other, named in (
        (replace(SETTINGS, batch=4), "made with batch 3, and now it is 4"),
        (replace(SETTINGS, engine=replace(SETTINGS.engine, steps=9)), "steps 4, and now it is 9"),
        (replace(SETTINGS, engine=engine), "made with"),
    ):
        with pytest.raises(DcompileError, match=named):
            made(prompts, out, other)
    with pytest.raises(DcompileError, match="a file of prompts with other content"):
        made(written(tmp_path / "q.jsonl", [{"prompt": "a"}]), out)
    (tmp_path / "used/parts").mkdir(parents=True)
    for name in (".thesis.tmp", "parts/.thesis", "thesis.tex"):
        (tmp_path / "used" / name).touch()
    with pytest.raises(DcompileError, match=r"holds other files \(.thesis.tmp\)"):
        made(prompts, tmp_path / "used")
    assert len(list((tmp_path / "used").rglob("*thesis*"))) == 3  # nothing of it was removed
    (tmp_path / "used/run.json").write_text("[1]")
    with pytest.raises(DcompileError, match=r"run.json is damaged"):
        made(prompts, tmp_path / "used")
    with pytest.raises(DcompileError, match="cannot write into"):
        made(prompts, prompts / "below a file")
    alias = replace(SETTINGS, engine=replace(SETTINGS.engine, model="sd", speedup=2.5))
    assert made(prompts, out, alias).present == 10


def test_two_runs_into_one_folder(prompts: Path, tmp_path: Path) -> None:
    def run(task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        with pytest.raises(DcompileError, match="another dcompile generate is writing into"):
            made(prompts, tmp_path / "out")
        return iter(())

    generate_all(prompts, tmp_path / "out", SETTINGS, run)


def test_a_full_disk_stops_the_run(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = os.replace

    def full(source: Path, target: Path) -> None:
        if "00000001-" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced(source, target)

    monkeypatch.setattr(folders.os, "replace", full)
    with pytest.raises(DcompileError, match=r"cannot write .*: No space left on device") as caught:
        made(prompts, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "out/parts").glob("*.parquet"))) == 1
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    monkeypatch.undo()
    made(prompts, tmp_path / "out")
    made(prompts, tmp_path / "whole")
    assert content(tmp_path / "whole") == content(tmp_path / "out")


def test_a_damaged_part_is_named(prompts: Path, tmp_path: Path) -> None:
    made(prompts, tmp_path / "out")
    part = min((tmp_path / "out/parts").iterdir())
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(DcompileError, match=f"{part.name} is damaged"):
        made(prompts, tmp_path / "out")
    part.unlink()
    assert made(prompts, tmp_path / "out").made == 3


def test_the_processes_end_before_the_folder_is_free(prompts: Path, tmp_path: Path) -> None:
    ended = []

    def run(task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        try:
            yield Report(chunks[0].name, fatal="nothing works")
        finally:
            with pytest.raises(DcompileError, match="another dcompile generate"):
                made(prompts, tmp_path / "out")
            ended.append(True)

    with pytest.raises(DcompileError, match="nothing works"):
        generate_all(prompts, tmp_path / "out", SETTINGS, run)
    assert ended


def test_the_command(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcompile.cli.app import app
    from dcompile.integrations.bulk import Actors

    monkeypatch.setattr(Actors, "run", lambda self, task, chunks: Local().run(task, chunks))
    monkeypatch.setenv("COLUMNS", "120")  # whatever other tests made of it

    def outcome(*arguments: str, rows: Path = prompts) -> tuple[int, str]:
        command = ["generate", str(rows), "--model", "sd", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*command, *arguments])
        return result.exit_code, result.output

    code, text = outcome("--batch", "4", "--interval", "3")
    assert code == 0
    assert "10 rows" in text
    assert "50% (2.00 times fewer)" in text
    code, text = outcome("--batch", "4", "--interval", "2")
    assert code == 2
    assert text.startswith(f"error: {tmp_path / 'out'} holds pictures made with interval 3")
    assert outcome("--interval", "3", "--speedup", "2")[0] == 2
    assert outcome("--lora", "unnamed")[1].startswith("error: --lora: expected NAME=PATH")
    bad = written(tmp_path / "bad.jsonl", [{"prompt": "a", "seed": -1}])
    code, text = outcome("--out", str(tmp_path / "failed"), rows=bad)
    assert code == 1
    assert "failed.jsonl" in text


def test_what_all_processes_need(prompts: Path, tmp_path: Path) -> None:
    nameless = written(tmp_path / "q.jsonl", [{"seed": 1}])
    with pytest.raises(DcompileError, match="needs prompts: expected a column 'prompt'"):
        made(nameless, tmp_path / "nameless")
    with pytest.raises(KeyboardInterrupt):
        made(prompts, tmp_path / "out", stop_after=1)
    agreed = json.loads((tmp_path / "out/agreed.json").read_text())
    (tmp_path / "out/agreed.json").write_text(json.dumps({**agreed, "device": "cuda"}))
    with pytest.raises(DcompileError, match="were made on cuda, and this process has cpu"):
        made(prompts, tmp_path / "out")
    with pytest.raises(DcompileError, match="format: expected one of parquet, webp, png"):
        replace(SETTINGS, form="gif")
    with pytest.raises(DcompileError, match="seed: expected an int of 0"):
        replace(SETTINGS, seed=-1)


def test_a_model_that_cannot_draw_at_all(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(self: FakeEngine, jobs: Sequence[Job]) -> list[Picture]:
        raise RuntimeError("no")

    monkeypatch.setattr(FakeEngine, "generate", no)
    with pytest.raises(DcompileError, match="cannot make a picture with its own settings"):
        made(prompts, tmp_path / "out")


def test_an_engine_that_takes_over_what_another_found(tmp_path: Path) -> None:
    """A chunk is the same whether its engine watched a run, or read what another one found."""
    prompts = written(tmp_path / "p.jsonl", [{"seed": seed} for seed in (5, 6)])
    engine = EngineSettings(model="ddpm-emoji", backend="eager", steps=4)

    def run(task: Task, chunks: Sequence[Chunk]) -> Iterable[Report]:
        return map(Maker(task).make, chunks)

    generate_all(prompts, tmp_path / "out", BulkSettings(engine, batch=1), run)
    whole = content(tmp_path / "out")
    assert json.loads(whole["agreed.json"])["schedule"]["known"]
    max((tmp_path / "out/parts").iterdir()).unlink()
    summary = generate_all(prompts, tmp_path / "out", BulkSettings(engine, batch=1), run)
    assert (summary.made, summary.present) == (1, 1)
    assert summary.flops_speedup is not None
    assert summary.flops_speedup > 1.5  # it reuses from its first run on
    assert content(tmp_path / "out") == whole
