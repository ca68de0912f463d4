"""Reads a call of the network: leaves, signature, conditioning. The first part of the hot path.

The first call of a kind is taken apart by ``CallForms`` and ``signature_of``. From what was found
there a function is generated that recognises further calls of that kind: it picks the leaves out of
``(args, kwargs)`` and compares shapes, dtypes, devices, strides and constants with those it was
made for. It is the guard of a program, and what a step pays for reading its call. Signatures are
interned: calls of equal signature have the very same one, so the rest compares by identity.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dcompile.compat.tensors import overrides_functions, unusual_memory
from dcompile.compiler.call import LEAF_TYPES, CallForm, CallForms
from dcompile.compiler.introspection import is_readable
from dcompile.compiler.lazy import LazyTensor
from dcompile.compiler.signature import (
    Signature,
    is_number,
    numbers_to_tensors,
    signature_of,
)

# Generated functions that are tried one after the other; further kinds of call go without.
MAX_MATCHERS = 8
# Values that a number may take and still be a constant of the graph.
FEW_VALUES = 2

Matcher = Callable[[tuple[Any, ...], dict[str, Any]], tuple[list[Any], list[torch.Tensor]] | None]
_NO_NUMBERS: Mapping[int, Any] = MappingProxyType({})
_NO_PLACES: frozenset[int] = frozenset()


class Call:
    """One call of the network.

    Attributes:
        leaves: its leaves, the timestep as a tensor. The list belongs to this call alone.
        form: which leaves are what; None if sample or timestep is missing.
        signature: the same object for all calls with an equal one; None if ``refusal`` is set.
        conditioning: the tensors except sample and timestep.
        timestep: as the caller gave it: a tensor or a number.
        numbers: leaves that were given as numbers, and are tensors among ``leaves``.
        refusal: why a call like this one cannot be cached; None if it can.
    """

    __slots__ = ("conditioning", "form", "leaves", "numbers", "refusal", "signature", "timestep")

    def __init__(
        self,
        leaves: list[Any],
        form: CallForm | None,
        signature: Signature | None,
        conditioning: list[torch.Tensor],
        timestep: Any,
        refusal: str | None = None,
        numbers: Mapping[int, Any] = _NO_NUMBERS,
    ) -> None:
        self.leaves = leaves
        self.form = form
        self.signature = signature
        self.conditioning = conditioning
        self.timestep = timestep
        self.refusal = refusal
        self.numbers = numbers

    @property
    def sample(self) -> torch.Tensor:
        """The sample, or the first of several."""
        assert self.form is not None
        sample: torch.Tensor = self.leaves[self.form.sample]
        return sample

    @property
    def whose(self) -> tuple[Any, list[torch.Tensor], Signature | None, torch.Tensor]:
        """What tells which run it belongs to: timestep, conditioning, signature and sample."""
        return self.timestep, self.conditioning, self.signature, self.sample

    @property
    def device(self) -> torch.device:
        """Where the sample is."""
        return self.sample.device


class _Known(NamedTuple):
    """A kind of call that was seen, and how it is recognised.

    Attributes:
        matches: the generated function.
        form: the form of such calls.
        signature: their signature.
        variable: positions of numbers that are inputs of the graph; part of the signature.
    """

    matches: Matcher
    form: CallForm
    signature: Signature
    variable: frozenset[int]


class CallReader:
    """Reads the calls of one network. Safe to use from several threads.

    Args:
        forms: of the network's forward.
        timestep_to_device: whether a timestep is copied to the sample's CUDA device, as CUDA graphs
            need it. The copy is asynchronous.
    """

    def __init__(self, forms: CallForms, timestep_to_device: bool = False) -> None:
        self._forms = forms
        self._timestep_to_device = timestep_to_device
        self._interned: dict[Signature, Signature] = {}
        self._lock = threading.Lock()  # held while what follows is changed
        self._known: tuple[_Known, ...] = ()
        # Of numbers in new calls: values seen; which are inputs, and which stay constants.
        self._values: dict[tuple[CallForm, int], set[Any]] = defaultdict(set)
        self._variable: dict[CallForm, frozenset[int]] = {}
        self._constant: dict[CallForm, frozenset[int]] = {}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call's leaves, signature and conditioning; or why it has none."""
        for matches, form, signature, variable in self._known:
            found = matches(args, kwargs)
            if found is not None:
                leaves, conditioning = found
                timestep = leaves[form.timestep]
                numbers = _NO_NUMBERS
                if variable or type(timestep) is not torch.Tensor or self._timestep_to_device:
                    numbers = self._convert_numbers(leaves, form, variable)
                return Call(leaves, form, signature, conditioning, timestep, None, numbers)
        return self._read_new(args, kwargs)

    def keep_constant(self, form: CallForm) -> None:
        """The network cannot take numbers of such calls as tensors: each value is a constant."""
        with self._lock:
            variable = self._variable.pop(form, _NO_PLACES)
            self._constant[form] = self._constant.get(form, _NO_PLACES) | variable
            self._forget(form)

    def _read_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, form = self._forms.flatten(args, kwargs)
        refusal = _refusal(leaves, form)
        if refusal is not None or form is None:
            return Call(leaves, form, None, [], None, refusal)
        timestep = leaves[form.timestep]
        with self._lock:
            variable = self._variable_numbers(leaves, form)
            numbers = self._convert_numbers(leaves, form, variable)
            signature, conditioning = signature_of(form, leaves, variable)
            try:
                signature = self._interned.setdefault(signature, signature)
            except TypeError:
                refusal = "an argument cannot be hashed"
                return Call(leaves, form, None, conditioning, timestep, refusal)
            if len(self._known) < MAX_MATCHERS:
                matcher = make_matcher(args, kwargs, form, variable)
                if matcher is not None:
                    self._known = (*self._known, _Known(matcher, form, signature, variable))
        return Call(leaves, form, signature, conditioning, timestep, None, numbers)

    def _variable_numbers(self, leaves: list[Any], form: CallForm) -> frozenset[int]:
        """Positions of numbers that have taken many values: they become inputs of the graph.

        Few values may tell calls of one step apart, such as those of guidance.
        """
        variable = self._variable.get(form, _NO_PLACES)
        fixed = {form.timestep, *variable, *self._constant.get(form, _NO_PLACES)}
        found = set()
        for place, leaf in enumerate(leaves):
            if place not in fixed and is_number(leaf):
                values = self._values[form, place]
                values.add(leaf)
                if len(values) > FEW_VALUES:
                    found.add(place)
                    del self._values[form, place]
        if found:
            variable |= found
            self._variable[form] = variable
            self._forget(form)
        return frozenset(place for place in variable if is_number(leaves[place]))

    def _forget(self, form: CallForm) -> None:
        """Read the next calls of this form as new ones."""
        self._known = tuple(known for known in self._known if known.form is not form)

    def _convert_numbers(
        self, leaves: list[Any], form: CallForm, variable: Collection[int]
    ) -> Mapping[int, Any]:
        """Make tensors of the timestep and of variable numbers, on the sample's CUDA device."""
        numbers = numbers_to_tensors(leaves, form.timestep, variable)
        device = leaves[form.sample].device
        if self._timestep_to_device and device.type == "cuda":
            for place in (form.timestep, *variable):
                leaves[place] = leaves[place].to(device, non_blocking=True)
        return numbers


