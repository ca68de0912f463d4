"""What structures are compared for: what changed, what running changes, the same in any process."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from dcompile.compiler.introspection import (
    PLAIN,
    attributes_of,
    function_behind,
    is_library,
    is_readable,
    own_dict,
    repr_of,
)
from dcompile.compiler.structure import (
    MAX_DEPTH,
    WRITTEN,
    Identity,
    Items,
    Structure,
    code_of,
    kind_of,
    name_of,
)


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
    if isinstance(value, Identity):
        return _portable(value.what)
    if isinstance(value, Items):
        return [[_portable(key), _portable(item)] for key, item in value if key not in _ORIGIN]
    if isinstance(value, tuple):
        return [_portable(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(json.dumps(_portable(item)) for item in value)
    return _class_of(value) if isinstance(value, type) else _ADDRESS.sub("", repr_of(value))


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _class_of(kind: type) -> str:
    """Name and code, in any process."""
    return _class_digest(kind, kind_of(kind))


@functools.lru_cache(maxsize=4096)
def _class_digest(kind: type, code: Any) -> str:
    """Name and code: a class of the same name may do something else elsewhere."""
    digest = hashlib.sha256()
    for base in kind.__mro__:
        if is_library(base.__module__):
            continue
        for name, member in sorted(vars(base).items()):
            if type(member) in PLAIN and not name.startswith("__"):
                digest.update(f"{name} {repr_of(member)}".encode())
            member = function_behind(member)
            while isinstance(member, types.FunctionType):  # and what a decorator has wrapped
                digest.update(f"{name} {code_of(member.__code__)}".encode())
                member = getattr(member, "__wrapped__", None)
    return f"{name_of(kind)} {digest.hexdigest()[:16]}"


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
            name = names[0]
            inside = _name_within(one.get(name), other.get(name))
            return f"{path or 'the network'}: {inside or name} changed"
    return "nothing changed"


def _name_within(one: Any, other: Any) -> str | None:
    """Which of the names that a class's code mentions, if that is all that differs."""
    if not isinstance(one, Identity) or not isinstance(other, Identity):
        return None
    if len(one.ident) != len(other.ident):
        return None
    for name, before, after in zip(one.ident, one.ident[1:], other.ident[1:], strict=False):
        if before is not after and before != after:
            return name if isinstance(name, str) else None
    return None


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
        for place in _places_that_differ(before[path].get(name, WRITTEN), value)
    )


def _places_that_differ(before: Any, after: Any) -> list[str]:
    """Positions, such as 1.0.1, at which two descriptions differ; "" for their entirety."""
    if before == after:
        return []
    if type(before) is not type(after) or not isinstance(after, tuple):
        return [""]
    if isinstance(after, (Identity, torch.Size)) or len(before) != len(after):
        return [""]
    return [
        f"{number}.{place}".rstrip(".")
        for number, (one, two) in enumerate(zip(before, after, strict=True))
        for place in _places_that_differ(one, two)
    ]


def tensors_in_containers(module: nn.Module) -> dict[int, str]:
    """Tensors that a network holds in lists, dicts, objects or modules that are no submodules.

    Nobody could look them up by a name.

    Returns:
        Addresses of their values, and where they are.
    """
    found: dict[int, str] = {}

    def look(value: Any, where: str, depth: int) -> None:
        if type(value) in PLAIN or not is_readable(value):
            return
        if isinstance(value, torch.Tensor):
            found.setdefault(value.data_ptr(), where)
        elif isinstance(value, nn.Module):
            for name, tensor in value.state_dict(keep_vars=True).items():
                found.setdefault(tensor.data_ptr(), f"{where}.{name}")
        elif depth == 0:
            return
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(item, f"{where}[{key!r}]", depth - 1)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(item, f"{where}[{number}]", depth - 1)
        else:
            for name, item in (own_dict(value) or {}).items():
                look(item, f"{where}.{name}", depth - 1)

    for path, submodule in module.named_modules():
        for name in attributes_of(submodule, path):
            value = vars(submodule)[name]
            if not isinstance(value, (torch.Tensor, nn.Module)):
                look(value, f"{path}.{name}".lstrip("."), MAX_DEPTH)
    return found
