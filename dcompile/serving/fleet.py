"""A folder of programs for a fleet: what was built, for which machine, and a picture to check by.

``dcompile build`` writes it, replicas read it. It holds ``fleet.json``, ``programs/`` (see
``storage.artifact``) and a picture named by its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image

from dcompile.errors import ArtifactError, JobError
from dcompile.serving.engine import Engine
from dcompile.serving.jobs import Caching, Job
from dcompile.serving.pictures import Picture, digest, encoded, psnr
from dcompile.serving.settings import EngineSettings
from dcompile.storage.artifact import machine
from dcompile.storage.folder import MANIFEST, read_files, sealed, sha256_of, write_in_one_step
from dcompile.version import __version__

FORMAT = 1
RECORD, PROGRAMS = "fleet.json", "programs"
# Another processor or library rounds differently: so much below the PSNR that was measured where
# the programs were built is no sign of a fault.
ALLOWED_LOSS = 3.0  # dB
# An uncached picture of the same weights, made elsewhere, is at least so close.
SAME_WEIGHTS = 25.0  # dB
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Check:
    """A picture that tells whether a replica generates what it should.

    Attributes:
        job: what it shows.
        uncached, cached: digests of the picture without and with caching, where it was built.
        psnr: of the cached one against the uncached one, in dB.
        picture: SHA-256 of the file that has the uncached one.
        file: name of that file: another one for another picture, so that a record and its picture
            are replaced in one step.
    """

    job: Job
    uncached: str
    cached: str
    psnr: float
    picture: str

    @property
    def file(self) -> str:
        return f"uncached-{self.picture[:16]}.png"


@dataclass(frozen=True)
class Record:
    """What ``fleet.json`` says.

    Attributes:
        model: name of what it was built for.
        settings: those of ``EngineSettings`` that programs depend on.
        machine: see ``machine_of``.
        sizes: of pictures, width and height in pixels.
        batches: pictures in a batch.
        steps: numbers of steps whose runs were watched.
        check: see ``Check``.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, str]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    check: Check

    def difference(self, here: Mapping[str, str]) -> str | None:
        """Why the programs do not fit a machine; None if they do."""
        for name in sorted(self.machine.keys() | here.keys()):
            if self.machine.get(name) != here.get(name):
                return (
                    f"built where {name} is {self.machine.get(name)!r}; here it is "
                    f"{here.get(name)!r}"
                )
        return None


def as_built(settings: EngineSettings, record: Record) -> EngineSettings:
    """These settings, with how runs are cached as the programs were built for."""
    own = record.settings
    return replace(
        settings,
        speedup=own.get("speedup"),
        interval=own.get("interval"),
        backend=own["backend"],
        options=own["options"],
    )


def machine_of(device: torch.device) -> dict[str, str]:
    """What programs depend on: torch, diffusers, processor; on CUDA the card and driver, too."""
    found = machine(device)
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError):
            found["driver"] = _DRIVER.read_text().splitlines()[0].strip()
    return found


def digest_of_machine(device: torch.device) -> str:
    """A short name of ``machine_of``."""
    content = json.dumps(machine_of(device), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def check_of(engine: Engine, job: Job) -> tuple[Check, bytes]:
    """Make the picture to check by, without and with caching; with the uncached one's file."""
    (uncached,) = engine.generate([_with(job, Caching("off"))])
    (cached,) = engine.generate([_with(job, Caching())])
    content = encoded(uncached.image, "png")
    return (
        Check(
            job=job,
            uncached=digest(uncached.image),
            cached=digest(cached.image),
            psnr=min(100.0, psnr(cached.image, uncached.image)),
            picture=sha256_of(content),
        ),
        content,
    )


def require_as_built(engine: Engine, folder: Path, record: Record) -> str:
    """Generate the picture to check by, and compare.

    Returns:
        How it compares, for the log.

    Raises:
        ArtifactError: this is not the model that the programs were built for, or they compute
            something else here.
    """
    (found,) = engine.generate([record.check.job])
    return _compared(found, folder, record, record.check.psnr - ALLOWED_LOSS, record.check.cached)


def require_same_weights(engine: Engine, folder: Path, record: Record) -> str:
    """The same without programs: compares uncached pictures."""
    job = _with(record.check.job, Caching("off"))
    try:
        engine.check(job)
    except JobError as error:
        raise ArtifactError(f"{folder} was built for {record.model}: {error}") from error
    (found,) = engine.generate([job])
    return _compared(found, folder, record, SAME_WEIGHTS, record.check.uncached)


def _compared(found: Picture, folder: Path, record: Record, least: float, exact: str) -> str:
    if digest(found.image) == exact:
        return "bit for bit the picture that was made where the programs were built"
    content = read_picture(folder, record)
    reached = psnr(found.image, Image.open(io.BytesIO(content)))
    if reached < least:
        raise ArtifactError(
            f"the picture to check by has {reached:.1f} dB against the uncached one of {folder}, "
            f"expected at least {least:.1f}: the weights are others, or the programs compute "
            "something else here. Build them again with this model"
        )
    return f"{reached:.1f} dB against the uncached picture, {record.check.psnr:.1f} there"


def _with(job: Job, caching: Caching) -> Job:
    return Job(**{**_fields(job), "caching": caching})


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__dataclass_fields__}


# The folder ---------------------------------------------------------------------------------------


