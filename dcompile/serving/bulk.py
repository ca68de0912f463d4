"""Bulk generation: a picture for each row of a file, resumable, the same however often it stops.

Everything that decides about a picture is fixed before the first: chunks are planned from the file
alone, every chunk is one batch, and all processes go by the schedule that the first one found and
wrote down. Nothing here knows Ray; ``generate_all`` is given what spreads chunks over processes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dcompile import models
from dcompile.errors import DcompileError, JobError, first_line
from dcompile.policy.self_tuned import SelfTuned
from dcompile.serving.bulk_folder import FORMS, Output, Record
from dcompile.serving.bulk_rows import Chunk, Failure, Kind, Row, kinds_of, read_prompts
from dcompile.serving.engine import Engine
from dcompile.serving.fleet import PROGRAMS, as_built, local_folder, read_record
from dcompile.serving.jobs import Job
from dcompile.serving.pictures import Picture, Trace, digest, encoded
from dcompile.serving.settings import EngineSettings
from dcompile.serving.worker import FATAL
from dcompile.storage.cache_folder import cache_folder
from dcompile.version import __version__

MOST_DEATHS = 3  # processes that a chunk may take with it before its rows fail


class BrokenDeviceError(Exception):
    """The device answers nothing any more: this process has to end, another takes over."""


@dataclass(frozen=True)
class BulkSettings:
    """What decides about the pictures, apart from the rows.

    Attributes:
        engine: how the model is loaded and cached.
        batch: rows of a chunk, at most.
        seed: of the first row, where a row has none; each further one adds 1.
        form: one of ``bulk_folder.FORMS``.
        threads: of torch in each process. Sums on a CPU depend on it.
    """

    engine: EngineSettings
    batch: int = 8
    seed: int = 0
    form: str = "parquet"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DcompileError(f"format: expected one of {', '.join(FORMS)}, got {self.form!r}")
        if not 0 <= self.seed < 2**63:
            raise DcompileError(f"seed: expected an int of 0 to 2**63 - 1, got {self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what a folder's earlier run is compared by."""
        engine = asdict(self.engine)
        return {
            "model": models.ALIASES.get(self.engine.model, self.engine.model),
            **self.engine.caching_arguments(),
            **{
                name: engine[name]
                for name in ("backend", "device", "steps", "programs", "loras", "components")
            },
            **{name: getattr(self, name) for name in ("batch", "seed", "form", "threads")},
            "dcompile": __version__,
            "torch": torch.__version__,
        }


@dataclass(frozen=True)
class Task:
    """What each process is given.

    Attributes:
        settings: see there.
        output: where pictures go.
        warm_up: kinds of the rows, the first of them first.
        has_prompts: whether the file has a column ``prompt``.
    """

    settings: BulkSettings
    output: Output
    warm_up: tuple[Kind, ...]
    has_prompts: bool


@dataclass
class Report:
    """What became of a chunk.

    Attributes:
        chunk: its name.
        present: its rows that have a picture now.
        failures: rows that have none.
        steps: steps of the pictures made.
        cost: the same in full steps, by their FLOPs.
        fatal: why nothing more can be made by anyone; None if that is not so.
    """

    chunk: str
    present: int = 0
    failures: list[Failure] = field(default_factory=list)
    steps: float = 0.0
    cost: float = 0.0
    fatal: str | None = None


@dataclass
class Summary:
    """How a run went.

    Attributes:
        rows: of the file.
        made: pictures of this run.
        present: pictures that were there.
        failed: rows without a picture.
        seconds: that this run took.
        flops_speedup: FLOPs of uncached runs over those of this run's; None if it made nothing.
        manifest: the file with all rows.
    """

    rows: int
    made: int
    present: int
    failed: int
    seconds: float
    flops_speedup: float | None
    manifest: Path


