"""Programs for a fleet: built side by side, checked where they are loaded, replaced in the open."""

import asyncio
import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcompile import ArtifactError, DcompileError
from dcompile.serving import fleet
from dcompile.serving.build import Plan, build
from dcompile.serving.engine import Engine
from dcompile.serving.jobs import Job
from dcompile.serving.replica import Replica
from dcompile.serving.settings import EngineSettings
from dcompile.serving.worker import Made, Request, Ticket
from dcompile.storage import folder as folders

# In one process of xdist's: all share what is built.
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("fleet")]
SETTINGS = EngineSettings("emoji-sd", speedup=2.0, backend="eager", steps=4, device="cpu")
PLAN = Plan(SETTINGS, ((64, 64), (72, 64)), (1, 2), (4,))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "fleet"
    lines: list[str] = []
    found = build(PLAN, folder, processes=2, told=lines.append)
    assert not found.failed
    assert sorted(line.partition(":")[0] for line in lines) == [
        "64x64, batch 1",
        "64x64, batch 2",
        "72x64, batch 1",
        "72x64, batch 2",
    ]
    picture = fleet.read_record(folder).check.file
    assert {one.name for one in folder.iterdir()} == {"fleet.json", "programs", picture}
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "fleet"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change(folder: Path, **fields: Any) -> None:
    """Edit the record as somebody would who knows how it is sealed."""
    content = json.loads((folder / fleet.RECORD).read_text())
    del content["seal"]
    (folder / fleet.RECORD).write_bytes(folders.sealed({**content, **fields}))


def made(replica: Replica, *jobs: Job) -> list[Made]:
    async def main() -> list[Any]:
        return await replica.worker.run_batch([Ticket(Request(job)) for job in jobs])

    found = asyncio.run(main())
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    found: list[Replica] = []
    yield found
    for replica in found:
        replica.close()


def started(folder: Path | str, replicas: list[Replica]) -> Replica:
    replicas.append(Replica(replace(SETTINGS, programs=str(folder)), "here"))
    return replicas[-1]


def test_programs_that_fit(built: Path, replicas: list[Replica]) -> None:
    replica = started(built, replicas)
    assert replica.programs == f"shipped: {built}"
    assert replica.check == "bit for bit the picture that was made where the programs were built"
    job = replica.worker.engine.default_job("dog", 5)
    for wide in (64, 72):
        jobs = [replace(job, width=wide).with_seed(seed) for seed in range(3)]
        found = made(replica, *jobs)
        assert [one.trace["batch"] for one in found] == [2, 2, 1]
        assert all("uncached" not in one.trace["steps"] for one in found)
    assert found[0].snapshot.captures == 0


def test_a_size_without_a_program(built: Path, cache: Path, replicas: list[Replica]) -> None:
    replica = started(built, replicas)
    job = replace(replica.worker.engine.default_job("dog", 5), width=80)
    (first,) = made(replica, job)
    assert set(first.trace["steps"]) == {"uncached"}
    (reason,) = first.trace["uncached_reasons"]
    assert "no saved program serves a call" in reason
    assert replica.wait(120)
    (second,) = made(replica, job)
    assert "uncached" not in second.trace["steps"]
    assert replica.programs == "with 80x64, batch 1"
    (plain,) = made(replica, replace(job, width=64))
    assert "uncached" not in plain.trace["steps"]
    (sampler,) = made(replica, replace(job, width=64, sampler="EulerDiscreteScheduler"))
    assert "uncached" not in sampler.trace["steps"], "its timesteps are fractional"
    without = replace(job, width=64, guidance=1.0)
    assert "uncached" in made(replica, without)[0].trace["steps"]
    assert replica.wait(120)
    assert "uncached" not in made(replica, without)[0].trace["steps"]


@pytest.mark.parametrize("error", [ArtifactError("other weights"), RuntimeError("no memory")])
def test_new_programs_that_fail_are_not_used(
    built: Path,
    cache: Path,
    replicas: list[Replica],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    replica = started(built, replicas)
    job = replica.worker.engine.default_job("dog", 5)
    (expected,) = made(replica, job)
    made(replica, replace(job, width=80))
    assert replica.wait(120)

    def fails(*_: Any) -> str:
        raise error

    monkeypatch.setattr("dcompile.serving.replica.require_as_built", fails)
    (found,) = made(replica, job)  # the batch that comes next is not at fault
    assert (found.digest, found.trace["steps"]) == (expected.digest, expected.trace["steps"])
    assert f"not used: {type(error).__name__}: {error}" in replica.programs
    assert set(made(replica, replace(job, width=80))[0].trace["steps"]) == {"uncached"}
    assert made(replica, job)[0].digest == expected.digest


def test_programs_that_wait_are_not_overtaken(
    built: Path, cache: Path, replicas: list[Replica]
) -> None:
    """What ran when one compilation ended does not begin another from the older programs."""
    replica = started(built, replicas)
    job = replica.worker.engine.default_job("dog", 5)
    first, second = replace(job, width=80), replace(job, width=88)
    made(replica, first)
    assert replica.wait(120)
    replica.worker.after([second], True)
    assert replica.wait(120)
    for wanted in (second, second):
        made(replica, wanted)
        assert replica.wait(120)
    for wanted in (job, first, second):
        assert "uncached" not in made(replica, wanted)[0].trace["steps"]


DAMAGES = {
    "file": "is damaged",
    "record": "cannot be parsed",
    "picture": "png is not what was written",
    "missing": "cannot be read",
    "version": "was built by dcompile '0.0.1'",
}


def damaged(folder: Path, damage: str) -> None:
    if damage == "file":
        next(folder.glob("programs/data-*/*")).write_bytes(b"x")
    elif damage == "record":
        (folder / fleet.RECORD).write_text((folder / fleet.RECORD).read_text()[:-9])
    elif damage == "picture":
        next(folder.glob("uncached-*.png")).write_bytes(b"x")
    elif damage == "missing":
        shutil.rmtree(folder)
    else:
        change(folder, dcompile="0.0.1")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copy: Path, damage: str) -> None:
    damaged(copy, damage)
    with pytest.raises(ArtifactError, match=DAMAGES[damage]):
        fleet.read_record(copy)


