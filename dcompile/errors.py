"""One exception tree: catch ``DcompileError`` to catch all of it."""

from __future__ import annotations


class DcompileError(Exception):
    """Base of every error dcompile raises on purpose."""


class CaptureError(DcompileError, RuntimeError):
    """The network could not be turned into a graph. It still runs, uncached."""


class NoSkipConnectionError(DcompileError, ValueError):
    """The network has no skip connection, so there is nothing to cut."""


class DepthError(DcompileError, ValueError):
    """The network has no skip connection at the depth asked for."""


class ScheduleError(DcompileError, ValueError):
    """A schedule that contradicts itself or the run it is used in."""


class BackendError(DcompileError, ValueError):
    """An unknown backend, or one that failed to compile a graph. The network runs, uncached."""


class ExportError(DcompileError, RuntimeError):
    """The network could not be written to a folder. Existing files are left untouched."""


class ModelError(DcompileError, LookupError):
    """A model that cannot be found, loaded or run."""


class NotCompiledError(DcompileError, LookupError):
    """``handle()`` of something that ``cache_compile`` was not called on."""


class TimestepError(DcompileError, TypeError):
    """The network takes no timestep, so its steps cannot be distinguished."""


class ArtifactError(DcompileError, RuntimeError):
    """A saved program that cannot be written, is damaged, or was made for something else."""


class TuneError(DcompileError, RuntimeError):
    """A run that cannot be tuned for: it does not repeat, or there is nothing to cache in it."""
