"""What tensors know about themselves without saying so in public."""

from __future__ import annotations

import torch


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes whenever the tensor is written to in place; None for inference tensors.

    ``Tensor._version`` counts writes, except those through ``.data``. Seen in torch 2.11 to 2.15.
    """
    return None if tensor.is_inference() else tensor._version
