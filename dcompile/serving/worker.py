"""Between requests, which are coroutines, and an engine, which computes in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from dcompile.errors import LostError
from dcompile.notices import logger
from dcompile.serving.engine import Engine, RunCancelled
from dcompile.serving.jobs import Job, split
from dcompile.serving.metrics import Snapshot, Tally
from dcompile.serving.pictures import Picture, digest, encoded

# Errors after which a device answers nothing any more: the process has to be started again.
FATAL = ("CUDA error", "device-side assert", "out of memory on device", "CUBLAS_STATUS")


@dataclass(frozen=True)
class Request:
    """A job, and how its picture is to be returned. Travels between processes.

    Attributes:
        job: what to generate.
        form, quality: see ``pictures.encoded``.
        previews: pictures to show on the way.
        alone: in no batch with others, as it may have ended the process that ran it before.
    """

    job: Job
    form: str = "png"
    quality: int = 90
    previews: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Made:
    """A picture as a file's content, with what is known about it. Travels between processes.

    Attributes:
        content: the file's.
        form: one of ``pictures.FORMATS``.
        seed: of its noise.
        digest: SHA-256 of size and pixels.
        trace: see ``Trace.as_dict``; with "waited", seconds before its run began.
        notes: for the person who asked.
        snapshot: the counts of the process that made it.
    """

    content: bytes
    form: str
    seed: int
    digest: str
    trace: dict[str, Any]
    notes: tuple[str, ...]
    snapshot: Snapshot


@dataclass(frozen=True)
class Step:
    """A step was done."""

    done: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """What there is after a step, as a file's content."""

    content: bytes
    form: str
    number: int


Event = Step | Preview | Made


