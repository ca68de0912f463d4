"""What dcompile logs, as tests listen to it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Ear(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """All warnings of dcompile's meanwhile."""
    messages: list[str] = []
    ear = _Ear(messages)
    logger = logging.getLogger("dcompile")
    logger.addHandler(ear)
    try:
        yield messages
    finally:
        logger.removeHandler(ear)


@contextmanager
def noticed(match: str) -> Iterator[list[str]]:
    """A warning that matches is logged meanwhile."""
    with heard() as messages:
        yield messages
    assert any(re.search(match, message) for message in messages), messages


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is logged meanwhile."""
    with heard() as messages:
        yield
    assert not messages
