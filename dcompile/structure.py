"""What a captured graph took for granted about its module, to notice when it changes.

A call checks its inputs every time; the module is looked at only when a generation begins. Adapter
layers that were added, attention processors that were swapped, scales that were set: all of that
is in the submodules' attributes, and a graph captured before is wrong after. Parameters are
compared by name, shape, dtype and device only: their values are inputs of the graph.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

# nn.Module's own bookkeeping is compared through what it holds, not as attributes.
_BOOKKEEPING = frozenset(vars(nn.Module()))
# Around the whole network, where dcompile and accelerate's hooks take turns; capture goes beneath.
_ROOT_WRAPPERS = frozenset({"forward", "_old_forward", "_hf_hook", "_is_torch_compile"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MAX_DEPTH = 4

Structure = dict[str, Any]


class _Identity(NamedTuple):
    """Something compared by what it is in this process; ``what`` says it in any process."""

    ident: tuple[int, ...]
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
    ignored = frozenset(ignore)
    first_names: dict[int, str] = {}
    return {
        path: _describe_module(submodule, path, ignored, first_names)
        for path, submodule in module.named_modules(remove_duplicate=False)
    }


def portable(structure: Structure) -> dict[str, dict[str, Any]]:
    """The structure in JSON's types, the same in every process that builds the same module.

    Left out is what only one process knows: identities, device numbers, and a mapping's private
    entries, such as the folder a configuration was read from.
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


def _portable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, _Identity):
        return _portable(value.what)
    if isinstance(value, _Items):
        return [
            [_portable(key), _portable(item)]
            for key, item in value
            if not (isinstance(key, str) and key.startswith("_"))
        ]
    if isinstance(value, tuple):
        return [_portable(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(map(str, value))
    return _class_of(value) if isinstance(value, type) else repr(value)


@functools.lru_cache(maxsize=4096)
def _class_of(kind: type) -> str:
    """Name and code: a class of the same name may do something else elsewhere."""
    methods = [getattr(kind, name, None) for name in ("forward", "__call__")]
    codes = [_code_of(m.__code__) for m in methods if isinstance(m, types.FunctionType)]
    return " ".join([_name_of(kind), *codes])


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
            names = [name for name in before[path] if after[path].get(name) != before[path][name]]
            names += [name for name in after[path] if name not in before[path]]
            return f"{path or 'the network'}: {names[0]} changed"
    return "nothing changed"


def changed_by_running(before: Structure, after: Structure) -> frozenset[str]:
    """Attributes the forward pass itself writes, such as counters: no sign of structure."""
    return frozenset(
        f"{path}:{name}"
        for path, entry in after.items()
        for name, value in entry.items()
        if path in before and before[path].get(name, None) != value
    )


def _describe_module(
    module: nn.Module, path: str, ignored: frozenset[str], first_names: dict[int, str]
) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": type(module), "training": module.training}
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                # A tied weight goes by its first name, in the graph too.
                tied_to = first_names.setdefault(id(tensor), f"{path}.{name}")
                shape, layout = tuple(tensor.shape), tensor.stride()
                entry[name] = (shape, tensor.dtype, tensor.device, tied_to, layout)
    for name, value in module.__dict__.items():
        if name in _BOOKKEEPING or (ignored and f"{path}:{name}" in ignored):
            continue
        if path or name not in _ROOT_WRAPPERS:
            entry[name] = value if type(value) in _PLAIN else _describe(value, _MAX_DEPTH)
    for table_name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = module.__dict__[table_name]
        if hooks:
            entry[table_name] = tuple(
                _Identity((id(hook),), _name_of(hook)) for hook in hooks.values()
            )
            inside = f"inside {table_name}"
            if f"{path}:{inside}" not in ignored:
                entry[inside] = tuple(_describe(hook, _MAX_DEPTH) for hook in hooks.values())
    return entry


def _describe(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):  # a constant of the graph: its values matter
        version = 0 if value.is_inference() else value._version
        return _Identity((id(value), version), ("tensor", tuple(value.shape), value.dtype))
    if isinstance(value, nn.Module):  # its weights are constants of the graph
        return _Identity((id(value),), ("module", kind))
    if depth == 0:
        return kind
    if isinstance(value, Mapping):
        return kind, _Items((_describe(k, 0), _describe(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return kind, tuple(_describe(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(repr, value))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
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
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # NumPy's
        return (
            kind,
            str(value.dtype),
            getattr(value, "shape", ()),
            hashlib.sha256(value.tobytes()).hexdigest()[:16],
        )
    state = dict(getattr(value, "__dict__", {}))
    for base in kind.__mro__:
        for name in _names(getattr(base, "__slots__", ())):
            if hasattr(value, name):
                state[name] = getattr(value, name)
    if state:
        return kind, tuple((name, _describe(item, depth - 1)) for name, item in state.items())
    if getattr(kind, "__repr__", None) is not object.__repr__:
        return kind, repr(value)
    return kind


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


@functools.lru_cache(maxsize=4096)
def _code_of(code: types.CodeType) -> str:
    """Differs when the code does; the same in every process."""
    constants = [_code_of(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    content = repr((code.co_code, constants, code.co_names))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
