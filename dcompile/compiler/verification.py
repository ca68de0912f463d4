"""Whether a captured graph computes what the network computes.

What a network takes from elsewhere than its arguments and weights is a constant of its graph: the
time of day, an iterator's next item, how often it was called. Nothing in the graph shows that, but
its result does: it was traced after a call that is known, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.program import CompiledGraph, convention_of, weights_of
from dcompile.compiler.weight_classes import remark_on
from dcompile.errors import CaptureError

# Shares of the largest value. Two calls of one network differ by less, if at all; its graph may
# also round differently where operators were decomposed. Libraries of other devices may choose
# another algorithm for each call.
SAME_CALL = 1e-5
SAME_COMPUTATION = 1e-4
OTHER_DEVICES = 1e-2


def run_graph(network: CapturedNetwork, module: nn.Module, leaves: Sequence[Any]) -> list[Any]:
    """What the graph returns for a call, with the module's weights; operator by operator."""
    graph_module = network.graph_module
    graph = CompiledGraph(graph_module, convention_of(graph_module, network))
    with torch.no_grad():
        return list(graph.bind(weights_of(module))(leaves))


def difference_of_results(one: Any, other: Any) -> float:
    """The largest difference as a share of the largest value; 0 only if they are equal.

    Infinite if they have different structures, shapes, dtypes, or other values that are no tensors.
    """
    ones, others = tree_leaves(one), tree_leaves(other)
    if len(ones) != len(others):
        return float("inf")
    return max(map(_difference, ones, others), default=0.0)


def _difference(one: Any, other: Any) -> float:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return 0.0 if type(one) is type(other) and one == other else float("inf")
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return float("inf")
    if one.is_meta or other.is_meta or torch.equal(one, other):
        return 0.0
    kind = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.detach().to(kind), other.detach().to(kind)
    same = (one == other) | (one.isnan() & other.isnan())  # infinities are equal
    if bool(same.all()):
        return 0.0
    apart = torch.where(same, 0, (one - other).abs())
    largest = torch.where(one.isfinite(), one, 0).abs().max()
    share = float(apart.max() / largest.clamp(min=torch.finfo(torch.float64).tiny))
    return share if share == share else float("inf")


def tolerance_of(result: Any, share: float) -> float:
    """``share``, or more where the result is in half precision or on another device than a CPU."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    coarsest = max((torch.finfo(tensor.dtype).eps for tensor in floating), default=0.0)
    elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    return max(share, 16 * coarsest, OTHER_DEVICES if elsewhere else 0.0)


def reason_to_refuse(
    network: CapturedNetwork,
    module: nn.Module,
    leaves: Sequence[Any],
    result: Any,
    again: Callable[[], Any],
) -> str | None:
    """Why the graph must not be used, if it computes something else than the network.

    Args:
        leaves, result: of a real call, before which random numbers were as they are now.
        again: makes the same call once more, with the same random numbers.

    Raises:
        CaptureError: the graph cannot be run, for lack of memory, say.
    """
    name = type(module).__name__
    try:
        computed = run_graph(network, module, leaves)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CaptureError(
            f"the graph captured of {name} cannot be run: {type(error).__name__}: {first}"
        ) from error
    found = difference_of_results(result, computed)
    if found == 0.0:
        return None
    repeated = difference_of_results(result, again())
    if repeated > tolerance_of(result, SAME_CALL):
        return (
            f"{name} returns something else each time it is called with the same arguments: its "
            "result depends on a clock, a counter, an iterator or the like, which would be a "
            "constant of a graph. It runs uncached"
        )
    if found > tolerance_of(result, SAME_COMPUTATION):
        return (
            f"the graph captured of {name} computes something else than the network itself (they "
            f"differ by {found:.1e} of the largest value): its code takes another path while it is "
            f"traced{remark_on(module)}. It runs uncached"
        )
    return None


__all__ = ["difference_of_results", "reason_to_refuse", "run_graph"]
