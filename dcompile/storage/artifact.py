"""Compiled programs on disk: build once, ship, load in seconds without capturing or compiling.

Weights are not part of an artefact: a program is bound to the weights of the module it is loaded
into. Compiled programs are code. Load them only from where you would install a package from.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.utils._pytree import treespec_dumps, treespec_loads

from dcompile.backends import Backend
from dcompile.compiler.guards import SizeGuard, TensorPattern, parse_condition
from dcompile.compiler.program import (
    CacheLayout,
    CompiledGraph,
    Constant,
    Convention,
    Program,
    ProgramSpec,
    graph_label,
)
from dcompile.compiler.saved import SavedProgram
from dcompile.errors import ArtifactError
from dcompile.policy import codec
from dcompile.policy.schedule import Schedule
from dcompile.policy.self_tuned import SelfTuned
from dcompile.storage.comparison import compare, compare_structures
from dcompile.storage.folder import (
    FORMAT,
    digest_of,
    read_files,
    replace_folder,
    sha256_of,
    unzipped,
    zipped,
)
from dcompile.version import __version__


@runtime_checkable
class Saveable(Protocol):
    """A backend whose callables can be written to files and come back, in another process too."""

    def dump(self, run: Callable[..., Any]) -> dict[str, bytes]:
        """What ``restore`` needs, by name. Names that are equal have equal content."""
        ...

    def restore(self, files: Mapping[str, bytes]) -> Callable[..., Any]:
        """The callable of what ``dump`` returned."""
        ...


@dataclass(frozen=True)
class Artifact:
    """All that a folder holds.

    Attributes:
        network: name of the module's class.
        backend: its name and options.
        cuts: where the programs are cut.
        dynamic, cuda_graphs, channels_last: see ``cache_compile``.
        schedule: None if it was a user's own class.
        forecasts: one for each cut; None in the place of a user's own class.
        structure: the module's, from ``structure.portable``.
        written: attributes that the network's own forward writes; see ``structure_of``.
        programs: each with the call signatures it serves.
    """

    network: str
    backend: tuple[str, dict[str, Any]]
    cuts: ProgramSpec
    dynamic: Any
    cuda_graphs: Any
    channels_last: Any
    schedule: Schedule | None
    forecasts: tuple[str | None, ...]
    structure: dict[str, dict[str, Any]]
    written: tuple[str, ...]
    programs: tuple[SavedProgram, ...]


# Writing ------------------------------------------------------------------------------------------


def write(folder: Path, artifact: Artifact, backend: Backend, device: torch.device) -> None:
    """Write an artefact; one that is there already is replaced when the new one is complete.

    Raises:
        ArtifactError: the backend's programs cannot be saved, the folder cannot be written, or
            ``autotune`` has not found anything yet.
    """
    if isinstance(artifact.schedule, SelfTuned) and not artifact.schedule.known:
        raise ArtifactError(
            "the first run is still being watched, and nothing is found yet: save after it"
        )
    if not isinstance(backend, Saveable):
        raise ArtifactError(
            f"programs of backend {backend.name!r} cannot be saved; those of 'inductor' and "
            "'eager' can"
        )
    if backend.folds_weights:
        raise ArtifactError(
            "the backend folded the weights into its code (freezing), and saved programs hold no "
            "weights: compile without"
        )
    from safetensors.torch import save as write_tensors

    files: dict[str, bytes] = {}
    libraries: dict[str, bytes] = {}
    constants: dict[str, torch.Tensor] = {}
    try:
        programs = [
            _program_entry(number, saved, backend, files, libraries, constants)
            for number, saved in enumerate(artifact.programs)
        ]
    except (TypeError, NotImplementedError) as error:
        raise ArtifactError(
            f"what the network takes or returns cannot be written to a file: {error}"
        ) from error
    files["structure.json.zip"] = zipped(
        {"structure.json": json.dumps(artifact.structure).encode()}
    )
    files["libraries.zip"] = zipped(libraries)
    files["constants.safetensors"] = write_tensors(constants)
    name, options = artifact.backend
    manifest = {
        "format": FORMAT,
        "dcompile": __version__,
        "network": artifact.network,
        "machine": machine(device),
        "backend": {"name": name, "options": options},
        "cuts": artifact.cuts._asdict(),
        "dynamic": artifact.dynamic,
        "cuda_graphs": artifact.cuda_graphs,
        "channels_last": artifact.channels_last,
        "schedule": codec.to_json(artifact.schedule) if artifact.schedule else None,
        "forecasts": list(artifact.forecasts),
        "written": list(artifact.written),
        "programs": programs,
        "files": {name: sha256_of(content) for name, content in sorted(files.items())},
    }
    try:
        replace_folder(folder, manifest, files)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error


def machine(device: torch.device) -> dict[str, str]:
    """What compiled code depends on apart from the module."""
    found = {"torch": torch.__version__, "device": device.type, "platform": platform.machine()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["diffusers"] = importlib.metadata.version("diffusers")  # whose code was captured
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def _program_entry(
    number: int,
    saved: SavedProgram,
    backend: Saveable,
    files: dict[str, bytes],
    libraries: dict[str, bytes],
    constants: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """The manifest's part about one program; its files are added to those given."""
    graphs = []
    cuts = len(saved.program.cached)
    labels = [graph_label(graph, cuts) for graph in range(len(saved.program.graphs))]
    for label, half in zip([*labels, "prologue"], saved.program.all_graphs, strict=False):
        try:
            dumped = backend.dump(half.run)
        except Exception as error:
            raise ArtifactError(f"the {label} graph cannot be saved: {error}") from error
        file = f"{number}-{label.replace(' ', '-')}"
        files[file] = dumped.pop("graph")
        libraries |= dumped
        weights: list[Any] = []
        for weight in half.convention.weights:
            if isinstance(weight, Constant):
                value = weight.value.detach().cpu().contiguous()
                # Captures may give one name to different literals.
                key = f"{weight.name}#{digest_of(value)}"
                constants[key] = value.clone()
                weights.append({"constant": key})
            else:
                weights.append(weight)
        graphs.append(
            {
                "file": file,
                "libraries": sorted(dumped),
                "weights": weights,
                "inputs": list(half.convention.inputs),
            }
        )
    return {
        "calls": list(saved.calls),
        "in_spec": treespec_dumps(saved.in_spec),
        "out_spec": treespec_dumps(saved.program.out_spec),
        "guard": _guard_entry(saved.guard),
        "cached": [list(cut) for cut in saved.program.cached],
        "ratios": list(saved.program.ratios),
        "probed": saved.program.probed,
        "graphs": graphs[: cuts + 1],
        "prologue": graphs[cuts + 1 :],
    }


