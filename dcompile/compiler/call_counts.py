"""Numbers that change at each call of a network, and whether anything is decided by them.

A graph does not count its calls. A count that nobody reads is left alone. One that decides
something, as in ``if self.calls > 10``, would be a constant of the graph, which agrees with the
network until it matters. So the network is called once with a stand-in for the count, which can be
added to and tells of everything else that is done with it.
"""

from __future__ import annotations

import sys
from typing import Any

from dcompile.compiler.hidden_effects import place_of

NUMBERS = (int, float)

_READING = (
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__", "__hash__"),
    *("__index__", "__int__", "__float__", "__complex__", "__repr__", "__str__", "__format__"),
    *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__floordiv__", "__rfloordiv__"),
    *("__mod__", "__rmod__", "__divmod__", "__rdivmod__", "__pow__", "__rpow__"),
    *("__lshift__", "__rlshift__", "__rshift__", "__rrshift__", "__and__", "__rand__"),
    *("__or__", "__ror__", "__xor__", "__rxor__", "__neg__", "__pos__", "__abs__", "__invert__"),
    *("__round__", "__trunc__", "__floor__", "__ceil__", "__reduce_ex__"),
)


class Count:
    """Stands in for a number.

    Sums and differences with other numbers are counts again; everything else gives what the number
    would give, and is noted.

    Args:
        number: what it stands in for.
        readings: gets the places of the code that reads it: ``net.py:12``.
    """

    def __init__(self, number: int | float, readings: list[str]) -> None:
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_readings", readings)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(_number_of(self))

    def __getattr__(self, name: str) -> Any:
        return getattr(_read(self), name)

    def __add__(self, other: Any) -> Any:
        return _sum(self, other, 1, 1)

    def __radd__(self, other: Any) -> Any:
        return _sum(self, other, 1, 1)

    def __sub__(self, other: Any) -> Any:
        return _sum(self, other, 1, -1)

    def __rsub__(self, other: Any) -> Any:
        return _sum(self, other, -1, 1)


def _number_of(count: Count) -> int | float:
    return object.__getattribute__(count, "_number")  # type: ignore[no-any-return]


def _sum(count: Count, other: Any, sign: int, sign_of_other: int) -> Any:
    if type(other) is Count:
        other = _number_of(other)
    if type(other) not in (int, float, bool):
        _read(count)
        return NotImplemented
    total = sign * _number_of(count) + sign_of_other * other
    return Count(total, object.__getattribute__(count, "_readings"))


def _read(count: Count) -> int | float:
    """The number, after noting the code that asks for it."""
    object.__getattribute__(count, "_readings").append(place_of(sys._getframe(2)))
    return _number_of(count)


def _reading(name: str) -> Any:
    def read(self: Count, *arguments: Any) -> Any:
        number = _read(self)
        others = [_number_of(each) if type(each) is Count else each for each in arguments]
        operator = getattr(number, name, None)
        return NotImplemented if operator is None else operator(*others)

    read.__name__ = name
    return read


for _name in _READING:
    setattr(Count, _name, _reading(_name))


__all__ = ["NUMBERS", "Count"]
