"""Saved programs of several folders, which processes compiled side by side, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from dcompile.errors import ArtifactError
from dcompile.storage.folder import (
    MANIFEST,
    read_files,
    replace_folder,
    sha256_of,
    unzipped,
    zipped,
)

_STRUCTURE, _LIBRARIES, _CONSTANTS = "structure.json.zip", "libraries.zip", "constants.safetensors"
# What may differ from folder to folder: the rest says what the programs are for.
_OWN = {"programs", "files", "data", "written"}


def merge(folders: Sequence[Path], target: Path) -> None:
    """Write the programs of all folders into one; of programs for the same calls, the first.

    Folders that hold others, one for each denoiser of a pipeline, are merged one by one.

    Raises:
        ArtifactError: a folder is damaged, or they are not for the same network, machine and
            settings, or ``target`` cannot be written.
    """
    if not (folders[0] / MANIFEST).exists():
        names = sorted(path.parent.name for path in folders[0].glob(f"*/{MANIFEST}"))
        for name in names:
            merge([folder / name for folder in folders], target / name)
        if names:
            return
    manifests: list[dict[str, Any]] = []
    programs: list[dict[str, Any]] = []
    known: set[tuple[str, ...]] = set()
    files: dict[str, bytes] = {}
    libraries: dict[str, bytes] = {}
    constants: dict[str, Any] = {}
    for folder in folders:
        manifest, content = read_files(folder)
        manifests.append(manifest)
        _require_alike(manifests[0], manifest, folder)
        if files and files[_STRUCTURE] != content[_STRUCTURE]:
            raise ArtifactError(f"{folder} was saved for a module of another structure")
        files[_STRUCTURE] = content[_STRUCTURE]
        libraries |= unzipped(content[_LIBRARIES])
        constants |= read_tensors(content[_CONSTANTS])
        for entry in manifest["programs"]:
            if tuple(entry["calls"]) not in known:
                known.add(tuple(entry["calls"]))
                programs.append(_renamed(entry, len(programs), content, files))
    files[_LIBRARIES] = zipped(libraries)
    files[_CONSTANTS] = write_tensors(constants)
    merged = {
        **{key: value for key, value in manifests[0].items() if key not in _OWN},
        "written": sorted({name for manifest in manifests for name in manifest["written"]}),
        "programs": programs,
        "files": {name: sha256_of(content) for name, content in sorted(files.items())},
    }
    try:
        replace_folder(target, merged, files)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error


def _require_alike(first: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    for name in sorted((first.keys() | other.keys()) - _OWN):
        if first.get(name) != other.get(name):
            raise ArtifactError(f"{folder} has another {name} than the folders before it")


def _renamed(
    entry: dict[str, Any], number: int, content: dict[str, bytes], files: dict[str, bytes]
) -> dict[str, Any]:
    """A program's entry with file names of its own; its files are added to those given."""

    def moved(graph: dict[str, Any]) -> dict[str, Any]:
        name = f"{number}-{graph['file'].partition('-')[2]}"
        files[name] = content[graph["file"]]
        return {**graph, "file": name}

    return {
        **entry,
        "graphs": [moved(graph) for graph in entry["graphs"]],
        "prologue": [moved(graph) for graph in entry["prologue"]],
    }
