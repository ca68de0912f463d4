"""The error gain of a sampler: how errors of the network at each step affect the result.

DDIM is an Euler step: with sigma_bar = sqrt((1 - alpha_bar) / alpha_bar), x / sqrt(alpha_bar) moves
by (change of sigma_bar) * epsilon. So an error in the noise predicted at step i reaches the result
multiplied by |change of sigma_bar at i|, and the same holds, to first order, for the other solvers
of that equation. Everything is read from the scheduler object: no list of classes.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from dcompile.policy.forecast import Damped, Forecast, Lagrange, Reuse

# alpha_bar of a noise schedule that ends in pure noise is 0, where sigma_bar is infinite.
_LEAST_ALPHA_BAR = 1e-5

# Refreshes of a run below which reuse is better than extrapolation: with 10 refreshes in 20 steps a
# damped forecast was 2 dB worse than reuse on emoji-sd, with 17 in 50 steps 4 dB better
# (bench/results/fidelity.md).
LEAST_REFRESHES = 12
# Mean interval up to which features change linearly enough: up to it a linear forecast was better
# than a damped one (by 3 dB on emoji-sd), beyond it worse (by 1 dB).
LONGEST_LINEAR = 3.5


def error_gains(scheduler: Any) -> list[float] | None:
    """The factor by which an error of the network at each step enters the result.

    Args:
        scheduler: a diffusers scheduler whose timesteps are set.

    Returns:
        One gain, at least 0, for each of ``scheduler.timesteps``; None if its noise levels cannot
        be read.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1 or not len(timesteps):
        return None
    timesteps = timesteps.detach().cpu()
    levels = _noise_levels(scheduler, timesteps)
    if levels is None or not torch.isfinite(levels).all():
        return None
    moved = (levels[1:] - levels[:-1]).abs()
    gains: list[float] = (moved * _per_unit_of_output(scheduler, levels[:-1])).tolist()
    for step in range(1, len(gains)):
        again = step + 1 < len(gains) and bool(timesteps[step] == timesteps[step + 1])
        if gains[step] == 0 and again:  # the second evaluation of one step (Heun, PNDM)
            gains[step - 1] = gains[step] = gains[step - 1] / 2
    return gains


def over_timesteps(scheduler: Any, timesteps: torch.Tensor) -> Any:
    """A copy of a scheduler that goes over other timesteps of the same noise schedule."""
    other = copy.copy(scheduler)
    other.timesteps = timesteps
    other.sigmas = None  # those of its own timesteps; alphas_cumprod knows all
    return other


def _noise_levels(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor | None:
    """sigma_bar (for flow matching: sigma) at each step and at the end, float64 on the CPU."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.dim() == 1:
        levels = sigmas.detach().cpu().double()
        if len(levels) == len(timesteps):
            levels = torch.cat([levels, levels.new_zeros(1)])
        if len(levels) == len(timesteps) + 1:
            return levels
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, torch.Tensor) or alphas.dim() != 1:
        return None
    alphas = alphas.detach().cpu().double()
    at = timesteps.double().clamp(0, len(alphas) - 1)
    below = at.floor().long()
    above = at.ceil().long()
    alpha_bar = torch.lerp(alphas[below], alphas[above], at - below)
    final = (
        torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).cpu().double().reshape(1)
    )
    alpha_bar = torch.cat([alpha_bar, final]).clamp(min=_LEAST_ALPHA_BAR)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _per_unit_of_output(scheduler: Any, levels: torch.Tensor) -> torch.Tensor:
    """Error of the predicted noise for one unit of error in what the network returns."""
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
    if predicts == "v_prediction":  # epsilon = sqrt(alpha_bar) v + ...
        return (1 + levels**2).rsqrt()
    if predicts == "sample":  # epsilon = (x - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
        return 1 / levels.clamp(min=1e-3)
    return torch.ones_like(levels)


def default_power(scheduler: Any, *, stochastic: bool) -> float:
    """The default exponent of ``error_gains``, for schedules that measure nothing.

    The errors of a network that predicts noise are about equal at all steps: 1/2 minimizes the sum
    of their effects if errors grow linearly with the age of the cache. For samplers that add noise
    1 was better in a prototype. The errors of a network that predicts velocity are largest where
    the gains are least, and the two about cancel: 0, which is uniform (bench/results/fidelity.md).
    Networks that predict the sample get 0 as well, which was not measured.
    """
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if predicts != "epsilon":
        return 0.0
    return 1.0 if stochastic else 0.5


def default_forecast(
    *, stochastic: bool, steps: int | None = None, refreshes: int | None = None
) -> Forecast:
    """The forecast that ``forecast="auto"`` chooses.

    With fresh noise at every step, or few refreshes, extrapolation is worse than plain reuse.
    Otherwise a linear forecast if refreshes are frequent, and a damped one if not: without damping
    it can be far worse than reuse (bench/results/fidelity.md).

    Args:
        stochastic: whether the sampler adds noise at each step.
        steps, refreshes: numbers of steps and refreshes of the whole run, if known.
    """
    if stochastic or (refreshes is not None and refreshes < LEAST_REFRESHES):
        return Reuse()
    frequent = steps is not None and refreshes is not None and steps <= LONGEST_LINEAR * refreshes
    return Lagrange(1) if frequent else Damped()


def describe_sampler(scheduler: Any) -> str:
    """Its class and a digest of its settings, the same in every process."""
    config = {
        str(name): value
        for name, value in dict(getattr(scheduler, "config", None) or {}).items()
        if not str(name).startswith("_")
    }
    settings = json.dumps(config, sort_keys=True, default=repr)
    return f"{type(scheduler).__name__} {hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def is_stochastic(scheduler: Any) -> bool:
    """Whether the sampler adds noise at each step: tries steps with two seeds, on a copy.

    A scheduler that cannot be tried counts as stochastic. Arguments that a pipeline passes at each
    step (DDIM's ``eta``) are not seen.
    """
    try:
        return not torch.equal(_tried(scheduler, 0), _tried(scheduler, 1))
    except Exception:  # a user's scheduler may raise anything
        return True


def _tried(scheduler: Any, seed: int) -> torch.Tensor:
    """The sample after three steps of six: no noise is added at the last one."""
    trial = copy.deepcopy(scheduler)
    for name, value in vars(trial).items():
        if isinstance(value, torch.Tensor):  # earlier steps may have moved it to a device
            setattr(trial, name, value.cpu())
    trial.set_timesteps(6)
    arguments: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    if "generator" in inspect.signature(trial.step).parameters:
        arguments["generator"] = generator
    sample = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with _DrawsFrom(generator), torch.no_grad():
        for timestep in trial.timesteps[:3]:
            if hasattr(trial, "scale_model_input"):
                trial.scale_model_input(sample, timestep)
            output = trial.step(0.1 * sample, timestep, sample, return_dict=False, **arguments)
            sample = output[0]
    return sample


class _DrawsFrom(TorchFunctionMode):
    """Random numbers of this thread come from a generator, and the global one is left alone."""

    _DRAWS = frozenset({"rand", "randn", "randint", "normal", "bernoulli", "multinomial"})
    _DRAWS_LIKE: ClassVar[Mapping[str, Any]] = {"rand_like": torch.rand, "randn_like": torch.randn}

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in self._DRAWS_LIKE:
            like = args[0] if args else kwargs["input"]
            func, args = self._DRAWS_LIKE[name], (like.shape,)
            kwargs = {"dtype": kwargs.get("dtype") or like.dtype}
        elif name.rstrip("_") not in self._DRAWS:
            return func(*args, **kwargs)
        if kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)
