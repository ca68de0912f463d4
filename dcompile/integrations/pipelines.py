"""What diffusers' pipelines are made of: the denoiser, its companions, the sampler."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from dcompile.errors import DcompileError, ScheduleError


def is_pipeline(module: Any) -> bool:
    """Whether this is a pipeline: no module itself, and has named ``components``."""
    return not isinstance(module, nn.Module) and isinstance(
        getattr(module, "components", None), dict
    )


def denoiser_of(module: Any) -> Any:
    """A pipeline's denoiser, as it stands there; anything else itself."""
    return getattr(module, denoiser_name(module)) if is_pipeline(module) else module


def denoiser_name(pipeline: Any) -> str:
    """The component that is called with a timestep. Usual names settle it if there are several."""
    timed = timed_components(pipeline)
    preferred: tuple[str, ...] = ("unet", "transformer", *(timed if len(timed) == 1 else ()))
    for name in preferred:
        if name in timed:
            return name
    raise DcompileError(
        f"{type(pipeline).__name__} has no single denoiser: components called with a timestep are "
        f"{', '.join(timed) or 'none'}. Pass the network itself: cache_compile(pipe.<name>)"
    )


def timed_components(pipeline: Any) -> list[str]:
    """Names of the components that are called with a timestep."""
    return [
        name
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and _takes_timestep(without_torch_compile(component))
    ]


def _takes_timestep(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return any("time" in name.lower() for name in names[1:])


def network_of(module: Any) -> nn.Module:
    """The network itself: a pipeline's denoiser, and without ``torch.compile`` around it."""
    if is_pipeline(module):
        name = denoiser_name(module)
        network: nn.Module = without_torch_compile(getattr(module, name))
        _unwrapped(network)
        if network is not getattr(module, name):
            setattr(module, name, network)
        return network
    if not isinstance(module, nn.Module):
        raise DcompileError(
            f"expected a torch.nn.Module or a diffusers pipeline, got {type(module).__name__}"
        )
    return _unwrapped(cast(nn.Module, without_torch_compile(module)))


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network, if it is one process's own.

    Raises:
        DcompileError: a parallel wrapper is around it, or its weights are spread over processes.
    """
    name = type(network).__name__
    parameters = inspect.signature(network.forward).parameters.values()
    inner = getattr(network, "module", None)
    if isinstance(inner, nn.Module) and all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        raise DcompileError(
            f"{name} is a parallel wrapper around {type(inner).__name__}: a captured graph would "
            "go past what it does with the weights. Compile the network inside, which runs in "
            "each process by itself: cache_compile(wrapper.module, ...)"
        )
    for key, parameter in network.named_parameters():
        spread = hasattr(parameter, "ds_id") or hasattr(parameter, "_local_tensor")
        if spread or "_flat_param" in key.rpartition(".")[2]:
            raise DcompileError(
                f"{name}.{key} is spread over several processes (FSDP, DeepSpeed ZeRO-3 or tensor "
                "parallel), and a captured graph reads whole weights. Load the network unsharded "
                "for inference"
            )
    return network


def without_torch_compile(module: Any) -> Any:
    """The module inside of ``torch.compile``'s wrapper, if there is one."""
    return getattr(module, "_orig_mod", module)


def sampler_of(module: Any, given: Any) -> Callable[[], Any] | None:
    """Where to find the sampler when a generation starts; a pipeline's may be replaced."""
    if given is not None:
        if not callable(getattr(given, "set_timesteps", None)):
            raise ScheduleError(
                f"sampler: expected a diffusers scheduler, got {type(given).__name__}"
            )
        return lambda: given
    if not is_pipeline(module) or not hasattr(module, "scheduler"):
        return None
    pipeline, latest = weakref.ref(module), module.scheduler

    def sampler() -> Any:
        # The network may outlive its pipeline, in another one made of the same parts.
        nonlocal latest
        latest = getattr(pipeline(), "scheduler", latest)
        return latest

    return sampler
