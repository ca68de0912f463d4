"""Messages to the user, through ``logging``: each kind once, and never in the way of a call.

They go to the logger "dcompile". Without a handler Python prints warnings to standard error;
``TORCH_LOGS="+dcompile"`` shows all of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("dcompile")

_NUMBER = re.compile(r"[0-9.]+")


def warn(message: str) -> None:
    """Log a warning."""
    logger.warning("dcompile: %s", message)


class Notices:
    """Warns once for each message, whatever numbers are in it; logs the others at debug level."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def warn(self, message: str) -> None:
        """Log ``message`` as a warning, unless one like it was logged before."""
        kind = _NUMBER.sub("", message)
        if kind in self._shown:
            logger.debug("dcompile: %s", message)
        else:
            self._shown.add(kind)
            warn(message)


@contextmanager
def muted(pattern: str) -> Iterator[None]:
    """Log no messages that begin with this regular expression."""
    expression = re.compile(f"dcompile: (?:{pattern})")

    def is_other(record: logging.LogRecord) -> bool:
        return expression.match(record.getMessage()) is None

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
