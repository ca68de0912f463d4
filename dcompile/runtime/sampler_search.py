"""Finds the sampler whose timesteps a run goes over, in the code that calls the network.

Pipelines that share one network bring a scheduler each, often one for every thread, and
``cache_compile`` has seen only one of them. The sampling loop has its scheduler at hand: as a local
variable, or as an attribute of one, such as a pipeline.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dcompile.compat.storages import storage_of

# Callers that are looked at, from the network's own call outwards.
MAX_CALLERS = 24
_ATTRIBUTES = ("scheduler", "sampler", "noise_scheduler")


def sampler_of_callers(timestep: torch.Tensor) -> Any | None:
    """An object with ``timesteps`` of which this is one, among the callers' variables.

    Args:
        timestep: the first of a run.
    """
    storage = storage_of(timestep)
    frame = sys._getframe(1)
    for _ in range(MAX_CALLERS):
        if frame is None:
            break
        for candidate in _candidates(frame):
            own = getattr(candidate, "timesteps", None)
            if isinstance(own, torch.Tensor) and storage_of(own) is storage:
                return candidate
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _candidates(frame: types.FrameType) -> Iterator[Any]:
    variables: Mapping[str, Any] = frame.f_locals
    values = [value for value in variables.values() if _may_have_attributes(value)]
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        # A copy, which the frame keeps: nothing may live longer for having been looked at.
        variables.clear()  # type: ignore[attr-defined]
    for value in values:
        if callable(getattr(type(value), "set_timesteps", None)):
            yield value
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            for name in _ATTRIBUTES:
                found = attributes.get(name)
                if callable(getattr(type(found), "set_timesteps", None)):
                    yield found


def _may_have_attributes(value: Any) -> bool:
    return not isinstance(value, (torch.Tensor, str, bytes, int, float, list, tuple, dict, set))
