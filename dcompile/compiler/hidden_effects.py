"""What a call does where no snapshot sees it: tensors it keeps somewhere, files it opens.

``side_effects`` compares what can be reached from a network. Python has more places than that: a
context variable's list, the target of a weak reference, a global of a module that is imported
within a function, an attribute of a metaclass. But wherever features are collected, they are alive
after the call; and a file that is written to has been opened.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dcompile.compat.tensors import gradient_of
from dcompile.compiler.introspection import is_library
from dcompile.compiler.states import address_of


class KeptTensors(TorchFunctionMode):
    """The tensors that this thread's code got from torch within the context."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[weakref.ref[torch.Tensor], str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func != gradient_of:
            made = result if isinstance(result, (tuple, list)) else (result,)
            for each in made:
                if isinstance(each, torch.Tensor) and not any(each is arg for arg in args):
                    self._made.append((weakref.ref(each), place_of(sys._getframe(1))))
        return result

    def alive(self, known: Iterable[torch.Tensor]) -> str | None:
        """Where one was made that is alive, and shares no memory with those known; None for none.

        Args:
            known: such as the result, and what a snapshot has seen.
        """
        if all(reference() is None for reference, _ in self._made):
            return None
        known = [*known]
        identities, memory = {*map(id, known)}, {*map(address_of, known)} - {None, 0}
        is_collected = False
        for reference, place in self._made:
            tensor = reference()
            if tensor is None or id(tensor) in identities or address_of(tensor) in memory:
                continue
            if not is_collected:  # or does it only wait for that, in a cycle?
                del tensor
                gc.collect()
                is_collected = True
                tensor = reference()
            if tensor is not None and _is_held(tensor):
                return place
        return None


def _is_held(tensor: torch.Tensor) -> bool:
    """Whether any Python object refers to a tensor, not only another tensor's history."""
    return any(type(each) is not FrameType for each in gc.get_referrers(tensor))


def place_of(frame: FrameType | None) -> str:
    """The innermost line of code that is no library's: ``net.py:12``."""
    while frame is not None and is_library(frame.f_globals.get("__name__")):
        frame = frame.f_back
    if frame is None:
        return "somewhere"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def place_of_error(error: BaseException) -> str:
    """The innermost line of code that is no library's, of those that an error came through."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return place_of(frames[-1]) if frames else "somewhere"


__all__ = ["KeptTensors", "place_of", "place_of_error"]
