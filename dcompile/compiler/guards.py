"""The calls that a dynamic capture is right for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


def _known_size(size: int | torch.SymInt) -> int | None:
    """None if it may vary. A symbol may have been tied to a number since it was made."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else None


class TensorPattern(NamedTuple):
    """What a dynamic capture wants of a tensor; a size of None may vary."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    contiguous: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorPattern:
        shape = tuple(map(_known_size, tensor.shape))
        return TensorPattern(shape, tensor.dtype, tensor.device, tensor.is_contiguous())

    def fits(self, given: Any) -> bool:
        return (
            isinstance(given, torch.Tensor)
            and given.dtype == self.dtype
            and given.device == self.device
            and given.dim() == len(self.shape)
            and given.is_contiguous() == self.contiguous
            and all(
                size in (None, actual) for size, actual in zip(self.shape, given.shape, strict=True)
            )
        )


def autocast_dtype(tensors: Sequence[torch.Tensor]) -> str | None:
    """The dtype of autocast where the tensors are, if it is on."""
    for kind in {tensor.device.type for tensor in tensors} - {"meta"}:
        if torch.is_autocast_enabled(kind):
            return str(torch.get_autocast_dtype(kind))
    return None


@dataclass(frozen=True)
class SizeGuard:
    """The calls that a dynamic capture is right for.

    Attributes:
        leaves: position among the call's leaves, and the pattern of a tensor or a constant.
        expression: further conditions on sizes, as Python over ``L["t0"]``, ``L["t1"]``, ..., the
            tensors among the leaves in order; from torch's ``ShapeEnv``.
        ranges: leaf, dimension, least and greatest size that the user asked for.
        autocast: its dtype if it was on.
    """

    leaves: tuple[tuple[int, Any], ...]
    expression: str | None
    ranges: tuple[tuple[int, int, int, int], ...] = ()
    autocast: str | None = None

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these leaves can run the captured graph."""
        tensors: list[torch.Tensor] = []
        for leaf, wanted in self.leaves:
            given = leaves[leaf]
            if isinstance(wanted, TensorPattern):
                if not wanted.fits(given):
                    return False
                tensors.append(given)
            elif type(given) is not type(wanted) or given != wanted:
                return False
        if autocast_dtype(tensors) != self.autocast:
            return False
        if any(not low <= leaves[leaf].shape[d] <= high for leaf, d, low, high in self.ranges):
            return False
        if self.expression is None:
            return True
        from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # imports sympy

        # As ShapeEnv.evaluate_guards_expression does, without its ShapeEnv.
        known = {"L": {f"t{number}": tensor for number, tensor in enumerate(tensors)}}
        return bool(eval(self.expression, SYMPY_INTERP, known))
