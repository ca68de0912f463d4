"""The HTTP interface: OpenAI's images API, a plain one, health and metrics.

``app_of`` makes an ASGI app of anything that generates (``client.Client``): in this process, or on
a Ray cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse

from dcompile.errors import DcompileError, JobError, LostError, OverloadedError
from dcompile.serving.answers import Watch, add_errors, answer_to, while_connected
from dcompile.serving.client import Client
from dcompile.serving.messages import ImagesRequest, PlainRequest, requests_of
from dcompile.serving.metrics import Metrics
from dcompile.serving.pictures import as_base64
from dcompile.serving.settings import Limits
from dcompile.serving.worker import Event, Made, Preview, Request, Step
from dcompile.version import __version__

PAGE = "/page"
LONGEST_HEADER = 4096  # bytes


class Server:
    """What the endpoints share.

    Args:
        clients: name of a model -> who generates with it; the first is the default.
        limits: what a client may ask for.
        chooses_caching: whether requests may say how they are cached.
    """

    def __init__(
        self, clients: Mapping[str, Client], limits: Limits, *, chooses_caching: bool = False
    ) -> None:
        self.clients = dict(clients)
        self.limits = limits
        self.chooses_caching = chooses_caching
        self.metrics = Metrics()
        self._about: dict[str, dict[str, Any]] = {}
        self._pending = 0

    def name_of(self, model: str | None) -> str:
        """The model a request names, the first one if it names none.

        Raises:
            JobError: there is no such model here.
        """
        name = model or next(iter(self.clients))
        if name not in self.clients:
            known = ", ".join(self.clients)
            raise JobError("model", f"expected one of: {known}; got {name[:100]!r}")
        return name

    async def about(self, name: str) -> dict[str, Any]:
        """What a model can do, see ``Engine.describe``; asked for once.

        Raises:
            LostError: nothing generates yet.
        """
        about = self._about.get(name)
        if about is None:
            about = await self.clients[name].describe()
            if "multiple" not in about:
                raise LostError(about.get("reason", "nothing generates yet"))
            self._about[name] = about
        return about

    async def requests(
        self, name: str, message: PlainRequest | ImagesRequest, *, chooses_caching: bool = False
    ) -> list[Request]:
        """A message from outside, checked.

        Args:
            name: of the model.
            message: what is asked for.
            chooses_caching: let it say how it is cached, even where others may not.

        Raises:
            JobError, LostError: see ``messages.requests_of`` and ``Client``.
        """
        may_choose = chooses_caching or self.chooses_caching
        about = await self.about(name)
        return requests_of(message, about, self.limits, chooses_caching=may_choose)

    @contextlib.asynccontextmanager
    async def place(self, count: int) -> AsyncIterator[None]:
        """A place in the queue for so many pictures.

        Raises:
            OverloadedError: there is none.
        """
        if self._pending + count > self.limits.queue:
            raise OverloadedError(
                f"{self._pending} pictures wait or are being made, of at most {self.limits.queue}"
            )
        self._pending += count
        self.metrics.pending(self._pending)
        try:
            yield
        finally:
            self._pending -= count
            self.metrics.pending(self._pending)

    async def generate(self, name: str, requests: list[Request]) -> list[Made]:
        """All pictures of one message; the others are cancelled if one of them fails."""
        client = self.clients[name]
        async with self.place(len(requests)):
            tasks = [asyncio.ensure_future(client.generate(request)) for request in requests]
            try:
                made = list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for one in made:
            self.metrics.made(one.trace, one.snapshot)
        return made

    async def events(self, name: str, request: Request) -> AsyncGenerator[Event, None]:
        """What happens to one request. A slow reader keeps no place in the queue from others."""
        found: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

        async def follow() -> None:
            stream: Any = self.clients[name].stream(request)
            try:
                async with self.place(1), contextlib.aclosing(stream) as events:
                    async for event in events:
                        found.put_nowait(event)
            except Exception as error:
                found.put_nowait(error)
            else:
                found.put_nowait(None)

        following = asyncio.ensure_future(follow())
        try:
            while (event := await found.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Made):
                    self.metrics.made(event.trace, event.snapshot)
                yield event
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


def app_of(
    clients: Mapping[str, Client],
    limits: Limits | None = None,
    *,
    chooses_caching: bool = False,
    page: bool = False,
) -> FastAPI:
    """An ASGI app.

    Args:
        clients: name of a model -> who generates with it; the first is the default.
        limits: what a client may ask for.
        chooses_caching: whether requests may say how they are cached.
        page: serve a page at ``/page`` that compares uncached and cached pictures; it chooses
            caching in any case.

    Raises:
        DcompileError: a page needs gradio.
    """
    server = Server(clients, limits or Limits(), chooses_caching=chooses_caching)
    app = FastAPI(title="dcompile", version=__version__, docs_url="/docs", redoc_url=None)
    app.state.server = server
    add_errors(app)
    _add_state(app, server)
    _add_pictures(app, server)
    counted = ("/generate", "/v1/images/generations", "/v1/models")
    app.add_middleware(Watch, counted=counted, answered=server.metrics.answered)
    if page:
        _add_page(app, server)
    return app


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health", summary="200 once pictures can be made")
    async def health() -> Response:
        async def ask(client: Client) -> dict[str, Any]:
            try:
                return await asyncio.wait_for(client.describe(), timeout=10)
            except Exception as error:  # whatever it is, it is not ready
                return {"ready": False, "reason": str(error) or type(error).__name__}

        first, *others = server.clients
        about = await ask(server.clients[first])
        is_ready = bool(about.get("ready"))
        content = {
            "status": "ready" if is_ready else "not ready",
            # Asking the others would load them.
            "models": {first: about, **{one: {"loaded": "when asked for"} for one in others}},
        }
        return JSONResponse(content, 200 if is_ready else 503)

    @app.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", summary="OpenAI's list of models")
    async def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "owned_by": "dcompile"} for name in server.clients]
        return {"object": "list", "data": data}


def _add_page(app: FastAPI, server: Server) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at its import
    try:
        from dcompile.serving.page import mount
    except ImportError as error:
        raise DcompileError('the page needs gradio: pip install "dcompile[page]"') from error

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(f".{PAGE}/")  # relative: a proxy may serve this under a prefix

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:  # browsers ask for one, and log an error if there is none
        return Response(status_code=204)

    mount(app, server, PAGE)


def _add_pictures(app: FastAPI, server: Server) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        413: {"description": "The body is too long."},
        422: {"description": "Something is beyond the limits, or unknown here; says what."},
        429: {"description": "Too much waits already."},
        503: {"description": "Nothing generates yet, or any more."},
    }

    @app.post(
        "/generate",
        summary="One picture, as a file",
        responses={200: {"content": {"image/png": {}}}, **refusals},
    )
    async def generate(message: PlainRequest, http: HttpRequest) -> Response:
        name = server.name_of(None)
        (request,) = await server.requests(name, message)
        if message.stream:
            return await _streamed(http, _plain_events(server.events(name, request)))
        (made,) = await while_connected(http, server.generate(name, [request]))
        headers = {
            "x-seed": str(made.seed),
            "x-digest": made.digest,
            "x-trace": _header(made.trace),
            "x-notes": json.dumps(made.notes),
        }
        return Response(made.content, media_type=f"image/{made.form}", headers=headers)

    @app.post("/v1/images/generations", summary="OpenAI's images API", responses=refusals)
    async def images(message: ImagesRequest, http: HttpRequest) -> Response:
        name = server.name_of(message.model)
        requests = await server.requests(name, message)
        if message.stream:
            if len(requests) > 1:
                raise JobError("n", "a stream is of one picture")
            return await _streamed(http, _openai_events(server.events(name, requests[0])))
        made = await while_connected(http, server.generate(name, requests))
        data = [{**_content(one, message.response_format), **_about(one)} for one in made]
        job = requests[0].job
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                "output_format": message.output_format,
                "size": f"{job.width}x{job.height}",
            }
        )


def _header(trace: dict[str, Any]) -> str:
    """As JSON; without what each step ran, where that is more than proxies take."""
    text = json.dumps(trace)
    return text if len(text) <= LONGEST_HEADER else json.dumps({**trace, "steps": None})


def _content(made: Made, response_format: str) -> dict[str, str]:
    content = as_base64(made.content)
    if response_format == "url":  # one that needs no file on any server
        return {"url": f"data:image/{made.form};base64,{content}"}
    return {"b64_json": content}


def _about(made: Made) -> dict[str, Any]:
    return {
        "seed": made.seed,
        "digest": made.digest,
        "trace": made.trace,
        "notes": list(made.notes),
    }


# Server-sent events -------------------------------------------------------------------------------


_Lines = AsyncGenerator[tuple[str, dict[str, Any]], None]


async def _plain_events(events: AsyncGenerator[Event, None]) -> _Lines:
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Step):
                yield "step", {"done": event.done, "steps": event.steps}
            elif isinstance(event, Preview):
                yield "preview", {"format": event.form, "b64_json": as_base64(event.content)}
            else:
                content = {"format": event.form, "b64_json": as_base64(event.content)}
                yield "picture", {**content, **_about(event)}


async def _openai_events(events: AsyncGenerator[Event, None]) -> _Lines:
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Preview):
                kind = "image_generation.partial_image"
                content = {"type": kind, "b64_json": as_base64(event.content)}
                place = {"partial_image_index": event.number, "output_format": event.form}
                yield kind, {**content, **place}
            elif isinstance(event, Made):
                kind = "image_generation.completed"
                content = {"type": kind, "b64_json": as_base64(event.content)}
                yield kind, {**content, "output_format": event.form, **_about(event)}


async def _streamed(http: HttpRequest, events: _Lines) -> Response:
    """A stream; what fails before its first event is an ordinary error."""
    first = await while_connected(http, anext(events))

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):  # a client that goes away cancels the picture
            yield _line(*first)
            try:
                async for event in events:
                    yield _line(*event)
            except Exception as error:
                status, body = answer_to(error)
                yield _line("error", {**body, "status": status})

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def _line(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
