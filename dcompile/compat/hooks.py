"""Hooks and wrappers of accelerate, diffusers, torch.compile and the parallel libraries.

None of these attributes is documented. Seen in accelerate 1.2 to 1.12, diffusers 0.35 to 0.42.
"""

from __future__ import annotations

from typing import Any

from torch import nn

forward_slots = ("forward", "_old_forward")
"""Attributes in which a module's forward may be: accelerate's hooks move it to the second."""


def forward_slot(module: nn.Module) -> str:
    """Where a forward is to be replaced: beneath accelerate's hooks, which move weights before."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's is on the whole network, such as CPU offload."""
    return hasattr(module, "_hf_hook")


def offload_hooks(module: nn.Module) -> list[tuple[str, str]]:
    """Path and name of diffusers' hooks that move the weights of one part after another."""
    found = []
    for path, submodule in module.named_modules():
        hooks = getattr(getattr(submodule, "_diffusers_hook", None), "hooks", {})
        found += [(path, name) for name in hooks if "offload" in name]
    return found


def without_torch_compile(module: Any) -> Any:
    """The module inside of ``torch.compile``'s wrapper, if there is one."""
    return getattr(module, "_orig_mod", module)


def spread_parameter(module: nn.Module) -> str | None:
    """The first parameter spread over processes by ZeRO-3, FSDP or tensor parallelism."""
    for name, parameter in module.named_parameters():
        spread = hasattr(parameter, "ds_id") or hasattr(parameter, "_local_tensor")
        if spread or "_flat_param" in name.rpartition(".")[2]:
            return name
    return None
