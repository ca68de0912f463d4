"""What surrounds every endpoint: answers to errors, the longest body, requests counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dcompile.errors import JobError, LostError, OverloadedError
from dcompile.notices import logger

LARGEST_BODY = 1 << 20  # bytes
POLL = 0.2  # seconds from one look at whether the client is still there to the next
CLIENT_GONE = 499  # as nginx logs it; nobody sees it
T = TypeVar("T")


def answer_to(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body, as OpenAI's clients expect them; details of unexpected errors are logged."""
    if isinstance(error, JobError):
        return 422, _body(str(error), "invalid_request_error", error.field)
    if isinstance(error, RequestValidationError):
        field, message = reason(error.errors()[0])
        return 422, _body(f"{field or 'body'}: {message}", "invalid_request_error", field)
    if isinstance(error, OverloadedError):
        return 429, _body(f"{error}; try again later", "rate_limit_error")
    if isinstance(error, LostError):
        return 503, _body(str(error), "server_error")
    if isinstance(error, HTTPException):
        return error.status_code, _body(str(error.detail), "invalid_request_error")
    number = uuid.uuid4().hex[:12]
    logger.error("request failed, number %s", number, exc_info=error)
    message = f"generation failed; the server's log says why under {number}"
    return 500, _body(message, "server_error")


def reason(error: Any) -> tuple[str, str]:
    """The field that one of pydantic's errors is about, and what is wrong with it."""
    names = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":  # its place is a position in the text
        names = []
    field = ".".join(str(name)[:100] for name in names)
    return field, str(error["msg"])


def _body(message: str, kind: str, field: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field or None, "code": None}}


def response_to(error: Exception) -> Response:
    """The answer to a failed request."""
    status, body = answer_to(error)
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if isinstance(error, HTTPException) and error.headers:
        headers |= error.headers
    return JSONResponse(body, status, headers)


def add_errors(app: FastAPI) -> None:
    """Answer errors of the endpoints."""

    async def answer(http: HttpRequest, error: Exception) -> Response:
        return response_to(error)

    for kind in (JobError, RequestValidationError, OverloadedError, LostError, HTTPException):
        app.add_exception_handler(kind, answer)


class Watch:
    """Counts requests, refuses long bodies, and answers what nobody else has.

    It is no ``BaseHTTPMiddleware``: inside of one, an endpoint does not learn that its client is
    gone.

    Args:
        app: the application.
        counted: paths to count.
        answered: is told path, status and seconds.
    """

    def __init__(
        self, app: ASGIApp, counted: Collection[str], answered: Callable[[str, int, float], None]
    ) -> None:
        self._app = app
        self._counted = frozenset(counted)
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path = str(scope["path"])  # a mounted application may change it
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            _require_short(scope)
            await self._app(scope, _limited(receive), sent)
        except Exception as error:
            if status:  # too late for another answer
                raise
            await response_to(error)(scope, receive, sent)
        finally:
            if path in self._counted and status:
                self._answered(path, status, time.perf_counter() - began)


def _require_short(scope: Scope) -> None:
    """Refuse a body that is said to be too long, before reading it."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    # Digits are counted first: int() refuses very many of them.
    if not length.isdigit() or len(length) > 18 or int(length) > LARGEST_BODY:
        raise HTTPException(413, f"expected at most {LARGEST_BODY} bytes")


def _limited(receive: Receive) -> Receive:
    """Refuse a body that turns out to be too long: one sent in chunks does not say so before."""
    length = 0

    async def limited() -> Message:
        nonlocal length
        message = await receive()
        length += len(message.get("body", b""))
        if length > LARGEST_BODY:
            raise HTTPException(413, f"expected at most {LARGEST_BODY} bytes")
        return message

    return limited


async def while_connected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Cancel the work when the client goes away.

    Raises:
        HTTPException: it went away.
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=POLL)
            if done:
                return task.result()
            if await http.is_disconnected():
                raise HTTPException(CLIENT_GONE)
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
