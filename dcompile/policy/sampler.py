"""The error gain of a sampler: how errors of the network at each step affect the result.

DDIM is an Euler step: with sigma_bar = sqrt((1 - alpha_bar) / alpha_bar), x / sqrt(alpha_bar) moves
by (change of sigma_bar) * epsilon. So an error in the noise predicted at step i reaches the result
multiplied by |change of sigma_bar at i|, and the same holds, to first order, for the other solvers
of that equation. Everything is read from the scheduler object: no list of classes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from dcompile.policy.forecast import Damped, Forecast, Lagrange, Reuse

# alpha_bar of a noise schedule that ends in pure noise is 0, where sigma_bar is infinite.
_LEAST_ALPHA_BAR = 1e-5


# Of a run, below which extrapolating features loses: with 10 refreshes in 20 steps a checked
# forecast was 2 dB worse than reuse on emoji-sd, with 17 in 50 steps 4 dB better
# (bench/results/fidelity.md).
LEAST_REFRESHES = 12
# Steps from a refresh to the next, on average, up to which features go straight enough: there a
# linear forecast was better than a checked one (by 3 dB on emoji-sd), beyond worse (by 1 dB).
LONGEST_STRAIGHT = 3.5


def error_gains(scheduler: Any) -> list[float] | None:
    """By how much an error of the network at each step is multiplied on its way into the result.

    Args:
        scheduler: a diffusers scheduler whose timesteps are set.

    Returns:
        One weight, at least 0, for each of ``scheduler.timesteps``; None if its noise levels cannot
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
    weights: list[float] = (moved * _per_unit_of_output(scheduler, levels[:-1])).tolist()
    for step in range(1, len(weights)):
        again = step + 1 < len(weights) and bool(timesteps[step] == timesteps[step + 1])
        if weights[step] == 0 and again:  # the second evaluation of one step (Heun, PNDM)
            weights[step - 1] = weights[step] = weights[step - 1] / 2
    return weights


def _noise_levels(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor | None:
    """sigma_bar (of flow matching: sigma) at each step, and at the end; float64, on the CPU."""
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

    A network that predicts noise errs about alike at all steps: 1/2 makes the sum of its errors
    least, if they grow linearly with a cache's age. For samplers that add noise 1 was better, in a
    prototype. One that predicts velocity errs most where its weights are least, and the two about
    make up for each other: 0, which is uniform (bench/results/fidelity.md); what predicts the
    sample itself is taken for the same, unmeasured.
    """
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if predicts != "epsilon":
        return 0.0
    return 1.0 if stochastic else 0.5


def default_forecast(
    *, stochastic: bool, steps: int | None = None, refreshes: int | None = None
) -> Forecast:
    """What ``forecast="auto"`` is for a sampler.

    Fresh noise at every step makes extrapolation worse than plain reuse, and so do few refreshes.
    Else linear, where they come often; where not, only as far as that was right so far: unchecked
    it can be far worse than reuse (bench/results/fidelity.md).

    Args:
        steps, refreshes: in the whole run, if that is known.
    """
    if stochastic or (refreshes is not None and refreshes < LEAST_REFRESHES):
        return Reuse()
    often = steps is not None and refreshes is not None and steps <= LONGEST_STRAIGHT * refreshes
    return Lagrange(1) if often else Damped()


def is_stochastic(scheduler: Any) -> bool:
    """Whether a step adds noise of its own, found out by taking one twice with other seeds.

    A scheduler that cannot be tried out counts as stochastic. What a pipeline asks for at each step
    (DDIM's ``eta``) is not seen.
    """
    try:
        return not torch.equal(_tried(scheduler, 0), _tried(scheduler, 1))
    except Exception:  # whatever a scheduler of the user's may raise
        return True


def _tried(scheduler: Any, seed: int) -> torch.Tensor:
    """One step from the middle of the timesteps, where noise is added if ever."""
    trial = copy.deepcopy(scheduler)
    for name, value in vars(trial).items():
        if isinstance(value, torch.Tensor):  # where earlier steps took it
            setattr(trial, name, value.cpu())
    trial.set_timesteps(6)
    arguments: dict[str, Any] = {}
    seeded: Any = contextlib.nullcontext()
    if "generator" in inspect.signature(trial.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    else:  # it can only draw from what all threads draw from
        seeded = _globally_seeded(seed)
    sample = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with seeded, torch.no_grad():
        for timestep in trial.timesteps[:3]:
            if hasattr(trial, "scale_model_input"):
                trial.scale_model_input(sample, timestep)
            output = trial.step(0.1 * sample, timestep, sample, return_dict=False, **arguments)
            sample = output[0]
    return sample


@contextlib.contextmanager
def _globally_seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of other devices
        yield
