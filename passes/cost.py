"""FLOPs and bytes per node, by the formulas of ``torch.utils.flop_counter``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What running something once takes.

    Attributes:
        flops: floating-point operations; a multiply-add counts as two.
        bytes: bytes of the tensors read and written, if nothing is fused.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Saving(ABC):
    """What every kind of cut says of its cost.

    Attributes:
        full: cost of the whole graph.
        shallow: cost of the graph without what the cut leaves out.
    """

    full: Cost
    shallow: Cost

    @property
    @abstractmethod
    def replaced(self) -> tuple[tuple[Node, Node | None], ...]:
        """Each tensor that is replaced, with the one that a cached tensor is added to, if any."""

    @property
    def cache_bytes(self) -> int:
        """Bytes cached for one call: of each replaced tensor, one of its shape and dtype."""
        return sum(tensor_bytes(node.meta.get("val")) for node, _ in self.replaced)

    @property
    def ratio(self) -> float:
        """r: FLOPs of the shallow graph over FLOPs of the full graph."""
        return self.shallow.flops / self.full.flops if self.full.flops else 1.0

    def speed_limit(self, interval: float) -> float:
        """The highest possible speed-up, N / (1 + (N - 1) r), refreshing every Nth step."""
        return interval / (1 + (interval - 1) * self.ratio)


@dataclass(frozen=True)
class _TensorLike:
    shape: tuple[int, ...]
    dtype: torch.dtype


def node_cost(node: Node) -> Cost:
    """The cost of one node; zero for what computes nothing or has no metadata.

    Symbolic sizes count with the sizes of the example they were captured with.
    """
    if node.op != "call_function" or "val" not in node.meta:
        return Cost()
    moved = sum(tensor_bytes(value) for value in tree_leaves(node.meta["val"]))
    moved += sum(tensor_bytes(operand.meta.get("val")) for operand in node.all_input_nodes)
    return Cost(_flops(node), moved)


def total_cost(nodes: Iterable[Node]) -> Cost:
    """The sum of ``node_cost`` over ``nodes``."""
    return sum((node_cost(node) for node in nodes), Cost())


def tensor_sizes(value: torch.Tensor) -> tuple[int, ...]:
    """The shape in plain ints; symbolic sizes as in the example they were captured with."""
    return tuple(
        size if isinstance(size, int) else int(size.node.hint or 0) for size in value.shape
    )


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor; zero for anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in tensor_sizes(value):
        count *= size
    return count * value.element_size()


def _flops(node: Node) -> int:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise in target.tags:
        return 0

    def frozen(argument: Any) -> Any:
        if isinstance(argument, Node):
            argument = argument.meta.get("val")
        if isinstance(argument, torch.Tensor):
            # One floating dtype: under autocast operands differ, and FLOPs do not depend on it.
            dtype = torch.float32 if argument.is_floating_point() else argument.dtype
            return _TensorLike(tensor_sizes(argument), dtype)
        if isinstance(argument, torch.SymInt):
            return int(argument.node.hint or 0)
        return argument

    args = map_aggregate(node.args, frozen)
    kwargs = tuple((name, map_aggregate(value, frozen)) for name, value in node.kwargs.items())
    return _operator_flops(target, _hashable(args), _hashable(kwargs))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


class _NoModules:
    """In the place of FlopCounterMode's ModuleTracker, which hooks all modules of the process.

    Other threads would run these hooks, and take them for a change of their modules.
    """

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@lru_cache(maxsize=4096)
def _operator_flops(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> int:
    """Run the operator on tensors without data and let FlopCounterMode see what it does.

    Composite operators (``conv2d``, ``linear``, ``scaled_dot_product_attention``) have no
    formula of their own; they reach the counter as what they consist of.
    """

    def example(argument: Any) -> Any:
        if isinstance(argument, _TensorLike):
            return torch.empty(argument.shape, dtype=argument.dtype, device="meta")
        if isinstance(argument, tuple):
            return [example(item) for item in argument]
        if isinstance(argument, torch.device):
            return torch.device("meta")
        return argument

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    try:
        # In inference mode composite operators reach the counter whole.
        with torch.inference_mode(False), torch.no_grad(), counter:
            target(*map(example, args), **{name: example(value) for name, value in kwargs})
    except (NotImplementedError, RuntimeError):  # no meta kernel: no formula either
        return 0
    return int(counter.get_total_flops())
