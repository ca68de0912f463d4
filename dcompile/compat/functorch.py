"""Whether code runs under transformations of ``torch.func``. Seen in torch 2.11 to 2.15."""

from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether ``vmap``, ``grad``, ``jvp`` or the like, or ``forward_ad``, are around this code."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


__all__ = ["is_transformed"]
