"""Requests and the thread that computes: batches, cancellation, failures."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from dcompile.errors import JobError, LostError
from dcompile.serving.engine import RunCancelled, Watcher
from dcompile.serving.jobs import Job
from dcompile.serving.pictures import Picture, Trace
from dcompile.serving.worker import Made, Preview, Request, Step, Ticket, Worker

STEPS = 5


class SlowEngine:
    """Draws the seed, in steps of some milliseconds."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(name="slow")
        self.handle = SimpleNamespace(stats=SimpleNamespace(cache_bytes=0))
        self.batches: list[list[int]] = []
        self.steps = 0
        self.fails: BaseException | None = None
        self.uncached: dict[str, int] = {}
        self.running = 0

    def check(self, job: Job) -> None:
        if job.width % 8:
            raise JobError("width", "expected a multiple of 8")

    def generate(self, jobs: Sequence[Job], watcher: Watcher) -> list[Picture]:
        self.running += 1
        assert self.running == 1, "two runs at a time"
        try:
            self.batches.append([job.seed for job in jobs])
            images = [PIL.Image.new("RGB", (8, 8), (job.seed % 256, 0, 0)) for job in jobs]
            for step in range(1, STEPS + 1):
                time.sleep(0.02)
                self.steps += 1
                if self.fails is not None:
                    raise self.fails
                if watcher.wants_preview(step, STEPS):
                    watcher.preview(images)
                watcher.step(step, STEPS)
            seconds = {"encode": 0.0, "denoise": 0.1, "decode": 0.0}
            trace = Trace(("refresh",) * STEPS, 0, 1.0, seconds, len(jobs), self.uncached)
            return [
                Picture(image, job.seed, trace) for image, job in zip(images, jobs, strict=True)
            ]
        finally:
            self.running -= 1


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


def run(
    engine: SlowEngine, work: Callable[[Worker], Coroutine[Any, Any, Any]], *batches: int
) -> Any:
    async def main() -> Any:
        worker = Worker(engine, "here", batches or (1,))  # type: ignore[arg-type]
        try:
            return await asyncio.wait_for(work(worker), 20)
        finally:
            worker.close()

    return asyncio.run(main())


def request(seed: int = 1, previews: int = 0, **change: Any) -> Request:
    job = Job(prompt="", seed=seed, steps=STEPS, width=8, height=8)
    return Request(replace(job, **change), previews=previews)


def colour(made: Made) -> int:
    return int(PIL.Image.open(io.BytesIO(made.content)).getpixel((0, 0))[0])  # type: ignore[index]


