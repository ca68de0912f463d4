"""Whether code runs under ``torch.func``'s transformations. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import torch

_peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


def is_transforming() -> bool:
    """Whether ``vmap``, ``grad``, ``jvp`` and the like are around this code."""
    return _peek() is not None
