"""Whether compiled code computes what its graph does, but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter
from torch.fx.node import Argument, Target
from torch.utils._pytree import tree_map

# Of a result's norm: more than rounding makes of it in any dtype, less than a mistake.
_WRONG = 0.1
# Times the graph's own rounding in half precision: other kernels round elsewhere.
_WORSE = 4.0
_HALF = (torch.float16, torch.bfloat16)


def computes_the_same(
    graph_module: GraphModule, run: Callable[..., Any], inputs: Sequence[Any]
) -> bool:
    """Whether ``run`` returns what the graph does for ``inputs``, but for rounding.

    Results in half precision may be nearly all rounding: a residual of a few blocks is the small
    difference of two large tensors. Where they differ, both are compared with the graph in single
    precision, and code that is not much further from that than the graph itself is right.
    """
    if any(value.is_meta for value in inputs if isinstance(value, torch.Tensor)):
        return True  # nothing can be run
    found, expected = run(*inputs), graph_module(*inputs)
    if all(_near(one, other) for one, other in zip(found, expected, strict=True)):
        return True
    try:
        exact = _SinglePrecision(graph_module).run(*inputs)
    except Exception:  # an operator for half precision only
        return False
    return all(
        _near(one, other) or _no_worse(one, other, true)
        for one, other, true in zip(found, expected, exact, strict=True)
    )


def _near(found: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        return True
    # An overflow, of features or of their norm, tells nothing.
    difference = _norm(found, expected)
    return difference <= _WRONG * _norm(expected) or not bool(expected.isfinite().all())


def _no_worse(found: torch.Tensor, expected: torch.Tensor, true: torch.Tensor) -> bool:
    return expected.dtype in _HALF and _norm(found, true) <= _WORSE * _norm(expected, true)


def _norm(one: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    wide = one.double()
    return float((wide if minus is None else wide - minus.double()).norm())


class _SinglePrecision(Interpreter):
    """Runs a graph with float32 wherever it has float16 or bfloat16; its inputs stay as they are.

    Weights are converted one operator at a time: of a large network there is no second copy.
    """

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return super().call_function(target, tree_map(_widened, args), tree_map(_widened, kwargs))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


__all__ = ["computes_the_same"]
