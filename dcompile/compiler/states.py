"""Mutable state that is no attribute or container: how to read it, and how to put it back."""

from __future__ import annotations

import array
import contextvars
import functools
import io
import itertools
import operator
import queue
import random
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dcompile.compiler.introspection import EMPTY, PLAIN


class Opaque(NamedTuple):
    """The state of what cannot be looked into, as something to compare."""

    state: Any


class Memory(NamedTuple):
    """Where a tensor's values are.

    Attributes:
        address: None if there are none, as while tracing.
        data: shares the memory.
    """

    address: int | None
    data: torch.Tensor

    def equals(self, other: Memory) -> bool:
        """Whether both hold the same values, bit for bit."""
        one, two = self.data, other.data
        if None in (self.address, other.address) or type(one) is not type(two):
            return False
        if (one.dtype, one.shape, one.device) != (two.dtype, two.shape, two.device):
            return False
        if type(one) is not torch.Tensor or one.layout is not torch.strided:
            return False
        return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, two)))


def members(kind: type) -> dict[str, Any]:
    """A class's own attributes that are no code."""
    code = (types.FunctionType, staticmethod, classmethod, property, type)
    slots = (types.MemberDescriptorType, types.GetSetDescriptorType)
    return {
        name: value
        for name, value in vars(kind).items()
        if not isinstance(value, (*code, *slots)) and not name.startswith("__")
    }


def opaque_state(thing: Any) -> tuple[Any, Callable[[Any], Any] | None] | None:
    """The state of what cannot be looked into; and what puts it back.

    Random number generators, arrays, bytes, queues, iterators, open files.
    """
    if isinstance(thing, random.Random):
        return thing.getstate(), lambda opaque: thing.setstate(opaque.state)
    if isinstance(thing, queue.SimpleQueue):
        return thing.qsize(), None
    if is_builtin_iterator(thing):
        return _position(thing), None
    if isinstance(thing, (array.array, bytearray)):
        return bytes(thing), functools.partial(_refill_bytes, thing)
    if isinstance(thing, io.IOBase):
        return None if _is_standard(thing) else _offset(thing), None
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(thing, numpy.ndarray):
        if thing.dtype == object:
            return [*map(id, thing.flat)], None
        kept = thing.copy()
        return thing.tobytes(), lambda _: numpy.copyto(thing, kept)
    if isinstance(thing, numpy.random.RandomState):
        kept = thing.get_state(legacy=False)
        return repr(kept), lambda _: thing.set_state(kept)
    if isinstance(thing, numpy.random.Generator):
        bits = thing.bit_generator
        kept = bits.state
        return repr(kept), lambda _: setattr(bits, "state", kept)
    return None


def _refill_bytes(thing: Any, opaque: Opaque) -> None:
    if isinstance(thing, bytearray):
        thing[:] = opaque.state
    else:
        del thing[:]
        thing.frombytes(opaque.state)


def _is_standard(file: io.IOBase) -> bool:
    """Whether it is the process's output, which others write to meanwhile: threads, processes."""
    try:
        return file.fileno() in (1, 2)
    except (OSError, ValueError):  # no file of the system, or closed
        return False


def is_builtin_iterator(thing: Any) -> bool:
    """Whether it is a generator, or an iterator of Python's own: ``next`` cannot be undone."""
    kind = type(thing)
    if kind.__module__ not in ("builtins", "itertools") or isinstance(thing, io.IOBase):
        return False
    return hasattr(kind, "__next__")


def _position(iterator: Any) -> Any:
    """Something that ``next`` changes; None if that cannot be known."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return "finished"
        inside = frame.f_locals.items()
        held = tuple((k, v if type(v) in PLAIN else id(v)) for k, v in inside)
        nested = tuple(_position(v) for _, v in inside if is_builtin_iterator(v))
        hint = iterator.gi_yieldfrom
        return frame.f_lasti, held, nested, _position(hint) if is_builtin_iterator(hint) else None
    if isinstance(iterator, (itertools.count, itertools.repeat)):
        return repr(iterator)
    try:
        kind, *rest = iterator.__reduce__()
    except TypeError:  # of Python 3.14 on, those of itertools; some have a length
        return operator.length_hint(iterator)
    return repr(kind), repr(rest[1:]), _parts(rest[0])


def _parts(arguments: Any) -> Any:
    return tuple(
        _position(item) if is_builtin_iterator(item) else item if type(item) in PLAIN else id(item)
        for item in arguments
    )


def _offset(file: Any) -> Any:
    try:
        return file.tell()
    except (OSError, ValueError):  # a terminal, a pipe; it is closed
        return file.closed


def set_variable(variable: contextvars.ContextVar[Any]) -> Callable[[Any], Any]:
    """What puts a context variable's value back, if it had one."""

    def write(state: dict[str, Any]) -> None:
        if state[""] is not EMPTY:
            variable.set(state[""])

    return write


# Putting states back


def address_of(tensor: torch.Tensor) -> int | None:
    """Of a tensor's values; None if it has none, as while tracing."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def set_data(tensor: torch.Tensor, memory: Memory) -> None:
    """Give a tensor its memory back."""
    if tensor.device != memory.data.device or address_of(tensor) != memory.address:
        tensor.data = memory.data


def set_members(kind: type, state: dict[str, Any]) -> None:
    """Put a class's attributes back."""
    for name in members(kind).keys() - state.keys():
        delattr(kind, name)
    set_all(kind, state)


def refill(items: Any, state: list[Any]) -> None:
    """Put a list's or deque's items back."""
    items.clear()
    items.extend(state)


def reset_set(items: set[Any], state: set[Any]) -> None:
    """Put a set's items back."""
    items.clear()
    items.update(state)


def refill_dict(items: dict[Any, Any], state: dict[Any, Any]) -> None:
    """Put a dict's items back."""
    if list(items) == list(state):  # others may read it meanwhile
        for key, value in state.items():
            dict.__setitem__(items, key, value)
        return
    dict.clear(items)
    for key, value in state.items():
        dict.__setitem__(items, key, value)


def set_all(thing: Any, state: dict[str, Any]) -> None:
    """Put an object's attributes back."""
    for name, value in state.items():
        if getattr(thing, name, EMPTY) is not value:
            if value is EMPTY:
                delattr(thing, name)
            else:
                setattr(thing, name, value)


def set_globals(scope: dict[str, Any], state: dict[str, Any]) -> None:
    """Put some global names back."""
    for name, value in state.items():
        if value is not EMPTY:
            scope[name] = value
        elif name in scope:
            del scope[name]


def fill_cell(cell: types.CellType, state: dict[str, Any]) -> None:
    """Put a closure's value back."""
    if state[""] is EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = state[""]
