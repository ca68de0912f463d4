"""Identity of tensor storages.

Step tracking depends on two things that PyTorch does not document: ``Tensor.untyped_storage()``
returns the same Python object for all views of one storage as long as anything refers to it, and
that object can be referred to weakly. Seen in torch 2.11 to 2.15.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

# (tensor) -> the storage object: the very same one for all views of it, as long as any of them
# lives. Not wrapped in a function: every call of a network asks for several.
storage_of: Callable[[torch.Tensor], torch.UntypedStorage] = torch.Tensor.untyped_storage


def row_stride_of(element: torch.Tensor) -> int:
    """How far apart the rows are of the table that a tensor is a view of; 1 if it is none."""
    base = element._base
    return base.stride(0) if base is not None and base.dim() == 2 else 1


def weak_storage(
    tensor: torch.Tensor, callback: Callable[[Any], Any] | None = None
) -> weakref.ref[Any]:
    """A weak reference to the tensor's storage, which is cleared when its memory is freed.

    Args:
        tensor: any view of it.
        callback: called with the reference when that happens.
    """
    return weakref.ref(tensor.untyped_storage(), callback)
