"""Hooks and wrappers of accelerate, diffusers, torch.compile and the parallel libraries.

None of these attributes is documented. Seen in accelerate 1.2 to 1.12, diffusers 0.35 to 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

forward_slots = ("forward", "_old_forward")
"""Attributes in which a module's forward may be: accelerate's hooks move it to the second."""


root_attributes = ("_hf_hook", "_is_torch_compile")
"""Attributes that accelerate and torch.compile add to a network they wrap as a whole."""


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


def stateful_hooks(module: nn.Module) -> list[tuple[str, str]]:
    """Path and name of diffusers' hooks that keep something from one call to the next.

    Those are its caches: FirstBlockCache, TaylorSeer, PyramidAttentionBroadcast and the like.
    """
    found = []
    for path, submodule in module.named_modules():
        hooks = getattr(getattr(submodule, "_diffusers_hook", None), "hooks", {})
        found += [(path, name) for name, hook in hooks.items() if hook._is_stateful]
    return found


# Attributes that libraries leave on a network, or its class, while their cache is on it.
_OTHER_CACHES = (
    ("_is_cached", "cache-dit or ParaAttention", "cache_dit.disable_cache(pipe)"),
    ("enable_teacache", "TeaCache", "enable_teacache = False of its class, and its own forward"),
)


def other_cache(module: nn.Module) -> tuple[str, str] | None:
    """Which other library's cache is on a network, and what removes it."""
    for attribute, library, cure in _OTHER_CACHES:
        if getattr(module, attribute, False) is True:
            return library, cure
    return None


def take_compiled_call(module: nn.Module) -> Any:
    """Undo ``module.compile()``, which would bypass ``forward``. Returns what it had installed."""
    installed = module._compiled_call_impl
    if installed is not None:  # None is the class's own: an attribute would be a trace
        module._compiled_call_impl = None
    return installed


def give_compiled_call(module: nn.Module, installed: Any) -> None:
    """Put back what ``take_compiled_call`` returned."""
    module._compiled_call_impl = installed


def has_compiled_call(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, which bypasses ``forward``."""
    return module._compiled_call_impl is not None


def moves_parts(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers change weights inside of a module during its call.

    Those are sequential and group offloading, and layerwise casting. A hook on the whole module,
    such as model offloading's, does its work before.
    """
    return any(
        getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
        or (part is not module and hasattr(part, "_hf_hook"))
        for part in module.modules()
    )


@contextmanager
def casts_in_graph(module: nn.Module) -> Iterator[None]:
    """diffusers' layerwise casting, as casts that a capture can follow.

    Its hooks write other weights over a layer's own before and after each call. Meanwhile they put
    casts of them in their place.
    """
    replaced = []
    for submodule in module.modules():
        registry = getattr(submodule, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if hasattr(hook, "storage_dtype") and hasattr(hook, "compute_dtype"):
                where = hook.fn_ref
                replaced.append((where, where.pre_forward, where.post_forward))
                where.pre_forward, where.post_forward = _casting_to(hook.compute_dtype)
    try:
        yield
    finally:
        for where, before, after in replaced:
            where.pre_forward, where.post_forward = before, after


def _casting_to(dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What to do before and after a layer's forward."""
    own: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def before(layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for part in layer.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_floating_point():
                        own.append((table, name, tensor))
                        table[name] = tensor.to(dtype)
        return args, kwargs

    def after(layer: nn.Module, output: Any) -> Any:
        while own:
            table, name, tensor = own.pop()
            table[name] = tensor
        return output

    return before, after


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


def global_hooks() -> dict[str, dict[int, Any]]:
    """The forward hooks that torch calls for all modules, by kind."""
    names = ("_global_forward_pre_hooks", "_global_forward_hooks")
    return {name: vars(nn.modules.module)[name] for name in names}


def ways_of_hooks(module: nn.Module, table: str, hooks: Iterable[int]) -> tuple[Any, ...]:
    """For each hook whether it takes keyword arguments, and whether it is called in any case."""
    takes_keywords = getattr(module, f"{table}_with_kwargs", {})
    always = getattr(module, f"{table}_always_called", {})
    return tuple((number in takes_keywords, number in always) for number in hooks)
