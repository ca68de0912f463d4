"""What a scheduler says of its noise levels, whichever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)

from dcompile.policy.forecast import Damped, Lagrange, Reuse
from dcompile.policy.sampler import default_forecast, default_power, error_gains, is_stochastic


def at(scheduler: Any, steps: int = 20) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def test_ddim_s_are_changes_of_sigma_bar() -> None:
    scheduler = at(DDIMScheduler(set_alpha_to_one=False))
    weights = error_gains(scheduler)
    assert weights is not None
    alphas = scheduler.alphas_cumprod[[*scheduler.timesteps.tolist(), 0]].double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(torch.tensor(weights).double(), (sigmas[:-1] - sigmas[1:]))


def test_one_unit_of_error_does_as_it_is_told() -> None:
    """An error added at one step moves DDIM's result by its weight, in x / sqrt(alpha_bar)."""
    scheduler = at(DDIMScheduler(clip_sample=False), 12)
    weights = error_gains(scheduler)
    assert weights is not None

    def result(wrong: int) -> torch.Tensor:
        x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
        for step, t in enumerate(scheduler.timesteps):
            # A network that errs at one step and does not see the sample.
            x = scheduler.step(torch.full_like(x, float(step == wrong)), t, x).prev_sample
        return x

    for step in (0, 4, 11):
        moved = (result(step) - result(-1)).abs().max()
        assert float(moved) == pytest.approx(weights[step], rel=1e-3)


def test_ways_to_write_the_same_steps_agree() -> None:
    ddim = error_gains(at(DDIMScheduler(timestep_spacing="trailing", clip_sample=False)))
    euler = error_gains(
        at(EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="linear"))
    )
    assert ddim is not None
    assert euler is not None
    torch.testing.assert_close(
        torch.tensor(ddim[:-1]), torch.tensor(euler[:-1]), rtol=1e-2, atol=1e-2
    )


def test_what_the_network_predicts_counts() -> None:
    noise = error_gains(at(DDIMScheduler()))
    velocity = error_gains(at(DDIMScheduler(prediction_type="v_prediction")))
    assert noise is not None
    assert velocity is not None
    assert velocity[0] < 0.1 * noise[0]  # sqrt(alpha_bar) is small where there is nothing but noise
    assert velocity[-1] == pytest.approx(noise[-1], rel=0.02)


DETERMINISTIC = [
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
]
STOCHASTIC = [
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    ScoreSdeVeScheduler,
]


@pytest.mark.parametrize("kind", [*DETERMINISTIC, *STOCHASTIC[:4]])
def test_every_family_has_a_weight_for_every_step(kind: Any) -> None:
    scheduler = at(kind())
    weights = error_gains(scheduler)
    assert weights is not None
    assert len(weights) == len(scheduler.timesteps)
    assert all(w >= 0 for w in weights)
    assert sum(weights) > 0


def test_variance_exploding() -> None:
    scheduler = ScoreSdeVeScheduler()
    scheduler.set_timesteps(20)
    scheduler.set_sigmas(20)
    weights = error_gains(scheduler)
    assert weights is not None
    assert len(weights) == 20
    assert weights[0] > weights[-1]


def test_pure_noise_has_a_finite_weight() -> None:
    weights = error_gains(
        at(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    )
    assert weights is not None
    assert max(weights) < 1e4


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_deterministic(kind: Any) -> None:
    assert not is_stochastic(at(kind()))


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_stochastic(kind: Any) -> None:
    scheduler = at(kind())
    state = torch.get_rng_state()
    assert is_stochastic(scheduler)
    assert torch.equal(torch.get_rng_state(), state)


def test_options_tell_too() -> None:
    assert is_stochastic(at(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")))


def test_trying_leaves_the_scheduler_alone() -> None:
    scheduler = at(UniPCMultistepScheduler(), 9)
    before = scheduler.timesteps
    is_stochastic(scheduler)
    assert scheduler.timesteps is before
    assert scheduler.step_index is None


@pytest.mark.parametrize("thing", [None, object(), DDIMScheduler, "scheduler"])
def test_what_is_no_scheduler(thing: Any) -> None:
    assert error_gains(thing) is None
    assert is_stochastic(thing)


def test_both_evaluations_of_a_step_count() -> None:
    weights = error_gains(at(HeunDiscreteScheduler(), 8))
    assert weights is not None
    assert all(w > 0 for w in weights[:-1])


def test_what_the_network_predicts_sets_the_power() -> None:
    noise, velocity = DDIMScheduler(), DDIMScheduler(prediction_type="v_prediction")
    assert default_power(noise, stochastic=False) == 0.5
    assert default_power(noise, stochastic=True) == 1.0
    assert default_power(velocity, stochastic=False) == 0.0


def test_noise_sets_the_forecast() -> None:
    assert default_forecast(stochastic=False) == Damped()
    assert default_forecast(stochastic=True) == Reuse()
    assert default_forecast(stochastic=False, steps=50, refreshes=17) == Lagrange(1)
    assert default_forecast(stochastic=False, steps=100, refreshes=17) == Damped()
    assert default_forecast(stochastic=True, steps=50, refreshes=17) == Reuse()
    assert default_forecast(stochastic=False, steps=20, refreshes=10) == Reuse()
    assert default_forecast(stochastic=False, refreshes=10) == Reuse()
