"""The folder of an export: one file of weights, graphs, a manifest; replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcompile.compiler.capture import CapturedNetwork
from dcompile.errors import ExportError, root_cause

FORMAT = "dcompile-onnx"
FORMAT_VERSION = 1
WEIGHTS = "weights.data"
MANIFEST = "manifest.json"
GRAPHS = ("full.onnx", "shallow.onnx", "prologue.onnx")  # the last one if it was asked for

_INLINE_BYTES = 1024  # Constants up to this size stay in the graph, where shape inference looks.
_LARGE_BYTES = 1 << 20  # Tensors from this size begin where any system can map them into memory.
_MAP_ALIGNMENT = 1 << 16
_ALIGNMENT = 64


class WeightsFile:
    """One file of tensors, in the order they came; equal bytes are stored once.

    Attributes:
        path: the file; it must not exist yet.
        size: bytes written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("xb")
        self._checksum = hashlib.sha256()
        self._offsets: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        """Where in the file ``data`` begins."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            step = _MAP_ALIGNMENT if len(data) >= _LARGE_BYTES else _ALIGNMENT
            self._write(bytes(-self.size % step))
            self._offsets[digest] = self.size
            self._write(data)
        return self._offsets[digest]

    @property
    def sha256(self) -> str:
        """Of all that was written, as hexadecimal digits."""
        return self._checksum.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)
        self.size += len(data)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def move_weights_out(model: Any, network: CapturedNetwork, stored: WeightsFile) -> None:
    """Replace a graph's weights and larger constants by references into a file."""
    import onnx_ir

    weights = set(network.parameters.values())
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor.nbytes and (name in weights or tensor.nbytes > _INLINE_BYTES):
            value.const_value = onnx_ir.ExternalTensor(
                stored.path.name,
                stored.add(tensor.tobytes()),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=stored.path.parent,
            )


def write_model(model: Any, path: Path) -> None:
    """Write one graph, and check that it is valid ONNX.

    Raises:
        ExportError: it is not.
    """
    import onnx
    import onnx_ir

    onnx_ir.save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the exporter made a graph that is not valid ONNX: {root_cause(error)}\nTry another "
            'version of torch or onnxscript: pip install --upgrade "dcompile[onnx]"'
        ) from error


def require_replaceable(folder: Path) -> None:
    """``folder`` is free, empty, or holds an export and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: give the name of a folder")
    try:
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise ExportError(f"cannot look into {folder}: {error}; choose another folder") from error
    foreign = sorted(found - {*GRAPHS, WEIGHTS, MANIFEST})
    if MANIFEST in found and not _is_manifest(folder / MANIFEST):
        foreign.append(MANIFEST)
    if found and (foreign or MANIFEST not in found):
        raise ExportError(
            f"{folder} holds files that are no part of an export ({', '.join(foreign or found)}) "
            "and would be lost: move them away or choose another folder"
        )


def _is_manifest(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder next to ``folder`` that takes its place once all is written."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    retired = draft.with_name(f"{draft.name}.old")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        require_replaceable(folder)
        if folder.exists():
            folder.rename(retired)
        try:
            draft.rename(folder)
        except OSError:
            if retired.exists():
                retired.rename(folder)
            raise
    except OSError as error:
        raise ExportError(
            f"cannot write the export to {folder}: {error.strerror or error}; free some space or "
            "choose a folder you may write to"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
