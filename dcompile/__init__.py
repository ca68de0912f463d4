"""dcompile: compiled feature caching for skip-connection diffusion networks, without training.

unet = dcompile.cache_compile(unet, interval=3)
"""

from dcompile.api import Handle, cache_compile, handle, load
from dcompile.dispatch import Stats
from dcompile.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    DcompileError,
    DepthError,
    ExportError,
    ModelError,
    NoSkipConnectionError,
    NotCompiledError,
    ScheduleError,
    TimestepError,
)
from dcompile.report import DepthReport, Explanation
from dcompile.schedule import Power, Schedule, Steps, Uniform
from dcompile.version import __version__

__all__ = [
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "DcompileError",
    "DepthError",
    "DepthReport",
    "Explanation",
    "ExportError",
    "Handle",
    "ModelError",
    "NoSkipConnectionError",
    "NotCompiledError",
    "Power",
    "Schedule",
    "ScheduleError",
    "Stats",
    "Steps",
    "TimestepError",
    "Uniform",
    "__version__",
    "cache_compile",
    "handle",
    "load",
]