class Maker:
    """Makes chunks in one process, with one engine.

    Args:
        task: what is to be done.
        build: makes the engine, when the first chunk needs it.
    """

    def __init__(self, task: Task, build: Callable[[EngineSettings], Engine] = Engine.of) -> None:
        self._task = task
        self._build = build
        self._engine: Engine | None = None

    def make(self, chunk: Chunk) -> Report:
        """Generate what a chunk lacks, and write it.

        Raises:
            BrokenDeviceError: see there.
        """
        try:
            return self._make(chunk)
        except DcompileError as error:
            return Report(chunk.name, fatal=str(error))

    def _make(self, chunk: Chunk) -> Report:
        output = self._task.output
        present = output.present(chunk)
        rows = [row for row in chunk.rows if row.number not in present]
        if not rows:  # written by a process that died before it could say so
            return Report(chunk.name, len(present))
        report = Report(chunk.name, len(present))
        with output.attempt(chunk) as deaths:
            if deaths >= MOST_DEATHS:
                reason = f"{deaths} processes died while they made this row's chunk"
                report.failures += [_failure(row, reason) for row in rows]
                return report
            if self._engine is None:
                self._engine = prepared(self._task, self._build)
            jobs = self._accepted(self._engine, rows, report)
            # What failed before is tried alone: the other rows of its chunk are there already.
            pictures = self._pictures(self._engine, jobs, report, together=not present)
            if pictures:
                output.add(chunk, [self._record(*made) for made in pictures])
            report.present += len(pictures)
        return report

    def _accepted(
        self, engine: Engine, rows: Sequence[Row], report: Report
    ) -> list[tuple[Row, Job]]:
        about, default = engine.describe(), engine.default_job()
        jobs = []
        for row in rows:
            job = row.job(default)
            try:
                _require_taken(job, row, about)
                engine.check(job)
            except JobError as error:
                report.failures.append(_failure(row, str(error)))
            else:
                jobs.append((row, job))
        return jobs

    def _pictures(
        self, engine: Engine, jobs: list[tuple[Row, Job]], report: Report, together: bool
    ) -> list[tuple[Row, Job, Picture]]:
        pictures: list[Picture] = []
        if jobs and (together or len(jobs) == 1):
            try:
                pictures = engine.generate([job for _, job in jobs])
            except Exception as error:
                if any(sign in str(error) for sign in FATAL):
                    raise BrokenDeviceError(first_line(error)) from error
                if len(jobs) == 1:
                    report.failures.append(_failure(jobs[0][0], first_line(error)))
                    return []
        # Not in the handler, where the error would keep the memory of the run that failed.
        if not pictures:
            alone = [self._pictures(engine, [one], report, True) for one in jobs]
            return [made for found in alone for made in found]
        for picture in pictures:
            steps = len(picture.trace.levels)
            report.steps += steps
            report.cost += steps / picture.trace.flops_speedup
        return [(row, job, made) for (row, job), made in zip(jobs, pictures, strict=True)]

    def _record(self, row: Row, job: Job, picture: Picture) -> Record:
        form = "png" if self._task.settings.form == "parquet" else self._task.settings.form
        return Record(
            row=row.number,
            prompt=job.prompt,
            seed=job.seed,
            width=picture.image.width,
            height=picture.image.height,
            image=encoded(picture.image, form, quality=100),
            digest=digest(picture.image),
            notes="; ".join((*picture.notes, *_uncached(picture.trace))),
            carried=row.carried,
        )


def _failure(row: Row, reason: str) -> Failure:
    return Failure(row.number, row.carried["id"], reason)


def _uncached(trace: Trace) -> list[str]:
    """Calls that ran uncached, as where the denoiser could not be captured for lack of memory."""
    return [f"{count} calls ran uncached: {why}" for why, count in trace.uncached_reasons.items()]


def _require_taken(job: Job, row: Row, about: dict[str, Any]) -> None:
    if about["prompt"] and not job.prompt.strip():
        raise JobError("prompt", "expected some text")
    if job.negative_prompt and not about["negative_prompt"]:
        raise JobError("negative_prompt", f"{about['model']} takes none")
    if row.kind.guidance is not None and not about["takes_guidance"]:
        raise JobError("guidance", f"{about['model']} takes none")


def prepared(task: Task, build: Callable[[EngineSettings], Engine]) -> Engine:
    """An engine in the one state that all processes of a run start from.

    The first process of the run makes a picture, so that its kind of run is watched if the schedule
    tunes itself, and writes down what was found. All others, and all later runs into the folder,
    take that over instead of watching one themselves.

    Raises:
        DcompileError: the model cannot be loaded or run, needs prompts that are not there, or is on
            another kind of device than before.
    """
    settings = task.settings
    torch.set_num_threads(settings.threads)
    engine = build(_with_programs(settings.engine))
    if engine.describe()["prompt"] and not task.has_prompts:
        raise DcompileError(
            f"{settings.engine.name} needs prompts: expected a column 'prompt' in the file"
        )
    device = str(engine.pipeline.device.type)

    def find() -> dict[str, Any]:
        _warm_up(engine, task.warm_up)
        engine.freeze()
        schedule = engine.handle.schedule
        tuned = schedule.as_json() if isinstance(schedule, SelfTuned) else None
        return {"device": device, "schedule": tuned}

    agreed = task.output.agree(find)
    if agreed["device"] != device:
        raise DcompileError(
            f"the pictures in {task.output.folder} were made on {agreed['device']}, and this "
            f"process has {device}: go on there, or give another folder"
        )
    if agreed["schedule"] is not None and settings.engine.programs is None:
        engine.configure(schedule=SelfTuned.of_fields(**agreed["schedule"]))
    engine.freeze()
    return engine


