"""Compiled feature caching for diffusion networks, without training.

    unet = dcompile.cache_compile(unet, interval=3)

The public names are imported when they are first used: ``import dcompile`` does not import torch,
and ``dcompile.passes`` can be used without the rest.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcompile.version import __version__

if TYPE_CHECKING:
    from dcompile.api import cache_compile as cache_compile
    from dcompile.api import handle as handle
    from dcompile.api import load as load
    from dcompile.errors import ArtifactError as ArtifactError
    from dcompile.errors import BackendError as BackendError
    from dcompile.errors import CaptureError as CaptureError
    from dcompile.errors import DcompileError as DcompileError
    from dcompile.errors import DepthError as DepthError
    from dcompile.errors import ExportError as ExportError
    from dcompile.errors import ModelError as ModelError
    from dcompile.errors import NoCutError as NoCutError
    from dcompile.errors import NotCompiledError as NotCompiledError
    from dcompile.errors import ScheduleError as ScheduleError
    from dcompile.errors import TimestepError as TimestepError
    from dcompile.errors import TuneError as TuneError
    from dcompile.handles import Handle as Handle
    from dcompile.policy.adaptive import Adaptive as Adaptive
    from dcompile.policy.fixed import NonUniform as NonUniform
    from dcompile.policy.fixed import Steps as Steps
    from dcompile.policy.fixed import Uniform as Uniform
    from dcompile.policy.forecast import Forecast as Forecast
    from dcompile.policy.gain_weighted import GainWeighted as GainWeighted
    from dcompile.policy.multi_level import MultiLevel as MultiLevel
    from dcompile.policy.schedule import Plan as Plan
    from dcompile.policy.schedule import RunInfo as RunInfo
    from dcompile.policy.schedule import Schedule as Schedule
    from dcompile.policy.tuned import Trial as Trial
    from dcompile.policy.tuned import Tuned as Tuned
    from dcompile.report.explain import DepthReport as DepthReport
    from dcompile.report.explain import Explanation as Explanation
    from dcompile.runtime.counters import Stats as Stats
    from dcompile.tuning.calibrate import calibrate as calibrate
    from dcompile.tuning.profile import DepthProfile as DepthProfile
    from dcompile.tuning.profile import Profile as Profile
    from dcompile.tuning.profile import profile as profile
    from dcompile.tuning.tune import tune as tune

_MODULES = {
    "dcompile.api": ("cache_compile", "handle", "load"),
    "dcompile.errors": (
        "ArtifactError",
        "BackendError",
        "CaptureError",
        "DcompileError",
        "DepthError",
        "ExportError",
        "ModelError",
        "NoCutError",
        "NotCompiledError",
        "ScheduleError",
        "TimestepError",
        "TuneError",
    ),
    "dcompile.handles": ("Handle",),
    "dcompile.policy.forecast": ("Forecast",),
    "dcompile.policy.adaptive": ("Adaptive",),
    "dcompile.policy.fixed": ("NonUniform", "Steps", "Uniform"),
    "dcompile.policy.gain_weighted": ("GainWeighted",),
    "dcompile.policy.multi_level": ("MultiLevel",),
    "dcompile.policy.schedule": ("Plan", "RunInfo", "Schedule"),
    "dcompile.policy.tuned": ("Trial", "Tuned"),
    "dcompile.report.explain": ("DepthReport", "Explanation"),
    "dcompile.runtime.counters": ("Stats",),
    "dcompile.tuning.profile": ("DepthProfile", "Profile", "profile"),
    "dcompile.tuning.calibrate": ("calibrate",),
    "dcompile.tuning.tune": ("tune",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

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
    "GainWeighted",
    "Handle",
    "ModelError",
    "MultiLevel",
    "NoCutError",
    "NonUniform",
    "NotCompiledError",
    "Plan",
    "Profile",
    "RunInfo",
    "Schedule",
    "ScheduleError",
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


def __getattr__(name: str) -> Any:
    """Import a public name's module at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dcompile' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A wheel has the folder passes/ as dcompile/passes. In a checkout it is next to this package.
_CHECKOUT = Path(__file__).parent.parent


class _PassesOfCheckout(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        folder = _CHECKOUT / "passes"
        if name != f"{__name__}.passes" or not (folder / "skips.py").is_file():
            return None
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (_CHECKOUT / "pyproject.toml").is_file():
    sys.meta_path.append(_PassesOfCheckout())
