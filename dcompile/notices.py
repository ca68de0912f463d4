"""Messages to the user: each kind once."""

from __future__ import annotations

import logging
import re
import warnings

logger = logging.getLogger("dcompile")

_NUMBER = re.compile(r"[0-9.]+")


class Notices:
    """Warns once for each message, whatever numbers are in it; logs every one at debug level.

    Args:
        stacklevel: of the warnings, as ``warnings.warn`` counts it from its caller.
    """

    def __init__(self, stacklevel: int = 6) -> None:
        self._stacklevel = stacklevel
        self._shown: set[str] = set()

    def warn(self, message: str) -> None:
        """Show ``message`` as a UserWarning, unless one like it was shown before."""
        logger.debug("%s", message)
        kind = _NUMBER.sub("", message)
        if kind not in self._shown:
            self._shown.add(kind)
            warnings.warn(f"dcompile: {message}", stacklevel=self._stacklevel)
