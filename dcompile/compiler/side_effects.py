"""What calling a network changes besides returning a result.

A graph computes and nothing else: what Python does beside it, such as a hook that collects
features, happens once while tracing and never again. So a network is called once for real before
it is captured, and everything that can be reached from it is compared before and after:
attributes, containers, closures, defaults, globals, class attributes, tensors. What a call changes
every time is a side effect, and the network is refused. What it changes the first time only was
made lazily, and stays. What tracing itself changes is undone.

Numbers, strings and the like that a call assigns are taken for counters and left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import contextvars
import functools
import io
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dcompile.compat.export import one_at_a_time
from dcompile.compat.tensors import version_of
from dcompile.compiler.introspection import (
    EMPTY,
    PLAIN,
    contents_of,
    globals_set_by,
    is_library,
    is_readable,
    names_in,
    own_dict,
    slot_values,
    slots_of,
)
from dcompile.compiler.random_states import RandomStates
from dcompile.compiler.states import (
    Memory,
    Opaque,
    address_of,
    fill_cell,
    is_builtin_iterator,
    members,
    opaque_state,
    refill,
    refill_dict,
    reset_set,
    set_all,
    set_data,
    set_globals,
    set_members,
    set_variable,
)

_STDLIB_CONTAINERS = (
    argparse.Namespace,
    asyncio.Queue,
    collections.ChainMap,
    collections.UserDict,
    collections.UserList,
    queue.Queue,
    threading.local,
    types.SimpleNamespace,
    weakref.WeakKeyDictionary,
    weakref.WeakSet,
    weakref.WeakValueDictionary,
)
# How what is in a module's own tables is called.
_MODULE_TABLES = {
    "_modules": "{where}.{name}",
    "_parameters": "{where}.{name}",
    "_buffers": "{where}.{name}",
    "_forward_hooks": "a hook of {where}",
    "_forward_pre_hooks": "a hook of {where}",
}

Key = tuple[int, Any]
"""Identity of a container and, where it has them, a key in it."""


class Change(NamedTuple):
    """One place that differs between two snapshots.

    Attributes:
        where: for a person.
        in_place: a tensor or file was written to, or an iterator advanced: nothing undoes that.
        harmless: only plain values were assigned, as a counter does, or an equal copy.
        plain: only plain values were assigned.
        added: there was no such key before.
    """

    where: str
    in_place: bool
    harmless: bool
    plain: bool = False
    added: bool = False


class _Held(NamedTuple):
    """One object with mutable state, and a shallow copy of that state.

    Attributes:
        thing: the object.
        where: for a person.
        state: the copy; a mapping for what is compared key by key.
        write: puts a state back; None where that is impossible.
    """

    thing: Any
    where: str
    state: Any
    write: Callable[[Any], Any] | None


class Snapshot:
    """The mutable state that can be reached from some objects, as it is now.

    Args:
        roots: objects, each with its name for a person.

    Attributes:
        caches: ``functools`` caches among what was reached.
    """

    def __init__(self, roots: Iterable[tuple[Any, str]]) -> None:
        self._held: dict[tuple[int, str], _Held] = {}
        self._seen: dict[int, Any] = {}
        self._visited: list[tuple[Any, str]] = []
        self.caches: list[Any] = []
        self._pending: list[tuple[Any, str]] = list(roots)
        while self._pending:
            thing, where = self._pending.pop()
            if id(thing) not in self._seen and type(thing) not in PLAIN:
                self._seen[id(thing)] = thing
                if not is_readable(thing):
                    continue
                self._visited.append((thing, where))
                self._visit(thing, where)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that can be reached."""
        readable = filter(is_readable, self._seen.values())
        return (each for each in readable if isinstance(each, torch.Tensor))

    def again(self) -> Snapshot:
        """All of it as it is now, and what can be reached from it now."""
        return Snapshot(reversed(self._visited))

    def changes(self, later: Snapshot) -> dict[Key, Change]:
        """What differs in a snapshot taken later by ``again``. New objects are not compared."""
        found: dict[Key, Change] = {}
        for key, held in self._held.items():
            now = later._held.get(key)
            if now is not None:
                found.update(_differences(held, now.state))
        return found

    def restore(self, changes: Iterable[Key]) -> None:
        """Put back what was changed since."""
        changed = {identity for identity, _ in changes}
        for held in self._held.values():
            if id(held.thing) in changed and held.write is not None:
                held.write(held.state)

    def restore_generators(self) -> None:
        """Put back the states of all ``torch.Generator`` objects."""
        for held in self._held.values():
            if isinstance(held.thing, torch.Generator) and held.write is not None:
                held.write(held.state)

    # What can be reached

    def _visit(self, thing: Any, where: str) -> None:
        kind = type(thing)
        if isinstance(thing, torch.Tensor):
            self._hold(thing, where, "tensor", version_of(thing), None)
            self._hold_memory(thing, where)
            if isinstance(thing, nn.Parameter):
                self._hold(
                    thing,
                    where,
                    "gradient",
                    {"grad": thing.grad},
                    functools.partial(set_all, thing),
                )
            self._attributes(thing, where)
        elif isinstance(thing, torch.Generator):
            self._hold(thing, where, "generator", thing.get_state(), thing.set_state)
        elif isinstance(thing, contextvars.ContextVar):
            self._hold(thing, where, "cell", {"": thing.get(EMPTY)}, set_variable(thing))
        elif isinstance(thing, dict):
            self._dictionary(thing, where)
        elif isinstance(thing, (list, collections.deque)):
            self._hold(thing, where, "items", list(thing), functools.partial(refill, thing))
            self._items(thing, where)
        elif isinstance(thing, set):
            self._hold(thing, where, "items", set(thing), functools.partial(reset_set, thing))
            self._items(thing, where)
        elif isinstance(thing, (tuple, frozenset)):
            self._items(thing, where)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, where)
        elif isinstance(thing, types.MethodType):
            self._pending += [(thing.__self__, where), (thing.__func__, where)]
        elif isinstance(thing, types.BuiltinFunctionType):  # such as ``found.append``
            if not isinstance(thing.__self__, (types.ModuleType, type)):
                self._pending.append((thing.__self__, where))
        elif isinstance(thing, functools.partial):
            self._pending += [(part, where) for part in (thing.func, thing.args, thing.keywords)]
        elif isinstance(thing, (staticmethod, classmethod)) or kind is _CACHED:
            if kind is _CACHED:
                self.caches.append(thing)
            self._pending.append((getattr(thing, "__wrapped__", None), where))
        elif isinstance(thing, property):
            self._pending += [(part, where) for part in (thing.fget, thing.fset) if part]
        elif isinstance(thing, type):
            self._class(thing)
        elif kind is types.ModuleType and thing.__name__ not in sys.modules:
            self._dictionary(vars(thing), where)
        elif (opaque := opaque_state(thing)) is not None:
            state, write = opaque
            self._hold(thing, where, "opaque", Opaque(state), write)
        elif isinstance(thing, nn.Module) or _is_looked_into(kind):  # type: ignore[arg-type]
            self._attributes(thing, where)
            self._pending.append((kind, kind.__name__))

    def _hold(
        self, thing: Any, where: str, aspect: str, state: Any, write: Callable[[Any], Any] | None
    ) -> None:
        self._held[id(thing), aspect] = _Held(thing, where, state, write)
        self._seen.setdefault(id(thing), thing)  # alive as long as its identity is used

    def _hold_memory(self, tensor: torch.Tensor, where: str) -> None:
        """Which memory a tensor has: ``.data = ...`` gives it another, and counts as no write."""
        memory = Memory(address_of(tensor), tensor.data)
        self._hold(tensor, where, "memory", memory, functools.partial(set_data, tensor))

    def _table(self, table: dict[Any, Any], where: str, form: str) -> None:
        """One of the tables in which a module keeps its submodules, tensors and hooks."""
        self._seen[id(table)] = table
        write = functools.partial(refill_dict, table)
        self._hold(table, where, "mapping", dict(table), write)
        for name, value in table.items():
            self._pending.append((value, form.format(where=where, name=name)))

    def _items(self, things: Iterable[Any], where: str) -> None:
        self._pending += [
            (item, f"{where}[{number}]")
            for number, item in enumerate(things)
            if type(item) not in PLAIN
        ]

    def _dictionary(self, thing: dict[Any, Any], where: str) -> None:
        state = dict(dict.items(thing))
        self._hold(thing, where, "mapping", state, functools.partial(refill_dict, thing))
        self._pending += [
            (value, f"{where}[{key!r}]") for key, value in state.items() if type(value) not in PLAIN
        ]
        self._pending += [(key, where) for key in state if type(key) not in PLAIN]

    def _attributes(self, thing: Any, where: str) -> None:
        attributes = own_dict(thing)
        if type(attributes) is dict and id(attributes) not in self._seen:
            self._seen[id(attributes)] = attributes
            write = functools.partial(refill_dict, attributes)
            self._hold(attributes, where, "attributes", dict(attributes), write)
            for name, value in attributes.items():
                if isinstance(thing, nn.Module) and name in _MODULE_TABLES and value:
                    self._table(value, where, _MODULE_TABLES[name])
                else:
                    self._pending.append((value, f"{where}.{name}"))
        names = [
            name
            for base in type(thing).__mro__
            if not is_library(base.__module__)
            for name in slots_of(base)
        ]
        slots = {**dict.fromkeys(names, EMPTY), **slot_values(thing, names)}
        if slots and not isinstance(thing, torch.Tensor):
            self._hold(thing, where, "slots", slots, functools.partial(set_all, thing))
            self._pending += [
                (value, f"{where}.{name}") for name, value in slots.items() if value is not EMPTY
            ]

    def _function(self, function: types.FunctionType, where: str) -> None:
        if is_library(function.__module__):
            return
        name = function.__qualname__
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            place = f"{variable!r}, which {name} refers to"
            self._cell(cell, place)
        self._pending += [
            (value, f"a default of {name}")
            for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        ]
        own = vars(function)
        self._hold(function, name, "attributes", dict(own), functools.partial(refill_dict, own))
        self._pending += [(value, f"{name}.{key}") for key, value in own.items()]
        self._globals(function)

    def _cell(self, cell: types.CellType, where: str) -> None:
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        content = contents_of(cell)
        self._hold(cell, where, "cell", {"": content}, functools.partial(fill_cell, cell))
        if content is not EMPTY:
            self._pending.append((content, where))

    def _globals(self, function: types.FunctionType) -> None:
        """The globals that its code names; of modules, what it may take from them."""
        names = names_in(function.__code__)
        scope = function.__globals__
        state = {name: scope[name] for name in names if name in scope}
        for name in globals_set_by(function.__code__):
            state.setdefault(name, EMPTY)
        for name, value in state.items():
            if value is EMPTY:
                continue
            if isinstance(value, types.ModuleType):
                if not is_library(value.__name__):
                    inside = vars(value)
                    self._pending += [
                        (inside[other], f"{name}.{other}") for other in names if other in inside
                    ]
            else:
                self._pending.append((value, f"the global {name!r}"))
        plain = {name: v for name, v in state.items() if not isinstance(v, types.ModuleType)}
        if plain:
            self._held[id(function), "globals"] = _Held(
                function, "the global", plain, functools.partial(set_globals, scope)
            )

    def _class(self, kind: type) -> None:
        if not _is_looked_into(kind):
            return
        write = functools.partial(set_members, kind)
        self._hold(kind, kind.__name__, "members", members(kind), write)
        self._pending += [
            (value, f"{kind.__name__}.{name}")
            for name, value in vars(kind).items()
            if name not in ("__dict__", "__weakref__")
        ]
        self._pending += [(base, base.__name__) for base in kind.__bases__]


