"""Random U-Nets, each at every depth: the invariants hold, and all skip connections are found.

``DCOMPILE_EXAMPLES=500 pytest tests/compiler/test_random_networks.py`` looks longer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import check_every_depth

TEXT = 8  # width of a text embedding
# configurations of each kind of network
FAST, FULL = 10, int(os.environ.get("DCOMPILE_EXAMPLES", "25"))


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),  # shrinking would capture hundreds more
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Configuration:
    """A network's configuration, the sizes it is called with, and how many skips it has."""

    config: dict[str, Any]
    batch: int
    height: int
    width: int
    skips: int
    tokens: int = 1
    timestep: float = 500


# Block types that go together: without attention and with it, down, up and in the middle.
PLAIN = ("DownBlock2D", "UpBlock2D")
RESNET = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
SELF_ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")
CROSS_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SIMPLE_ATTENTION = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def blocks(draw: st.DrawFn, levels: int, kinds: list[tuple[str, str]]) -> dict[str, Any]:
    pairs = [draw(st.sampled_from(kinds)) for _ in range(levels)]
    return {
        "down_block_types": tuple(down for down, _ in pairs),
        "up_block_types": tuple(up for _, up in reversed(pairs)),
    }


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """What both kinds of network have in common."""
    levels = draw(st.sampled_from([2, 2, 3, 3, 4]))
    return {
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 8)),
        "block_out_channels": tuple(draw(st.sampled_from([8, 16])) for _ in range(levels)),
        "norm_num_groups": draw(st.sampled_from([1, 2, 4])),  # more than one channel in each
        "attention_head_dim": draw(st.sampled_from([2, 4, 8])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 2**0.5])),
        "act_fn": draw(st.sampled_from(["silu", "gelu", "mish", "relu"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "time_embedding_type": draw(st.sampled_from(["positional", "fourier"])),
    }


@st.composite
def unconditional(draw: st.DrawFn) -> Configuration:
    config = draw(shapes())
    levels = len(config["block_out_channels"])
    layers = draw(st.sampled_from([1, 1, 2, 2, 3]))
    middle = draw(st.sampled_from(["UNetMidBlock2D", "UNetMidBlock2D", None]))
    config |= blocks(draw, levels, [PLAIN, RESNET, SELF_ATTENTION])
    config |= {
        "layers_per_block": layers,
        "mid_block_type": middle,
        "add_attention": draw(st.booleans()),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "attn_norm_num_groups": draw(st.sampled_from([None, 2])),
        **draw(
            st.sampled_from(
                [
                    {},
                    {"num_class_embeds": 4},
                    {"class_embed_type": "timestep"},
                    {"class_embed_type": "identity"},
                ]
            )
        ),
    }
    unit = 2 ** (levels - 1)  # it needs sizes that it can halve at every level
    sides = st.sampled_from([unit, 2 * unit, 3 * unit])
    return Configuration(
        config=config,
        batch=draw(st.integers(1, 3)),
        height=draw(sides),
        width=draw(sides),
        skips=levels * (layers + 1) - (middle is None),
        timestep=draw(st.sampled_from([1, 500, 999])),
    )


@st.composite
def conditional(draw: st.DrawFn) -> Configuration:
    config = draw(shapes())
    levels = len(config["block_out_channels"])
    layers = [draw(st.sampled_from([1, 1, 2, 2, 3])) for _ in range(levels)]
    if draw(st.booleans()):
        kinds = [RESNET, SIMPLE_ATTENTION]
        middle = draw(st.sampled_from(["UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None]))
    else:
        kinds = [PLAIN, CROSS_ATTENTION, SELF_ATTENTION]
        middle = draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]))
    config |= blocks(draw, levels, kinds)
    config |= {
        "layers_per_block": tuple(layers),
        "mid_block_type": middle,
        "cross_attention_dim": TEXT,
        "transformer_layers_per_block": draw(st.sampled_from([1, 1, 2])),
        "use_linear_projection": draw(st.booleans()),
        "only_cross_attention": draw(st.booleans()),
        "mid_block_only_cross_attention": draw(st.sampled_from([None, True])),
        "upcast_attention": draw(st.booleans()),
        "resnet_skip_time_act": draw(st.booleans()),
        "resnet_out_scale_factor": draw(st.sampled_from([1.0, 2**0.5])),
        "conv_in_kernel": draw(st.sampled_from([1, 3])),
        "conv_out_kernel": draw(st.sampled_from([1, 3])),
        "encoder_hid_dim": draw(st.sampled_from([None, 12])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
        "timestep_post_act": draw(st.sampled_from([None, "silu"])),
        **draw(
            st.sampled_from(
                [
                    {},
                    {"num_class_embeds": 4},
                    {"class_embed_type": "timestep"},
                    {"class_embed_type": "projection"},
                    {"class_embed_type": "simple_projection"},
                ]
            )
        ),
        "projection_class_embeddings_input_dim": TEXT + 6 * 4,
        "addition_time_embed_dim": 4,
        "addition_embed_type": draw(st.sampled_from([None, "text_time"])),
    }
    if config.get("class_embed_type") and config["addition_embed_type"] is None:
        config["class_embeddings_concat"] = draw(st.booleans())
    unit = 2 ** (levels - 1)
    if {*config["up_block_types"]} <= {PLAIN[1], CROSS_ATTENTION[1]}:
        sides = st.integers(unit, unit + 6)  # these resize the up path to any size
    else:
        sides = st.sampled_from([unit, 2 * unit])
    return Configuration(
        config=config,
        batch=draw(st.integers(1, 3)),
        height=draw(sides),
        width=draw(sides),
        skips=sum(layer + 1 for layer in layers) - (middle is None),
        tokens=draw(st.integers(1, 5)),
        timestep=draw(st.sampled_from([1, 500, 999])),
    )


def class_labels(config: dict[str, Any], batch: int, embedding: int) -> dict[str, Any]:
    kind = config.get("class_embed_type")
    if kind is not None:
        shape = (batch,) if kind == "timestep" else (batch, embedding)
        return {"class_labels": 1 + torch.rand(shape)}
    return {"class_labels": torch.arange(batch)} if "num_class_embeds" in config else {}


def check(network: torch.nn.Module, drawn: Configuration, conditioning: dict[str, Any]) -> None:
    channels = drawn.config["in_channels"]
    sample = torch.randn(drawn.batch, channels, drawn.height, drawn.width)
    skips = check_every_depth(network.eval(), (sample, torch.tensor(drawn.timestep)), conditioning)
    assert len(skips) == drawn.skips
    assert all(outer.ratio < inner.ratio for outer, inner in pairwise(skips))


def check_unconditional(drawn: Configuration) -> None:
    torch.manual_seed(0)
    network = UNet2DModel(**drawn.config)
    embedding = network.time_embedding.linear_2.out_features
    check(network, drawn, class_labels(drawn.config, drawn.batch, embedding))


def check_conditional(drawn: Configuration) -> None:
    torch.manual_seed(0)
    config, batch = drawn.config, drawn.batch
    text = torch.randn(batch, drawn.tokens, config["encoder_hid_dim"] or TEXT)
    conditioning = {
        "encoder_hidden_states": text,
        **class_labels(config, batch, config["projection_class_embeddings_input_dim"]),
    }
    if config["time_cond_proj_dim"] is not None:
        conditioning["timestep_cond"] = torch.randn(batch, config["time_cond_proj_dim"])
    if config["addition_embed_type"] is not None:
        conditioning["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, TEXT),
            "time_ids": torch.rand(batch, 6),
        }
    check(UNet2DConditionModel(**config), drawn, conditioning)


@pytest.mark.full
@examples(FAST)
@given(unconditional())
def test_unconditional_networks(drawn: Configuration) -> None:
    check_unconditional(drawn)


@pytest.mark.full
@examples(FAST)
@given(conditional())
def test_conditional_networks(drawn: Configuration) -> None:
    check_conditional(drawn)


@pytest.mark.full
@examples(FULL)
@given(unconditional())
def test_many_unconditional_networks(drawn: Configuration) -> None:
    check_unconditional(drawn)


@pytest.mark.full
@examples(FULL)
@given(conditional())
def test_many_conditional_networks(drawn: Configuration) -> None:
    check_conditional(drawn)
