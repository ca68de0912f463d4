"""What Python objects are made of: slots, closures, the names that code mentions."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dcompile.compat.hooks import forward_slots, root_attributes

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
)
"""Types of values that cannot change and refer to nothing."""

# nn.Module's own bookkeeping is looked at for what it holds, not as attributes.
_BOOKKEEPING = frozenset(vars(nn.Module()))
# Around the whole network, where dcompile and accelerate's hooks take turns; capture goes beneath.
_ROOT_WRAPPERS = frozenset({*forward_slots, *root_attributes})


def attributes_of(module: nn.Module, path: str) -> list[str]:
    """The names of a submodule's attributes, but for parameters, buffers, submodules and hooks.

    Args:
        module: the submodule.
        path: its name in the network, empty for the whole of it; then without what wraps that.
    """
    return [
        name
        for name in vars(module)
        if name not in _BOOKKEEPING and (path or name not in _ROOT_WRAPPERS)
    ]


EMPTY = object()
"""What a cell without contents has."""

# Libraries whose code does not change and keeps nothing for its callers, apart from Python's own.
_LIBRARIES = frozenset(
    {"torch", "torchvision", "numpy", "sympy", "dcompile", "functorch", "triton"}
)


@functools.lru_cache(maxsize=4096)
def is_library(module: str | None) -> bool:
    """Whether a module belongs to torch, Python or the like, and is not looked into."""
    package = (module or "").partition(".")[0]
    return package in _LIBRARIES or (package in sys.stdlib_module_names and package != "__main__")


_PACKAGES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def is_installed(code: types.CodeType) -> bool:
    """Whether code is an installed package's, not a script's or that of a checkout."""
    return code.co_filename.startswith(_PACKAGES)


def slots_of(kind: type) -> tuple[str, ...]:
    """Names of the slots that a class itself adds."""
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    return tuple(
        f"{private}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    )


def is_readable(thing: Any) -> bool:
    """Whether an object tells its class. A proxy of what is gone, or not yet there, raises."""
    try:
        thing.__class__  # noqa: B018
    except Exception:
        return False
    return True


def own_dict(thing: Any) -> Any:
    """An object's ``__dict__``, None without one; its ``__getattr__`` is not asked."""
    read: Any = type(thing).__getattribute__
    try:
        return read(thing, "__dict__")
    except Exception:
        return None


def repr_of(thing: Any) -> str:
    """An object as it prints itself; its class where it raises instead."""
    try:
        return repr(thing)
    except Exception:
        return f"<{type(thing).__name__} that cannot be printed>"


def slot_values(thing: Any, names: Iterable[str]) -> dict[str, Any]:
    """What an object's slots hold, without those that nothing was assigned to."""
    read: Any = type(thing).__getattribute__
    found = {}
    for name in names:
        try:
            found[name] = read(thing, name)
        except Exception:  # nothing assigned
            continue
    return found


def contents_of(cell: types.CellType) -> Any:
    """What a closure's cell holds; ``EMPTY`` if nothing was assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


@functools.lru_cache(maxsize=16384)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """All global names and attributes that code mentions, in functions within it, too."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(names_in(constant)))
    return tuple(names)


_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


@functools.lru_cache(maxsize=16384)
def globals_set_by(code: types.CodeType) -> tuple[str, ...]:
    """The global names that code assigns, in functions within it, too."""
    names = set()
    if _STORE_GLOBAL in code.co_code[::2]:
        names = {i.argval for i in dis.get_instructions(code) if i.opcode == _STORE_GLOBAL}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(globals_set_by(constant))
    return tuple(sorted(names))


def function_behind(member: Any) -> Any:
    """The function of a class, static or property member; the member itself if it is neither."""
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
