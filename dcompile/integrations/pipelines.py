"""What diffusers' pipelines consist of: the denoiser, its companions, the sampler."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from dcompile.compat.hooks import spread_parameter, without_torch_compile
from dcompile.compiler.roles import is_called_time, may_be_called_time
from dcompile.errors import DcompileError, ScheduleError


def is_pipeline(module: Any) -> bool:
    """Whether this is a pipeline: no module itself, with named ``components``."""
    return not isinstance(module, nn.Module) and isinstance(
        getattr(module, "components", None), dict
    )


def denoiser_of(module: Any) -> Any:
    """A pipeline's denoiser, with any wrapper around it; anything else itself.

    Raises:
        DcompileError: a pipeline without a recognisable denoiser.
    """
    return getattr(module, denoiser_name(module)) if is_pipeline(module) else module


def denoiser_name(pipeline: Any) -> str:
    """The component that is called with a timestep; the first of several of one class.

    Usual names settle it if there are several of different classes.

    Raises:
        DcompileError: there is none, or it cannot be decided.
    """
    timed = timed_components(pipeline)
    if len({type(without_torch_compile(getattr(pipeline, name))) for name in timed}) == 1:
        return timed[0]
    for name in ("unet", "transformer"):
        if name in timed:
            return name
    raise DcompileError(
        f"{type(pipeline).__name__} has no single denoiser: components called with a timestep are "
        f"{', '.join(timed) or 'none'}. Pass the network itself: cache_compile(pipe.<name>)"
    )


def denoisers_of(module: Any) -> dict[str, nn.Module]:
    """A pipeline's denoisers by name: nearly always one.

    Some pipelines have two of the same class, one for much noise and one for little, each called
    at some of the steps. Of anything that is no pipeline: that itself, under no name. In neither
    case with ``torch.compile``'s wrapper.

    Raises:
        DcompileError: a pipeline without a recognisable denoiser.
    """
    if not is_pipeline(module):
        return {"": without_torch_compile(module)}
    first = denoiser_name(module)
    timed = timed_components(module)
    networks = {name: without_torch_compile(getattr(module, name)) for name in [first, *timed]}
    one = networks[first]
    return {
        name: network
        for name, network in networks.items()
        if name == first or (type(network) is type(one) and network is not one)
    }


def timed_components(pipeline: Any) -> list[str]:
    """Names of the components that are called with a timestep.

    Those that say so in a parameter's name; else those whose second parameter is called what a
    timestep may be called, such as ``r``.
    """
    parameters = {
        name: _parameters(without_torch_compile(component))[1:]
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }
    return [name for name, names in parameters.items() if any(map(is_called_time, names))] or [
        name for name, names in parameters.items() if names and may_be_called_time(names[0])
    ]


def _parameters(component: nn.Module) -> list[str]:
    """Names of its forward's parameters; of its class's if another library has put one in its place
    that takes anything."""
    parameters = inspect.signature(component.forward).parameters
    if "forward" in vars(component) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return list(inspect.signature(type(component).forward).parameters)[1:]
    return list(parameters)


def companions_of(pipeline: Any) -> list[nn.Module]:
    """The other networks that are called with a timestep, such as ControlNets."""
    denoisers = denoisers_of(pipeline)
    return [getattr(pipeline, name) for name in timed_components(pipeline) if name not in denoisers]


def auxiliary_components(pipeline: Any) -> list[nn.Module]:
    """What runs once for a picture, beside the denoiser: text encoders, and the VAE's decoder.

    Pipelines call ``vae.decode``, which calls the module ``vae.decoder``. Decoders of videos that
    keep features from one call to the next are left out.
    """
    timed = set(timed_components(pipeline))
    found: list[nn.Module] = []
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module) or name in timed:
            continue
        decoder = getattr(component, "decoder", None)
        if name.startswith("text_encoder"):
            found.append(component)
        elif (
            isinstance(decoder, nn.Module)
            and hasattr(component, "decode")
            and "feat_cache" not in _parameters(decoder)
        ):
            found.append(decoder)
    return list(dict.fromkeys(found))


def network_of(module: Any) -> nn.Module:
    """The network itself: a pipeline's denoiser, and without ``torch.compile`` around it.

    Raises:
        DcompileError: neither a module nor a pipeline; a parallel wrapper is around the network, or
            its weights are spread over several processes.
    """
    if not isinstance(module, nn.Module) and not is_pipeline(module):
        raise DcompileError(
            f"expected a torch.nn.Module or a diffusers pipeline, got {type(module).__name__}"
        )
    network = cast(nn.Module, without_torch_compile(denoiser_of(module)))
    _require_one_process(network)
    return network


def take_denoisers(module: Any) -> list[nn.Module]:
    """``denoisers_of``; a pipeline is made to hold them instead of ``torch.compile``'s wrappers.

    Raises:
        DcompileError: see ``network_of``.
    """
    denoisers = denoisers_of(module)
    for network in denoisers.values():
        network_of(network)
    for name, network in denoisers.items():
        if name and getattr(module, name) is not network:
            setattr(module, name, network)
    return list(denoisers.values())


def _require_one_process(network: nn.Module) -> None:
    name = type(network).__name__
    parameters = inspect.signature(network.forward).parameters.values()
    inner = getattr(network, "module", None)
    if isinstance(inner, nn.Module) and all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        raise DcompileError(
            f"{name} is a parallel wrapper around {type(inner).__name__}: a captured graph would "
            "bypass what it does with the weights. Compile the network inside, which runs in "
            "each process by itself: cache_compile(wrapper.module, ...)"
        )
    spread = spread_parameter(network)
    if spread is not None:
        raise DcompileError(
            f"{name}.{spread} is spread over several processes (FSDP, DeepSpeed ZeRO-3 or tensor "
            "parallel), and a captured graph reads whole weights. Load the network unsharded "
            "for inference"
        )


def sampler_of(module: Any, given: Any) -> Callable[[], Any] | None:
    """Where to find the sampler when a run starts; a pipeline's may be replaced meanwhile.

    Args:
        module: a network or pipeline.
        given: a diffusers scheduler, or None for the pipeline's.

    Raises:
        ScheduleError: ``given`` is no scheduler.
    """
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
        # The network may outlive its pipeline, in another one built of the same parts.
        nonlocal latest
        latest = getattr(pipeline(), "scheduler", latest)
        return latest

    return sampler
