"""What replaces a module's ``forward``, and how it is installed and removed."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from dcompile.compat.hooks import forward_slots, give_compiled_call, take_compiled_call
from dcompile.notices import warn


class ForwardWrapper:
    """Replaces a module's ``forward``.

    Attributes:
        module: the module.
        original: its own forward, as its class has it now, unless the instance had one of its own.
        replaced: what the module had in the attribute that this is installed in.
        compiled_call: what ``nn.Module.compile()`` had left.
    """

    # Only what functools.update_wrapper writes is in __dict__: accelerate's hooks copy that into
    # their own wrapper, and with it would keep and deep-copy all state.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_given",
        "_is_of_class",
        "compiled_call",
        "module",
        "replaced",
    )

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__code__ = getattr(original, "__code__", None)  # torch.export looks at it
        self.module = module
        self._given = original
        function = getattr(original, "__func__", None)
        self._is_of_class = function is not None and function is getattr(
            type(module), "forward", None
        )
        self.replaced: dict[str, Any] = {}
        self.compiled_call: Any = None

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        if not self._is_of_class:
            return self._given
        method: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return method

    def copy_that_is_called(self) -> nn.Module | None:
        """The module whose call this is, if it is a shallow copy of this one's.

        A shallow copy has this object in its attributes, too. Only the caller's frame,
        ``nn.Module.__call__``, knows which of them is called.
        """
        caller = sys._getframe(2).f_locals.get("self")
        if caller is self.module or not isinstance(caller, nn.Module):
            return None
        return caller if caller.__dict__.get("forward") is self else None

    @property
    def enabled(self) -> bool:
        """Whether calls are served here; if not, they go to ``original``."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self, slot: str) -> None:
        """Replace the module's forward in this attribute, one of ``forward_slots``."""
        attributes = self.module.__dict__
        if slot in attributes:
            self.replaced[slot] = attributes[slot]
        self.compiled_call = take_compiled_call(self.module)
        attributes[slot] = self

    def uninstall(self) -> None:
        """Give the module its own forward back."""
        attributes = self.module.__dict__
        for slot in forward_slots:
            if attributes.get(slot) is self:
                if slot in self.replaced:
                    attributes[slot] = self.replaced[slot]
                elif slot == "forward":
                    del attributes[slot]
                else:
                    attributes[slot] = self.original
                if self.compiled_call is not None:
                    give_compiled_call(self.module, self.compiled_call)
                return
        warn(
            f"{type(self.module).__name__}.forward was replaced by something else since "
            "cache_compile; dcompile is switched off beneath it"
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


def wrapper_of(module: Any) -> ForwardWrapper | None:
    """What replaces the module's forward, if anything of dcompile's does."""
    for slot in forward_slots:
        found = getattr(module, "__dict__", {}).get(slot)
        if isinstance(found, ForwardWrapper) and found.module is module:
            return found
    return None


def own_forward_of_copy(module: nn.Module) -> None:
    """Give a shallow copy of a wrapped module its own forward back, in place."""
    found = module.__dict__.get("forward")
    if isinstance(found, ForwardWrapper) and found.module is not module:
        del module.__dict__["forward"]
