"""Every sampler of diffusers: steps are counted as it takes them, whatever its timesteps are."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDPMWuerstchenScheduler,
    KarrasVePipeline,
    RePaintPipeline,
    SCMScheduler,
    ScoreSdeVePipeline,
    schedulers,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from every_pipeline import every_third, stale_features
from heard import heard
from small_pipelines import DDIM, image, run, stable_diffusion, unconditional, unet
from torch import Tensor

import dcompile
from dcompile import GainWeighted

STEPS = 8

LEFT_OUT = {
    "AmusedScheduler": "unmasks tokens; its networks are transformers without skips",
    "BlockRefinementScheduler": "writes blocks of text",
    "ConsistencyDecoderScheduler": "takes two steps at most",
    "DiscreteDDIMScheduler": "samples tokens from logits",
    "EntropyBoundScheduler": "samples tokens from logits",
    "HeliosDMDScheduler": "needs the noise of its own video pipeline at each step",
    "PiflowScheduler": "takes a policy of ten predictions from its own transformer",
    "RFD4ProteinaScheduler": "moves atoms of proteins",
    "ScoreSdeVpScheduler": "no pipeline uses it, and it hands out a score, not a step",
    "VQDiffusionScheduler": "samples tokens from logits",
}
# Whose noise levels are in no attribute that others have, too: their steps count alike.
UNTOLD = {"DDPMWuerstchenScheduler", "IPNDMScheduler", "SCMScheduler"}
NEEDS = {"LMSDiscreteScheduler": "scipy"}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
    "DPMSolverMultistepScheduler": [
        {"use_karras_sigmas": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"euler_at_final": True, "final_sigmas_type": "zero"},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ],
    "DPMSolverSinglestepScheduler": [{"solver_order": 3}],
    "EDMDPMSolverMultistepScheduler": [{"algorithm_type": "sde-dpmsolver++"}],
    "EulerDiscreteScheduler": [
        {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, {"stochastic_sampling": True}],
    "PNDMScheduler": [{"skip_prk_steps": True}],
    "UniPCMultistepScheduler": [{"solver_order": 3}],
}


def every_scheduler() -> Iterator[str]:
    for found in pkgutil.walk_packages(schedulers.__path__, schedulers.__name__ + "."):
        try:
            module: ModuleType = importlib.import_module(found.name)
        except ImportError:  # of a package that this sampler needs
            continue
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == found.name
            if own and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin:
                yield name


def every_case() -> list[Any]:
    """Each scheduler as it is by default, and with settings that change its steps."""
    return [
        pytest.param(name, settings, id="-".join([name, *map(str, settings.values())]))
        for name in every_scheduler()
        if name not in {*LEFT_OUT, *IN_PIXELS}
        for settings in [{}, *VARIANTS.get(name, [])]
    ]


class Loop:
    """A plain sampling loop, for samplers that no pipeline with a U-Net takes."""

    def __init__(self) -> None:
        self.unet = unet()
        self.components = {"unet": self.unet}
        self.scheduler: Any = None

    @torch.no_grad()
    def __call__(self, **more: Any) -> Tensor:
        """Sample; ``more`` is for the scheduler."""
        self.scheduler.set_timesteps(STEPS, **more)
        timesteps = self.scheduler.timesteps
        if isinstance(self.scheduler, SCMScheduler | DDPMWuerstchenScheduler):
            timesteps = timesteps[:-1]  # nothing is left to be done at the last
        prompt, sample, known, before = torch.randn(2, 5, 16), torch.randn(2, 4, 8, 8), None, None
        for timestep in timesteps:
            output = self.unet(sample, timestep, prompt, return_dict=False)[0]
            if isinstance(self.scheduler, CogVideoXDPMScheduler):
                sample, known = self.scheduler.step(output, known, timestep, before, sample)
                before = timestep
                continue
            if isinstance(self.scheduler, DDPMWuerstchenScheduler):
                timestep = timestep.expand(len(sample))
            sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]
        return sample


Pair = tuple[Any, Any]
"""One never compiled, and one that is captured once for all tests."""


@cache
def latent_pipelines() -> Pair:
    return stable_diffusion(), stable_diffusion()


@cache
def loops() -> Pair:
    return Loop(), Loop()


IN_A_LOOP: dict[str, dict[str, Any]] = {
    "CogVideoXDPMScheduler": {},
    "DDPMWuerstchenScheduler": {},
    "FlowMapEulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "HeliosScheduler": {"stage_index": 0},
    "LTXEulerAncestralRFScheduler": {},
    "MiniMaxH3Scheduler": {},
    "SCMScheduler": {"intermediate_timesteps": None},
    "UnCLIPScheduler": {},
}


@dataclass(frozen=True)
class InPixels:
    """A sampler that has a pipeline of its own.

    Attributes:
        step: the scheduler's method that takes a step.
        refreshed: the calls that refresh, with interval 3.
        calls: in all.
        more: arguments of the pipeline.
    """

    pipeline: Any
    step: str
    calls: int
    refreshed: Sequence[int]
    more: dict[str, Any] = field(default_factory=dict)


IN_PIXELS = {
    # Two noise levels at each step, and they go to and fro.
    "KarrasVeScheduler": InPixels(KarrasVePipeline, "step", 15, range(15)),
    # At each jump it refreshes twice: another run may have begun.
    "RePaintScheduler": InPixels(
        RePaintPipeline,
        "step",
        14,
        [0, 3, 4, 5, 7, 8, 9, 11, 12, 13],
        {
            "image": image()[..., :8, :8],
            "mask_image": image(1)[:, :1, :8, :8].round(),
            "jump_length": 2,
            "jump_n_sample": 2,
        },
    ),
    # Two calls at each noise level, and nothing tells one from the other.
    "ScoreSdeVeScheduler": InPixels(ScoreSdeVePipeline, "step_pred", 16, range(16)),
}


def picture(of: Any, name: str, settings: dict[str, Any]) -> Tensor:
    """What a pipeline or loop draws with a new scheduler."""
    kind = getattr(diffusers, name)
    torch.manual_seed(0)  # some draw their noise from what all draw from
    if isinstance(of, Loop):
        of.scheduler = kind(**settings)
        return of(**IN_A_LOOP[name])
    of.scheduler = kind.from_config(DDIM.config, **settings)
    return run(of, num_inference_steps=STEPS)


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, backend="eager", verbose=False, **settings)


@pytest.mark.one_in(24)
@pytest.mark.parametrize(("name", "settings"), every_case())
def test_every_scheduler(
    name: str, settings: dict[str, Any], compatible: Callable[..., dict[str, Any]]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    set_to = ", ".join(f"{setting}={value}" for setting, value in settings.items())
    compatible("scheduler", f"{name} ({set_to})" if set_to else name)
    plain, pipe = loops() if name in IN_A_LOOP else latent_pipelines()

    def drawn(**chosen: Any) -> tuple[Tensor, dcompile.Stats]:
        cached(pipe, **chosen)
        return picture(pipe, name, settings), dcompile.handle(pipe).stats

    expected = picture(plain, name, settings)
    assert expected.isfinite().all()
    found, stats = drawn(interval=1)
    assert torch.equal(found, expected)
    assert stats.reuse_steps == 0
    calls = stats.refresh_steps

    found, stats = drawn(interval=3)
    assert not torch.equal(found, expected)
    assert stats.refresh_steps == len(range(0, calls, 3))
    assert stats.refresh_steps + stats.reuse_steps == calls
    cut = dcompile.handle(pipe).explain().depths[0]
    with stale_features(plain.unet, cut, every_third(calls)) as counted:
        assert torch.equal(found, picture(plain, name, settings))
    assert len(counted) == calls

    with heard() as warned:
        _, stats = drawn(speedup=1.5, autotune=False)
    assert len(warned) == (name in UNTOLD), warned
    assert all("has no noise levels that can be read" in message for message in warned)
    assert stats.refresh_steps == GainWeighted(speedup=1.5).refreshes(calls, cut.ratio)

    with heard():
        found, stats = drawn(speedup=1.5)  # watched
        assert torch.equal(found, expected)
        assert stats.reuse_steps == 0
        # Runs of these end before their timesteps do: that is known once it has happened twice.
        for _ in range(2 if name in UNTOLD else 0):
            assert torch.equal(picture(pipe, name, settings), expected)
        before = dcompile.handle(pipe).stats
        found = picture(pipe, name, settings)
    assert not torch.equal(found, expected)
    assert before.reuse_steps == 0
    after = dcompile.handle(pipe).stats
    assert after.reuse_steps + after.partial_steps >= calls / 3


@pytest.mark.parametrize("name", IN_PIXELS)
def test_in_doubt_it_refreshes(name: str, compatible: Callable[..., dict[str, Any]]) -> None:
    """Samplers that go to and fro: a call that may be out of turn computes everything."""
    case = IN_PIXELS[name]
    rare = f"{len(case.refreshed)} of {case.calls} calls refresh at interval 3"
    compatible("scheduler", name, note=rare)
    pipe = unconditional(case.pipeline)
    network = pipe.unet

    def samples() -> Tensor:
        """After every step; the picture is cut off at black and white."""
        pipe.scheduler = getattr(diffusers, name)()
        take_step, seen = getattr(pipe.scheduler, case.step), []

        def step(*args: Any, **kwargs: Any) -> Any:
            output = take_step(*args, **kwargs)
            seen.append(output.prev_sample)
            return output

        setattr(pipe.scheduler, case.step, step)
        generator = torch.Generator().manual_seed(0)
        pipe(generator=generator, num_inference_steps=STEPS, **case.more)
        return torch.stack(seen)

    expected = samples()
    cached(pipe, interval=1)
    assert torch.equal(samples(), expected)
    cached(pipe, interval=3)
    found, stats = samples(), dcompile.handle(pipe).stats
    assert stats.refresh_steps == len(case.refreshed)
    assert stats.refresh_steps + stats.reuse_steps == case.calls
    cut = dcompile.handle(pipe).explain().depths[0]
    dcompile.handle(pipe).remove()
    refreshed = [call in case.refreshed for call in range(case.calls)]
    with stale_features(network, cut, refreshed) as counted:
        assert torch.equal(found, samples())
    assert len(counted) == case.calls
    assert torch.equal(found, expected) == all(refreshed)


def test_what_is_left_out_exists() -> None:
    named = {*LEFT_OUT, *VARIANTS, *IN_A_LOOP, *IN_PIXELS}
    assert named <= set(every_scheduler())