@dataclass(eq=False)
class Ticket:
    """A request that waits for its batch, or is in it.

    Attributes:
        request: what is wanted.
        events: where to tell how it goes; None if nobody listens.
        cancelled: set when nobody waits for it any more.
        since: when it came.
        previewed: previews shown so far.
        worker: that is to generate, where several share a batcher.
        result: what comes of it, where a batcher is used.
    """

    request: Request
    events: asyncio.Queue[Event] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    since: float = field(default_factory=time.perf_counter)
    previewed: int = 0
    worker: Worker | None = None
    result: asyncio.Future[Made] | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Tickets of one group may become one batch."""
        own = id(self) if self.request.alone else None
        return id(self.worker), self.request.job.kind, own

    def settle(self, result: Made | BaseException) -> None:
        """Tell whoever waits for ``result``, if it is not cancelled."""
        if self.result is None or self.result.done():
            return
        if isinstance(result, BaseException):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)


Batcher = Callable[[Ticket], Awaitable[Made]]


class Worker:
    """Runs an engine's batches, one after another, in a thread of its own.

    Args:
        engine: not used by anyone else meanwhile.
        name: of this process, in metrics.
        batches: sizes of batches that there are programs for.

    Attributes:
        engine: see above.
        failure: why this process can generate nothing any more; None while it can.
        between: called in the engine's thread before each batch, to install new programs, say.
        after: called there after each batch, with its jobs and whether they ran uncached.
    """

    def __init__(self, engine: Engine, name: str, batches: tuple[int, ...] = (1,)) -> None:
        self.engine = engine
        self.failure: str | None = None
        self.between: Callable[[], None] = lambda: None
        self.after: Callable[[Sequence[Job], bool], None] = lambda jobs, uncached: None
        self.batches = batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcompile-engine")
        self._others = ThreadPoolExecutor(2, thread_name_prefix="dcompile-encode")
        self._tally = Tally(name, engine.settings.name)

    async def run_batch(
        self, tickets: Sequence[Ticket], pixels: int | None = None
    ) -> list[Made | BaseException]:
        """Generate for tickets of one kind.

        Args:
            tickets: in any number; they are split into batches that there are programs for.
            pixels: most pixels of a batch; None for no limit.

        Returns:
            For each what was made, or why not: ``RunCancelled`` for a cancelled one.
        """
        results: dict[int, Made | BaseException] = {}
        waiting = list(enumerate(tickets))
        while waiting:
            for place, ticket in waiting:
                if ticket.cancelled.is_set():
                    results[place] = RunCancelled()
            waiting = [pair for pair in waiting if pair[0] not in results]
            if not waiting:
                break
            job = waiting[0][1].request.job
            most = len(waiting) if pixels is None else max(1, pixels // (job.width * job.height))
            size = split(min(len(waiting), most), self.batches)[0]
            part, waiting = waiting[:size], waiting[size:]
            made = await self._run([ticket for _, ticket in part])
            results.update(zip((place for place, _ in part), made, strict=True))
        return [results[place] for place in range(len(tickets))]

    async def submit(self, ticket: Ticket, batcher: Batcher | None = None) -> Made:
        """Generate for one ticket; cancelled with the task that awaits it.

        Args:
            ticket: the request.
            batcher: collects tickets into batches; None runs it alone.

        Raises:
            JobError: the engine does not do this.
            LostError: the device answers nothing any more.
        """
        if self.failure is not None:
            raise LostError(self.failure)
        self.engine.check(ticket.request.job)
        try:
            if batcher is not None:
                return await batcher(ticket)
            (result,) = await self.run_batch([ticket])
            if isinstance(result, BaseException):
                raise result
            return result
        except asyncio.CancelledError:
            ticket.cancelled.set()
            self._tally.cancelled()
            raise

    async def stream(
        self, request: Request, batcher: Batcher | None = None
    ) -> AsyncIterator[Event]:
        """What happens to a request, the picture last."""
        ticket = Ticket(request, asyncio.Queue())
        assert ticket.events is not None
        task = asyncio.ensure_future(self.submit(ticket, batcher))
        try:
            while True:
                event = asyncio.ensure_future(ticket.events.get())
                await asyncio.wait({task, event}, return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    yield event.result()
                    continue
                event.cancel()
                while not ticket.events.empty():
                    yield ticket.events.get_nowait()
                break
            yield await task
        finally:
            if not task.done():
                ticket.cancelled.set()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def snapshot(self) -> Snapshot:
        """The counts so far."""
        return self._tally.snapshot(self.engine.handle.stats)

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Call something in the engine's thread, between batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """End the threads when what they do is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._others.shutdown(wait=False, cancel_futures=True)

    async def _run(self, tickets: Sequence[Ticket]) -> list[Made | BaseException]:
        loop = asyncio.get_running_loop()
        watcher = _Tickets(tickets, loop)
        began = 0.0

        def generate() -> list[Picture]:
            nonlocal began
            began = time.perf_counter()
            self.between()
            jobs = [ticket.request.job for ticket in tickets]
            found = self.engine.generate(jobs, watcher)
            self.after(jobs, bool(found[0].trace.uncached_reasons))
            return found

        try:
            pictures = await loop.run_in_executor(self._thread, generate)
        except RunCancelled as error:
            return [error] * len(tickets)
        except Exception as error:
            self._tally.failed(len(tickets))
            logger.exception("a batch of %d failed", len(tickets))
            if any(sign in str(error) for sign in FATAL):
                self.failure = str(error).splitlines()[0]
                return [LostError(self.failure)] * len(tickets)
            return [error] * len(tickets)
        self._tally.ran(pictures[0].trace, len(pictures))
        encoding = [
            loop.run_in_executor(self._others, self._made, picture, ticket, began - ticket.since)
            for picture, ticket in zip(pictures, tickets, strict=True)
        ]
        made = await asyncio.gather(*encoding, return_exceptions=True)
        for one in made:
            if isinstance(one, Exception):
                logger.error("a picture could not be encoded", exc_info=one)
        return list(made)

    def _made(self, picture: Picture, ticket: Ticket, waited: float) -> Made:
        request = ticket.request
        return Made(
            content=encoded(picture.image, request.form, request.quality),
            form=request.form,
            seed=picture.seed,
            digest=digest(picture.image),
            trace={**picture.trace.as_dict(), "waited": round(waited, 4)},
            notes=picture.notes,
            snapshot=self.snapshot(),
        )


class _Tickets:
    """Tells those who listen how their batch goes; called in the engine's thread."""

    def __init__(self, tickets: Sequence[Ticket], loop: asyncio.AbstractEventLoop) -> None:
        self._tickets = tickets
        self._loop = loop

    def step(self, done: int, steps: int) -> None:
        if all(ticket.cancelled.is_set() for ticket in self._tickets):
            raise RunCancelled
        for ticket in self._tickets:
            self._tell(ticket, Step(done, steps))

    def wants_preview(self, done: int, steps: int) -> bool:
        return done < steps and any(
            done in _preview_steps(ticket.request.previews, steps) for ticket in self._tickets
        )

    def preview(self, images: Sequence[Image]) -> None:
        for ticket, image in zip(self._tickets, images, strict=False):
            if ticket.request.previews > ticket.previewed:
                content = encoded(image, "jpeg", 80)
                self._tell(ticket, Preview(content, "jpeg", ticket.previewed))
                ticket.previewed += 1

    def _tell(self, ticket: Ticket, event: Event) -> None:
        if ticket.events is not None:
            self._loop.call_soon_threadsafe(ticket.events.put_nowait, event)


def _preview_steps(count: int, steps: int) -> set[int]:
    """After which steps there is a preview: spread evenly, without the last one."""
    return {round(steps * (number + 1) / (count + 1)) for number in range(count)}
