"""CUDA and batched operators without a public name. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch


def clear_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps for each stream."""
    torch._C._cuda_clearCublasWorkspaces()


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, with as few kernels as possible."""
    torch._foreach_copy_(list(targets), list(sources))


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