def write_record(folder: Path, record: Record, picture: bytes) -> None:
    """Write the record and its picture, next to the programs; ``fleet.json`` last, in one step.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        write_in_one_step(folder / record.check.file, picture)
        write_in_one_step(folder / RECORD, sealed(_as_json(record)))
        for other in folder.glob("uncached-*.png"):
            if other.name != record.check.file:
                other.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error


def read_record(folder: Path) -> Record:
    """What was built, with its programs and picture checked to be whole.

    Raises:
        ArtifactError: the folder is missing or damaged, or another version wrote it.
    """
    record = _of_json(folder, _read_sealed(folder))
    programs = folder / PROGRAMS
    parts = [programs] if (programs / MANIFEST).exists() else sorted(programs.glob("*/"))
    if not parts:
        raise ArtifactError(f"{folder} is damaged: it has no programs; build it again")
    for part in parts:
        read_files(part)  # raises if a file is not what was written
    read_picture(folder, record)
    return record


def read_picture(folder: Path, record: Record) -> bytes:
    """The file of the uncached picture.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    file = folder / record.check.file
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from error
    if sha256_of(content) != record.check.picture:
        raise ArtifactError(f"{folder} is damaged: {file.name} is not what was written")
    return content


def _read_sealed(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RECORD).read_bytes())
        seal = content.pop("seal")
        whole = json.loads(sealed(content))["seal"] == seal
    except OSError as error:
        raise ArtifactError(
            f"{folder} was not built: {RECORD} cannot be read ({error.strerror or error}). "
            "dcompile build writes it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder} is damaged: {RECORD} cannot be parsed") from error
    if not whole:
        raise ArtifactError(f"{folder} is damaged: {RECORD} is not what was written")
    if content.get("format") != FORMAT or content.get("dcompile") != __version__:
        raise ArtifactError(
            f"{folder} was built by dcompile {content.get('dcompile')!r}, this is {__version__}: "
            "build it again"
        )
    found: dict[str, Any] = content
    return found


def _as_json(record: Record) -> dict[str, Any]:
    return {"format": FORMAT, "dcompile": __version__, **asdict(record)}


def _of_json(folder: Path, content: Mapping[str, Any]) -> Record:
    try:
        check = dict(content["check"])
        job = dict(check.pop("job"))
        job["caching"] = Caching(*job["caching"])
        return Record(
            model=content["model"],
            settings=dict(content["settings"]),
            machine=dict(content["machine"]),
            sizes=tuple((width, height) for width, height in content["sizes"]),
            batches=tuple(content["batches"]),
            steps=tuple(content["steps"]),
            check=Check(job=Job(**job), **check),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} is damaged: {RECORD} lacks something: {error}") from error


# Object storage -----------------------------------------------------------------------------------


def is_address(place: str) -> bool:
    """Whether this is one of fsspec's addresses, such as ``s3://bucket/folder``."""
    return "://" in place


def local_folder(place: str, downloads: Path) -> Path:
    """The folder that ``dcompile build`` wrote, from object storage if need be.

    Args:
        place: a folder, or one of fsspec's addresses.
        downloads: where to copy it to in that case.

    Raises:
        ArtifactError: it cannot be downloaded.
    """
    return download(place, downloads) if is_address(place) else Path(place)


def download(address: str, into: Path) -> Path:
    """Copy a fleet's folder from object storage; checked to be whole.

    Args:
        address: one of fsspec's.
        into: a folder; it gets one of its own for this address.

    Returns:
        The local folder.

    Raises:
        ArtifactError: it cannot be read, or is damaged.
    """
    target = into / hashlib.sha256(address.encode()).hexdigest()[:16]
    filesystem, path = _filesystem(address)
    try:
        into.mkdir(parents=True, exist_ok=True)
        # Replicas start side by side: one downloads, and the others find what it has.
        with FileLock(into / f".{target.name}.lock"):
            _fetch(filesystem, path, target)
    except ArtifactError as error:
        raise ArtifactError(f"{address}: {error}") from error
    except Exception as error:  # each file system has its own errors
        raise ArtifactError(f"cannot read {address}: {type(error).__name__}: {error}") from error
    return target


def _fetch(filesystem: Any, path: str, target: Path) -> None:
    """Replace a folder by the one at ``path``, unless they have the same record."""
    fresh = bytes(filesystem.cat_file(f"{path}/{RECORD}"))
    with contextlib.suppress(OSError, ArtifactError):
        if (target / RECORD).read_bytes() == fresh:
            read_record(target)
            return
    draft = target.with_name(f".{uuid.uuid4().hex[:16]}")
    draft.mkdir()
    try:
        filesystem.get(f"{path}/", f"{draft}/", recursive=True)
        read_record(draft)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def upload(folder: Path, address: str) -> None:
    """Copy a fleet's folder to object storage, its record last: readers find all or nothing.

    Raises:
        ArtifactError: it cannot be written.
    """
    filesystem, path = _filesystem(address)
    files = sorted(one for one in folder.rglob("*") if one.is_file() and one.name[0] != ".")
    try:
        for file in sorted(files, key=lambda one: (one.name == RECORD, one.name == MANIFEST)):
            place = f"{path}/{file.relative_to(folder).as_posix()}"
            filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(file), place)
    except Exception as error:  # each file system has its own errors
        raise ArtifactError(f"cannot write {address}: {type(error).__name__}: {error}") from error


def _filesystem(address: str) -> tuple[Any, str]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ArtifactError(f"cannot reach {address}: {error}") from error
    return filesystem, str(path).rstrip("/")
