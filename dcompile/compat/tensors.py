"""Tensor internals: write counts, and subclasses without storage. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=torch.Tensor)

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""As a class's ``__torch_function__``: operators are not intercepted before dispatch."""


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes whenever the tensor is written to in place; None for inference tensors.

    ``Tensor._version`` counts writes, except those through ``.data``.
    """
    return None if tensor.is_inference() else tensor._version


def wrapper_subclass(kind: type[T], like: torch.Tensor) -> T:
    """A tensor subclass with shape, strides, dtype and device of ``like``, and no data."""
    made: T = torch.Tensor._make_wrapper_subclass(
        kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )
    return made
