"""The folder that bulk generation writes: parts that appear whole, and what they add up to.

- ``run.json``: what is generated, by what settings.
- ``agreed.json``: what the first process found, and all others go by.
- ``parts/``: for each chunk a Parquet file with its pictures, or a file of JSON lines about them.
- ``images/``: where they are not in the parts, the pictures, each named by its row.
- ``failed.jsonl``: rows without a picture, and why.
- ``manifest.parquet`` or ``manifest.jsonl``: all rows in their order, at the end.

Every file is written under a temporary name and renamed. A chunk is complete when its part is
there, so whoever generates it again, after a crash or beside another process, replaces the same
files by files with the same content.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from dcompile.errors import DcompileError, first_line
from dcompile.serving.bulk_rows import Chunk, Failure, plain
from dcompile.storage.folder import write_in_one_step

FORMS = ("parquet", "webp", "png")
_RUN, _AGREED, _FAILED = "run.json", "agreed.json", "failed.jsonl"
_LOCK, _AGREEING = ".lock", ".agreeing.lock"
_COLUMNS = {
    "row": pa.int64(),
    "prompt": pa.string(),
    "seed": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "image": pa.binary(),
    "digest": pa.string(),
    "notes": pa.string(),
}


@dataclass(frozen=True)
class Record:
    """A picture that was made.

    Attributes:
        row: its row's number.
        prompt, seed, width, height: of its job.
        image: the file's content.
        digest: SHA-256 of size and pixels.
        notes: what the person who asked should know.
        carried: see ``Row``.
    """

    row: int
    prompt: str
    seed: int
    width: int
    height: int
    image: bytes
    digest: str
    notes: str
    carried: Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """A folder of pictures. Travels between processes.

    Attributes:
        folder: where; of this run alone.
        form: one of ``FORMS``.
        schema: of the columns that are carried along.
    """

    folder: Path
    form: str
    schema: pa.Schema

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from writing here.

        Raises:
            DcompileError: somebody does, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise DcompileError(
                f"another dcompile generate is writing into {self.folder}: wait until it is done, "
                "or give another folder"
            ) from error
        except OSError as error:
            raise DcompileError(
                f"cannot write into {self.folder}: {error.strerror or error}"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Make this folder the run's, or find that it is; remove what crashed writes left.

        Args:
            run: what decides about the pictures, as JSON has it.

        Raises:
            DcompileError: it holds another run's pictures, or other files.
        """
        record = self.folder / _RUN
        if record.is_file():
            self._require_same(run, _read_json(record))
            self._sweep()
        else:
            names = {item.name for item in self.folder.iterdir()} - {_LOCK}
            others = sorted(name for name in names if not name.startswith(f".{_RUN}."))
            if others:
                raise DcompileError(
                    f"{self.folder} holds other files ({others[0]}): give a folder of its own"
                )
            replace_file(record, json.dumps(run, indent=1).encode())
        try:
            for name in ("parts", *(["images"] if self.form != "parquet" else [])):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def _sweep(self) -> None:
        """Remove what crashed writes left, and the counts of ``attempt``."""
        for pattern in (".*.tmp", "parts/.*", "images/.*"):
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)

    def _require_same(self, run: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*run, *before)):
            was, now = before.get(name), run.get(name)
            if was == now:
                continue
            if name == "prompts":
                raise DcompileError(
                    f"{self.folder} holds pictures of a file of prompts with other content: "
                    "give another folder, or the same file"
                )
            raise DcompileError(
                f"{self.folder} holds pictures made with {name} {was!r}, and now it is {now!r}: "
                "give another folder, or the same settings"
            )

    def agree(self, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process that came here found; ``find`` if this is the first."""
        file = self.folder / _AGREED
        if not file.is_file():
            found = json.dumps(find()).encode()
            with FileLock(self.folder / _AGREEING):
                if not file.is_file():
                    replace_file(file, found)
        return _read_json(file)

    @contextmanager
    def attempt(self, chunk: Chunk) -> Iterator[int]:
        """Count the processes that died while they made a chunk; yields how many did.

        The count lasts as long as the run: ``begin`` removes it.
        """
        file = self.folder / "parts" / f".{chunk.name}.attempts"
        deaths = file.stat().st_size if file.is_file() else 0
        try:
            with file.open("ab") as count:
                count.write(b".")
        except OSError as error:
            raise _not_written(file, error) from error
        yield deaths
        file.unlink(missing_ok=True)  # not where an error goes on: the process ends

    def present(self, chunk: Chunk) -> set[int]:
        """The rows of a chunk that have their pictures."""
        if not self._part(chunk).is_file():
            return set()
        if self.form == "parquet":
            return set(self._table(self._part(chunk), ["row"])["row"].to_pylist())
        rows = {record["row"] for record in _read_json_lines(self._part(chunk))}
        # Somebody removed a picture: the chunk is made again, in the batch that it was made in.
        return rows if all(self._image(row).is_file() for row in rows) else set()

    def add(self, chunk: Chunk, records: Sequence[Record]) -> None:
        """Write pictures of a chunk, beside those of its rows that are there.

        Raises:
            DcompileError: it cannot be written. The chunk is as it was.
        """
        before = self.present(chunk)
        part = self._part(chunk)
        if self.form == "parquet":
            table = self._table_of(records)
            if before:
                table = pa.concat_tables([self._table(part), table]).sort_by("row")
            replace_file(part, _parquet(table))
            return
        entries = _read_json_lines(part) if before else []
        for record in records:
            replace_file(self._image(record.row), record.image)
            entries.append(self._entry(record))
        entries.sort(key=lambda entry: entry["row"])
        replace_file(part, _json_lines(entries))

    def fail(self, failures: Sequence[Failure]) -> None:
        """Write which rows failed, and nothing where none did."""
        file = self.folder / _FAILED
        if failures:
            entries = [plain(failure._asdict()) for failure in sorted(failures, key=_row)]
            replace_file(file, _json_lines(entries))
        else:
            file.unlink(missing_ok=True)

    def finish(self, chunks: Sequence[Chunk]) -> Path:
        """Write the manifest of the pictures that are there, in the order of rows."""
        parts = [part for chunk in chunks if (part := self._part(chunk)).is_file()]
        if self.form == "parquet":
            names = [name for name in self._columns().names if name != "image"]
            tables = [self._table(part, names) for part in parts]
            empty = self._columns().empty_table().select(names)
            content = _parquet(pa.concat_tables([empty, *tables]).sort_by("row"))
            file = self.folder / "manifest.parquet"
        else:
            entries = [entry for part in parts for entry in _read_json_lines(part)]
            content = _json_lines(sorted(entries, key=lambda entry: cast(int, entry["row"])))
            file = self.folder / "manifest.jsonl"
        replace_file(file, content)
        return file

    def _part(self, chunk: Chunk) -> Path:
        suffix = "parquet" if self.form == "parquet" else "jsonl"
        return self.folder / "parts" / f"{chunk.name}.{suffix}"

    def _image(self, row: int) -> Path:
        return self.folder / "images" / f"{row:08d}.{self.form}"

    def _entry(self, record: Record) -> dict[str, Any]:
        carried = {name: plain(value) for name, value in record.carried.items()}
        return {
            "row": record.row,
            "id": carried.pop("id"),
            "file": self._image(record.row).relative_to(self.folder).as_posix(),
            **{name: getattr(record, name) for name in ("prompt", "seed", "width", "height")},
            "digest": record.digest,
            "notes": record.notes,
            **carried,
        }

    def _columns(self) -> pa.Schema:
        first, *others = self.schema
        own = [pa.field(name, kind) for name, kind in _COLUMNS.items()]
        return pa.schema([own[0], first, *own[1:], *others])

    def _table_of(self, records: Sequence[Record]) -> pa.Table:
        columns = []
        for field in self._columns():
            if field.name in _COLUMNS:
                values = [getattr(record, field.name) for record in records]
            else:
                values = [record.carried.get(field.name) for record in records]
                if pa.types.is_string(field.type):
                    values = [value if _is_text(value) else _as_json(value) for value in values]
            columns.append(pa.array(values, field.type))
        return pa.Table.from_arrays(columns, schema=self._columns())

    def _table(self, part: Path, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.ParquetFile(part).read(columns)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(part, error) from error


def replace_file(file: Path, content: bytes) -> None:
    """Write a file in one step: others see what was there, or all of this.

    Raises:
        DcompileError: it cannot be written.
    """
    try:
        write_in_one_step(file, content)
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> DcompileError:
    return DcompileError(
        f"cannot write {file}: {error.strerror or error}. Complete pictures are kept; the same "
        "command goes on from there"
    )


def _damaged(file: Path, error: Exception) -> DcompileError:
    return DcompileError(
        f"{file} is damaged ({first_line(error)}): remove it, and its pictures are made again"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _json_lines(entries: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _as_json(value: Any) -> str:
    return json.dumps(plain(value))


def _row(failure: Failure) -> int:
    return failure.row