@pytest.mark.parametrize("damage", ["file", "machine"])
def test_programs_that_do_not_fit(
    copy: Path, cache: Path, replicas: list[Replica], damage: str
) -> None:
    """Uncached at first, compiled meanwhile."""
    if damage == "machine":
        change(copy, machine={"torch": "2.13.0", "card": "another"})
    else:
        damaged(copy, damage)
    replica = started(copy, replicas)
    reason = "does not fit: built where" if damage == "machine" else DAMAGES[damage]
    assert replica.programs.startswith("none yet, compiling: ")
    assert reason in replica.programs
    job = replica.worker.engine.default_job("dog", 5)
    (first,) = made(replica, job)
    assert set(first.trace["steps"]) == {"uncached"}
    assert replica.wait(180)
    (second,) = made(replica, job)
    assert "uncached" not in second.trace["steps"], replica.programs
    assert replica.programs == "compiled on this machine"
    assert replica.describe()["ready"]
    again = started(copy, replicas)  # as the next process does
    assert again.programs == "compiled on this machine"
    assert "uncached" not in made(again, job)[0].trace["steps"]


def test_other_weights_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    own = Engine.of

    def changed(settings: EngineSettings) -> Engine:
        engine = own(settings)
        with torch.no_grad():
            for parameter in engine.pipeline.unet.parameters():
                parameter.mul_(1.05)
        return engine

    monkeypatch.setattr(Engine, "of", staticmethod(changed))
    with pytest.raises(ArtifactError, match=r"expected at least .* the weights are others"):
        Replica(replace(SETTINGS, programs=str(copy)), "here")


def test_another_model(built: Path) -> None:
    with pytest.raises(ArtifactError, match="built for emoji-sd"):
        Replica(replace(SETTINGS, model="ddpm-emoji", programs=str(built)), "here")


def test_object_storage(built: Path, cache: Path, replicas: list[Replica]) -> None:
    fleet.upload(built, "memory://bucket/fleet")
    replica = started("memory://bucket/fleet", replicas)
    assert replica.check.startswith("bit for bit")
    local = fleet.download("memory://bucket/fleet", cache / "programs" / "downloads")
    before = (local / fleet.RECORD).stat().st_mtime_ns
    fleet.download("memory://bucket/fleet", cache / "programs" / "downloads")
    assert (local / fleet.RECORD).stat().st_mtime_ns == before, "what is here is downloaded again"


def test_an_upload_ends_with_its_record(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads meanwhile finds none, and not one that lacks something."""
    import fsspec

    memory = fsspec.filesystem("memory")
    put: list[str] = []
    monkeypatch.setattr(memory, "put_file", lambda file, place: put.append(place.split("/")[-1]))
    monkeypatch.setattr(fleet, "_filesystem", lambda address: (memory, "/bucket/order"))
    fleet.upload(built, "memory://bucket/order")
    assert put[-2:] == ["manifest.json", fleet.RECORD]


def test_downloads_side_by_side(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody removes what another one reads."""
    import fsspec

    fleet.upload(built, "memory://bucket/many")
    memory = fsspec.filesystem("memory")
    fetch, fetched = memory.get, []

    def get(source: str, *rest: Any, **options: Any) -> None:
        fetched.append(source)
        fetch(source, *rest, **options)

    monkeypatch.setattr(memory, "get", get)
    monkeypatch.setattr(fleet, "_filesystem", lambda address: (memory, "/bucket/many"))

    def replica(_: int) -> None:
        folder = fleet.download("memory://bucket/many", tmp_path)
        for _ in range(20):
            fleet.read_record(folder)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(replica, range(8)))
    assert len(fetched) == 1


def test_a_damaged_download(built: Path, tmp_path: Path) -> None:
    import fsspec

    fleet.upload(built, "memory://bucket/bad")
    memory = fsspec.filesystem("memory")
    file = next(one for one in memory.find("/bucket/bad") if "data-" in one)
    memory.pipe_file(file, b"x")
    with pytest.raises(ArtifactError, match=r"memory://bucket/bad: .* is damaged"):
        fleet.download("memory://bucket/bad", tmp_path)
    assert not [one for one in tmp_path.iterdir() if one.suffix != ".lock"]
    with pytest.raises(ArtifactError, match="cannot read memory://bucket/none"):
        fleet.download("memory://bucket/none", tmp_path)
    with pytest.raises(ArtifactError, match="cannot reach nowhere://x"):
        fleet.download("nowhere://x", tmp_path)


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(DcompileError, match="width: expected a multiple of 8"):
        build(replace(PLAN, sizes=((63, 64),)), tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        build(PLAN, tmp_path / "file")


def test_a_full_disk(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before is untouched."""
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    record = fleet.read_record(copy)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        fleet.write_record(copy, record, b"picture")
    assert before == {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
