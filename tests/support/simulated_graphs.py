"""CUDA-graph semantics on a CPU, as unforgiving as the real thing."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.runtime.cuda_recorder import Runs


@dataclass
class Recording:
    run: Runs
    reads: list[Any]
    lifetimes: list[weakref.ref[Any]]
    outputs: tuple[Any, ...]
    given: set[int]


class SimulatedRecorder:
    """Records a function instead of launches.

    A replay reads the addresses the inputs had when they were captured, whatever has become of
    the tensors since, and overwrites the captured outputs in place. It refuses to read an address
    that nobody holds any more. As in a memory pool that recordings share, a replay spoils what
    recordings captured later have returned: their memory was free when it was captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.recordings: list[Recording] = []

    def capture(self, run: Runs, reads: Sequence[Any]) -> tuple[Recording, tuple[Any, ...]]:
        tensors = [x for x in reads if isinstance(x, torch.Tensor)]
        fixed = [_at_this_address(x) if isinstance(x, torch.Tensor) else x for x in reads]
        given = {x.untyped_storage().data_ptr() for x in fixed if isinstance(x, torch.Tensor)}
        outputs = tuple(run([*fixed]))
        lifetimes = [weakref.ref(x.untyped_storage()) for x in tensors]
        recording = Recording(run, fixed, lifetimes, outputs, given)
        self.recordings.append(recording)
        _spoil(recording)  # recording launches nothing
        return recording, outputs

    def replay(self, recording: Recording) -> None:
        if any(alive() is None for alive in recording.lifetimes):
            raise AssertionError("a recording reads an address that was freed")
        for output, value in zip(recording.outputs, recording.run(recording.reads), strict=True):
            if isinstance(output, torch.Tensor):
                _once(output).copy_(_once(value))
        for later in self.recordings[self.recordings.index(recording) + 1 :]:
            _spoil(later)


def _at_this_address(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory through a storage of its own: keeps no one alive, follows no one."""
    window = torch.frombuffer(
        (ctypes.c_byte * tensor.untyped_storage().nbytes()).from_address(
            tensor.untyped_storage().data_ptr()
        ),
        dtype=torch.uint8,
    ).view(tensor.dtype)
    return window.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """An expanded tensor's elements, each once."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _spoil(recording: Recording) -> None:
    for x in recording.outputs:
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in recording.given:
            _once(x).fill_(float("nan") if x.is_floating_point() else -1)
