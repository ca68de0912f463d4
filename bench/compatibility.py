"""What is known to work, as a page: python bench/compatibility.py

Runs the tests that say what they are about (by the fixture ``compatible``) and writes
docs/compatibility.md. ``--rows FILE`` takes what ``pytest --compatibility FILE`` has written;
``--check`` writes nothing and fails where the page is out of date.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from full_size import full_size_rows

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
INTERVAL = 3

Row = dict[str, Any]

INTRODUCTION = f"""# What works

Made from the tests by `python bench/compatibility.py`: a row is there because a test says so, and
it works if all tests of that name pass. All of it runs on the CPU, with small networks of the same
classes and random weights.

r is a reuse step's share of a full step's FLOPs at `depth=0`: cut at the outermost skip connection,
or behind the first block of a transformer. Caching alone cannot speed a network up more than
N / (1 + (N - 1) r). That is the limit given here, for `interval={INTERVAL}`. Small networks have a
larger r than the ones people use: see [at full size](#at-full-size), and
`dcompile.handle(pipe).explain()` for yours.
"""

# kind -> what comes above its table
SECTIONS = {
    "network": """## Networks

At every depth: the full graph returns what the network returns, and the shallow graph, fed with
fresh features, does so, too, bit for bit.""",
    "pipeline": """## Pipelines

With `interval=1` a run is what it is without caching, bit for bit; with `interval=3` it is what
stale features make of it by other means (the DeepCache package, or hooks in the network).""",
    "scheduler": """## Schedulers

The same, for each sampler. A note says where fewer steps are reused than the interval allows.""",
    "add-on": """## Add-ons

What is done to a pipeline before or after `cache_compile`, or around it.""",
    "full size": """## At full size

r and the limit of published configurations, at the sizes they are used with. Nothing is computed
but FLOPs: weights and inputs have shapes and no values.""",
}


def tests() -> list[Path]:
    """The files with tests that use the fixture."""
    return [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r'\bcompatible\(\s*"', path.read_text())
    ]


def rows_of_a_run() -> list[Row]:
    """Run these tests; some may fail, and the page says so."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "--compatibility", str(file), *map(str, tests())]
        if subprocess.run(command, cwd=ROOT, check=False).returncode > 1:
            raise typer.Exit(1)
        rows: list[Row] = json.loads(file.read_text())
    return rows


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each kind and name, by name; several tests may be about the same.

    Of their ratios the largest counts: it promises least.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (-row.get("ratio", 0.0), json.dumps(row))):
        known = found.setdefault((row["kind"], row["name"]), {**row})
        works = known.get("works", True) and row.get("works", True)
        known.update({**row, **known, "works": works})
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1].casefold()))]


def limit(ratio: float) -> float:
    return INTERVAL / (1 + (INTERVAL - 1) * ratio)


def status(row: Row) -> str:
    return "; ".join(filter(None, ["works" if row["works"] else "**fails**", row.get("note")]))


def numbers(row: Row) -> list[str]:
    ratio = row.get("ratio")
    return ["–", "–"] if ratio is None else [f"{ratio:.2f}", f"{limit(ratio):.2f}×"]


def table(heads: list[str], lines: Iterable[list[str]]) -> str:
    """The first column is text, and so is a status; numbers are aligned to the right."""
    rules = ["---" if head in (heads[0], "status") else "---:" for head in heads]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rules, *lines])


def listing(rows: list[Row]) -> str:
    """One line for each class, with what it was set to."""
    classes: dict[str, list[str]] = {}
    for row in rows:
        name, _, settings = row["name"].removesuffix(")").partition(" (")
        remark = status(row).removeprefix("works").removeprefix("; ")
        if settings:
            setting = f"`{settings}`" + (f" ({remark})" if remark else "")
            classes.setdefault(name, []).append(setting)
        else:
            classes.setdefault(name, []).insert(0, remark)
    lines = []
    for name, remarks in classes.items():
        said = "; ".join(filter(None, remarks))
        lines.append(f"- {name}" + (f": {said}" if said else ""))
    return "\n".join(lines)


def section(kind: str, rows: list[Row]) -> str:
    if kind == "scheduler":
        return listing(rows)
    if kind == "add-on":
        return table(["add-on", "status"], [[row["name"], status(row)] for row in rows])
    lines = [[row["name"], *numbers(row), status(row)] for row in rows]
    limited = f"limit at N={INTERVAL}"
    if kind == "pipeline":
        return table(["pipeline", "r", limited, "status"], lines)
    for line, row in zip(lines, rows, strict=True):
        line.insert(1, str(row.get("depths", "–")))
    if kind == "full size":
        return table(["network", "depths", "r", limited], [line[:-1] for line in lines])
    return table(["network", "depths", "r", limited, "status"], lines)


def page(rows: Iterable[Row]) -> str:
    """The whole page as Markdown; the order of the rows does not matter."""
    parts = [INTRODUCTION]
    known = merged(rows)
    for kind, introduction in SECTIONS.items():
        if some := [row for row in known if row["kind"] == kind]:
            parts += [introduction + "\n", section(kind, some) + "\n"]
    return "\n".join(parts)


def difference(old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "docs/compatibility.md", "tests", lineterm="", n=1
    )
    return "\n".join(lines)


def main(
    rows: Annotated[
        Path | None, typer.Option(help="What pytest --compatibility wrote, instead of a new run.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Fail where the page is out of date.")] = False,
) -> None:
    """Write docs/compatibility.md from the tests."""
    found: list[Row] = json.loads(rows.read_text()) if rows is not None else rows_of_a_run()
    if not any(row["kind"] == "full size" for row in found):
        found += full_size_rows()
    text = page(found)
    failing = [row["name"] for row in merged(found) if not row.get("works", True)]
    if failing:
        typer.echo(f"fails: {', '.join(failing)}")
    if not check:
        PAGE.write_text(text)
        return
    old = PAGE.read_text() if PAGE.exists() else ""
    if old != text:
        typer.echo(difference(old, text))
        typer.echo("docs/compatibility.md is out of date: run python bench/compatibility.py")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
