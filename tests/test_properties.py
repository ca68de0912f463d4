"""The invariants hold for any U-Net, at every depth, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import check_every_depth

configurations = settings(
    max_examples=int(os.environ.get("DCOMPILE_EXAMPLES", "10")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """What both kinds of network have in common."""
    levels = draw(st.integers(2, 4))
    groups = draw(st.sampled_from([1, 2, 4]))
    width = st.sampled_from([4, 8, 12, 16])
    return {
        "block_out_channels": tuple(draw(width) for _ in range(levels)),
        "norm_num_groups": groups,
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 2**0.5])),
        "act_fn": draw(st.sampled_from(["silu", "gelu"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
    }


def attention_places(draw: st.DrawFn, levels: int) -> list[bool]:
    return draw(st.lists(st.booleans(), min_size=levels, max_size=levels))


@st.composite
def unconditional(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    config = draw(shapes())
    levels = len(config["block_out_channels"])
    places = attention_places(draw, levels)
    config |= {
        "down_block_types": ["AttnDownBlock2D" if at else "DownBlock2D" for at in places],
        "up_block_types": ["AttnUpBlock2D" if at else "UpBlock2D" for at in reversed(places)],
        "layers_per_block": draw(st.integers(1, 3)),
        "add_attention": draw(st.booleans()),
        "attention_head_dim": 4,
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
    }
    # An unconditional U-Net needs sizes it can halve at every level.
    unit = 2 ** (levels - 1)
    return config, (unit * draw(st.integers(1, 2)), unit * draw(st.integers(1, 2)))


@st.composite
def conditional(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    config = draw(shapes())
    levels = len(config["block_out_channels"])
    places = attention_places(draw, levels)
    layers = draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))
    config |= {
        "down_block_types": ["CrossAttnDownBlock2D" if at else "DownBlock2D" for at in places],
        "up_block_types": ["CrossAttnUpBlock2D" if at else "UpBlock2D" for at in reversed(places)],
        "layers_per_block": layers,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "use_linear_projection": draw(st.booleans()),
        "only_cross_attention": draw(st.booleans()),
    }
    # A conditional one resizes its up path to fit any.
    sides = st.integers(2 ** (levels - 1), 2 ** (levels - 1) + 5)
    return config, (draw(sides), draw(sides))


@configurations
@given(unconditional(), st.integers(1, 2))
def test_any_unconditional_network(
    drawn: tuple[dict[str, Any], tuple[int, int]], batch: int
) -> None:
    config, (height, width) = drawn
    torch.manual_seed(0)
    unet = UNet2DModel(**config).eval()
    skips = check_every_depth(unet, (torch.randn(batch, 3, height, width), torch.tensor(500)), {})
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    assert len(skips) == levels * (layers + 1)


@configurations
@given(conditional(), st.integers(1, 2))
def test_any_conditional_network(drawn: tuple[dict[str, Any], tuple[int, int]], batch: int) -> None:
    config, (height, width) = drawn
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    skips = check_every_depth(
        unet,
        (torch.randn(batch, 4, height, width), torch.tensor(500)),
        {"encoder_hidden_states": torch.randn(batch, 3, 8)},
    )
    assert len(skips) == sum(layers + 1 for layers in config["layers_per_block"])