def test_batches_of_sizes_that_there_are_programs_for(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> list[Any]:
        return await worker.run_batch([Ticket(request(seed)) for seed in range(7)])

    made = run(engine, work, 1, 2, 4)
    assert [colour(one) for one in made] == list(range(7))
    assert engine.batches == [[0, 1, 2, 3], [4, 5], [6]]


def test_batches_of_so_many_pixels(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> list[Any]:
        return await worker.run_batch([Ticket(request(seed)) for seed in range(5)], 64 * 2 + 1)

    run(engine, work, 1, 2, 4)
    assert engine.batches == [[0, 1], [2, 3], [4]]


def test_requests_take_turns(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> list[Made]:
        return list(
            await asyncio.gather(*(worker.submit(Ticket(request(seed))) for seed in range(4)))
        )

    made = run(engine, work)
    assert [one.seed for one in made] == [0, 1, 2, 3]
    assert made[-1].snapshot.pictures == 4
    assert made[-1].trace["waited"] >= 0.3 > made[0].trace["waited"]


def test_a_refused_one_takes_no_time(engine: SlowEngine) -> None:
    with pytest.raises(JobError):
        run(engine, lambda worker: worker.submit(Ticket(request(width=9))))
    assert not engine.batches


def test_a_cancelled_one_stops_between_steps(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> Made:
        task = asyncio.ensure_future(worker.submit(Ticket(request(1))))
        while engine.steps < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await worker.submit(Ticket(request(2)))

    made = run(engine, work)
    assert colour(made) == 2
    assert engine.steps < 2 * STEPS
    assert (made.snapshot.cancelled, made.snapshot.pictures, made.snapshot.failed) == (1, 1, 0)


def test_one_cancelled_of_a_batch(engine: SlowEngine) -> None:
    tickets = [Ticket(request(1)), Ticket(request(2))]

    async def work(worker: Worker) -> list[Any]:
        running = asyncio.ensure_future(worker.run_batch(tickets))
        while engine.steps < 2:
            await asyncio.sleep(0.005)
        tickets[0].cancelled.set()
        return await running

    made = run(engine, work, 2)
    assert colour(made[1]) == 2


def test_one_cancelled_before_its_batch(engine: SlowEngine) -> None:
    tickets = [Ticket(request(1)), Ticket(request(2))]
    tickets[0].cancelled.set()
    made = run(engine, lambda worker: worker.run_batch(tickets), 2)
    assert isinstance(made[0], RunCancelled)
    assert engine.batches == [[2]]


def test_a_failure_is_of_its_batch(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> tuple[Any, Made]:
        engine.fails = RuntimeError("out of luck")
        failed = await asyncio.gather(worker.submit(Ticket(request(1))), return_exceptions=True)
        engine.fails = None
        assert worker.failure is None
        return failed[0], await worker.submit(Ticket(request(2)))

    failed, made = run(engine, work)
    assert str(failed) == "out of luck"
    assert (made.snapshot.failed, made.snapshot.pictures) == (1, 1)


def test_a_picture_that_cannot_be_encoded_is_alone(engine: SlowEngine) -> None:
    tickets = [Ticket(Request(request(1).job, form="none")), Ticket(request(2))]
    made = run(engine, lambda worker: worker.run_batch(tickets), 2)
    assert isinstance(made[0], KeyError)
    assert colour(made[1]) == 2


def test_a_lost_device_is_said(engine: SlowEngine) -> None:
    engine.fails = RuntimeError("CUDA error: an illegal memory access\nmore")

    async def work(worker: Worker) -> str | None:
        for seed in (1, 2):
            with pytest.raises(LostError, match="illegal memory access"):
                await worker.submit(Ticket(request(seed)))
        return worker.failure

    assert run(engine, work) == "CUDA error: an illegal memory access"
    assert engine.steps == 1, "a broken device was used again"


def test_streams(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> list[Any]:
        return [event async for event in worker.stream(request(7, previews=2))]

    events = run(engine, work)
    assert [event.done for event in events if isinstance(event, Step)] == [1, 2, 3, 4, 5]
    assert [event.number for event in events if isinstance(event, Preview)] == [0, 1]
    assert colour(events[-1]) == 7


def test_a_closed_stream_stops(engine: SlowEngine) -> None:
    async def work(worker: Worker) -> int:
        stream = worker.stream(request(7))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)
        return engine.steps

    assert run(engine, work) < STEPS


def test_a_stream_that_fails(engine: SlowEngine) -> None:
    engine.fails = RuntimeError("out of luck")

    async def work(worker: Worker) -> list[Any]:
        return [event async for event in worker.stream(request(7))]

    with pytest.raises(RuntimeError, match="out of luck"):
        run(engine, work)


def test_between_batches(engine: SlowEngine) -> None:
    called: list[Any] = []
    engine.uncached = {"no program": 5}

    async def work(worker: Worker) -> None:
        worker.between = lambda: called.append(threading.current_thread().name)
        worker.after = lambda jobs, uncached: called.append((len(jobs), uncached))
        await worker.run_batch([Ticket(request(1)), Ticket(request(2))])

    run(engine, work, 2)
    assert called[0].startswith("dcompile-engine")
    assert called[1] == (2, True)
