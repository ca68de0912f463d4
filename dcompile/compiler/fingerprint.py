"""The structure of a module that a captured graph depends on, to notice when it changes.

A call checks its inputs every time; the module is examined only when a run begins. Adapter
layers that were added, attention processors that were swapped, scales that were set: all of that
is in the submodules' attributes, and a graph captured before is wrong after. Parameters are
compared by name, shape, dtype and device only: their values are inputs of the graph.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from dcompile.compat.hooks import forward_slots, root_attributes
from dcompile.compat.tensors import is_wrapper, parts_of, version_of
from dcompile.compiler.introspection import (
    EMPTY,
    PLAIN,
    contents_of,
    function_behind,
    is_library,
    names_in,
    slots_of,
)

# nn.Module's own bookkeeping is compared through what it holds, not as attributes.
_BOOKKEEPING = frozenset(vars(nn.Module()))
# Around the whole network, where dcompile and accelerate's hooks take turns; capture goes beneath.
_ROOT_WRAPPERS = frozenset({*forward_slots, *root_attributes})
_MAX_DEPTH = 8  # levels of containers and objects within an attribute

Structure = dict[str, Any]


class _Identity(NamedTuple):
    """Something compared by what it is in this process; ``what`` says it in any process."""

    ident: tuple[Any, ...]
    what: Any


class _Items(tuple[Any, ...]):
    """A mapping's pairs."""

    __slots__ = ()


def structure_of(module: nn.Module, ignore: Iterable[str] = ()) -> Structure:
    """A comparable description of ``module``: one entry for each submodule.

    Args:
        module: the network.
        ignore: entries of ``changed_by_running``; they are left out.
    """
    ignored: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for key in ignore:
        where, _, place = key.rpartition(":")
        path, _, name = where.rpartition(":")
        positions = tuple(map(int, place.split("."))) if place else ()
        ignored.setdefault((path, name), []).append(positions)
    first_names: dict[int, str] = {}
    _kinds.known = {}
    try:
        structure = {
            path: _describe_module(submodule, path, first_names)
            for path, submodule in module.named_modules(remove_duplicate=False)
        }
    finally:
        _kinds.known = None
    for (path, name), places in ignored.items():
        entry = structure.get(path, {})
        if () in places:
            entry.pop(name, None)
        elif name in entry:
            entry[name] = _without(entry[name], places)
    return structure


def identity_of(module: nn.Module) -> tuple[str, int]:
    """Class name and number of parameters: what a tuned schedule is compared by."""
    return type(module).__name__, sum(parameter.numel() for parameter in module.parameters())


def portable(structure: Structure) -> dict[str, dict[str, Any]]:
    """The structure in JSON's types, the same in every process that builds the same module.

    Left out is what only one process knows: identities, device numbers, and where a configuration
    came from.
    """
    plain = json.loads(
        json.dumps(
            {
                path: {name: _portable(value) for name, value in entry.items()}
                for path, entry in structure.items()
            }
        )
    )
    return cast(dict[str, dict[str, Any]], plain)


# What diffusers' configurations say of their own origin.
_ORIGIN = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"})


