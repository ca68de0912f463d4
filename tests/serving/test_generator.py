"""What a replica of Ray Serve does, without Ray: models that are loaded and make room."""

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from dcompile.errors import JobError, LostError, ModelError
from dcompile.integrations import serve
from dcompile.serving.jobs import Job
from dcompile.serving.settings import ServeSettings
from dcompile.serving.worker import Made, Request, Ticket

SETTINGS = ServeSettings.of({"engines": [{"model": name} for name in ("a", "b", "c")]})


class Replica:
    """Is loaded when it may be."""

    made = 0
    may = threading.Event()

    def __init__(self, settings: Any, name: str) -> None:
        type(self).made += 1
        assert self.may.wait(20)
        self.name = name
        self.worker = SimpleNamespace(failure=None, replica=self)  # part of a cycle


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> serve.Generator:
    Replica.made, Replica.may = 0, threading.Event()
    Replica.may.set()
    monkeypatch.setattr(serve, "Replica", Replica)
    return serve.Generator(SETTINGS.as_dict())


def load(generator: serve.Generator, model: str) -> Any:
    """Without the part that counts models, which needs a cluster."""
    return serve.Generator._other.__wrapped__(generator, model)


def test_a_model_that_made_room_is_freed(generator: serve.Generator) -> None:
    async def work() -> None:
        replica = await load(generator, "b")
        gone, name = weakref.ref(replica), replica.name
        assert "b" in generator._loaded
        del replica
        await asyncio.sleep(0.1)  # the thread that made it has it for a moment
        await load(generator, "c")
        assert gone() is None
        assert (await load(generator, "b")).name != name
        generator.check_health()

    asyncio.run(work())
    gc.collect()


def test_who_goes_away_does_not_begin_a_load_anew(generator: serve.Generator) -> None:
    async def work() -> None:
        Replica.may.clear()
        before = Replica.made
        for _ in range(3):
            waiting = asyncio.ensure_future(load(generator, "b"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        Replica.may.set()
        assert (await load(generator, "b")).name
        assert Replica.made == before + 1
        assert not generator._loading

    asyncio.run(work())


def test_what_comes_of_a_cancelled_ticket_is_nobody_s(generator: serve.Generator) -> None:
    """asyncio logs errors that nobody has looked at."""
    said: list[Any] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, about: said.append(about))

        async def collect(ticket: Ticket) -> None:
            await asyncio.sleep(20)

        generator._collectors[generator._first] = collect
        ticket = Ticket(SimpleNamespace())  # type: ignore[arg-type]
        waiting: asyncio.Future[Made] = asyncio.ensure_future(
            generator._batcher(generator._first)(ticket)
        )
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        ticket.settle(RuntimeError("cancelled"))
        del ticket, waiting
        gc.collect()

    asyncio.run(work())
    assert not said


def test_models_collect_apart(generator: serve.Generator) -> None:
    """None waits for a batch of another's."""

    async def work() -> None:
        one, other = generator._first, await load(generator, "b")
        assert generator._collector_of(one) is generator._collector_of(one)
        assert generator._collector_of(one) is not generator._collector_of(other)

    asyncio.run(work())


JOB = Job("cat", 5, 4, 64, 64)


def test_a_request_that_is_made_again_is_alone() -> None:
    worker = SimpleNamespace()
    first, second = (Ticket(Request(JOB), worker=worker) for _ in range(2))  # type: ignore[arg-type]
    assert first.group == second.group
    again = Ticket(Request(JOB, alone=True), worker=worker)  # type: ignore[arg-type]
    assert again.group != first.group


class Failing:
    """A handle of replicas that fail so many times."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.asked: list[Request] = []

    def options(self, **_: Any) -> Any:
        return self

    @property
    def generate(self) -> Any:
        return SimpleNamespace(remote=self._generate)

    async def _generate(self, model: str, request: Request) -> str:
        self.asked.append(request)
        if self.errors:
            raise self.errors.pop(0)
        return "a picture"


def asked_of(handle: Failing) -> Any:
    client = serve.RayClient(handle, "b")  # type: ignore[arg-type]
    return asyncio.run(client.generate(Request(JOB)))


def broken() -> Exception:
    return RayTaskError("generate", "a long\ntrace", LostError("CUDA error: unspecified"))


def test_a_broken_device_is_another_replica_s_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RETRY_AFTER", 0.01)
    handle = Failing([broken(), broken()])
    assert asked_of(handle) == "a picture"
    assert [request.alone for request in handle.asked] == [False, True, True]
    assert {request.job for request in handle.asked} == {JOB}
    with pytest.raises(LostError, match="lost 4 times: CUDA error: unspecified"):
        asked_of(Failing([broken() for _ in range(9)]))


@pytest.mark.parametrize("error", [JobError("width", "too wide"), ValueError("no such thing")])
def test_what_a_request_causes_is_its_own(error: Exception) -> None:
    handle = Failing([RayTaskError("generate", "a trace", error)])
    with pytest.raises(JobError if isinstance(error, JobError) else RayTaskError):
        asked_of(handle)
    assert len(handle.asked) == 1


def test_a_model_that_cannot_be_loaded_is_not_ready() -> None:
    class Handle:
        def options(self, **_: Any) -> Any:
            return self

        @property
        def describe(self) -> Any:
            return SimpleNamespace(remote=self._fail)

        async def _fail(self, model: str) -> None:
            raise RayTaskError("describe", "a long\ntrace", ModelError(f"no folder {model}"))

    client = serve.RayClient(Handle(), "b")  # type: ignore[arg-type]
    assert asyncio.run(client.describe()) == {"ready": False, "reason": "no folder b"}
