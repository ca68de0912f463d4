"""Programs that replicas compile on their own machine where shipped ones do not fit."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from dcompile.errors import ArtifactError
from dcompile.models.loading import resolve_device
from dcompile.serving.build import Plan, build
from dcompile.serving.fleet import (
    RECORD,
    Record,
    as_built,
    digest_of_machine,
    machine_of,
    read_record,
)
from dcompile.serving.settings import EngineSettings


class CompiledHere:
    """The programs of one model; kept for the next replica.

    Args:
        settings: of the engine.
        shipped: what does not fit; None if it cannot be read.
        work: the folder where this machine keeps programs.

    Attributes:
        folder: where they are.
    """

    def __init__(self, settings: EngineSettings, shipped: Record | None, work: Path) -> None:
        device = resolve_device(settings.device)
        self.folder = work / f"{settings.name}-{digest_of_machine(device)}"
        self._machine = machine_of(device)
        if shipped is None:
            own = replace(settings, programs=None, components=False)
            self._plan = Plan(own, steps=(settings.steps,))
        else:
            own = replace(as_built(settings, shipped), programs=None, components=False)
            self._plan = Plan(own, shipped.sizes, shipped.batches, shipped.steps)

    def record(self) -> Record:
        """What there is.

        Raises:
            ArtifactError: nothing, or it is damaged, or something else was asked for.
        """
        record, plan = read_record(self.folder), self._plan
        have = (record.settings, record.batches, record.steps)
        is_as_asked = have == (plan.recorded_settings(), plan.batches, plan.steps)
        if (
            record.difference(self._machine)
            or not is_as_asked
            or plan.sizes
            not in (
                (),
                record.sizes,
            )
        ):
            raise ArtifactError(f"{self.folder} was built for something else")
        return record

    def build(self) -> Record:
        """Compile, once for all replicas that wait for it; with low priority.

        Raises:
            DcompileError: it cannot be compiled.
        """
        began = time.time()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(f".{self.folder.name}.lock")):
            with contextlib.suppress(ArtifactError, OSError):
                # One that was there at the start was not used: of another model, say.
                if (self.folder / RECORD).stat().st_mtime >= began:
                    return self.record()
            return build(self._plan, self.folder, is_background=True).record


__all__ = ["CompiledHere"]