def _portable(value: Any) -> Any:
    if isinstance(value, str):  # often an object's representation
        return _ADDRESS.sub("", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, _Identity):
        return _portable(value.what)
    if isinstance(value, _Items):
        return [[_portable(key), _portable(item)] for key, item in value if key not in _ORIGIN]
    if isinstance(value, tuple):
        return [_portable(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(json.dumps(_portable(item)) for item in value)
    return _class_of(value) if isinstance(value, type) else _ADDRESS.sub("", repr(value))


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


_kinds = threading.local()  # .known: what was found of classes for the present structure


def _kind_of(kind: type) -> Any:
    """A class, and the code it has at present: methods may be replaced on the class itself."""
    known = getattr(_kinds, "known", None)
    if known is None:
        known = {}
    if kind not in known:
        code = tuple(
            function
            for base in kind.__mro__
            if not is_library(base.__module__)
            for member in vars(base).values()
            for function in _functions_of(member)
        )
        known[kind] = _Identity((kind, *code), kind) if code else kind
    return known[kind]


_CALLED = frozenset({"forward", "__call__"})


def _functions_of(member: Any) -> Iterator[Any]:
    """The function behind a member of a class; of what is called, the functions it names, too."""
    member = function_behind(member)
    if not isinstance(member, types.FunctionType):
        return
    yield member
    if member.__name__ in _CALLED:
        for name in names_in(member.__code__):
            named = member.__globals__.get(name)
            if isinstance(named, types.FunctionType):
                yield named


def _class_of(kind: type) -> str:
    """Name and code, in any process."""
    return _class_digest(kind, _kind_of(kind))


@functools.lru_cache(maxsize=4096)
def _class_digest(kind: type, code: Any) -> str:
    """Name and code: a class of the same name may do something else elsewhere."""
    digest = hashlib.sha256()
    for base in kind.__mro__:
        if is_library(base.__module__):
            continue
        for name, member in sorted(vars(base).items()):
            member = function_behind(member)
            while isinstance(member, types.FunctionType):  # and what a decorator has wrapped
                digest.update(f"{name} {_code_of(member.__code__)}".encode())
                member = getattr(member, "__wrapped__", None)
    return f"{_name_of(kind)} {digest.hexdigest()[:16]}"


def _name_of(thing: Any) -> str:
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{thing.__module__}.{thing.__qualname__}"


def difference(before: Structure, after: Structure) -> str:
    """Name the first thing that differs, for a person."""
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            return f"{path} was removed"
        if path not in before:
            return f"{path} was added"
        if before[path] != after[path]:
            one, other = before[path], after[path]
            names = [n for n in one if n not in other or other[n] != one[n]]
            names += [n for n in other if n not in one]
            return f"{path or 'the network'}: {names[0]} changed"
    return "nothing changed"


def changed_by_running(before: Structure, after: Structure) -> frozenset[str]:
    """What the forward pass itself writes, such as counters: no sign of structure.

    Of an object's or a container's description only the parts that differ: a counter within an
    attention processor says nothing about the processor.

    Returns:
        ``path:attribute:place``; the place is a position within the attribute's description, or
        empty for all of it.
    """
    return frozenset(
        f"{path}:{name}:{place}"
        for path, entry in after.items()
        for name, value in entry.items()
        if path in before
        for place in _places_that_differ(before[path].get(name, _WRITTEN), value)
    )


_WRITTEN = "written by the forward pass"


def _places_that_differ(before: Any, after: Any) -> list[str]:
    """Positions, such as 1.0.1, at which two descriptions differ; "" for their entirety."""
    if before == after:
        return []
    if type(before) is not type(after) or not isinstance(after, tuple):
        return [""]
    if isinstance(after, (_Identity, torch.Size)) or len(before) != len(after):
        return [""]
    return [
        f"{number}.{place}".rstrip(".")
        for number, (one, two) in enumerate(zip(before, after, strict=True))
        for place in _places_that_differ(one, two)
    ]


def _without(description: Any, places: Iterable[tuple[int, ...]]) -> Any:
    """The description with a mark instead of what is at these places."""
    for place in places:
        description = _marked(description, place)
    return description


def _marked(description: Any, place: tuple[int, ...]) -> Any:
    if not place:
        return _WRITTEN
    plain = isinstance(description, tuple) and not isinstance(description, (_Identity, torch.Size))
    if not plain or place[0] >= len(description):
        return description  # something else now, which will be noticed
    items = list(description)
    items[place[0]] = _marked(items[place[0]], place[1:])
    return type(description)(items)


def _describe_module(module: nn.Module, path: str, first_names: dict[int, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": _kind_of(type(module)), "training": module.training}
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                # A tied weight has its first name, as in the graph.
                tied_to = first_names.setdefault(id(tensor), f"{path}.{name}")
                shape, layout = tuple(tensor.shape), tensor.stride()
                entry[name] = (shape, tensor.dtype, tensor.device, tied_to, layout)
                if type(tensor) is not nn.Parameter and is_wrapper(tensor):  # quantized
                    entry[name] += (_describe_wrapper(tensor),)
    for name, value in module.__dict__.items():
        if name not in _BOOKKEEPING and (path or name not in _ROOT_WRAPPERS):
            entry[name] = value if type(value) in PLAIN else _describe(value, _MAX_DEPTH)
    # The whole network's own hooks are around what is captured.
    for table_name in ("_forward_hooks", "_forward_pre_hooks") if path else ():
        hooks = module.__dict__[table_name]
        if hooks:
            entry[table_name] = tuple(
                _Identity((id(hook),), _name_of(hook)) for hook in hooks.values()
            )
            entry[f"inside {table_name}"] = tuple(
                _describe(hook, _MAX_DEPTH) for hook in hooks.values()
            )
    return entry


def _describe_wrapper(tensor: Any) -> Any:
    names, metadata = tensor.__tensor_flatten__()
    parts = [(part.shape, part.dtype, part.stride()) for part in parts_of(tensor)]
    return type(tensor), tuple(names), tuple(parts), _describe(metadata, _MAX_DEPTH)


class ToggleSnapshot:
    """All switches (attributes that are bools) and scales (dicts of numbers) in a module.

    To compare during a run: adapters keep their weights in such dicts.

    Some pipelines turn parts of a network off while they draw, or change an adapter's weight.
    Comparing the whole structure takes too long for that.
    """

    def __init__(self, module: nn.Module) -> None:
        switches = [
            (
                submodule.__dict__,
                [name for name, v in submodule.__dict__.items() if v is True or v is False],
            )
            for submodule in module.modules()
        ]
        self._switches = [(where, names) for where, names in switches if names]
        self._scales = [
            (submodule.__dict__, name)
            for submodule in module.modules()
            for name, value in submodule.__dict__.items()
            if _are_numbers(value)
        ]
        self._seen = self._now()

    def changed(self) -> bool:
        """Whether any is not what it was."""
        return self._now() != self._seen

    def _now(self) -> list[Any]:
        found = [where.get(name) for where, names in self._switches for name in names]
        for where, name in self._scales:
            value = where.get(name)
            found.append(dict(value) if isinstance(value, dict) else value)
        return found


def _are_numbers(value: Any) -> bool:
    """A dict of nothing but numbers, such as the scales of an adapter layer."""
    return (
        type(value) is dict
        and bool(value)
        and all(type(item) in (int, float) for item in value.values())
    )


class WeightIdentities:
    """A module's parameters, to notice that others were put in their places.

    ``torch.func.functional_call`` does so for the time of one call. Held weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._all = [
            (submodule._parameters, name, weakref.ref(parameter))
            for submodule in module.modules()
            for name, parameter in submodule._parameters.items()
            if parameter is not None
        ]
        self._some = self._all[-1:]  # a reuse step reads it too: it is in the processor's cache

    def changed(self, thoroughly: bool) -> bool:
        """Whether any is another object now; of the last one only, unless ``thoroughly``."""
        for table, name, reference in self._all if thoroughly else self._some:
            if table.get(name) is not reference():
                return True
        return False


def tensors_in_containers(module: nn.Module) -> dict[int, str]:
    """Tensors that a network holds in lists, dicts, objects or modules that are no submodules.

    Nobody could look them up by a name.

    Returns:
        Addresses of their values, and where they are.
    """
    found: dict[int, str] = {}

    def look(value: Any, where: str, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            found.setdefault(value.data_ptr(), where)
        elif isinstance(value, nn.Module):
            for name, tensor in value.state_dict(keep_vars=True).items():
                found.setdefault(tensor.data_ptr(), f"{where}.{name}")
        elif depth == 0 or type(value) in PLAIN:
            return
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(item, f"{where}[{key!r}]", depth - 1)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(item, f"{where}[{number}]", depth - 1)
        else:
            for name, item in getattr(value, "__dict__", {}).items():
                look(item, f"{where}.{name}", depth - 1)

    for path, submodule in module.named_modules():
        for name, value in submodule.__dict__.items():
            named = isinstance(value, (torch.Tensor, nn.Module)) or name in _BOOKKEEPING
            if not named and (path or name not in _ROOT_WRAPPERS):
                look(value, f"{path}.{name}".lstrip("."), _MAX_DEPTH)
    return found


def _describe(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, torch.Tensor):  # a constant of the graph: its values matter
        version = version_of(value) or 0
        return _Identity((id(value), version), ("tensor", tuple(value.shape), value.dtype))
    if isinstance(value, nn.Module):  # its weights are constants of the graph
        return _Identity((id(value),), ("module", kind))
    if depth == 0:
        return kind
    if isinstance(value, types.ModuleType):
        return kind, value.__name__
    if isinstance(value, Mapping) and not isinstance(value, dict):  # may read its items from a disk
        return _Identity((id(value),), ("mapping", kind))
    if isinstance(value, dict):
        return kind, _Items((_describe(k, 0), _describe(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return kind, tuple(_describe(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(Counter(_describe(item, depth - 1) for item in value).items())
    if isinstance(value, types.FunctionType):
        cells = [
            held for cell in value.__closure__ or () if (held := contents_of(cell)) is not EMPTY
        ]
        inside = _describe([cells, value.__defaults__, value.__kwdefaults__], depth - 1)
        return value.__module__, value.__qualname__, _code_of(value.__code__), inside
    if isinstance(value, functools.partial):
        return kind, _describe([value.func, value.args, value.keywords], depth - 1)
    if isinstance(value, types.MethodType):
        owner = value.__self__
        inside = type(owner) if isinstance(owner, nn.Module) else _describe(owner, depth - 1)
        return kind, _describe(value.__func__, depth - 1), inside
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
        return (
            kind,
            str(value.dtype),
            getattr(value, "shape", ()),
            hashlib.sha256(value.tobytes()).hexdigest()[:16],
        )
    state = dict(getattr(value, "__dict__", {}))
    for base in kind.__mro__:
        for name in slots_of(base):
            if hasattr(value, name):
                state[name] = getattr(value, name)
    if state:
        return _kind_of(kind), tuple(
            (name, _describe(item, depth - 1)) for name, item in state.items()
        )
    if getattr(kind, "__repr__", None) is not object.__repr__:
        return _kind_of(kind), repr(value)
    return _kind_of(kind)


@functools.lru_cache(maxsize=4096)
def _code_of(code: types.CodeType) -> str:
    """Differs when the code does; the same in every process."""
    constants = [_code_of(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    content = repr((code.co_code, constants, code.co_names))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
