"""A network is captured while nobody runs its own forward, and the other way round.

While torch.export traces a module, tensors without values are in its parameters' places: a call in
another thread would compute with them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureGate:
    """Of one module. Calls do not wait for each other, only for captures."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._calls = 0
        self._capturing: int | None = None  # the thread that captures

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the module's own forward."""
        me = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._capturing in (None, me))
            self._calls += 1
        try:
            yield
        finally:
            with self._turn:
                self._calls -= 1
                self._turn.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around a capture; captures of one module must not overlap."""
        with self._turn:
            self._turn.wait_for(lambda: self._calls == 0)
            self._capturing = threading.get_ident()
        try:
            yield
        finally:
            with self._turn:
                self._capturing = None
                self._turn.notify_all()
