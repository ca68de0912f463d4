"""Finds the sampler and the timestep of a sampling loop, in the code that calls the network.

Pipelines that share one network bring a scheduler each, often one for every thread, and
``cache_compile`` has seen only one of them. And many pass the network a timestep of their own
making, such as ``t.expand(batch) / 1000``, which is no element of ``scheduler.timesteps`` any more.
The sampling loop has both at hand: the scheduler as a local variable or as an attribute of one,
such as a pipeline, and ``t`` as a local variable.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.compat.storages import storage_of
from dcompile.compiler.introspection import is_readable, own_dict

# Callers that are looked at, from the network's own call outwards.
MAX_CALLERS = 24
_ATTRIBUTES = ("scheduler", "sampler", "noise_scheduler")


def sampler_of_callers(timestep: torch.Tensor) -> Any | None:
    """An object with ``timesteps`` of which this is one, among the callers' variables.

    Args:
        timestep: the first of a run.
    """
    storage = storage_of(timestep)
    for frame in _callers():
        for candidate in _samplers(_variables(frame)):
            own = getattr(candidate, "timesteps", None)
            if isinstance(own, torch.Tensor) and storage_of(own) is storage:
                return candidate
    return None


class LoopTimesteps:
    """Finds the element of ``scheduler.timesteps`` that a timestep was computed from.

    That is the one variable of a caller that is an element of its scheduler's timesteps. It says
    which step it is as long as the network is not called with two timesteps at one element, as in
    a loop within the loop, or where the variable has stayed from a loop before. That is looked at
    in the first two steps that a piece of code makes, by the timesteps' values, which on a GPU
    waits for the device. Afterwards that code is trusted, and no value is read. Code that does
    otherwise is not asked again: its timesteps are identified by value.

    Safe to use from several threads: whoever comes second finds out the same.
    """

    def __init__(self) -> None:
        # By identity: hashing code goes through all of it. The code is kept, so that none else
        # gets its identity.
        self._known: dict[int, tuple[types.CodeType, _Evidence]] = {}

    def element(self, timestep: Any) -> torch.Tensor | None:
        """The element that belongs to a timestep; None if there is none, or it is not certain.

        Args:
            timestep: as the network got it: a tensor or a number.
        """
        found = _element_of_callers()
        if found is None:
            return None
        element, code = found
        _, evidence = self._known.setdefault(id(code), (code, _Evidence()))
        if evidence.verdict is None:
            evidence.add(float(element.flatten()[0]), _largest(timestep), _tolerance(timestep))
        return None if evidence.verdict is False else element


@dataclass
class _Evidence:
    """Whether the elements that a piece of code is at tell its steps apart.

    Attributes:
        verdict: None until two elements were seen.
        first: the first element, and the timestep there.
    """

    verdict: bool | None = None
    first: tuple[float, float] | None = None

    def add(self, element: float, timestep: float, tolerance: float) -> None:
        """Look at one call."""
        if self.first is None:
            self.first = element, timestep
        elif element != self.first[0]:
            self.verdict = True
        elif abs(timestep - self.first[1]) > tolerance * abs(self.first[1]):
            self.verdict = False


def _element_of_callers() -> tuple[torch.Tensor, types.CodeType] | None:
    """The one element of a scheduler's timesteps among a caller's variables, and its code."""
    for frame in _callers():
        variables = _variables(frame)
        tensors = [value for value in variables if type(value) is torch.Tensor]
        if not tensors:
            continue
        for sampler in _samplers(variables):
            own = getattr(sampler, "timesteps", None)
            if not isinstance(own, torch.Tensor) or own.numel() < 2:
                continue
            storage = storage_of(own)
            elements = {
                tensor.storage_offset(): tensor
                for tensor in tensors
                if storage_of(tensor) is storage
                and (tensor.numel() == 1 or not any(tensor.stride()))
            }
            if elements:
                return (elements.popitem()[1], frame.f_code) if len(elements) == 1 else None
    return None


def _largest(timestep: Any) -> float:
    """Of a timestep for each token or frame, some may be zero: what is conditioned on."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.detach().abs().max())
    return float(timestep)


def _tolerance(timestep: Any) -> float:
    """Relative, of rounding in the timestep's dtype."""
    if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
        return 4 * torch.finfo(timestep.dtype).eps
    return 1e-6


def _callers() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(2)
    for _ in range(MAX_CALLERS):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def _variables(frame: types.FrameType) -> list[Any]:
    """The values of a frame's local variables."""
    variables: Mapping[str, Any] = frame.f_locals
    values = list(variables.values())
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        # A copy, which the frame keeps: nothing may live longer for having been looked at.
        variables.clear()  # type: ignore[attr-defined]
    return values


def _samplers(variables: list[Any]) -> Iterator[Any]:
    for value in variables:
        if not is_readable(value) or isinstance(
            value, (torch.Tensor, str, bytes, int, float, list, tuple, dict, set)
        ):
            continue
        if callable(getattr(type(value), "set_timesteps", None)):
            yield value
        attributes = own_dict(value)
        if isinstance(attributes, dict):
            for name in _ATTRIBUTES:
                found = attributes.get(name)
                if callable(getattr(type(found), "set_timesteps", None)):
                    yield found
