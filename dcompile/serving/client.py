"""How those who answer requests reach those who generate."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from dcompile.serving.engine import Engine
from dcompile.serving.worker import Event, Made, Request, Ticket, Worker


class Client(Protocol):
    """Generates, wherever that is."""

    async def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``; with "ready" and, if it is not, "reason"."""
        ...

    async def generate(self, request: Request) -> Made:
        """A picture. Cancelled with the task that awaits it.

        Raises:
            JobError: it is refused.
            OverloadedError, LostError: see there.
        """
        ...

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """What happens to a request, the picture last; closing it cancels the request."""
        ...


class LocalClient:
    """Generates in this process: for a page on one's own machine, and for tests.

    Args:
        worker: runs the jobs, one after another.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @classmethod
    def of(cls, engine: Engine) -> LocalClient:
        """A client of an engine in this process."""
        return cls(Worker(engine, uuid.uuid4().hex[:8]))

    async def describe(self) -> dict[str, Any]:
        return {**self._worker.engine.describe(), "ready": self._worker.failure is None}

    async def generate(self, request: Request) -> Made:
        return await self._worker.submit(Ticket(request))

    def stream(self, request: Request) -> AsyncIterator[Event]:
        return self._worker.stream(request)
