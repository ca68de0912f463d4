"""Whether a network's Python code reads a clock, which would be a constant of its graph, or a file.

Two calls soon after each other may return the same: a clock moves by a share of its reading that
float32 cannot hold. So it is looked for among the calls of C functions, not in results.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from dcompile.compiler.hidden_effects import place_of
from dcompile.compiler.introspection import is_library

_CLOCKS = frozenset(
    function
    for module, names in (
        (time, ("time", "monotonic", "perf_counter", "process_time", "thread_time")),
        (time, ("clock_gettime", "gmtime", "localtime", "ctime", "asctime", "strftime")),
        (os, ("urandom", "getrandom", "times")),
    )
    for name in names
    for function in (getattr(module, name, None), getattr(module, f"{name}_ns", None))
    if function is not None
)
_DATES = (datetime.date, datetime.datetime)
_NOW = ("now", "utcnow", "today")
# They read clocks for what they do themselves: waiting, log records, progress.
_OTHERWISE = frozenset(
    ("asyncio", "concurrent", "logging", "queue", "subprocess", "threading", "torch", "warnings")
)
_FILES = frozenset((open, os.open, os.write))
_CALL_OTHERS = ("logging", "warnings")  # which may read clocks for records, such as Ray does


class ClockReadings:
    """What this thread's code reads within the context. Nothing under another profiler.

    Attributes:
        places: the clocks that were read, and where: ``time.time() (net.py:12)``.
        files: where code that is no library's, or a library's that it calls, opens files.
    """

    def __init__(self) -> None:
        self.places: dict[str, None] = {}
        self.files: dict[str, None] = {}
        self._looking = False
        self._on_garbage = {getattr(callback, "__code__", None) for callback in gc.callbacks}

    def __enter__(self) -> ClockReadings:
        if sys.getprofile() is None:
            self._looking = True
            sys.setprofile(self._look)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._looking:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call":
            return
        if _is_among(called, _FILES):
            if not _is_for_another_purpose(frame):
                self.files[place_of(frame)] = None
            return
        if not _is_clock(called):
            return
        if frame.f_code in self._on_garbage or _is_for_a_record(frame):
            return
        owner = getattr(called, "__self__", None)
        of = getattr(owner, "__name__", None) or getattr(called, "__module__", "")
        file = os.path.basename(frame.f_code.co_filename)
        self.places[f"{of}.{called.__name__}() ({file}:{frame.f_lineno})"] = None


def _is_for_a_record(frame: FrameType) -> bool:
    if _package_of(frame) in _OTHERWISE:
        return True
    caller = frame.f_back
    while caller is not None and _package_of(caller) not in _CALL_OTHERS:
        caller = caller.f_back
    return caller is not None


def _is_for_another_purpose(frame: FrameType | None) -> bool:
    """Such as the source line of a warning, or a module's code: whoever asks for a file in vain."""
    while frame is not None and is_library(frame.f_globals.get("__name__")):
        if _package_of(frame) in (*_OTHERWISE, "importlib", "linecache", "_frozen_importlib"):
            return True
        frame = frame.f_back
    return frame is None


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_among(called: Any, functions: frozenset[Any]) -> bool:
    try:
        return called in functions
    except TypeError:  # not hashable: a method of an object that is not
        return False


def _is_clock(called: Any) -> bool:
    if _is_among(called, _CLOCKS):
        return True
    owner = getattr(called, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, _DATES) and called.__name__ in _NOW


__all__ = ["ClockReadings"]
