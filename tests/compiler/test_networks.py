"""Every network, at every depth: the graphs compute what the module computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from networks import NETWORKS, Network, call_once, check_every_depth, identical
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dcompile

# name -> number of skip connections and where the outermost is read
EXPECTED = {
    "ddpm": (6, "up_blocks.2.resnets.1"),
    "ddpm_class_conditional": (6, "up_blocks.2.resnets.1"),
    "ncsnpp": (6, "up_blocks.2.resnets.1"),
    "sd15": (9, "up_blocks.2.resnets.2"),  # 3 levels of 2 layers
    "sd15_free_u": (6, "up_blocks.2.resnets.1"),
    "sd15_controlnet": (6, "up_blocks.2.resnets.1"),
    "sd15_inpainting": (6, "up_blocks.2.resnets.1"),
    "sdxl": (6, "up_blocks.2.resnets.1"),
    "x4_upscaler": (6, "up_blocks.2.resnets.1"),
    "lcm": (6, "up_blocks.2.resnets.1"),
    "kandinsky22": (4, "up_blocks.1.resnets.1"),
    "deepfloyd_if": (4, "up_blocks.1.resnets.1"),
    "dreamlite": (6, "up_blocks.2.resnets.1"),
    "controlnet_xs": (6, "up_blocks.1.resnets.2"),  # and none of its exchanges on the way down
    "unet_3d": (4, "up_blocks.1.resnets.1"),
    "stable_video": (4, "up_blocks.1.resnets.1"),
    "animatediff": (4, "up_blocks.1.resnets.1"),
    "i2vgen_xl": (4, "up_blocks.1.resnets.1"),
    "kandinsky3": (2, "up_blocks.2"),
    "stable_cascade": (1, "up_blocks.1.0"),
    "unet_1d": (3, "up_blocks.2.resnets.0"),
    "hunyuan_dit": (2, "blocks.5.skip_norm"),
    "audioldm": (6, "up_blocks.2.resnets.1"),
    "audioldm2": (4, "up_blocks.1.resnets.1"),
    "hunyuan_dit_controlnet": (2, "blocks.5.skip_norm"),
    "ldm_super_resolution": (9, "up_blocks.2.resnets.2"),
    "unclip_super_resolution": (6, "up_blocks.2.resnets.1"),
    "consistency_model": (9, "up_blocks.2.resnets.2"),
    "ldm_text_to_image": (6, "up_blocks.2.resnets.1"),
    "sd15_t2i_adapter": (6, "up_blocks.2.resnets.1"),
    "instruct_pix2pix": (6, "up_blocks.2.resnets.1"),
    "gligen": (6, "up_blocks.2.resnets.1"),
    "sd21": (6, "up_blocks.2.resnets.1"),
    "stable_unclip": (6, "up_blocks.2.resnets.1"),
    "sdxl_refiner": (8, "up_blocks.3.resnets.1"),
    "latent_upscaler": (3, "up_blocks.3.resnets.0"),
    "kandinsky21": (4, "up_blocks.1.resnets.1"),
    "kandinsky22_controlnet": (4, "up_blocks.1.resnets.1"),
    "unclip_decoder": (4, "up_blocks.1.resnets.1"),
    "deepfloyd_if_upscaler": (4, "up_blocks.1.resnets.1"),
    "animatediff_sdxl": (4, "up_blocks.1.resnets.1"),
    "stable_cascade_decoder": (3, "up_blocks.2.0"),  # its middle level runs twice
    "wuerstchen": (2, "up_blocks.2.0"),
    "diffuser_1d": (2, "up_blocks.1.resnets.0"),
    "unidiffuser": (2, "transformer.transformer_out_blocks.1.skip.skip_linear"),
    "plain": (4, "output_blocks.3"),
}

# A picture beside the features.
TWO_TENSORS = {"ncsnpp"}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", NETWORKS)
def test_full_and_freshly_fed_shallow_graphs_are_exact(
    name: str, compatible: Callable[..., dict[str, Any]]
) -> None:
    row = compatible("network", NETWORKS[name].title)
    module = NETWORKS[name].module()
    skips = check_every_depth(module, *NETWORKS[name].example())
    row["depths"], row["ratio"] = len(skips), round(skips[0].ratio, 3)

    count, outermost = EXPECTED[name]
    assert len(skips) == count
    assert [skip.depth for skip in skips] == list(range(count))
    assert skips[0].module_path.removeprefix("network.") == outermost
    assert len(skips[0].boundary) == (2 if name in TWO_TENSORS else 1)
    ratios = [skip.ratio for skip in skips]
    assert all(outer < inner for outer, inner in pairwise(ratios)), ratios
    assert ratios[0] > 0
    assert ratios[-1] < 1


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", NETWORKS)
def test_refreshing_every_step_changes_nothing(name: str) -> None:
    network = NETWORKS[name]
    module = network.module()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    sample, conditioning = network.sample(), network.conditioning()

    expected = sampled(module, network, sample, conditioning, scheduler.timesteps)
    dcompile.cache_compile(module, interval=1, backend="eager", verbose=False)
    actual = sampled(module, network, sample, conditioning, scheduler.timesteps)

    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert identical(ours, theirs), f"step {step}"
    stats = dcompile.handle(module).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.uncached_calls) == (5, 0, 0)
    assert (stats.runs, stats.captures) == (1, 1)


@torch.no_grad()
def sampled(
    module: nn.Module,
    network: Network,
    sample: Tensor,
    conditioning: dict[str, Any],
    timesteps: Tensor,
) -> list[Any]:
    """What the network returns at each step of a sampling loop."""
    outputs = []
    for timestep in timesteps:
        outputs.append(call_once(module, *network.call(sample, timestep, conditioning)))
        prediction = tree_leaves(outputs[-1])[0]
        if prediction.shape == sample.shape:
            sample = sample - 0.1 * prediction
    return outputs