def _guard_entry(guard: SizeGuard | None) -> Any:
    if guard is None:
        return None
    leaves: list[Any] = []
    for leaf, wanted in guard.leaves:
        if isinstance(wanted, TensorPattern):
            pattern = [list(wanted.shape), str(wanted.dtype), wanted.contiguous]
            leaves.append([leaf, {"tensor": pattern}])
        else:
            leaves.append([leaf, {"value": wanted}])
    return {
        "leaves": leaves,
        "expression": guard.expression,
        "autocast": guard.autocast,
        "ranges": [list(item) for item in guard.ranges],
    }


# Reading ------------------------------------------------------------------------------------------


def read(
    folder: Path,
    module: nn.Module,
    device: torch.device,
    backend_of: Callable[[str, dict[str, Any]], Backend],
    structure_of_module: Callable[[Sequence[str], Any, Backend], dict[str, dict[str, Any]]],
) -> tuple[Artifact, Backend]:
    """Read an artefact for ``module``, and check that it was made for one like it.

    Args:
        folder: what ``write`` wrote.
        module: constants that are its attributes are compared and taken from it.
        device: where the module is.
        backend_of: a backend from its name and options.
        structure_of_module: the module's portable structure, leaving out the attributes given,
            with its weights laid out as ``channels_last`` and the backend want them.

    Raises:
        ArtifactError: missing, damaged, or made for another torch, machine or module; names the
            first difference.
    """
    from safetensors.torch import load as read_tensors

    manifest, files = read_files(folder)
    compare("machine", manifest["machine"], machine(device))
    with _as_damage(folder):
        structure = json.loads(unzipped(files["structure.json.zip"])["structure.json"])
    name, options = manifest["backend"]["name"], manifest["backend"]["options"]
    backend = backend_of(name, options)
    here = structure_of_module(manifest["written"], manifest["channels_last"], backend)
    compare_structures(structure, here)
    with _as_damage(folder):
        libraries = unzipped(files["libraries.zip"])
        constants = read_tensors(files["constants.safetensors"])
    for key, value in constants.items():
        constants[key] = _checked_constant(module, key.rpartition("#")[0], value, device)
    assert isinstance(backend, Saveable)
    with _as_damage(folder):
        programs = tuple(
            SavedProgram(
                calls=tuple(entry["calls"]),
                in_spec=treespec_loads(entry["in_spec"]),
                guard=_guard_of(entry["guard"], device),
                program=_program_of(entry, backend, files, libraries, constants),
            )
            for entry in manifest["programs"]
        )
        artifact = Artifact(
            network=manifest["network"],
            backend=(name, options),
            cuts=ProgramSpec(
                tuple(manifest["cuts"]["depths"]),
                tuple(manifest["cuts"]["histories"]),
                manifest["cuts"]["probe"],
            ),
            dynamic=manifest["dynamic"],
            cuda_graphs=manifest["cuda_graphs"],
            channels_last=manifest["channels_last"],
            schedule=codec.from_json(manifest["schedule"]) if manifest["schedule"] else None,
            forecasts=tuple(manifest["forecasts"]),
            structure=structure,
            written=tuple(manifest["written"]),
            programs=programs,
        )
    return artifact, cast(Backend, backend)