def _with_programs(settings: EngineSettings) -> EngineSettings:
    """The settings to load what ``dcompile build`` wrote; the same ones if there is nothing.

    Raises:
        ArtifactError: it is damaged.
    """
    if settings.programs is None:
        return settings
    downloads = cache_folder() or Path(tempfile.gettempdir())
    folder = local_folder(settings.programs, downloads)
    own = as_built(settings, read_record(folder))
    return replace(own, programs=str(folder / PROGRAMS))


def _warm_up(engine: Engine, kinds: Sequence[Kind]) -> None:
    """Generate once as the first kind of row that the model does."""
    default = engine.default_job()
    tried = [
        replace(default, steps=kind.steps or default.steps, sampler=kind.sampler) for kind in kinds
    ]
    for job in dict.fromkeys((*tried, default)):
        try:
            engine.check(job)
            engine.generate([job])
        except JobError:
            continue
        except Exception as error:
            if any(sign in str(error) for sign in FATAL):
                raise BrokenDeviceError(first_line(error)) from error
            if job == default:
                raise DcompileError(
                    f"{engine.settings.name} cannot make a picture with its own settings: "
                    f"{first_line(error)}"
                ) from error
        else:
            return


Runner = Callable[[Task, Sequence[Chunk]], Iterable[Report]]


def generate_all(
    prompts: Path,
    folder: Path,
    settings: BulkSettings,
    run: Runner,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Summary:
    """Make a picture for each row of a file, as far as it is not there.

    Args:
        prompts: see ``read_prompts``.
        folder: where the pictures go.
        settings: see there.
        run: makes chunks, in any order, by ``Maker.make`` in processes of its own or in this one.
        progress: is told how many of how many rows that were left are done.

    Raises:
        DcompileError: the file cannot be read, the folder is another run's or in use, the model
            cannot be run, or pictures cannot be written. What is complete is kept.
    """
    began = time.perf_counter()
    found = read_prompts(prompts, settings.seed)
    said = {**settings.as_dict(), "prompts": found.digest}
    chunks = found.chunks(settings.batch, said)
    output = Output(folder.absolute(), settings.form, found.schema)
    with output.locked():
        output.begin(said)
        present = {chunk.name: len(output.present(chunk)) for chunk in chunks}
        left = [chunk for chunk in chunks if present[chunk.name] < len(chunk.rows)]
        task = Task(settings, output, tuple(kinds_of(chunks)), found.has_prompts)
        total = _Total(len(found.rows), present, list(found.bad), progress)
        reports = run(task, left) if left else iter(())
        try:
            total.follow(reports)
        finally:
            # Processes end while the folder is still locked.
            if isinstance(reports, Generator):
                reports.close()
            output.fail(total.failures)
        manifest = output.finish(chunks)
    return Summary(
        rows=len(found.rows) + len(found.bad),
        made=total.made,
        present=sum(present.values()),
        failed=len(total.failures),
        seconds=time.perf_counter() - began,
        flops_speedup=total.steps / total.cost if total.cost else None,
        manifest=manifest,
    )


@dataclass
class _Total:
    """Adds up what is reported; ``present`` is what was there before, by chunk."""

    rows: int
    present: dict[str, int]
    failures: list[Failure]
    progress: Callable[[int, int], None]
    made: int = 0
    steps: float = 0.0
    cost: float = 0.0

    def follow(self, reports: Iterable[Report]) -> None:
        done, left = 0, self.rows - sum(self.present.values())
        self.progress(done, left)
        for report in reports:
            if report.fatal is not None:
                raise DcompileError(report.fatal)
            made = report.present - self.present[report.chunk]
            self.made += made
            self.failures += report.failures
            self.steps += report.steps
            self.cost += report.cost
            done += made + len(report.failures)
            self.progress(done, left)