def value_at(snapshot: Snapshot, key: Key) -> Any:
    """What a place holds, if it is one of a mapping's; ``EMPTY`` otherwise."""
    identity, name = key
    for held in snapshot._held.values():
        here = id(held.thing) == identity and isinstance(held.state, Mapping)
        if here and name in held.state:
            return held.state[name]
    return EMPTY


def put(snapshot: Snapshot, values: Mapping[Key, Any]) -> None:
    """Put other values into places that hold what they did when the snapshot was taken."""
    for held in snapshot._held.values():
        if isinstance(held.state, Mapping) and held.write is not None:
            here = {
                name: value
                for (identity, name), value in values.items()
                if identity == id(held.thing) and name in held.state
            }
            if here:
                held.write({**held.state, **here})


def _differences(held: _Held, now: Any) -> Iterator[tuple[Key, Change]]:
    before, where = held.state, held.where
    if isinstance(before, Mapping):
        for key in before.keys() | now.keys():
            one, other = before.get(key, EMPTY), now.get(key, EMPTY)
            if not _same(one, other):
                place = where if key == "" else _place(held, key)
                plain = _is_plain(one) and _is_plain(other)
                harmless = plain or _is_copy(one, other)
                change = Change(place, False, harmless, plain, added=one is EMPTY)
                yield (id(held.thing), key), change
    elif isinstance(before, Memory):
        if before.address != now.address:  # layerwise casting moves weights, there and back
            moved = Change(where, in_place=False, harmless=before.equals(now))
            yield (id(held.thing), "memory"), moved
    elif isinstance(before, Opaque):
        if before != now:
            final = is_builtin_iterator(held.thing) or isinstance(held.thing, io.IOBase)
            yield (id(held.thing), None), Change(where, in_place=final, harmless=False)
    elif isinstance(held.thing, torch.Tensor):
        if before != now:
            yield (id(held.thing), None), Change(where, in_place=True, harmless=False)
    elif isinstance(held.thing, torch.Generator):
        if not torch.equal(before, now):  # drawing random numbers is no side effect
            yield (id(held.thing), None), Change(where, in_place=False, harmless=True)
    elif len(before) != len(now) or not all(
        _same(one, other) for one, other in zip(_ordered(before), _ordered(now), strict=True)
    ):
        yield (id(held.thing), None), Change(where, in_place=False, harmless=False)