def _checked_constant(
    module: nn.Module, name: str, value: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """The module's own tensor of that name, if it has one; it must be the one that was saved."""
    try:
        live: Any = module
        for part in name.split("."):
            live = getattr(live, part)
    except AttributeError:
        live = None
    if not isinstance(live, torch.Tensor):
        return value.to(device)
    if live.shape != value.shape or not torch.equal(live.detach().cpu(), value):
        raise ArtifactError(
            f"saved for another module: the values of {name}, a constant of the graph, differ"
        )
    return live


def _program_of(
    entry: dict[str, Any],
    backend: Saveable,
    files: Mapping[str, bytes],
    libraries: Mapping[str, bytes],
    constants: Mapping[str, torch.Tensor],
) -> Program:
    graphs, prologue = (
        [_graph_of(graph, backend, files, libraries, constants) for graph in entry[part]]
        for part in ("graphs", "prologue")
    )
    return Program(
        treespec_loads(entry["out_spec"]),
        tuple(graphs),
        tuple(CacheLayout(*cut) for cut in entry["cached"]),
        tuple(entry["ratios"]),
        entry["probed"],
        *prologue,
    )


def _graph_of(
    entry: dict[str, Any],
    backend: Saveable,
    files: Mapping[str, bytes],
    libraries: Mapping[str, bytes],
    constants: Mapping[str, torch.Tensor],
) -> CompiledGraph:
    content = {"graph": files[entry["file"]]}
    content |= {name: libraries[name] for name in entry["libraries"]}
    weights = tuple(
        Constant(item["constant"].rpartition("#")[0], constants[item["constant"]])
        if isinstance(item, dict)
        else item
        for item in entry["weights"]
    )
    return CompiledGraph(backend.restore(content), Convention(weights, tuple(entry["inputs"])))


def _guard_of(entry: Any, device: torch.device) -> SizeGuard | None:
    if entry is None:
        return None
    if entry["expression"] is not None:
        parse_condition(entry["expression"])  # raises now rather than at a call
    leaves: list[tuple[int, Any]] = []
    for leaf, wanted in entry["leaves"]:
        if "tensor" in wanted:
            shape, dtype, contiguous = wanted["tensor"]
            dtype = getattr(torch, dtype.removeprefix("torch."))
            leaves.append((leaf, TensorPattern(tuple(shape), dtype, device, contiguous)))
        else:
            leaves.append((leaf, wanted["value"]))
    return SizeGuard(
        tuple(leaves),
        entry["expression"],
        tuple(tuple(item) for item in entry["ranges"]),
        entry["autocast"],
    )


@contextlib.contextmanager
def _as_damage(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while files are taken apart, they are not what they should be."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{folder} cannot be loaded: {type(error).__name__}: {error}; save it again"
        ) from error
