"""Whether anything that a structure was read from is other than it was, at little cost.

Reading the structure of an SDXL-shaped network takes 12 ms, and a run of four steps has not much
more to gain. Nearly always nothing has changed since the run before, and that is quick to prove:
all that was looked into is still made of the very same objects.
"""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from dcompile.compat.tensors import TensorProperties
from dcompile.compiler.introspection import (
    attributes_of,
    contents_of,
    own_dict,
    slot_values,
)

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watch:
    """Everything that one structure is read from, as it was right before it was read.

    ``unchanged`` compares identities, so a "yes" is certain; a "no" may only mean that an equal
    object is in the place of another, and the structure has to be read again. Parameters, buffers
    and submodules are held weakly, unless a submodule that is gone holds them.

    Args:
        network: whose structure is read next, while this is told of all that is looked into.

    Attributes:
        possible: whether all but the weights can be watched.
        weights_possible: whether the weights can be.
    """

    def __init__(self, network: nn.Module) -> None:
        self.possible = self.weights_possible = True
        # What has parts, a function that finds them, and the parts it had.
        self._made_of: list[tuple[Any, Callable[[Any], Iterable[Any]], list[Any]]] = []
        # What can only be described again, and how it was described.
        self._described: list[tuple[Any, Callable[[Any], Any], Any]] = []
        named = [*network.named_modules(remove_duplicate=False)]
        self._modules = [weakref.ref(module) for _, module in named]
        self._spaces = [vars(module) for _, module in named]
        self._getters = [
            operator.itemgetter(*attributes_of(module, path), "training", *_TABLES, *_HOOKS)
            for path, module in named
        ]
        tables = [[space[name] for space in self._spaces] for name in _TABLES]
        # The whole network's own hooks are around what is captured, and are not looked into.
        hooks = [space[name] for space in self._spaces[1:] for name in _HOOKS]
        self._empty = [table for table in (*chain(*tables), *hooks) if not table]
        self._tables = [[*filter(None, kind)] for kind in tables]
        self._sizes = self._sizes_now()
        self._attributes = [*self._attributes_now()]
        for table in filter(None, hooks):
            self.mapping(table)
        held = self._held_now()
        self._held = [[*map(_reference, values)] for values in held]
        try:
            self._tensors = TensorProperties(_tensors(held))
        except RuntimeError:  # such as parameters without storage
            self.weights_possible = False

    # What else is looked into

    def kind(self, kind: type) -> None:
        """A class: what it inherits from, and what is called of it."""
        self._watch(kind, lambda kind: (*kind.__mro__, getattr(kind, "forward", None)))

    def partial(self, partial: functools.partial[Any]) -> None:
        """What a partial calls, and with what."""
        self._watch(partial, operator.attrgetter("func", "args", "keywords"))

    def mapping(self, mapping: Mapping[Any, Any]) -> None:
        """A dict, or the members of a class."""
        self._watch(mapping, _keys_and_values)

    def sequence(self, values: Iterable[Any]) -> None:
        """A list or deque."""
        self._watch(values, iter)

    def function(self, function: types.FunctionType) -> None:
        """A function: its code, defaults and closure."""
        self._watch(function, _code_and_closure)

    def instance(self, value: Any, slots: Sequence[str]) -> None:
        """An object: its class, its dict, and what it holds without one."""
        self._watch(
            value,
            lambda value: (
                type(value),
                own_dict(value),
                *map(slot_values(value, slots).get, slots),
            ),
        )

    def named(self, scope: dict[str, Any], name: str) -> None:
        """A global name that code mentions."""
        self._watch(scope, lambda scope: (scope.get(name),))

    def elements(self, values: Collection[Any]) -> None:
        """A set, whose elements are not looked into."""
        self.described(values, frozenset)

    def described(self, value: Any, describe: Callable[[Any], Any]) -> None:
        """What can only be described again."""
        self._described.append((value, describe, describe(value)))

    def _watch(self, thing: Any, parts: Callable[[Any], Iterable[Any]]) -> None:
        self._made_of.append((thing, parts, [*parts(thing)]))

    # Afterwards

    def unchanged(self) -> bool:
        """Whether everything is what it was."""
        return self.weights_possible and self.attributes_unchanged() and self._weights_unchanged()

    def attributes_unchanged(self) -> bool:
        """Whether everything but the weights is what it was; cheaper than ``unchanged``."""
        try:
            if not self.possible or any(self._empty) or self._sizes_now() != self._sizes:
                return False
            return (
                _are_same(self._attributes_now(), self._attributes)
                and all(_is_made_of(*known) for known in self._made_of)
                and all(describe(value) == known for value, describe, known in self._described)
            )
        except (AttributeError, KeyError, RuntimeError, TypeError):  # something is gone
            return False

    def _weights_unchanged(self) -> bool:
        """Whether the parameters, buffers and submodules are what they were."""
        held = self._held_now()
        try:
            return all(
                _are_same(values, map(operator.call, references))
                for values, references in zip(held, self._held, strict=True)
            ) and self._tensors.same(_tensors(held))
        except (AttributeError, RuntimeError, TypeError):
            return False

    def _sizes_now(self) -> list[int]:
        """Of all that is compared one by one, so that all come in the same number."""
        return [*map(len, chain(self._spaces, *self._tables))]

    def _attributes_now(self) -> Iterable[Any]:
        """Classes and attributes of the modules, and the names in their tables."""
        return chain(
            map(type, map(operator.call, self._modules)),
            map(vars, map(operator.call, self._modules)),
            chain.from_iterable(map(operator.call, self._getters, self._spaces)),
            chain.from_iterable(chain(*self._tables)),
        )

    def _held_now(self) -> list[list[Any]]:
        """All parameters, all buffers, all submodules."""
        values = operator.methodcaller("values")
        return [[*chain.from_iterable(map(values, tables))] for tables in self._tables]


def _are_same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(map(operator.is_, one, other))


def _is_made_of(thing: Any, parts: Callable[[Any], Iterable[Any]], known: list[Any]) -> bool:
    now = [*parts(thing)]
    return len(now) == len(known) and _are_same(now, known)


def _keys_and_values(mapping: Mapping[Any, Any]) -> Iterable[Any]:
    return chain(mapping, mapping.values())


def _code_and_closure(function: types.FunctionType) -> Iterable[Any]:
    cells = map(contents_of, function.__closure__ or ())
    return (function.__code__, function.__defaults__, function.__kwdefaults__, *cells)


def _reference(value: Any) -> Callable[[], Any]:
    return (lambda: None) if value is None else weakref.ref(value)


def _tensors(held: Sequence[Iterable[Any]]) -> list[torch.Tensor]:
    return [tensor for values in held[:2] for tensor in values if tensor is not None]
