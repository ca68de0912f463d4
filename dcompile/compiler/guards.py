"""The calls that a dynamic capture is right for.

The conditions on sizes come from torch as a Python expression, and from a saved manifest as text.
It is never evaluated as Python: ``parse_condition`` understands integer arithmetic and comparisons
over sizes, and nothing else.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dcompile.compat.export import expression_of

MAX_LENGTH = 200_000  # characters of a condition
MAX_EXPONENT = 16
MAX_FACTOR = 1 << 80  # of an operand of a power


class GuardSyntaxError(ValueError):
    """A condition on sizes has a form that is not understood."""


def _known_size(size: int | torch.SymInt) -> int | None:
    """None if it may vary. A symbol may have been specialized to a number since it was made."""
    if isinstance(size, int):
        return size
    expression = expression_of(size)
    return int(expression) if expression.is_number else None


class TensorPattern(NamedTuple):
    """What a dynamic capture requires of a tensor; a size of None may vary."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    contiguous: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorPattern:
        """The pattern of a fake tensor with symbolic sizes."""
        shape = tuple(map(_known_size, tensor.shape))
        return TensorPattern(shape, tensor.dtype, tensor.device, tensor.is_contiguous())

    def fits(self, given: Any) -> bool:
        """Whether ``given`` is a tensor like this."""
        return (
            isinstance(given, torch.Tensor)
            and given.dtype == self.dtype
            and given.device == self.device
            and given.dim() == len(self.shape)
            and given.is_contiguous() == self.contiguous
            and all(
                size in (None, actual) for size, actual in zip(self.shape, given.shape, strict=True)
            )
        )


def autocast_dtype(tensors: Sequence[torch.Tensor]) -> str | None:
    """The dtype of autocast where the tensors are, if it is on."""
    for kind in {tensor.device.type for tensor in tensors} - {"meta"}:
        if torch.is_autocast_enabled(kind):
            return str(torch.get_autocast_dtype(kind))
    return None


