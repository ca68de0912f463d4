"""A file of prompts: its rows, checked, and planned into chunks, by what the file says alone."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dcompile.errors import DcompileError, JobError, first_line
from dcompile.serving.jobs import Job

LARGEST_SEED = 2**63 - 1
MOST_STEPS, LONGEST_SIDE, MOST_GUIDANCE = 1000, 16384, 100.0
RESERVED = ("row", "image", "file", "digest", "notes")  # columns of the output
_WHOLE = re.compile(r"[+-]?[0-9]{1,30}")


class Kind(NamedTuple):
    """What rows of one chunk have in common; None and empty mean the model's own."""

    steps: int | None
    width: int | None
    height: int | None
    guidance: float | None
    sampler: str
    lora: str


# Columns that say what to generate; all others are carried along.
OWN = ("prompt", "negative_prompt", "seed", *Kind._fields)


@dataclass(frozen=True)
class Row:
    """One picture to make.

    Attributes:
        number: of the row in the file, from 0.
        prompt, negative_prompt, seed: see ``Job``.
        kind: the rest of the job.
        carried: ``id`` and columns that have no meaning here.
    """

    number: int
    prompt: str
    negative_prompt: str
    seed: int
    kind: Kind
    carried: Mapping[str, Any]

    def job(self, default: Job) -> Job:
        """What to generate, with what the row does not say taken from ``default``."""
        kind = self.kind
        return replace(
            default,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            steps=default.steps if kind.steps is None else kind.steps,
            width=default.width if kind.width is None else kind.width,
            height=default.height if kind.height is None else kind.height,
            guidance=default.guidance if kind.guidance is None else kind.guidance,
            sampler=kind.sampler,
            lora=kind.lora,
        )


class Failure(NamedTuple):
    """A row without a picture.

    Attributes:
        row: its number.
        id: what its column ``id`` says.
        error: why.
    """

    row: int
    id: Any
    error: str


class Chunk(NamedTuple):
    """Rows of one kind, which are generated in one batch.

    Attributes:
        name: the first row's number and a digest of what is to be made.
        rows: ascending.
    """

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Prompts:
    """What a file of prompts says.

    Attributes:
        rows: those that can be tried, ascending.
        bad: those that cannot.
        schema: of the columns that are carried along; ``id`` is the first.
        digest: SHA-256 of the file.
        has_prompts: whether there is a column ``prompt``.
    """

    rows: tuple[Row, ...]
    bad: tuple[Failure, ...]
    schema: pa.Schema
    digest: str
    has_prompts: bool

    def chunks(self, size: int, settings: Mapping[str, Any]) -> list[Chunk]:
        """Rows of one kind in their order, up to ``size`` in a chunk; by first rows.

        Args:
            size: rows of a chunk.
            settings: what else decides about the pictures, for the names.
        """
        found: list[tuple[Row, ...]] = []
        waiting: dict[Kind, list[Row]] = {}
        for row in self.rows:
            group = waiting.setdefault(row.kind, [])
            group.append(row)
            if len(group) == size:
                found.append(tuple(waiting.pop(row.kind)))
        found += [tuple(group) for group in waiting.values()]
        return [_chunk(rows, settings) for rows in sorted(found, key=lambda rows: rows[0].number)]


def _chunk(rows: tuple[Row, ...], settings: Mapping[str, Any]) -> Chunk:
    said = [[row.number, row.prompt, row.negative_prompt, row.seed, row.kind] for row in rows]
    content = json.dumps([said, dict(settings)], sort_keys=True).encode()
    return Chunk(f"{rows[0].number:08d}-{hashlib.sha256(content).hexdigest()[:12]}", rows)


def read_prompts(file: Path, seed: int = 0) -> Prompts:
    """Read a file of prompts and check its rows as far as that needs no model.

    Args:
        file: Parquet, CSV or JSON lines, by its suffix.
        seed: of the first row; each further one adds 1. A row's own seed comes first.

    Raises:
        DcompileError: it cannot be read, has no rows, or names a column as the output does.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DcompileError(
            f"{file}: unknown kind of file; expected one of {', '.join(sorted(_READERS))}"
        )
    try:
        content = file.read_bytes()
        table = reader(content)
    except (OSError, UnicodeError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DcompileError(f"cannot read rows from {file}: {first_line(error)}") from error
    if not table.rows:
        raise DcompileError(f"{file} has no rows: expected one for each picture")
    for name in table.names:
        if name in RESERVED:
            raise DcompileError(
                f"{file}: the output has a column {name!r} of its own: rename the one in this file"
            )
        if table.names.count(name) > 1:
            raise DcompileError(f"{file} has several columns {name!r}: expected one")
    rows, bad = [], []
    for number, values in enumerate(table.rows):
        try:
            rows.append(_row(number, values, seed))
        except JobError as error:
            own = values.get("id") if isinstance(values, dict) else None
            bad.append(Failure(number, own, str(error)))
    return Prompts(
        tuple(rows),
        tuple(bad),
        table.schema,
        hashlib.sha256(content).hexdigest(),
        "prompt" in table.names,
    )


class _Table(NamedTuple):
    """A file's content: a dictionary for each row, or what is wrong with the row."""

    names: list[str]
    rows: list[dict[str, Any] | str]
    schema: pa.Schema


