"""The forms a call of the network can take: which leaves it has, and which of them are what."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map_only,
    tree_unflatten,
)

from dcompile.compiler.introspection import is_readable
from dcompile.compiler.lazy import LazyTensor, materialize
from dcompile.compiler.roles import UNKNOWN, Roles, is_list_of_fields, roles_of
from dcompile.compiler.side_effects import undone
from dcompile.errors import TimestepError


@dataclass(frozen=True, eq=False)
class CallForm:
    """One way to call the network: which arguments are given, and which leaves are what.

    Attributes:
        spec: tree structure of ``(args, kwargs)``.
        samples: positions of the noisy sample among the leaves: one, or several where the network
            takes a list of tensors.
        timestep: position of the timestep.
        roles: names of the arguments that they are.
        names: what each leaf is called, for messages.
        takes_list: the sample is a list of tensors, perhaps of one: a size of theirs is no batch.
    """

    spec: TreeSpec
    samples: tuple[int, ...]
    timestep: int
    roles: Roles = UNKNOWN
    names: tuple[str, ...] = ()
    takes_list: bool = False

    @property
    def sample(self) -> int:
        """Position of the sample, or of the first tensor of it."""
        return self.samples[0]

    @property
    def own(self) -> tuple[int, ...]:
        """Positions of what is another tensor at each step: sample and timestep."""
        return (*self.samples, self.timestep)


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
    """Finds sample and timestep in the calls of one forward function; see ``roles``.

    Args:
        forward: the function.
        asked: the names the user gave to the two, where it cannot be told.

    Raises:
        TimestepError: the function has fewer than two parameters, or none of a name asked for.
    """

    def __init__(self, forward: Callable[..., Any], asked: Roles = UNKNOWN) -> None:
        self.asked = asked
        self._forward = forward
        self._parameters = inspect.signature(forward)
        self._decorated = hasattr(forward, "__wrapped__")
        self._names = list(self._parameters.parameters)
        if len(self._names) < 2:
            raise TimestepError(
                f"forward{self._parameters} takes no timestep: without one, steps cannot "
                "be distinguished. Expected (sample, timestep, ...)"
            )
        open_ended = any(
            p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            for p in self._parameters.parameters.values()
        )
        for role, name in asked._asdict().items():
            if name is not None and name not in self._names and not open_ended:
                raise TimestepError(
                    f"{role}={name!r}: forward has no such parameter; it has "
                    f"{', '.join(self._names)}"
                )
        self._known: dict[tuple[Any, ...], CallForm | None] = {}

    def flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], roles: Roles | None = None
    ) -> tuple[list[Any], CallForm | None]:
        """The call's leaves and form; no form if sample or timestep is not given.

        Leaves come in the order of ``torch.utils._pytree``, which is slow and asked once for each
        form.

        Args:
            args, kwargs: the call.
            roles: what is what, if known from another way to write the call.

        Raises:
            TimestepError: several arguments may be the sample, or the timestep.
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
            form = self._known[key] = self._analyse(spec, args, kwargs, roles)
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
        kept = [
            name
            for name, parameter in parameters.items()
            if name in kwargs
            and (self._decorated or name in form.roles or not _is_default(parameter, kwargs[name]))
        ]
        kept_kwargs = {name: kwargs[name] for name in kept}
        leaves, standard = self.flatten(positional[0], kept_kwargs, form.roles)
        order, _ = tree_flatten((positional[1], {name: named_places[name] for name in kept}))
        if standard is None or len(order) != len(leaves):
            return given
        return StandardCall(standard, leaves, tuple(order))

    def _analyse(
        self,
        spec: TreeSpec,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        roles: Roles | None,
    ) -> CallForm | None:
        named = {**dict(zip(self._positional(len(args)), args, strict=True)), **kwargs}
        places = {name: index for index, name in enumerate(self._names)}
        arguments = {
            name: named[name]
            for name in sorted(named, key=lambda name: places.get(name, len(places)))
            if is_readable(named[name])
            and (
                isinstance(named[name], (torch.Tensor, numbers.Real))
                or is_list_of_fields(named[name])
            )
        }
        if roles is None:
            roles = roles_of(arguments, self.asked, lambda: self._called(args, kwargs))
        if roles.sample not in arguments or roles.timestep not in arguments:
            return None
        sample = arguments[roles.sample]
        takes_list = is_list_of_fields(sample)
        marked = [object() for _ in sample] if takes_list else [object()]
        marks: dict[str, Any] = {
            roles.sample: type(sample)(marked) if takes_list else marked[0],
            roles.timestep: object(),
        }
        marked_args = tuple(
            marks.get(name, value)
            for name, value in zip(self._positional(len(args)), args, strict=True)
        )
        marked_kwargs = {name: marks.get(name, value) for name, value in kwargs.items()}
        leaves, _ = tree_flatten((marked_args, marked_kwargs))
        where = {id(leaf): place for place, leaf in enumerate(leaves)}
        samples, timestep = [where[id(mark)] for mark in marked], where[id(marks[roles.timestep])]
        names = self._leaf_names(args, kwargs)
        return CallForm(spec, tuple(samples), timestep, roles, names, takes_list)

    def _leaf_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        paths, _ = tree_flatten_with_path(
            (
                dict(zip(self._positional(len(args)), args, strict=True)),
                kwargs,
            )
        )
        return tuple(keystr(path[1:]).strip("[]'\"") for path, _ in paths)

    def _positional(self, count: int) -> list[str]:
        """Names for positional arguments, made up for those that ``*args`` takes."""
        parameters = self._parameters.parameters.values()
        taken = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return [taken[i] if i < len(taken) else f"argument {i}" for i in range(count)]

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(
            LazyTensor, lambda lazy: materialize([lazy])[0], (args, kwargs)
        )
        with torch.no_grad(), undone(args, kwargs, self._forward):
            return self._forward(*args, **kwargs)


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
