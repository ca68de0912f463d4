"""``dcompile build``: compiles a model's programs ahead, in parallel processes, for a fleet."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dcompile.errors import ArtifactError, DcompileError, first_line
from dcompile.models.loading import resolve_device
from dcompile.serving.engine import Engine
from dcompile.serving.fleet import (
    PROGRAMS,
    Check,
    Record,
    check_of,
    machine_of,
    read_picture,
    write_record,
)
from dcompile.serving.jobs import Job
from dcompile.serving.samplers import samplers_for_programs
from dcompile.serving.settings import EngineSettings
from dcompile.storage.merge import merge

T = TypeVar("T")
Told = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Attributes:
        settings: of the engine; without programs.
        sizes: of pictures, width and height in pixels; none for the model's own.
        batches: pictures in a batch.
        steps: numbers of steps; a run of each is watched, where the settings have a ``speedup``.
    """

    settings: EngineSettings
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (20,)

    def recorded_settings(self) -> dict[str, Any]:
        """Those that programs depend on, see ``fleet.Record``."""
        return {
            **self.settings.caching_arguments(),
            "backend": self.settings.backend,
            "options": dict(self.settings.options),
        }


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        record: see ``fleet.Record``.
        failed: (size and batch, why not) of what could not be compiled.
    """

    record: Record
    failed: tuple[tuple[str, str], ...]


def build(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 0,
    told: Told = lambda line: None,
    is_background: bool = False,
) -> Built:
    """Compile a model's programs for all sizes and batches, and write them to a folder.

    One process watches runs, finds the schedule and compiles the first size; the others, one for
    each further size and batch, compile for that schedule side by side.

    Args:
        plan: what to build.
        folder: where to write; what was built there before is replaced at the end.
        processes: that compile at a time; 0 for one per four processors.
        told: is given a line about each thing that is done.
        is_background: whether something else on this machine matters more.

    Raises:
        DcompileError: the first size cannot be compiled, or the folder cannot be written.
    """
    processes = processes or max(1, (os.cpu_count() or 1) // 4)
    combinations = [(size, batch) for batch in plan.batches for size in plan.sizes or ((0, 0),)]
    failed: list[tuple[str, str]] = []
    with _workplace(folder) as place, _pool(processes, is_background) as pool:
        first = place / "0"
        record, picture = _result(pool.submit(_first, plan, *combinations[0], first))
        told(f"{_name(*combinations[0])}: compiled; {record.check.psnr:.1f} dB against uncached")
        settings = replace(plan.settings, programs=str(first))
        waiting = {
            pool.submit(_further, settings, plan.steps[0], size, batch, place / str(number)): (
                size,
                batch,
                place / str(number),
            )
            for number, (size, batch) in enumerate(combinations[1:], start=1)
        }
        done = [first]
        for future in as_completed(waiting):
            size, batch, part = waiting[future]
            try:
                _result(future)
            except DcompileError as error:
                failed.append((_name(size, batch), str(error)))
                told(f"{_name(size, batch)}: failed: {error}")
            else:
                done.append(part)
                told(f"{_name(size, batch)}: compiled")
        merge(sorted(done, key=lambda part: int(part.name)), folder / PROGRAMS)
        write_record(folder, record, picture)
    return Built(record, tuple(failed))


def extend(
    settings: EngineSettings, record: Record, folder: Path, target: Path, job: Job, batch: int
) -> Record:
    """Programs for one more job in such a batch, with those that there are, in another folder.

    Raises:
        DcompileError: it cannot be compiled.
    """
    with _workplace(target) as place, _pool(1, is_background=True) as pool:
        own = replace(
            settings, programs=str(folder / PROGRAMS), new_calls="compile", components=False
        )
        size = (job.width, job.height)
        _result(pool.submit(_asked, own, replace(job, lora=""), batch, place / "1"))
        merge([folder / PROGRAMS, place / "1"], target / PROGRAMS)
        known = dict.fromkeys([*record.sizes, size]), dict.fromkeys([*record.batches, batch])
        wider = replace(record, sizes=tuple(known[0]), batches=tuple(known[1]))
        write_record(target, wider, read_picture(folder, record))
    return wider


def _first(plan: Plan, size: tuple[int, int], batch: int, folder: Path) -> tuple[Record, bytes]:
    """In a process of its own: find the schedule, compile for the first size, make the check."""
    engine = Engine.of(plan.settings)
    job = _sized(engine.default_job(), size)
    engine.check(job)
    for steps in plan.steps:
        engine.generate([replace(job, steps=steps)])  # watched
    engine.freeze()
    job = replace(job, steps=plan.steps[0])
    for sampler in samplers_for_programs(engine.pipeline):
        engine.generate(_batch(replace(job, sampler=sampler), batch))
    check, picture = check_of(engine, job)
    engine.handle.save(folder)
    record = _record(engine, plan, check)
    return record, picture


def _further(
    settings: EngineSettings, steps: int, size: tuple[int, int], batch: int, folder: Path
) -> None:
    """In a process of its own: compile for one more size and batch."""
    engine = Engine.of(settings)
    job = replace(_sized(engine.default_job(), size), steps=steps)
    _compile(engine, job, batch, samplers_for_programs(engine.pipeline), folder)


def _asked(settings: EngineSettings, job: Job, batch: int, folder: Path) -> None:
    """In a process of its own: compile for one more job."""
    _compile(Engine.of(settings), job, batch, [job.sampler], folder)


def _compile(engine: Engine, job: Job, batch: int, samplers: Sequence[str], folder: Path) -> None:
    engine.check(job)
    for sampler in samplers:
        pictures = engine.generate(_batch(replace(job, sampler=sampler), batch))
        if pictures[0].trace.uncached_reasons:
            raise ArtifactError(next(iter(pictures[0].trace.uncached_reasons)))
    engine.handle.save(folder)


def _record(engine: Engine, plan: Plan, check: Check) -> Record:
    own = engine.default_job()
    return Record(
        model=plan.settings.name,
        settings=plan.recorded_settings(),
        machine=machine_of(resolve_device(plan.settings.device)),
        sizes=plan.sizes or ((own.width, own.height),),
        batches=plan.batches,
        steps=plan.steps,
        check=check,
    )


def _sized(job: Job, size: tuple[int, int]) -> Job:
    return replace(job, width=size[0], height=size[1]) if size != (0, 0) else job


def _batch(job: Job, count: int) -> list[Job]:
    return [job.with_seed(job.seed + number) for number in range(count)]


def _name(size: tuple[int, int], batch: int) -> str:
    sides = f"{size[0]}x{size[1]}" if size != (0, 0) else "the model's size"
    return f"{sides}, batch {batch}"


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder for parts, on the same file system; removed afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _pool(processes: int, is_background: bool) -> ProcessPoolExecutor:
    # Spawned: a forked process has the locks of torch's threads without the threads.
    context = multiprocessing.get_context("spawn")
    if is_background:
        return ProcessPoolExecutor(processes, context, os.nice, (10,))
    return ProcessPoolExecutor(processes, context)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except DcompileError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot build: {first_line(error)}") from error
    except Exception as error:  # a process that was killed, for want of memory say
        raise DcompileError(f"compiling failed: {first_line(error)}") from error
