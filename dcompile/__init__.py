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
    TuneError,
)
from dcompile.forecast import Forecast
from dcompile.profiling import DepthProfile, Profile, profile
from dcompile.report import DepthReport, Explanation
from dcompile.schedule import Adaptive, Power, Pyramid, Run, Schedule, Sigma, Steps, Uniform
from dcompile.tuning import Trial, Tuned, calibrate, tune
from dcompile.version import __version__

__all__ = [
    "Adaptive",
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "DcompileError",
    "DepthError",
    "DepthProfile",
    "DepthReport",
    "Explanation",
    "ExportError",
    "Forecast",
    "Handle",
    "ModelError",
    "NoSkipConnectionError",
    "NotCompiledError",
    "Power",
    "Profile",
    "Pyramid",
    "Run",
    "Schedule",
    "ScheduleError",
    "Sigma",
    "Stats",
    "Steps",
    "TimestepError",
    "Trial",
    "TuneError",
    "Tuned",
    "Uniform",
    "__version__",
    "cache_compile",
    "calibrate",
    "handle",
    "load",
    "profile",
    "tune",
]