def _refusal(leaves: list[Any], form: CallForm | None) -> str | None:
    """Why a call cannot be cached, as far as its arguments tell."""
    if form is None:
        return (
            "none of its arguments can be the sample, or none the timestep: a number, or a tensor "
            'with one element or one for each batch element (timestep="..." says which it is)'
        )
    if not all(map(is_readable, leaves)):
        return "an argument raises when it is looked at, as a proxy does of what is gone"
    samples, timestep = [leaves[place] for place in form.samples], leaves[form.timestep]
    if not all(isinstance(sample, torch.Tensor) for sample in samples):
        return "the sample is no tensor"
    if not isinstance(timestep, (torch.Tensor, bool)) and not is_number(timestep):
        return "the timestep is neither a tensor nor a number"
    if any(sample.numel() == 0 for sample in samples):
        return "the sample is empty"
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and overrides_functions(type(leaf)):
            return f"{type(leaf).__name__} tensors override torch's functions, and graphs do not"
        if isinstance(leaf, torch.Tensor) and (kind := unusual_memory(leaf)) is not None:
            return f"an argument is {kind}, which graphs do not take"
    return None


def make_matcher(
    args: tuple[Any, ...], kwargs: dict[str, Any], form: CallForm, variable: Collection[int] = ()
) -> Matcher | None:
    """Generate a function that recognises calls with the form and signature of this one.

    Args:
        args, kwargs: the example call.
        form: its form.
        variable: positions of numbers whose values do not matter.

    Returns:
        ``(args, kwargs) -> (leaves, conditioning)``, or None for other calls. No function if an
        argument is a container that only pytree knows how to take apart.
    """
    writer = _MatcherWriter(form, variable)
    try:
        writer.write(args, kwargs)
    except _NoMatcherError:
        return None
    return writer.compiled()


class _NoMatcherError(Exception):
    """An argument is of a type that the generated code does not handle."""


