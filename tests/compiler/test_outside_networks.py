"""Networks that are not from diffusers, and the samplers they come with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from builders import BATCH, TEXT
from networks import Network, check_every_depth
from outside_networks import (
    DENOISING_DIFFUSION,
    MONAI,
    OUTSIDE,
    LatentDiffusionUNet,
    checkpointed,
    denoising_diffusion,
)
from torch import Tensor, nn

import dcompile

Counts = tuple[int, int]  # of refresh and reuse steps

# name -> number of skip connections and where the outermost is read
EXPECTED = {
    "monai_2d": (6, "up_blocks.2.resnets.1"),
    "monai_2d_classes": (6, "up_blocks.2.resnets.1"),
    "monai_2d_cross_attention": (6, "up_blocks.2.resnets.1"),
    "monai_2d_controlnet": (6, "up_blocks.2.resnets.1"),
    "monai_2d_flash": (6, "up_blocks.2.resnets.1"),
    "monai_3d": (4, "up_blocks.1.resnets.1"),
    "monai_3d_cross_attention": (4, "up_blocks.1.resnets.1"),
    "monai_spade": (6, "up_blocks.2.resnets.1"),
    "ddpm_pytorch": (5, "final_res_block"),
    "ddpm_pytorch_self_condition": (5, "final_res_block"),
    "ddpm_pytorch_guidance": (5, "final_res_block"),
    "ddpm_pytorch_1d": (5, "final_res_block"),
    "ddpm_pytorch_karras": (6, "skip_mp_cat"),
    "ddpm_pytorch_karras_1d": (6, "skip_mp_cat"),
    "ddpm_pytorch_karras_3d": (6, "skip_mp_cat"),
    "ddpm_pytorch_uvit": (5, "final_res_block"),
    "ldm_imagenet": (9, "output_blocks.8"),
    "ldm_labels": (9, "output_blocks.8"),
    "ldm_own_checkpoint": (4, "output_blocks.3"),
    "ldm_reentrant_checkpoint": (4, "output_blocks.3"),
    "ldm_checkpoint": (4, "output_blocks.3"),
}


PACKAGES = {
    "monai": "pip install monai einops",
    "denoising_diffusion_pytorch": "pip install einops, and pip install --no-deps "
    "denoising-diffusion-pytorch: what only its training needs includes torchvision",
}


def needs(package: str) -> None:
    if find_spec(package) is None or find_spec("einops") is None:
        pytest.skip(PACKAGES[package])


def network_of(name: str) -> Network:
    if name in MONAI:
        needs("monai")
    elif name in DENOISING_DIFFUSION:
        needs("denoising_diffusion_pytorch")
    return OUTSIDE[name]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OUTSIDE)
def test_full_and_freshly_fed_shallow_graphs_are_exact(
    name: str, compatible: Callable[..., dict[str, Any]]
) -> None:
    network = network_of(name)
    row = compatible("network", network.title)
    skips = check_every_depth(network.module(), *network.example())

    row["depths"], row["ratio"] = len(skips), round(skips[0].ratio, 3)
    count, outermost = EXPECTED[name]
    assert len(skips) == count
    assert skips[0].module_path == outermost
    assert all(len(skip.boundary) == 1 for skip in skips)
    ratios = [skip.ratio for skip in skips]
    assert ratios[0] > 0
    assert all(outer < inner for outer, inner in pairwise(ratios)), ratios
    assert ratios[-1] < 1


@pytest.mark.parametrize("way", ["none", "own", "reentrant", "not reentrant"])
def test_checkpointing_changes_nothing(way: str) -> None:
    torch.manual_seed(0)
    network = checkpointed(way).eval()
    torch.manual_seed(0)
    plain = checkpointed("none").eval()
    x, timesteps = torch.randn(BATCH, 3, 16, 16), torch.full((BATCH,), 500)
    context = torch.randn(BATCH, 1, TEXT)
    with torch.no_grad():
        expected = plain(x, timesteps, context)
        dcompile.cache_compile(network, backend="eager", verbose=False)
        assert torch.equal(network(x, timesteps, context=context), expected)
    assert dcompile.handle(network).stats.refresh_steps == 1


def ddim(network: nn.Module, x: Tensor, context: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM as samplers of that code base call a network: a new tensor a step."""
    alphas = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
    times = list(range(0, 1000, 1000 // steps))[:steps]
    for index in reversed(range(steps)):
        t = torch.full((len(x),), times[index], dtype=torch.long)
        error, guided = network(torch.cat([x] * 2), torch.cat([t] * 2), context).chunk(2)
        error = error + 3 * (guided - error)
        alpha = alphas[times[index]]
        earlier = alphas[times[index - 1]] if index else torch.tensor(1.0)
        clean = (x - (1 - alpha).sqrt() * error) / alpha.sqrt()
        x = earlier.sqrt() * clean + (1 - earlier).sqrt() * error
    return x


@torch.no_grad()
def test_timesteps_made_anew_at_every_step() -> None:
    network = LatentDiffusionUNet(context_channels=TEXT).eval()
    x, context = torch.randn(BATCH, 3, 16, 16), torch.randn(2 * BATCH, 1, TEXT)
    check_sampler(network, lambda: ddim(network, x, context, 6), (3, 3))


def check_sampler(network: nn.Module, sample: Callable[[], Tensor], counts: Counts) -> None:
    """The sampler's own result with ``interval=1``; ``counts`` steps of each kind with 3.

    These samplers create a new timestep for every call. Where the loop is not over a scheduler's, a
    run is identified by timestep values, and its second step refreshes too, until their direction
    is known: 0, 1, 3, 6, ...
    """

    def seeded() -> Tensor:
        torch.manual_seed(1)
        return sample()

    expected = seeded()
    dcompile.cache_compile(network, interval=1, backend="eager", verbose=False)
    assert torch.equal(seeded(), expected)
    stats = dcompile.handle(network).stats
    assert (stats.reuse_steps, stats.uncached_calls) == (0, 0)
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    cached = seeded()
    assert not torch.equal(cached, expected)
    for runs in (1, 2, 3, 4):  # the values of the runs before are the same
        stats = dcompile.handle(network).stats
        assert (stats.refresh_steps, stats.reuse_steps) == (runs * counts[0], runs * counts[1])
        assert torch.equal(seeded(), cached)
    dcompile.handle(network).remove()
    assert torch.equal(seeded(), expected)


@pytest.mark.parametrize(
    ("steps", "self_condition", "counts"),
    [
        (6, False, (3, 3)),  # DDIM
        (9, False, (4, 5)),  # all steps: ancestral sampling
        (6, True, (3, 3)),  # its first call has nothing to condition on: another program
    ],
)
def test_sampling_by_denoising_diffusion_pytorch(
    steps: int, self_condition: bool, counts: Counts
) -> None:
    needs("denoising_diffusion_pytorch")
    package = denoising_diffusion()
    network = package.Unet(dim=8, dim_mults=(1, 2), self_condition=self_condition).eval()
    diffusion = package.GaussianDiffusion(
        network, image_size=16, timesteps=9, sampling_timesteps=steps
    ).eval()
    check_sampler(network, lambda: diffusion.sample(batch_size=BATCH), counts)


def test_guidance_by_denoising_diffusion_pytorch() -> None:
    """Two calls a step, with the same tensors: a number says which is which."""
    needs("denoising_diffusion_pytorch")
    network = OUTSIDE["ddpm_pytorch_guidance"].module()
    diffusion = denoising_diffusion("classifier_free_guidance").GaussianDiffusion(
        network, image_size=16, timesteps=100, sampling_timesteps=6
    )
    classes = torch.tensor([3, 7])
    check_sampler(network, lambda: diffusion.eval().sample(classes, cond_scale=3.0), (6, 6))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_sampling_by_monai(guidance: float | None) -> None:
    needs("monai")
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDIMScheduler

    network = OUTSIDE["monai_2d_cross_attention"].module()
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    inferer = DiffusionInferer(scheduler)
    conditioning = torch.randn(BATCH, 5, TEXT)

    def sample() -> Tensor:
        scheduler.set_timesteps(num_inference_steps=6)
        image: Tensor = inferer.sample(
            torch.randn(BATCH, 1, 16, 16),
            network,
            conditioning=conditioning,
            cfg=guidance,
            verbose=False,
        )
        return image

    check_sampler(network, sample, (2, 4))  # its scheduler's timesteps are found
