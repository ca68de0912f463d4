"""The forms a call of the network can take: which leaves it has, and which of them are what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_unflatten,
)

from dcompile.compiler.lazy import LazyTensor
from dcompile.errors import TimestepError


@dataclass(frozen=True, eq=False)
class CallForm:
    """One way to call the network: which arguments are given, and which leaves are what.

    Attributes:
        spec: tree structure of ``(args, kwargs)``.
        sample: position of the noisy sample among the leaves.
        timestep: position of the timestep.
    """

    spec: TreeSpec
    sample: int
    timestep: int


class StandardCall(NamedTuple):
    """A call in normal form: what is captured and compiled.

    Attributes:
        form: its form; the same object for all calls of equal structure.
        leaves: its leaves.
        order: the position of each of them among the leaves of the call as it was made.
    """

    form: CallForm
    leaves: list[Any]
    order: tuple[int, ...]


class CallForms:
    """Finds sample and timestep in the calls of one forward function.

    The sample is the first parameter. The timestep is the first one whose name contains "time",
    else the second: ``(sample, timestep, ...)``, ``(x, timesteps)``, ``(x, t)``.

    Raises:
        TimestepError: the function has fewer than two parameters.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._parameters = inspect.signature(forward)
        self._decorated = hasattr(forward, "__wrapped__")
        names = list(self._parameters.parameters)
        timed = [name for name in names[1:] if "time" in name.lower()]
        if len(names) < 2:
            raise TimestepError(
                f"forward{inspect.signature(forward)} takes no timestep: without one, steps cannot "
                "be distinguished. Expected (sample, timestep, ...)"
            )
        self._sample = names[0]
        self._timestep = (timed or names[1:])[0]
        self._position = names.index(self._timestep)
        self._known: dict[tuple[Any, ...], CallForm | None] = {}

    def flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], CallForm | None]:
        """The call's leaves and form; no form if sample or timestep is not given as one leaf.

        Leaves come in the order of ``torch.utils._pytree``, which is slow and asked once for each
        form.
        """
        leaves: list[Any] = []
        structure: list[Any] = [len(args), *kwargs]
        for value in args:
            _flatten_into(value, leaves, structure)
        for value in kwargs.values():
            _flatten_into(value, leaves, structure)
        key = tuple(structure)
        try:
            return leaves, self._known[key]
        except KeyError:
            _, spec = tree_flatten((args, kwargs))
            form = self._known[key] = self._analyse(spec, args, kwargs)
            return leaves, form

    def standard(self, form: CallForm, leaves: Sequence[Any]) -> StandardCall:
        """The call in normal form: keyword arguments in order, without default values.

        So programs do not depend on how a pipeline happens to write its calls. A decorator can see
        that, so for a decorated forward only the order of keyword arguments changes. Called for
        every new signature, not for every call.
        """
        given = StandardCall(form, list(leaves), tuple(range(len(leaves))))
        args, kwargs = tree_unflatten(list(leaves), form.spec)
        places, named_places = tree_unflatten(list(given.order), form.spec)
        parameters = self._parameters.parameters
        positional: tuple[Any, ...] = (args, places)
        if not self._decorated:
            taken = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            if args and (len(args) > len(taken) or next(iter(parameters.values())) != taken[0]):
                return given
            names = [p.name for p in taken[: len(args)]]
            if not kwargs.keys().isdisjoint(names):
                return given  # which the network will refuse
            kwargs = dict(zip(names, args, strict=True)) | kwargs
            named_places = dict(zip(names, places, strict=True)) | named_places
            positional = ((), ())
        if not kwargs.keys() <= parameters.keys():
            return given
        asked = (self._sample, self._timestep)
        kept = [
            name
            for name, parameter in parameters.items()
            if name in kwargs
            and (self._decorated or name in asked or not _is_default(parameter, kwargs[name]))
        ]
        leaves, standard = self.flatten(positional[0], {name: kwargs[name] for name in kept})
        order, _ = tree_flatten((positional[1], {name: named_places[name] for name in kept}))
        if standard is None or len(order) != len(leaves):
            return given
        return StandardCall(standard, leaves, tuple(order))

    def _analyse(
        self, spec: TreeSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CallForm | None:
        sample = _leaf_of(args, kwargs, 0, self._sample)
        timestep = _leaf_of(args, kwargs, self._position, self._timestep)
        if sample is None or timestep is None:
            return None
        return CallForm(spec, sample, timestep)


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    default = parameter.default
    return type(value) is type(default) and type(value) in _CONSTANT_TYPES and value == default


_CONSTANT_TYPES = (type(None), bool, int, float, str)
LEAF_TYPES = frozenset({type(None), bool, int, float, str, torch.Tensor, nn.Parameter, LazyTensor})


def _flatten_into(value: Any, leaves: list[Any], structure: list[Any]) -> None:
    """Append the leaves of one argument, and what distinguishes its structure from others."""
    kind = type(value)
    if kind in LEAF_TYPES:
        leaves.append(value)
    elif kind is dict:
        structure.append((dict, len(leaves), *value))
        for item in value.values():
            _flatten_into(item, leaves, structure)
    elif kind is list or kind is tuple:
        structure.append((kind, len(leaves), len(value)))
        for item in value:
            _flatten_into(item, leaves, structure)
    else:
        found, spec = tree_flatten(value)
        if not spec.is_leaf():
            structure.append((len(leaves), spec))
        leaves.extend(found)


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
