"""The folder of saved programs: replaced in one step, with a seal and a digest of every file.

A folder holds ``manifest.json`` and one folder of data that it names. The data folder is written
under another name and renamed when it is complete; then the manifest, replaced in one step, points
to it. So whoever reads finds the old programs or the new ones, and two writers cannot mix theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock

from dcompile.errors import ArtifactError
from dcompile.version import __version__

FORMAT = 6
MANIFEST = "manifest.json"
_LOCK = ".lock"


def replace_folder(folder: Path, manifest: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Write files and manifest; what was there is replaced when they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _require_own(folder)
    data = f"data-{uuid.uuid4().hex[:16]}"
    draft = folder / f".{data}"
    draft.mkdir()
    try:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        content = sealed({**manifest, "data": data})
        (draft / MANIFEST).write_bytes(content)
        # Writers take turns for the moment in which one set of files takes the other's place.
        with FileLock(folder / _LOCK):
            os.replace(draft / MANIFEST, folder / f".{data}.json")
            os.replace(draft, folder / data)
            os.replace(folder / f".{data}.json", folder / MANIFEST)
            for item in folder.iterdir():
                if _DATA.fullmatch(item.name) and item.name != data:
                    shutil.rmtree(item, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_in_one_step(file: Path, content: bytes) -> None:
    """Write a file: whoever reads finds what was there before, or all of this.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, outlasts a loss of power
        finally:
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


_DATA = re.compile(r"data-[0-9a-f]{16}")
_DRAFT = re.compile(r"\.data-[0-9a-f]{16}(\.json)?")


def _require_own(folder: Path) -> None:
    """The folder holds saved programs, whole or damaged, and nothing else: they will be removed."""
    for item in folder.iterdir():
        ours = _DATA.fullmatch(item.name) or _DRAFT.fullmatch(item.name)
        known = item.name == _LOCK or ours is not None
        if item.name == MANIFEST:
            try:
                content = json.loads(item.read_bytes())
            except ValueError:
                content = {"seal": "damaged"}
            known = isinstance(content, dict) and "seal" in content
        if not known:
            raise ArtifactError(
                f"{folder} holds other files ({item.name}): give a folder of its own"
            )


def _data_folder_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / MANIFEST).read_bytes())["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sealed(manifest: dict[str, Any]) -> bytes:
    """JSON that notices a changed byte."""
    body = json.dumps(manifest, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1, sort_keys=True).encode()


def digest_of(tensor: torch.Tensor) -> str:
    """Of a tensor's dtype, shape and values."""
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256_of(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content)[:16]


def sha256_of(content: bytes) -> str:
    """SHA-256, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """An archive of these files, the same for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the files it lists, all of them whole."""
    for attempt in range(3):
        manifest = _read_manifest(folder)
        try:
            files = {
                name: (folder / manifest["data"] / name).read_bytes() for name in manifest["files"]
            }
        except FileNotFoundError as error:
            # Somebody may have replaced the artefact since the manifest was read.
            if attempt < 2 and _data_folder_of(folder) != manifest["data"]:
                continue
            raise ArtifactError(f"{folder} is damaged: {error.filename} is missing") from error
        except OSError as error:
            raise ArtifactError(f"cannot read {folder}: {error}") from error
        break
    for name, digest in manifest["files"].items():
        if sha256_of(files[name]) != digest:
            raise ArtifactError(
                f"{folder} is damaged: {name} is not what was written (SHA-256 differs); "
                "save it again"
            )
    return manifest, files


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{folder} holds no saved programs: {MANIFEST} cannot be read "
            f"({error.strerror or error}). handle(module).save(folder) writes them"
        ) from error
    try:
        manifest = json.loads(content)
        seal = manifest.pop("seal")
        body = json.dumps(manifest, sort_keys=True)
        whole = hashlib.sha256(body.encode()).hexdigest() == seal
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{folder} is damaged: {MANIFEST} cannot be parsed") from error
    if not whole:
        raise ArtifactError(f"{folder} is damaged: {MANIFEST} is not what was written")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} has format {manifest.get('format')!r}, this is dcompile {__version__}, "
            f"which reads format {FORMAT}: save it again"
        )
    return cast(dict[str, Any], manifest)


def unzipped(content: bytes) -> dict[str, bytes]:
    """The files of an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
