"""What changes the meaning of the operators around some code. Seen in torch 2.11 to 2.15."""

import torch
from torch._C import _len_torch_function_stack as count_function_modes
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

UNDER_TORCH_FUNC = (
    "it is called under torch.func (vmap, grad, jvp or the like) or torch.autograd.forward_ad"
)


def what_transforms() -> str | None:
    """What is around this code that a graph would bypass, as a sentence; None for nothing."""
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return UNDER_TORCH_FUNC
    for number in range(count_function_modes()):
        mode = torch._C._get_function_stack_at(number)
        if not isinstance(mode, DeviceContext):  # of ``with torch.device``
            return f"{type(mode).__name__} intercepts torch's functions, and graphs have none"
    return None


__all__ = ["UNDER_TORCH_FUNC", "what_transforms"]
