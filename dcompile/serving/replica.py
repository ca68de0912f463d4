"""One process that generates with one model: how it starts, and what it compiles meanwhile.

1. Programs that fit are loaded, and a picture is compared with the one made where they were built.
2. Programs that do not fit, or are damaged, are compiled again in other processes, with low
   priority, and kept for the next start. Until they are done requests run uncached.
3. A size or batch that has no program runs uncached, and its program is compiled in the same way.
4. Without shipped programs they are compiled now, before the first request, and later when a
   request needs others.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcompile.errors import ArtifactError, DcompileError, first_line
from dcompile.models.loading import resolve_device
from dcompile.notices import logger
from dcompile.serving.build import extend
from dcompile.serving.compiled_here import CompiledHere
from dcompile.serving.engine import Engine
from dcompile.serving.fleet import (
    PROGRAMS,
    Record,
    as_built,
    local_folder,
    machine_of,
    read_record,
    require_as_built,
    require_same_weights,
)
from dcompile.serving.jobs import DEFAULT, Job
from dcompile.serving.settings import EngineSettings
from dcompile.serving.worker import Worker
from dcompile.storage.cache_folder import cache_folder

# Kinds of calls that are compiled during traffic; further ones stay uncached, so that requests
# cannot keep a machine compiling.
MOST_EXTRA = 4
COMPILED_HERE = "compiled on this machine"


class Replica:
    """A worker, and the programs of its engine.

    Starting takes seconds with programs that fit, and as long as compiling takes without any.

    Args:
        settings: of the engine. ``programs`` is a folder of ``dcompile build``'s or its address.
        name: of this process, in metrics.

    Attributes:
        worker: runs requests.
        programs: what it runs with, for people.
        check: how the picture to check by compared; empty without one.

    Raises:
        ArtifactError: the model's weights are not those that the programs were built for.
        DcompileError: the model cannot be loaded.
    """

    def __init__(self, settings: EngineSettings, name: str) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._tried: set[tuple[Any, ...]] = set()
        self._thread: threading.Thread | None = None
        self._is_waiting = False  # for the next batch, to use new programs from then on
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._widened: tempfile.TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._record: Record | None = None
        self.check = ""
        engine, batches = self._started()
        self.worker = Worker(engine, name, batches)
        self.worker.after = self._after
        if self._folder is None and settings.programs is not None:
            self._begin(self._rebuild)

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``; with "ready", "programs" and "check"."""
        return {
            **self.worker.engine.describe(),
            "ready": self.worker.failure is None,
            "reason": self.worker.failure or "",
            "programs": self.programs,
            "check": self.check,
        }

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is compiled in the background; whether that is so."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """End the threads; what is compiled in the background is given up with the process."""
        self.worker.close()
        for folder in (self._temporary, self._widened):
            if folder is not None:
                folder.cleanup()

    def _started(self) -> tuple[Engine, tuple[int, ...]]:
        settings = self._settings
        if settings.programs is None:
            engine = Engine.of(settings)
            job = engine.default_job()
            for _ in range(2):  # the first run may be watched, the second one compiles
                engine.generate([job])
            engine.freeze()
            self.programs = "compiled at the start"
            return engine, (1,)
        try:
            folder = self._local(settings.programs)
            self._record = read_record(folder)
            other = self._record.difference(machine_of(resolve_device(settings.device)))
            if other is not None:
                raise ArtifactError(f"{settings.programs} does not fit: {other}")
            engine = self._with(folder)
            self.check = require_as_built(engine, folder, self._record)
        except ArtifactError as error:
            return self._started_here() or (self._uncached(error), (1,))
        self._folder = folder
        self.programs = f"shipped: {settings.programs}"
        return engine, self._record.batches

    def _started_here(self) -> tuple[Engine, tuple[int, ...]] | None:
        """With what an earlier replica compiled on this machine; None if it did not, or not so."""
        here = self._here()
        folder = here.folder
        try:
            record = here.record()
            engine = self._with(folder, record)
            self.check = require_as_built(engine, folder, record)
        except ArtifactError:
            return None
        self._folder, self._record = folder, record
        self.programs = COMPILED_HERE
        return engine, record.batches

    def _with(self, folder: Path, record: Record | None = None) -> Engine:
        record = record or self._record
        assert record is not None
        own = as_built(self._settings, record)
        return Engine.of(replace(own, programs=str(folder / PROGRAMS), new_calls="uncached"))

    def _uncached(self, error: ArtifactError) -> Engine:
        """Begin without programs; they are compiled in the background."""
        logger.warning("%s; requests run uncached until programs are compiled here", error)
        self.programs = f"none yet, compiling: {error}"
        engine = Engine.of(replace(self._settings, programs=None))
        if self._record is not None:
            assert self._settings.programs is not None
            folder = self._local(self._settings.programs)
            self.check = require_same_weights(engine, folder, self._record)
        engine.pause()
        return engine

    def _local(self, place: str) -> Path:
        return local_folder(place, self._work() / "downloads")

    def _here(self) -> CompiledHere:
        return CompiledHere(self._settings, self._record, self._work())

    def _work(self) -> Path:
        """Where this machine keeps what it downloads and compiles."""
        folder = cache_folder()
        if folder is None:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="dcompile-")
            folder = Path(self._temporary.name)
        return folder / "programs"

    # In the background

    def _begin(self, work: Callable[[], None]) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return

            def guarded() -> None:
                try:
                    work()
                except DcompileError as error:
                    logger.warning("compiling in the background failed: %s", error)
                    self.programs += f"; compiling failed: {error}"
                except Exception:
                    logger.exception("compiling in the background failed")
                    self.programs += "; compiling failed, see the log"

            self._thread = threading.Thread(target=guarded, daemon=True, name="dcompile-programs")
            self._thread.start()

    def _rebuild(self) -> None:
        """What was shipped, compiled for this machine."""
        here = self._here()
        self._install_later(here.folder, here.build(), COMPILED_HERE)

    def _after(self, jobs: Sequence[Job], uncached: bool) -> None:
        """Compile what just ran uncached for want of a program."""
        if not uncached or self._folder is None or self._record is None:
            return
        job, batch = jobs[0], len(jobs)
        # What a call's signature depends on; without guidance there is one half to compute.
        is_guided = job.guidance is None or job.guidance > 1
        kind = (job.width, job.height, batch, job.sampler, is_guided)
        if kind in self._tried or len(self._tried) >= MOST_EXTRA or job.caching != DEFAULT:
            return
        thread = self._thread
        if (thread is not None and thread.is_alive()) or self._is_waiting:
            return  # it is asked for again, or it is not needed
        self._tried.add(kind)
        folder, record = self._folder, self._record

        def widen() -> None:
            temporary = tempfile.TemporaryDirectory(
                prefix=f"{record.model}-", dir=self._made(self._work())
            )
            own = as_built(self._settings, record)
            wider = extend(own, record, folder, Path(temporary.name), job, batch)
            what = f"with {job.width}x{job.height}, batch {batch}"
            self._install_later(Path(temporary.name), wider, what, temporary)

        self._begin(widen)

    def _install_later(
        self,
        folder: Path,
        record: Record,
        what: str,
        temporary: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        """Use these programs from the next batch on; their folder is removed with this process."""

        def install() -> None:
            self.worker.between = lambda: None
            engine = self.worker.engine
            try:
                engine.adopt(folder / PROGRAMS, new_calls="uncached")
                self.check = require_as_built(engine, folder, record)
            except Exception as error:  # the batch that waits is not at fault
                logger.warning("programs for %s are not used: %s", self._settings.name, error)
                self.programs += f"; not used: {first_line(error)}"
                self._go_back()
            else:
                self._folder, self._record = folder, record
                self._widened = temporary  # an earlier one is removed
                self.worker.batches = record.batches
                self.programs = what
                logger.info("programs for %s: %s", self._settings.name, what)
            finally:
                self._is_waiting = False

        self._is_waiting = True
        self.worker.between = install

    def _go_back(self) -> None:
        """To the programs before, without the new ones; uncached if there are none."""
        engine = self.worker.engine
        if self._folder is None:
            engine.pause()
            return
        try:
            engine.restore(self._folder / PROGRAMS)
        except Exception:
            logger.exception("programs for %s cannot be loaded again", self._settings.name)

    @staticmethod
    def _made(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
