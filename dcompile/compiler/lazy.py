"""Tensors that are computed when, and only if, somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from dcompile.compat.tensors import no_torch_function, wrapper_subclass


class PendingCall:
    """The results of one call that has not run yet.

    Args:
        compute: takes the numbers of some results and returns those, in that order.
        count: how many results there are.
    """

    def __init__(self, compute: Callable[[tuple[int, ...]], Sequence[torch.Tensor]], count: int):
        self._compute: Callable[[tuple[int, ...]], Sequence[torch.Tensor]] | None = compute
        self._count = count
        self._made: dict[int, torch.Tensor] = {}

    def values(self, numbers: Iterable[int]) -> dict[int, torch.Tensor]:
        """These results, computed together as far as they are not yet."""
        missing = tuple(sorted(number for number in set(numbers) if number not in self._made))
        if missing:
            assert self._compute is not None
            self._made.update(zip(missing, self._compute(missing), strict=True))
            if len(self._made) == self._count:
                self._compute = None  # and let go of the call's arguments
        return self._made

    def all_values(self) -> dict[int, torch.Tensor]:
        """All results."""
        return self.values(range(self._count))


class LazyTensor(torch.Tensor):
    """One of the results of a ``PendingCall`` call.

    Has its shape, strides, dtype and device from the start. Any operator that is called with it
    gets the true tensor, and so does whatever reads its memory (``numpy``, DLPack, ``data_ptr``,
    pickle), so whoever does not know of it is served rightly: then all results are computed.
    ``materialize`` asks for some of them only.
    """

    pending: PendingCall
    number: int
    __torch_function__ = no_torch_function

    @staticmethod
    def __new__(cls, like: torch.Tensor, pending: PendingCall, number: int) -> LazyTensor:
        made = wrapper_subclass(cls, like)
        made.pending, made.number = pending, number
        return made

    def value(self) -> torch.Tensor:
        """The true tensor."""
        return self.pending.all_values()[self.number]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.value())


def _of_the_true_tensor(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.value(), name)(*args, **kwargs)

    return method


# What reads memory without calling an operator, or returns the tensor itself where nothing changes.
for _name in (
    *("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "__dlpack_device__"),
    *("__deepcopy__", "__reduce_ex__", "share_memory_", "pin_memory"),
    *("to", "cpu", "cuda", "type", "float", "double", "half", "bfloat16", "contiguous"),
):
    setattr(LazyTensor, _name, _of_the_true_tensor(_name))


def materialize(values: Sequence[Any]) -> list[Any]:
    """The same values, deferred ones computed: of each call, these results and no others."""
    wanted: dict[PendingCall, list[int]] = {}
    for value in values:
        if type(value) is LazyTensor:
            wanted.setdefault(value.pending, []).append(value.number)
    found = {pending: pending.values(numbers) for pending, numbers in wanted.items()}
    return [
        found[value.pending][value.number] if type(value) is LazyTensor else value
        for value in values
    ]
