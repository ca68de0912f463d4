"""Whether two results differ by more than rounding."""

from __future__ import annotations

from typing import Any

import torch

# In units of the last place of the result's dtype. A tensor made of a number has fewer digits.
TOLERANCE = 64


def alike(one: Any, other: Any) -> bool:
    """Equal but for rounding."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one is other or one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    difference = (one.double() - other.double()).norm()
    allowed = TOLERANCE * torch.finfo(one.dtype).eps
    return bool(difference <= allowed * other.double().norm())