def _of_parquet(content: bytes) -> _Table:
    table = pq.read_table(pa.BufferReader(content))
    names = list(table.column_names)
    if len(set(names)) < len(names):
        return _Table(names, [{}], pa.schema([]))
    carried = {field.name: field.type for field in table.schema if field.name not in OWN}
    return _Table(names, table.to_pylist(), _schema(carried))


def _of_csv(content: bytes) -> _Table:
    lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    names = next(lines, [])
    rows: list[dict[str, Any] | str] = []
    for cells in lines:
        if cells and len(cells) != len(names):
            rows.append(f"expected {len(names)} cells as in the first line, got {len(cells)}")
        elif cells:
            rows.append(dict(zip(names, cells, strict=True)))
    return _Table(names, rows, _schema({name: pa.string() for name in names if name not in OWN}))


def _of_json_lines(content: bytes) -> _Table:
    rows = [_object(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    carried = {}
    for name in names:
        if name not in OWN:
            values = [row.get(name) for row in rows if isinstance(row, dict)]
            carried[name] = _common_type(values)
    return _Table(names, rows, _schema(carried))


def _object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {first_line(error)}"
    return value if isinstance(value, dict) else "expected a JSON object"


def _common_type(values: Sequence[Any]) -> pa.DataType:
    """Of a column; values that have none in common are written as JSON text."""
    try:
        found = pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.string()
    return pa.string() if pa.types.is_null(found) or pa.types.is_nested(found) else found


def _schema(carried: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema({"id": carried.get("id", pa.string()), **carried})


_READERS: dict[str, Callable[[bytes], _Table]] = {
    ".parquet": _of_parquet,
    ".csv": _of_csv,
    ".jsonl": _of_json_lines,
}


def _row(number: int, values: dict[str, Any] | str, seed: int) -> Row:
    if isinstance(values, str):
        raise JobError("row", values)
    own = _whole(values, "seed", 0, LARGEST_SEED)
    if own is None and seed + number > LARGEST_SEED:
        raise JobError("seed", f"expected at most {LARGEST_SEED}, got {seed + number}")
    kind = Kind(
        steps=_whole(values, "steps", 1, MOST_STEPS),
        width=_whole(values, "width", 1, LONGEST_SIDE),
        height=_whole(values, "height", 1, LONGEST_SIDE),
        guidance=_number(values, "guidance", MOST_GUIDANCE),
        sampler=_text(values, "sampler"),
        lora=_text(values, "lora"),
    )
    carried = {name: value for name, value in values.items() if name not in OWN}
    try:
        json.dumps(plain(carried), ensure_ascii=False).encode()
    except UnicodeError as error:
        raise JobError("row", "is no valid Unicode") from error
    return Row(
        number,
        _text(values, "prompt"),
        _text(values, "negative_prompt"),
        seed + number if own is None else own,
        kind,
        {"id": None, **carried},
    )


def _text(values: Mapping[str, Any], field: str) -> str:
    value = values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise JobError(field, f"expected text, got {_shown(value)}")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise JobError(field, "is no valid Unicode")
    return value


def _whole(values: Mapping[str, Any], field: str, least: int, most: int) -> int | None:
    value = values.get(field)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        is_whole = _WHOLE.fullmatch(value.strip()) is not None
    else:
        is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    found = int(value) if is_whole else -1
    if not least <= found <= most:
        raise JobError(field, f"expected an int of {least} to {most}, got {_shown(value)}")
    return found


def _number(values: Mapping[str, Any], field: str, most: float) -> float | None:
    value = values.get(field)
    if value is None or value == "":
        return None
    found = math.nan
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
    if not 0 <= found <= most:  # nor NaN
        raise JobError(field, f"expected a number of 0 to {most:g}, got {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def plain(value: Any) -> Any:
    """A carried value as JSON can hold it: what JSON has no form for becomes text, NaN null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def kinds_of(chunks: Sequence[Chunk]) -> Iterator[Kind]:
    """Of the chunks, each once, in their order."""
    yield from dict.fromkeys(chunk.rows[0].kind for chunk in chunks)