class _MatcherWriter:
    """Writes the source of one matcher, one check a line; constants are bound by name."""

    def __init__(self, form: CallForm, variable: Collection[int]) -> None:
        self._form = form
        self._open = {form.timestep, *variable}  # numbers of any value
        self._checks: list[str] = []  # conditions under which the call is another one
        self._loads: list[str] = []
        self._names: dict[str, Any] = {"Tensor": torch.Tensor, "strided": torch.strided}
        self._fresh = itertools.count()
        self._leaves: list[str] = []
        self._conditioning: list[str] = []
        self._values: list[Any] = []

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the code for all arguments."""
        self._check(f"len(args) != {len(args)} or len(kwargs) != {len(kwargs)}")
        values = [(f"args[{place}]", value) for place, value in enumerate(args)]
        values += [(f"kwargs[{name!r}]", value) for name, value in kwargs.items()]
        for source, value in values:
            self._value(source, value)
        self._distinguish_conditioning()

    def compiled(self) -> Matcher:
        """The function."""
        body = ["def matches(args, kwargs):", " try:"]
        body += [f"  {line}" for line in self._loads]
        body += [
            " except (KeyError, RuntimeError):",  # such as a nested tensor's, which has no shape
            "  return None",
            f" return [{', '.join(self._leaves)}], [{', '.join(self._conditioning)}]",
        ]
        exec(compile("\n".join(body), "<call matcher>", "exec"), self._names)
        matcher: Matcher = self._names["matches"]
        return matcher

    def _check(self, condition: str) -> None:
        self._loads.append(f"if {condition}: return None")

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._fresh)}"
        self._names[name] = value
        return name

    def _value(self, source: str, value: Any) -> None:
        name = f"v{next(self._fresh)}"
        self._loads.append(f"{name} = {source}")
        kind = type(value)
        if kind in LEAF_TYPES:
            self._leaf(name, value)
        elif kind is dict:
            keys = self._constant(tuple(value))
            self._check(f"type({name}) is not dict or tuple({name}) != {keys}")
            for key, item in value.items():
                self._value(f"{name}[{self._constant(key)}]", item)
        elif kind in (list, tuple):
            expected = f"type({name}) is not {kind.__name__}"
            self._check(f"{expected} or len({name}) != {len(value)}")
            for place, item in enumerate(value):
                self._value(f"{name}[{place}]", item)
        else:
            raise _NoMatcherError

    def _leaf(self, name: str, value: Any) -> None:
        number = len(self._leaves)
        self._leaves.append(name)
        self._values.append(value)
        if isinstance(value, torch.Tensor):
            self._tensor(name, value)
            if number == self._form.sample:
                self._autocast(value)
        elif number in self._open:
            self._check(f"type({name}) is not {self._constant(type(value))}")
        elif value is None or isinstance(value, bool):
            self._check(f"{name} is not {value}")
        else:
            kind, expected = self._constant(type(value)), self._constant(value)
            self._check(f"type({name}) is not {kind} or {name} != {expected}")

    def _distinguish_conditioning(self) -> None:
        """Which tensors are neither the sample nor the timestep, and not lazy."""
        own = self._form.own
        for number, (name, value) in enumerate(zip(self._leaves, self._values, strict=True)):
            if number in own or not isinstance(value, torch.Tensor) or type(value) is LazyTensor:
                continue
            for other in own:  # a network may get its sample in a second argument, too
                same = value is self._values[other]
                self._check(f"{name} is {'not ' if same else ''}{self._leaves[other]}")
            if not any(value is self._values[other] for other in own):
                self._conditioning.append(name)

    def _tensor(self, name: str, value: torch.Tensor) -> None:
        kind = "Tensor" if type(value) is torch.Tensor else self._constant(type(value))
        shape, dtype = self._constant(value.shape), self._constant(value.dtype)
        cpu = value.device.type == "cpu"
        device = f"not {name}.is_cpu" if cpu else f"{name}.device != {self._constant(value.device)}"
        self._check(
            f"type({name}) is not {kind} or {name}.shape != {shape} or {name}.dtype is not {dtype} "
            f"or {device} or {name}.layout is not strided"
        )
        if value.is_contiguous():
            self._check(f"not {name}.is_contiguous()")
        else:
            self._check(f"{name}.stride() != {self._constant(value.stride())}")

    def _autocast(self, sample: torch.Tensor) -> None:
        kind = sample.device.type
        if kind == "meta":
            return
        self._names["is_autocast_enabled"] = torch.is_autocast_enabled
        if not torch.is_autocast_enabled(kind):
            self._check(f"is_autocast_enabled({kind!r})")
            return
        self._names["get_autocast_dtype"] = torch.get_autocast_dtype
        dtype = self._constant(torch.get_autocast_dtype(kind))
        self._check(
            f"not is_autocast_enabled({kind!r}) or get_autocast_dtype({kind!r}) is not {dtype}"
        )


__all__ = ["Call", "CallReader", "make_matcher"]
