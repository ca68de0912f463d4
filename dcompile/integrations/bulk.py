"""Bulk generation on Ray: an engine in each actor, which Ray Data gives chunks to."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from dcompile.errors import DcompileError, first_line
from dcompile.serving.bulk import BrokenDeviceError, Maker, Report, Task
from dcompile.serving.bulk_rows import Chunk

_MOST_BLOCKS = 2000  # Ray Data keeps something for each of them in the driver
_OBJECT_STORE = 200 << 20  # bytes; pictures do not go through it
_BROKEN_DEVICE = 70  # exit status


@dataclass(frozen=True)
class Actors:
    """The processes that generate.

    Attributes:
        count: how many.
        gpus: of each, also a part of one; None for one where Ray has any.
    """

    count: int = 1
    gpus: float | None = None

    def run(self, task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        """Make chunks; a ``Runner`` of ``serving.bulk``.

        An actor that dies is started again, and what it was at is made by any of them.

        Raises:
            DcompileError: there are too few GPUs, or Ray gives up.
        """
        threads = task.settings.threads
        with _ray(self.count * threads + 1):
            try:
                yield from self._reports(task, chunks)
            except RayError as error:
                raise DcompileError(
                    f"Ray gave up: {first_line(error)}. Complete pictures are kept; the same "
                    "command goes on from there"
                ) from error

    def _reports(self, task: Task, chunks: Sequence[Chunk]) -> Iterator[Report]:
        rows = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
        blocks = min(len(rows), _MOST_BLOCKS)
        reports = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Generator,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self.count, blocks)),
            num_cpus=task.settings.threads,
            num_gpus=self._gpus(task.settings.engine.device) or None,
        )
        for batch in reports.iter_batches(batch_size=None, prefetch_batches=0):
            for content in batch["report"]:
                yield pickle.loads(content)

    def _gpus(self, device: str) -> float:
        there = float(ray.cluster_resources().get("GPU", 0))
        if self.gpus is None:
            return 1.0 if there and device != "cpu" else 0.0
        if self.count * self.gpus > there:
            raise DcompileError(
                f"{self.count} actors with {self.gpus:g} GPUs each need {self.count * self.gpus:g},"
                f" and Ray has {there:g}: give fewer --actors or --gpus-per-actor"
            )
        return self.gpus


class _Generator:
    """What an actor is: makes the chunks it is given, one after another."""

    def __init__(self, task: Task) -> None:
        self._maker = Maker(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            reports = [self._maker.make(pickle.loads(content)) for content in batch["chunk"]]
        except BrokenDeviceError:
            os._exit(_BROKEN_DEVICE)  # Ray starts another process, which makes the chunk
        found = np.empty(len(reports), dtype=object)
        found[:] = [pickle.dumps(report) for report in reports]
        return {"report": found}


@contextmanager
def _ray(cpus: int) -> Iterator[None]:
    """Ray: the cluster of ``$RAY_ADDRESS``, or one on this machine that ends with the run."""
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of Ray Data's own ways
        address = os.environ.get("RAY_ADDRESS", "local")
        local: dict[str, Any] = {
            "num_cpus": max(cpus, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }
        try:
            with _silent():
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **(local if address == "local" else {}),
                )
        except BaseException:  # Ctrl-C, too: what is half started would crash at exit
            ray.shutdown()
            raise
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        context.enable_progress_bars = shown
        if own:
            ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to standard error, also by Ray's C++, which says how it will log."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
