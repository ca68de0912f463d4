"""Which arguments of a call are the noisy sample and the timestep.

Decided by what they look like: the timestep is a number, or a tensor with one element or one for
each batch element; the sample is a floating-point tensor with at least two dimensions, and shaped
like what the network returns, or the first argument and a list of such tensors, one for each batch
element. Names only break ties, and may make a timestep of a tensor that does not look like one.
Where that leaves more than one, nothing is guessed.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dcompile.errors import TimestepError

# What papers and libraries call a timestep or noise level, apart from names with one of the words.
_TIME_WORDS = ("time", "sigma", "noise", "step")
_TIME_NAMES = ("t", "r", "tau", "s", "logsnr", "log_snr", "lam")
_CERTAIN_NAMES = ("timestep", "timesteps", "time", "t", "sigma", "sigmas", "noise_level")
_SAMPLE_NAMES = ("sample", "x", "hidden_states", "latents", "latent", "x_t", "xt", "z", "z_t")


class Roles(NamedTuple):
    """Names of the two arguments; None where nothing fits."""

    sample: str | None
    timestep: str | None


UNKNOWN = Roles(None, None)


def roles_of(arguments: Mapping[str, Any], asked: Roles, output_of: Callable[[], Any]) -> Roles:
    """The roles in a call.

    Args:
        arguments: those that are tensors, numbers, or lists that ``is_list_of_fields``, by name, in
            the order of the parameters.
        asked: names the user gave; None where none was given.
        output_of: calls the network, once, if what it returns has to decide.

    Raises:
        TimestepError: several arguments fit equally well.
    """
    sample = asked.sample or _sample_of(arguments, asked.timestep, output_of)
    timestep = asked.timestep or _timestep_of(arguments, sample)
    return Roles(
        sample if sample in arguments else None, timestep if timestep in arguments else None
    )


def is_called_time(name: str) -> bool:
    """Whether a parameter's name alone says that it is a timestep."""
    return "time" in name.lower()


def may_be_called_time(name: str) -> bool:
    """Whether a timestep may have this name."""
    lowered = name.lower()
    return lowered in _TIME_NAMES or any(word in lowered for word in _TIME_WORDS)


def _sample_of(
    arguments: Mapping[str, Any], timestep: str | None, output_of: Callable[[], Any]
) -> str | None:
    first = next(iter(arguments), "")
    if first.lower() in _SAMPLE_NAMES and (
        isinstance(arguments[first], torch.Tensor) or is_list_of_fields(arguments[first])
    ):
        return first
    tensors = [
        name
        for name, value in arguments.items()
        if name != timestep and not is_called_time(name) and isinstance(value, torch.Tensor)
    ]
    fitting = [name for name in tensors if _is_field(arguments[name])]
    if len(fitting) < 2:
        return next(iter(fitting or tensors), None)
    shape = _shape_of(output_of())
    alike = [name for name in fitting if arguments[name].shape == shape] or [
        name for name in fitting if _differ_in_channels_only(arguments[name].shape, shape)
    ]
    if len(alike) == 1:
        return alike[0]
    candidates = alike or fitting
    named = [name for name in candidates if name.lower() in _SAMPLE_NAMES]
    if len(named) == 1:
        return named[0]
    if not named and candidates[0] == first:
        return candidates[0]  # the first parameter, as everywhere
    raise _ambiguous("noisy sample", "sample", named or candidates)


def _timestep_of(arguments: Mapping[str, Any], sample: str | None) -> str | None:
    others = {name: value for name, value in arguments.items() if name != sample}
    batch = _batch_of(arguments.get(sample)) if sample is not None else None
    fitting = [name for name, value in others.items() if _is_time(value, batch)]
    certain = [name for name in _CERTAIN_NAMES if name in others]
    for name in (*(name for name in certain if name in fitting), *certain[:1]):
        return name  # one value for each token or pixel, where only the name fits
    timed = [name for name in fitting if is_called_time(name)]
    if timed or len(fitting) == 1:
        return (timed or fitting)[0]
    if not fitting:
        return next(filter(is_called_time, others), None)
    named = [name for name in fitting if may_be_called_time(name)]
    exact = [name for name in _TIME_NAMES if name in named]
    if len(named) == 1:
        return named[0]
    if exact:
        return exact[0]
    raise _ambiguous("timestep", "timestep", named or fitting)


def _ambiguous(what: str, parameter: str, names: Sequence[str]) -> TimestepError:
    return TimestepError(
        f"cannot tell which argument is the {what}: {', '.join(names)} look alike. Say it: "
        f'cache_compile(network, {parameter}="{names[0]}")'
    )


def _is_field(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _batch_of(sample: Any) -> int | None:
    if isinstance(sample, torch.Tensor):
        return sample.shape[0] if sample.dim() else None
    return len(sample) if is_list_of_fields(sample) else None


def is_list_of_fields(value: Any) -> bool:
    """Whether a value is a list of tensors such as a sample may be, one for each batch element."""
    return type(value) in (list, tuple) and len(value) > 0 and all(map(_is_field, value))


def _is_time(value: Any, batch: int | None) -> bool:
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.bool:
            return False
        return value.numel() == 1 or (value.numel() == batch and value.shape[0] == batch)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shape_of(output: Any) -> torch.Size | None:
    """Of the first tensor in what a network returned."""
    if isinstance(output, torch.Tensor):
        return output.shape
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (list, tuple)):
        return next((shape for item in output if (shape := _shape_of(item)) is not None), None)
    return None


def _differ_in_channels_only(one: torch.Size, other: torch.Size | None) -> bool:
    if other is None or len(one) != len(other) or one[0] != other[0]:
        return False
    return one[2:] == other[2:] or one[1:-1] == other[1:-1]