@dataclass(frozen=True)
class SizeGuard:
    """The calls that a dynamic capture is right for.

    Attributes:
        leaves: position among the call's leaves, and the pattern of a tensor or a constant.
        expression: further conditions on sizes, see ``parse_condition``; None for none.
        ranges: leaf, dimension, least and greatest size that the user asked for.
        autocast: its dtype if it was on.
    """

    leaves: tuple[tuple[int, Any], ...]
    expression: str | None
    ranges: tuple[tuple[int, int, int, int], ...] = ()
    autocast: str | None = None

    @property
    def understood(self) -> bool:
        """Whether the conditions on sizes can be checked."""
        try:
            return self.expression is None or bool(parse_condition(self.expression))
        except GuardSyntaxError:
            return False

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these leaves can run the captured graph."""
        tensors: list[torch.Tensor] = []
        for leaf, wanted in self.leaves:
            given = leaves[leaf]
            if isinstance(wanted, TensorPattern):
                if not wanted.fits(given):
                    return False
                tensors.append(given)
            elif type(given) is not type(wanted) or given != wanted:
                return False
        if autocast_dtype(tensors) != self.autocast:
            return False
        if any(not low <= leaves[leaf].shape[d] <= high for leaf, d, low, high in self.ranges):
            return False
        return self.expression is None or parse_condition(self.expression)(tensors)


# Conditions on sizes

Value = Callable[[Sequence[torch.Tensor]], Any]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "int": int,
    "float": float,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
    "math.sqrt": math.sqrt,
}
_READS: dict[str, Callable[[torch.Tensor, int], int]] = {
    "size": lambda tensor, dimension: tensor.size(dimension),
    "stride": lambda tensor, dimension: tensor.stride(dimension),
}


@functools.lru_cache(maxsize=4096)
def parse_condition(text: str) -> Callable[[Sequence[torch.Tensor]], bool]:
    """A predicate of the tensors of a call.

    Understood are ``and``, ``or``, ``not``, comparisons, arithmetic on numbers, a few functions
    (min, max, abs, rounding), and ``L['t0'].size()[1]`` and ``.stride()[1]``, which read the
    tensors ``t0``, ``t1``, ... in order.

    Raises:
        GuardSyntaxError: there is anything else in it.
    """
    if len(text) > MAX_LENGTH:
        raise GuardSyntaxError(f"a condition of {len(text)} characters")
    try:
        body = ast.parse(text, mode="eval").body
        value = _value(body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GuardSyntaxError(f"not a condition on sizes: {text[:80]!r}: {error}") from error

    def holds(tensors: Sequence[torch.Tensor]) -> bool:
        try:
            return bool(value(tensors))
        except (ArithmeticError, IndexError, ValueError):
            return False

    return holds


def _value(node: ast.expr) -> Value:
    match node:
        case ast.Constant(value=bool() | int() | float() as constant):
            return lambda _: constant
        case ast.BoolOp(op=op, values=nodes):
            parts = [_value(part) for part in nodes]
            combine = all if isinstance(op, ast.And) else any
            return lambda tensors: combine(part(tensors) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _comparison([left, *others], ops)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _value(operand)
            return lambda tensors: not inner(tensors)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _value(operand)
            return lambda tensors: -inner(tensors)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply, one, two = _BINARY[type(op)], _value(left), _value(right)
            return lambda tensors: apply(one(tensors), two(tensors))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            condition, yes, no = _value(test), _value(body), _value(orelse)
            return lambda tensors: yes(tensors) if condition(tensors) else no(tensors)
        case ast.Subscript(value=ast.Call(func=ast.Attribute() as read, args=[], keywords=[])):
            return _size(read, node.slice)
        case ast.Call(func=func, args=args, keywords=[]):
            return _call(func, args)
    raise GuardSyntaxError(f"{type(node).__name__} is not understood")


def _comparison(operands: Sequence[ast.expr], ops: Sequence[ast.cmpop]) -> Value:
    if any(type(op) not in _COMPARISONS for op in ops):
        raise GuardSyntaxError("a comparison that is not one of numbers")
    values = [_value(operand) for operand in operands]
    compare = [_COMPARISONS[type(op)] for op in ops]

    def chain(tensors: Sequence[torch.Tensor]) -> bool:
        found = [value(tensors) for value in values]
        return all(
            holds(one, two) for holds, one, two in zip(compare, found, found[1:], strict=False)
        )

    return chain


def _power(base: Value, exponent: Value) -> Value:
    def power(tensors: Sequence[torch.Tensor]) -> Any:
        one, two = base(tensors), exponent(tensors)
        if abs(two) > MAX_EXPONENT or abs(one) > MAX_FACTOR:
            raise OverflowError(f"{one} ** {two}")
        return one**two

    return power


def _size(read: ast.Attribute, index: ast.expr) -> Value:
    """``L['t0'].size()[1]``: which tensor, what of it, which dimension."""
    match read.value, index:
        case (
            ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str() as name)),
            ast.Constant(value=int() as dimension),
        ) if name[:1] == "t" and name[1:].isdigit() and read.attr in _READS:
            number, of = int(name[1:]), _READS[read.attr]
            return lambda tensors: of(tensors[number], dimension)
    raise GuardSyntaxError("an attribute that is neither a size nor a stride")


def _call(func: ast.expr, args: Sequence[ast.expr]) -> Value:
    match func:
        case ast.Name(id=name):
            pass
        case ast.Attribute(value=ast.Name(id="math"), attr=attribute):
            name = f"math.{attribute}"
        case _:
            raise GuardSyntaxError("a call that is not one of a known function")
    if name not in _FUNCTIONS or not args:
        raise GuardSyntaxError(f"a call of {name}")
    function, values = _FUNCTIONS[name], [_value(argument) for argument in args]
    return lambda tensors: function(*(value(tensors) for value in values))
