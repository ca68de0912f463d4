"""Bulk generation that is killed again and again: is a row missing, doubled or different?

    python bench/bulk.py

Runs ``dcompile generate`` into one folder, kills it or one of its actors at random moments with
SIGKILL, and starts it again until all rows are there. Every picture is compared, byte for byte,
with that of a run that nobody killed. Writes bench/results/bulk.json.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow.parquet as pq
import typer

from dcompile import models

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--model", "emoji-sd", "--backend", "eager", "--batch", "2", "--speedup", "2.5"]
PATIENCE = 600.0  # seconds without a new part after which something is wrong


class Kill(NamedTuple):
    """When, and whom."""

    parts: int  # written since the kill before
    delay: float
    driver: bool


def random_kill(chance: random.Random) -> Kill:
    parts = chance.randrange(3)
    # Before the first part: while Ray starts, the model is loaded, or the schedule is found.
    return Kill(parts, chance.uniform(0, 0.5 if parts else 15), chance.random() < 0.5)


def write_prompts(file: Path, rows: int) -> None:
    words = models.defaults("emoji-sd").prompts
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "prompt", "steps"])
        writer.writerows(
            [f"n{n}", words[n % len(words)], 8 + 2 * (n % 3 == 0)] for n in range(rows)
        )


def start(prompts: Path, folder: Path, actors: int) -> subprocess.Popen[bytes]:
    program = "from dcompile.cli.app import app; app()"
    command = [sys.executable, "-c", program, "generate", str(prompts), "--out", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, *OPTIONS, "--actors", str(actors)],
        env={**os.environ, "PYTHONPATH": path, "DCOMPILE_CACHE_DIR": "", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )


def descendants(process: int) -> list[int]:
    """Of a process: Ray's, too, while the process lives."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [process]
    while left:
        left += (own := children.get(left.pop(), []))
        found += own
    return found


def actors_of(process: int) -> list[int]:
    return [one for one in descendants(process) if b"MapWorker" in _command(one)]


def _command(process: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the driver; Ray's processes notice. Those that do not are killed, too."""
    others = descendants(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and any(_command(one) for one in others):
        time.sleep(0.2)
    for one in others:
        if b"ray" in _command(one):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


def interrupted_run(
    prompts: Path, folder: Path, kills: list[Kill], actors: int = 1
) -> tuple[int, list[str]]:
    """Generate; whenever a kill is due, kill. Returns the last exit status and who was killed."""
    killed: list[str] = []
    process = start(prompts, folder, actors)
    for kill in kills:
        before = parts_in(folder)
        waited = time.monotonic()
        while process.poll() is None and parts_in(folder) < before + kill.parts:
            assert time.monotonic() - waited < PATIENCE, "nothing happens"
            time.sleep(0.02)
        time.sleep(kill.delay)
        if process.poll() is not None:
            break
        found = actors_of(process.pid)
        if kill.driver or not found:
            kill_all(process)
            process = start(prompts, folder, actors)
            killed.append("driver")
        else:
            with suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGKILL)
            killed.append("actor")
    return process.wait(PATIENCE), killed


def parts_in(folder: Path) -> int:
    return len(list((folder / "parts").glob("*.parquet")))


def pictures_in(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = [row for part in (folder / "parts").glob("*") for row in pq.read_table(part).to_pylist()]
    return [(row["row"], row) for row in rows]


def compared(whole: Path, folder: Path, rows: int) -> dict[str, int]:
    """What is wrong with a folder."""
    expected, found = dict(pictures_in(whole)), pictures_in(folder)
    assert sorted(expected) == list(range(rows))
    counts = Counter(number for number, _ in found)
    manifest = pq.read_table(folder / "manifest.parquet")["row"].to_pylist()
    assert manifest == sorted(counts)
    return {
        "missing": sum(number not in counts for number in range(rows)),
        "doubled": sum(count - 1 for count in counts.values()),
        "differing": sum(expected[number] != row for number, row in found),
    }


def main(
    rows: Annotated[int, typer.Option(help="Of the file of prompts.")] = 60,
    kills: int = 10,
    actors: int = 1,
    seed: int = 0,
    output: Path = ROOT / "bench/results/bulk.json",
) -> None:
    chance = random.Random(seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name) / "prompts.csv"
        write_prompts(prompts, rows)
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        assert start(prompts, whole, 1).wait() == 0
        alone = time.perf_counter() - began
        planned = [random_kill(chance) for _ in range(kills)]
        status, killed = interrupted_run(prompts, folder, planned, actors)
        assert status == 0, f"exit status {status}"
        result = {
            "rows": rows,
            "kills": len(killed),
            "killed": dict(Counter(killed)),
            **compared(whole, folder, rows),
            "seconds": round(time.perf_counter() - began - alone, 1),
            "seconds_without_kills": round(alone, 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
