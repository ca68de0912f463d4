"""The structure of a module that a captured graph depends on, to notice when it changes.

A call checks its inputs every time; the module is examined only when a run begins. Adapter
layers that were added, attention processors that were swapped, scales that were set: all of that
is in the submodules' attributes, and a graph captured before is wrong after. Parameters are
compared by name, shape, dtype and device only: their values are inputs of the graph.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import hashlib
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dcompile.compat.hooks import global_hooks, ways_of_hooks
from dcompile.compat.tensors import ORDINARY, is_wrapper, parts_of, version_of
from dcompile.compiler.introspection import (
    EMPTY,
    PLAIN,
    attributes_of,
    contents_of,
    function_behind,
    is_installed,
    is_library,
    is_readable,
    names_in,
    own_dict,
    repr_of,
    slot_values,
    slots_of,
)
from dcompile.compiler.states import address_of
from dcompile.compiler.watch import Watch

MAX_DEPTH = 8  # levels of containers and objects within an attribute
WRITTEN = "written by the forward pass"

Structure = dict[str, Any]


class Identity(NamedTuple):
    """Something compared by what it is in this process; ``what`` says it in any process."""

    ident: tuple[Any, ...]
    what: Any


class Items(tuple[Any, ...]):
    """The pairs of a mapping, or of an object's attributes."""

    __slots__ = ()


def structure_of(
    module: nn.Module, ignore: Iterable[str] = (), watch: Watch | None = None
) -> Structure:
    """A comparable description of ``module``: one entry for each submodule.

    Args:
        module: the network.
        ignore: entries of ``changed_by_running``; they are left out.
        watch: made right before, is told of everything that is looked into.
    """
    ignored: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for key in ignore:
        where, _, place = key.rpartition(":")
        path, _, name = where.rpartition(":")
        positions = tuple(map(int, place.split("."))) if place else ()
        ignored.setdefault((path, name), []).append(positions)
    describer = _Describer(watch, map(id, module.modules()))
    structure: Structure = {"global hooks": describer.global_hooks()}
    structure |= {
        path: describer.module(submodule, path)
        for path, submodule in module.named_modules(remove_duplicate=False)
    }
    for (path, name), places in ignored.items():
        entry = structure.get(path, {})
        if () in places:
            entry.pop(name, None)
        elif name in entry:
            entry[name] = _without(entry[name], places)
    return structure


def kind_of(kind: type) -> Any:
    """A class, and the code it has at present: methods may be replaced on the class itself."""
    return _Describer(None).kind(kind)


