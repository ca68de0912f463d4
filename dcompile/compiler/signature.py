"""Call signatures: what a program depends on, apart from the values of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten, treespec_dumps, treespec_loads

from dcompile.compiler.call import CallForm
from dcompile.compiler.lazy import LazyTensor

Signature = tuple[Any, ...]
"""The call's form, each tensor's shape, dtype, device and strides, each constant's type and value,
and autocast's state."""


# Subclasses may compute something else, and have programs of their own.
_ORDINARY = (torch.Tensor, torch.nn.Parameter, LazyTensor)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a number, of Python or NumPy."""
    return isinstance(leaf, Real) and not isinstance(leaf, bool)


def numbers_to_tensors(
    leaves: list[Any], timestep: int, others: Iterable[int] = ()
) -> dict[int, Any]:
    """Make inputs of the graph of numbers that would be constants of it.

    Args:
        leaves: of a call; changed in place, to tensors without dimensions.
        timestep: position of the timestep among them, which may be a tensor already.
        others: positions of further numbers; floats become float64, which loses no digits.

    Returns:
        The numbers that were replaced, by their position among the leaves.
    """
    numbers: dict[int, Any] = {}
    if not isinstance(leaves[timestep], torch.Tensor):
        numbers[timestep] = leaves[timestep]
        leaves[timestep] = torch.tensor(leaves[timestep])
    for place in others:
        numbers[place] = value = leaves[place]
        leaves[place] = torch.tensor(
            value, dtype=torch.float64 if isinstance(value, float) else None
        )
    return numbers


def signature_of(
    form: CallForm, leaves: Sequence[Any], numbers: Container[int] = ()
) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a call, and its conditioning.

    Calls of equal signatures can run the same program. The conditioning is all tensors except
    sample and timestep, and except those made of numbers and lazy ones, which belong to one call.

    Args:
        form: the call's form.
        leaves: its leaves.
        numbers: positions of leaves that were converted from numbers.
    """
    parts: list[Any] = [form]
    conditioning: list[torch.Tensor] = []
    sample, own_leaves = leaves[form.sample], [leaves[place] for place in form.own]
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            where = leaf.device if type(leaf) in _ORDINARY else (leaf.device, type(leaf))
            parts += (leaf.shape, leaf.dtype, where, leaf.is_contiguous() or leaf.stride())
            own = place in numbers or any(leaf is one for one in own_leaves)
            if not own and type(leaf) is not LazyTensor:
                conditioning.append(leaf)
        else:
            parts += (type(leaf), leaf)
    device = sample.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        parts += (device, torch.get_autocast_dtype(device))
    return tuple(parts), conditioning


def constants_that_differ(one: Signature, other: Signature) -> list[int] | None:
    """Leaves that are another constant of the same type; None if anything else differs."""
    if one[0] is not other[0] or len(one) != len(other):
        return None
    found: list[int] = []
    place, leaf = 1, 0
    while leaf < one[0].spec.num_leaves:
        width = 4 if isinstance(one[place], torch.Size) else 2
        before, after = one[place : place + width], other[place : place + width]
        if before != after:
            if width == 4 or before[0] is not after[0]:
                return None
            found.append(leaf)
        place, leaf = place + width, leaf + 1
    return found if one[place:] == other[place:] else None


def what_differs(one: Signature, other: Signature) -> str:
    """The first difference of two signatures, for a person."""
    if one[0] is not other[0]:
        return "its arguments are given in another way"
    for before, after in zip(one[1:], other[1:], strict=False):
        if before != after:
            if isinstance(before, torch.Size) and isinstance(after, torch.Size):
                return f"a tensor of shape {tuple(after)} instead of {tuple(before)}"
            if isinstance(before, type) or isinstance(after, type):
                return "an argument of another type"
            if isinstance(before, (bool, tuple)):
                return "a tensor with other strides" if isinstance(after, tuple) else f"{after!r}"
            return f"{after!r} instead of {before!r}"
    return "autocast"


def portable_signature(signature: Signature) -> str | None:
    """A call signature as JSON, equal in every process; None if it cannot be written as JSON."""
    form, *parts = signature
    try:
        return json.dumps([treespec_dumps(form.spec), *map(_plain, parts)])
    except (TypeError, NotImplementedError, KeyError):
        return None


def _plain(part: Any) -> Any:
    if part is None or isinstance(part, (bool, int, str)):
        return part
    if isinstance(part, float):
        return repr(part)
    if isinstance(part, (torch.Size, tuple)):
        return [_plain(item) for item in part]
    if isinstance(part, torch.device):
        return part.type
    if isinstance(part, torch.dtype):
        return str(part)
    if isinstance(part, type):
        return part.__qualname__
    raise TypeError(f"{part!r} has no portable form")


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NoneType": lambda value: None,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
}


def example_of(
    signature: str, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], torch.dtype | None]:
    """A call with that portable signature: args, kwargs, and autocast's dtype if it was on.

    Tensors are zeros; those that were not on the CPU are on ``device``.

    Raises:
        ValueError: this is no portable signature.
    """
    try:
        text, *parts = json.loads(signature)
        spec = treespec_loads(text)
        leaves: list[Any] = []
        rest = iter(parts)
        for _ in range(spec.num_leaves):
            first = next(rest)
            if isinstance(first, str):
                leaves.append(_CONSTANTS[first](next(rest)))
                continue
            dtype, kind, layout = next(rest), next(rest), next(rest)
            options: dict[str, Any] = {
                "dtype": _dtype(dtype),
                "device": "cpu" if kind == "cpu" else device,
            }
            if layout is True:
                leaves.append(torch.zeros(first, **options))
            else:
                leaves.append(torch.empty_strided(first, layout, **options).zero_())
        autocast = list(rest)
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs, _dtype(autocast[1]) if autocast else None
    except (TypeError, KeyError, AttributeError, StopIteration, RuntimeError, ValueError) as error:
        raise ValueError(f"not a call signature: {signature[:80]!r}") from error


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found
