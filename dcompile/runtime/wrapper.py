"""What takes the place of a module's ``forward``, and how it gets there and away again."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

_SLOTS = ("forward", "_old_forward")  # where a module's forward may be: accelerate moves it


class ForwardWrapper:
    """Stands in for a module's ``forward``.

    Attributes:
        module: the module.
        original: its own forward.
        enabled: whether calls are served here; else they go to ``original``.
        replaced: what the module had in the slot this now sits in.
        compiled_call: what ``nn.Module.compile()`` had left.
    """

    # Only what functools.update_wrapper writes is in __dict__: accelerate's hooks copy that into
    # their own wrapper, and with it would keep and deep-copy all state.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "compiled_call",
        "enabled",
        "module",
        "original",
        "replaced",
    )

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__code__ = getattr(original, "__code__", None)  # torch.export looks at it
        self.module = module
        self.original = original
        self.enabled = True
        self.replaced: dict[str, Any] = {}
        self.compiled_call: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self, slot: str) -> None:
        """Take the place of the module's forward in this attribute."""
        attributes = self.module.__dict__
        if slot in attributes:
            self.replaced[slot] = attributes[slot]
        if self.module._compiled_call_impl is not None:  # nn.Module.compile() calls around ours
            self.compiled_call = self.module._compiled_call_impl
            self.module._compiled_call_impl = None
        attributes[slot] = self

    def uninstall(self) -> None:
        """Give the module its own forward back."""
        attributes = self.module.__dict__
        for slot in _SLOTS:
            if attributes.get(slot) is self:
                if slot in self.replaced:
                    attributes[slot] = self.replaced[slot]
                elif slot == "forward":
                    del attributes[slot]
                else:
                    attributes[slot] = self.original
                if self.compiled_call is not None:
                    self.module._compiled_call_impl = self.compiled_call
                return
        warnings.warn(
            f"{type(self.module).__name__}.forward was replaced by something else since "
            "cache_compile; dcompile is switched off beneath it",
            stacklevel=3,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copied module is uncached: its forward is its own class's."""
        module = memo.get(id(self.module))
        if module is None:
            raise TypeError("a dcompile dispatcher is copied only along with its module")
        if getattr(self.original, "__func__", None) is None:
            raise TypeError(
                "this module's forward was replaced before cache_compile, so a copy cannot be "
                "restored: call handle(module).remove() first"
            )
        return types.MethodType(self.original.__func__, module)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a cache_compiled {type(self.module).__name__} cannot be pickled: its compiled code "
            "belongs to this process. Call handle(module).remove() first, or save its state_dict"
        )


def wrapper_slot(module: nn.Module) -> str:
    """Where to install: beneath accelerate's hooks, which move weights before they call it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def wrapper_of(module: Any) -> ForwardWrapper | None:
    """What stands in for the module's forward, if anything does."""
    for slot in _SLOTS:
        found = getattr(module, "__dict__", {}).get(slot)
        if isinstance(found, ForwardWrapper):
            return found
    return None