class _Describer:
    """Describes what it is given, and tells ``watch`` what it looked into."""

    def __init__(self, watch: Watch | None, modules: Iterable[int] = ()) -> None:
        self._modules = set(modules)  # of the network, by identity
        self._watch = Watch(nn.Module()) if watch is None else watch
        self._kinds: dict[type, Any] = {}
        self._functions: set[types.FunctionType] = set()
        self._first_names: dict[int, str] = {}  # of parameters, by identity

    def module(self, module: nn.Module, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"class": self.kind(type(module)), "training": module.training}
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    # A tied weight has its first name, as in the graph.
                    tied_to = self._first_names.setdefault(id(tensor), f"{path}.{name}")
                    shape, layout = tuple(tensor.shape), tensor.stride()
                    entry[name] = (shape, tensor.dtype, tensor.device, tied_to, layout)
                    if type(tensor) not in ORDINARY:  # quantized
                        entry[name] += (self._weight(tensor),)
        for name in attributes_of(module, path):
            value = module.__dict__[name]
            entry[name] = value if type(value) in PLAIN else self.value(value, MAX_DEPTH)
        # The whole network's own hooks are around what is captured.
        for table_name in ("_forward_hooks", "_forward_pre_hooks") if path else ():
            hooks = module.__dict__[table_name]
            if hooks:
                entry[table_name] = tuple(
                    Identity((id(hook),), name_of(hook)) for hook in hooks.values()
                )
                entry[f"kinds of {table_name}"] = ways_of_hooks(module, table_name, hooks)
                entry[f"inside {table_name}"] = tuple(
                    self.value(hook, MAX_DEPTH) for hook in hooks.values()
                )
        return entry

    def global_hooks(self) -> dict[str, Any]:
        """Those that torch calls for all modules, and the functions that its layers call."""
        self._watch.mapping(vars(F))
        found: dict[str, Any] = {
            F.__name__: Identity(tuple(filter(callable, vars(F).values())), F.__name__)
        }
        for name, hooks in global_hooks().items():
            self._watch.mapping(hooks)
            found[name] = tuple(Identity((id(hook),), name_of(hook)) for hook in hooks.values())
        return found

    def kind(self, kind: type) -> Any:
        """A class, and the code it has at present: methods may be replaced on the class itself."""
        if kind in self._kinds:
            return self._kinds[kind]
        self._kinds[kind] = kind  # while it is looked into, which may lead back here
        self._watch.kind(kind)
        parts: list[Any] = []
        called = _called_members(kind)
        for base in kind.__mro__[:-1]:
            self._watch.mapping(vars(base))
            if is_library(base.__module__):  # whose methods may be replaced
                if issubclass(base, nn.Module):
                    parts += filter(callable, vars(base).values())
                continue
            for name, member in vars(base).items():
                function = function_behind(member)
                if isinstance(function, types.FunctionType):
                    parts += (function, function.__code__)
                    if name in called:
                        parts += self._code(function, _LEVELS)
                elif not name.startswith("__") and not _is_of_a_slot(member):
                    parts.append((name, self.value(function, MAX_DEPTH - 2)))
        if issubclass(kind, nn.Module):
            parts.append(kind.forward)  # of a library's class, it may have been replaced
        self._kinds[kind] = Identity((kind, *kind.__mro__, *parts), kind) if parts else kind
        return self._kinds[kind]

    def _code(self, function: types.FunctionType, levels: int) -> Iterator[Any]:
        """A function, and what its code names: functions in turn, numbers, parts of modules."""
        if function in self._functions:
            return
        self._functions.add(function)
        self._watch.function(function)
        yield function
        yield function.__code__
        yield self.value((function.__defaults__, function.__kwdefaults__), 3)
        if is_library(function.__module__):
            return
        if is_installed(function.__code__):  # such as diffusers, whose code goes on and on
            levels, matters = min(levels, _LEVELS_OF_PACKAGES), _is_plain_or_code
        else:
            matters = _matters
            for name, cell in zip(
                function.__code__.co_freevars, function.__closure__ or (), strict=True
            ):
                if name != "__class__" and _matters(held := contents_of(cell)):
                    yield name, self._global(held)
        names = names_in(function.__code__)
        for name in names:
            scope = function.__globals__
            named = scope.get(name)
            if isinstance(named, types.FunctionType) and levels:
                self._watch.named(scope, name)
                yield from self._code(named, levels - 1)
            elif isinstance(named, types.ModuleType):
                for part in names:
                    if matters(value := vars(named).get(part)):
                        self._watch.named(vars(named), part)
                        yield part, self._global(value)
            elif name in scope and matters(named):
                self._watch.named(scope, name)
                yield name, self._global(named)

    def _global(self, value: Any) -> Any:
        """What a global name or a closure's variable refers to."""
        if isinstance(value, type) and not is_library(value.__module__):
            return value if issubclass(value, nn.Module) else self.kind(value)
        return value if isinstance(value, _CODE) else self.value(value, _DEPTH_OF_GLOBALS)

    def _weight(self, tensor: Any) -> Any:
        """A weight of a class of its own."""
        if not is_wrapper(tensor):
            self._watch.mapping(vars(tensor))
            return type(tensor), self._container(vars(tensor), MAX_DEPTH)
        self._watch.weights_possible = False
        names, metadata = tensor.__tensor_flatten__()
        parts = [(part.shape, part.dtype, part.stride()) for part in parts_of(tensor)]
        return type(tensor), tuple(names), tuple(parts), self.value(metadata, MAX_DEPTH)

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if not is_readable(value):
            self._watch.possible = False
            return Identity((id(value),), ("unreadable", kind))
        if isinstance(value, torch.Tensor):  # a constant of the graph: its values matter
            self._watch.described(value, state_of)
            return Identity((id(value), *state_of(value)), ("tensor", *_form_of(value)))
        if isinstance(value, nn.Module):
            return self._module_in_attribute(value, depth)
        if depth == 0:
            return kind
        if isinstance(value, types.ModuleType):
            return kind, value.__name__
        if isinstance(value, types.MappingProxyType):
            self._watch.mapping(value)
            return kind, self._container(dict(value), depth - 1)
        if isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)):
            inside = self._container(value, depth - 1)
            own = self._object(value, depth - 1) if own_dict(value) is not None else None
            return (kind, inside) if own is None else (kind, inside, own)
        if isinstance(value, Mapping) and own_dict(value) is None:  # may read from a disk
            return Identity((id(value),), ("mapping", kind))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth - 1)
        if isinstance(value, functools.partial):
            self._watch.partial(value)
            return kind, self.value((value.func, value.args, value.keywords), depth - 1)
        if isinstance(value, contextvars.ContextVar):
            self._watch.described(value, _content)
            return kind, self.value(_content(value), depth - 1)
        if isinstance(value, types.MethodType):
            inside = self.value(value.__self__, depth - 1)
            return kind, self.value(value.__func__, depth - 1), inside
        if isinstance(value, (type, types.BuiltinFunctionType)):
            return getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
        if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
            self._watch.described(value, _array)
            return _array(value)
        return self._object(value, depth - 1)

    def _module_in_attribute(self, module: nn.Module, depth: int) -> Any:
        """A module that an attribute holds: one of the network's, or one beside it.

        The weights of the latter are constants of the graph.
        """
        same = Identity((id(module),), ("module", type(module)))
        if id(module) in self._modules or depth <= 0:
            return same
        self._modules.add(id(module))
        self._watch.mapping(vars(module))
        parts = []
        for table in (module._parameters, module._buffers, module._modules):
            self._watch.mapping(table)
            parts += [(name, self.value(held, depth - 1)) for name, held in table.items()]
        parts += [
            (name, self.value(vars(module)[name], depth - 1))
            for name in attributes_of(module, "of it")
        ]
        return same, self.kind(type(module)), module.training, tuple(parts)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            self._watch.mapping(value)
            return Items((self.value(k, 0), self.value(v, depth)) for k, v in value.items())
        if isinstance(value, (set, frozenset)):
            self._watch.elements(value)
            return frozenset(Counter(self.value(item, depth) for item in value).items())
        if isinstance(value, (list, collections.deque)):
            self._watch.sequence(value)
        return tuple(self.value(item, depth) for item in value)

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        self._watch.function(value)
        cells = [
            held for cell in value.__closure__ or () if (held := contents_of(cell)) is not EMPTY
        ]
        self._watch.mapping(vars(value))
        own = [*self._code(value, _LEVELS), *vars(value).values()] if depth > 0 else []
        own = [item for item in own if item is not value and item is not value.__code__]
        inside = self.value((*cells, value.__defaults__, value.__kwdefaults__, *own), depth)
        return value.__module__, value.__qualname__, code_of(value.__code__), inside

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        names = [name for base in kind.__mro__ for name in slots_of(base)]
        self._watch.instance(value, names)
        state = own_dict(value)
        if state is not None:
            self._watch.mapping(state)
            if own_dict(value) is not state:  # made whenever it is asked for
                self._watch.possible = False
        if names:
            state = {**(state or {}), **slot_values(value, names)}
        if state:
            return self.kind(kind), Items(
                (name, self.value(item, depth)) for name, item in state.items()
            )
        if getattr(kind, "__repr__", None) is not object.__repr__:
            self._watch.described(value, repr_of)
            return self.kind(kind), repr_of(value)
        return self.kind(kind)


