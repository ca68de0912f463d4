"""Whether code runs under ``torch.func``'s transformations. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from torch._C._functorch import peek_interpreter_stack


def is_transforming() -> bool:
    """Whether ``vmap``, ``grad``, ``jvp`` and the like are around this code."""
    return peek_interpreter_stack() is not None
