"""CUDA and batched operators without a public name. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def clear_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps for each stream."""
    torch._C._cuda_clearCublasWorkspaces()


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, with as few kernels as possible."""
    torch._foreach_copy_(list(targets), list(sources))
