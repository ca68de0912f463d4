"""All exceptions of dcompile; each derives from ``DcompileError``."""

from __future__ import annotations

from typing import Any


class DcompileError(Exception):
    """Base of every error dcompile raises on purpose."""


class CaptureError(DcompileError, RuntimeError):
    """The network cannot be captured as a graph. It still runs, uncached.

    Attributes:
        uncached_result: what the network itself returned for the call, in a tuple, if it was called
            once for real before it was captured; else empty.
    """

    uncached_result: tuple[Any, ...] = ()


class NoCutError(DcompileError, ValueError):
    """The network has neither skip connections nor a residual stream to cut."""


class DepthError(DcompileError, ValueError):
    """The network has no cut at the requested depth."""


class ScheduleError(DcompileError, ValueError):
    """A schedule or forecast is invalid, or does not fit the run or network it is used with."""


class BackendError(DcompileError, ValueError):
    """The backend is unknown, or failed to compile a graph. The network still runs, uncached."""


class ExportError(DcompileError, RuntimeError):
    """The network cannot be exported. Existing files are left untouched."""


class ModelError(DcompileError, LookupError):
    """A model cannot be found, loaded or run."""


class NotCompiledError(DcompileError, LookupError):
    """``cache_compile`` was not called on this, or nothing is compiled or captured yet."""


class TimestepError(DcompileError, TypeError):
    """The network takes no timestep, so its steps cannot be identified."""


class ArtifactError(DcompileError, RuntimeError):
    """A saved program cannot be written, is damaged, or does not fit the network or machine."""


class TuneError(DcompileError, RuntimeError):
    """``tune``, ``calibrate`` or ``profile`` cannot use this run or these arguments."""


class JobError(DcompileError, ValueError):
    """A picture that this server does not make.

    Attributes:
        field: of the request that is at fault.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # it travels between processes
        return type(self), (self.field, self.reason)


class OverloadedError(DcompileError):
    """Too many pictures wait already: try again later."""


class LostError(DcompileError):
    """The process that was generating is gone, or broken. The same request may be made again."""


def root_cause(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
