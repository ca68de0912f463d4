"""CUDA and batched operators without a public name. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch


def clear_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps for each stream."""
    torch._C._cuda_clearCublasWorkspaces()


def current_stream_number(device: torch.device) -> int:
    """What identifies the current stream: in 0.2 us, where ``current_stream`` takes 17."""
    number: int = torch._C._cuda_getCurrentRawStream(device.index or 0)
    return number


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target: many with few kernels, few without lists of them."""
    if len(targets) > 2:
        torch._foreach_copy_(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def abandon_pool(device: torch.device, pool: Any) -> None:
    """Stop recording into a memory pool after a capture that was invalidated, and release it.

    ``CUDAGraph.capture_end`` raises before it does so (torch 2.11 to 2.14), and ``reset`` releases
    only what a successful capture held: the pool could never be recorded into again, its memory
    never used for anything else.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # newer versions have stopped by themselves
        torch._C._cuda_endAllocateToPool(index, pool)
    torch._C._cuda_releasePool(index, pool)