def _ordered(items: Any) -> Any:
    return sorted(items, key=id) if isinstance(items, set) else items


def _place(held: _Held, key: Any) -> str:
    if held.where == "the global":
        return f"the global {key!r}"
    if isinstance(held.thing, dict) and not isinstance(key, str):
        return f"{held.where}[{key!r}]"
    return f"{held.where}.{key}"


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and _is_plain(one) and bool(one == other)


def _is_copy(one: Any, other: Any, depth: int = 4) -> bool:
    """Containers of the same things: torch.export replaces some by copies."""
    if _same(one, other):
        return True
    if type(one) is not type(other) or not isinstance(one, (list, tuple, dict)) or depth == 0:
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            _is_copy(value, other[key], depth - 1) for key, value in one.items()
        )
    return len(one) == len(other) and all(
        _is_copy(a, b, depth - 1) for a, b in zip(one, other, strict=True)
    )


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return value is EMPTY or type(value) in PLAIN


@functools.lru_cache(maxsize=4096)
def _is_looked_into(kind: type) -> bool:
    if issubclass(kind, _STDLIB_CONTAINERS):
        return True
    return kind.__module__ == "unittest.mock" or not is_library(kind.__module__)


@contextlib.contextmanager
def undone(*roots: Any) -> Iterator[None]:
    """At the end put back what was changed inside: what these can reach, and random numbers.

    For calls of a network that nobody asked for. Tensors that are written to in place stay so.
    """
    with one_at_a_time:
        before, numbers = Snapshot((root, "") for root in roots), RandomStates()
        try:
            yield
        finally:
            before.restore(before.changes(before.again()))
            before.restore_generators()
            numbers.restore()


_CACHED = functools._lru_cache_wrapper
