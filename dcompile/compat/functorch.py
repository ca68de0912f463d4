"""Whether code runs under ``torch.func``'s transformations. Seen in torch 2.11 to 2.15."""

from torch._C._functorch import peek_interpreter_stack as innermost_transformation

# () -> Any: the innermost of ``vmap``, ``grad``, ``jvp`` and the like around this code, or None.
__all__ = ["innermost_transformation"]