_CALLED = ("forward", "__call__")


def _called_members(kind: type) -> set[str]:
    """Names of the methods that a call of an object leads to; of all if it cannot be called."""
    members = {
        name: function
        for base in reversed(kind.__mro__)
        if not is_library(base.__module__)
        for name, member in vars(base).items()
        if isinstance(function := function_behind(member), types.FunctionType)
    }
    pending = [name for name in _CALLED if name in members] or [*members]
    found = set(pending)
    while pending:
        for name in names_in(members[pending.pop()].__code__):
            if name in members and name not in found:
                found.add(name)
                pending.append(name)
    return found


_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
_LEVELS, _LEVELS_OF_PACKAGES = 16, 3  # of functions that functions name
_DEPTH_OF_GLOBALS = 4


def _is_plain_or_code(value: Any) -> bool:
    return type(value) in PLAIN or isinstance(
        value, (types.FunctionType, types.BuiltinFunctionType)
    )


def _matters(value: Any) -> bool:
    """Whether what a global name refers to decides something, other than a library's objects."""
    if type(value) in PLAIN or type(value) in _CONTAINERS:
        return True
    if not is_readable(value):
        return False
    if isinstance(value, _HOLDERS):
        return True
    return value is not EMPTY and not is_library(type(value).__module__)


_CONTAINERS = (dict, list, set, tuple, collections.deque, collections.defaultdict)
_HOLDERS = (
    *(types.FunctionType, types.BuiltinFunctionType, type),
    *(types.SimpleNamespace, functools.partial, contextvars.ContextVar),
    *(torch.Tensor, nn.Module),
)


def state_of(tensor: torch.Tensor) -> tuple[int, int | None]:
    """Changes whenever a tensor is written to, or is given other memory."""
    return version_of(tensor) or 0, address_of(tensor)


def _form_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _is_of_a_slot(member: Any) -> bool:
    return isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType))


def _content(variable: contextvars.ContextVar[Any]) -> Any:
    return variable.get(None)


def _array(value: Any) -> Any:
    digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
    return type(value), str(value.dtype), getattr(value, "shape", ()), digest


def name_of(thing: Any) -> str:
    """Module and qualified name of a class or function, or of an object's class."""
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{thing.__module__}.{thing.__qualname__}"


def _without(description: Any, places: Iterable[tuple[int, ...]]) -> Any:
    """The description with a mark instead of what is at these places."""
    for place in places:
        description = _marked(description, place)
    return description


def _marked(description: Any, place: tuple[int, ...]) -> Any:
    if not place:
        return WRITTEN
    plain = isinstance(description, tuple) and not isinstance(description, (Identity, torch.Size))
    if not plain or place[0] >= len(description):
        return description  # something else now, which will be noticed
    items = list(description)
    items[place[0]] = _marked(items[place[0]], place[1:])
    return type(description)(items)


@functools.lru_cache(maxsize=4096)
def code_of(code: types.CodeType) -> str:
    """Differs when the code does; the same in every process."""
    content = repr((code.co_code, [*map(_constant, code.co_consts)], code.co_names))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _constant(value: Any) -> str:
    """The order of a set of strings is another in each process."""
    if isinstance(value, types.CodeType):
        return code_of(value)
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(_constant, value))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    return repr(value)
