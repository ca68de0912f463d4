"""What a call of the network consists of: its leaves, and a signature to find a program by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from dcompile.errors import TimestepError


@dataclass(frozen=True, eq=False)
class CallForm:
    """One way to call the network: which arguments are given, and which leaves are what.

    Attributes:
        spec: structure of ``(args, kwargs)``.
        sample: position of the noisy sample among the leaves.
        timestep: position of the timestep.
    """

    spec: TreeSpec
    sample: int
    timestep: int


class CallForms:
    """Finds sample and timestep in the calls of one forward function.

    The sample is the first parameter. The timestep is the first one whose name speaks of time,
    else the second: ``(sample, timestep, ...)``, ``(x, timesteps)``, ``(x, t)``.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        names = list(inspect.signature(forward).parameters)
        timed = [name for name in names[1:] if "time" in name.lower()]
        if len(names) < 2:
            raise TimestepError(
                f"forward{inspect.signature(forward)} takes no timestep: without one, steps cannot "
                "be told apart. Expected (sample, timestep, ...)"
            )
        self._sample = names[0]
        self._timestep = (timed or names[1:])[0]
        self._position = names.index(self._timestep)
        self._known: dict[TreeSpec, CallForm | None] = {}

    def flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], CallForm | None]:
        """The call's leaves and form; no form if sample or timestep is not given as one leaf."""
        leaves, spec = tree_flatten((args, kwargs))
        try:
            return leaves, self._known[spec]
        except KeyError:
            form = self._known[spec] = self._analyse(spec, args, kwargs)
            return leaves, form

    def _analyse(
        self, spec: TreeSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CallForm | None:
        sample = _leaf_of(args, kwargs, 0, self._sample)
        timestep = _leaf_of(args, kwargs, self._position, self._timestep)
        if sample is None or timestep is None:
            return None
        return CallForm(spec, sample, timestep)


def _leaf_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str
) -> int | None:
    """Position among the leaves of one argument, if it is a single leaf."""
    mark = object()
    if name in kwargs:
        marked: tuple[Any, Any] = (args, {**kwargs, name: mark})
    elif position < len(args):
        marked = ((*args[:position], mark, *args[position + 1 :]), dict(kwargs))
    else:
        return None
    original, _ = tree_flatten((args, dict(kwargs)))
    leaves, _ = tree_flatten(marked)
    if len(leaves) != len(original):
        return None
    return next(index for index, leaf in enumerate(leaves) if leaf is mark)


class Signature(NamedTuple):
    """Everything a graph depends on besides the values of tensors.

    Attributes:
        form: structure of the call.
        leaves: shape, strides, dtype and device of each tensor; type and value of each constant.
        autocast: device type and dtype, if autocast is on.
    """

    form: CallForm
    leaves: tuple[Any, ...]
    autocast: tuple[str, torch.dtype] | None


def signature_of(form: CallForm, leaves: Sequence[Any]) -> Signature:
    """The signature of a call; equal signatures can run the same program."""
    described = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    device = leaves[form.sample].device.type
    autocast = None
    if device != "meta" and torch.is_autocast_enabled(device):
        autocast = (device, torch.get_autocast_dtype(device))
    return Signature(form, described, autocast)
