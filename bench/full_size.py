"""r of published configurations, from shapes alone: networks without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    I2VGenXLUNet,
    StableCascadeUNet,
    UNet2DConditionModel,
    UNet2DModel,
    UNetMotionModel,
)
from rich.progress import track
from shapes import UNETS
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.compiler.call import CallForms
from dcompile.compiler.capture import capture
from dcompile.passes import SkipConnection, find_skip_connections


@dataclass(frozen=True)
class Published:
    """A network as it was published, and what it is called with.

    Attributes:
        network: its class.
        config: where it differs from the class's defaults.
        sizes: shapes of a call's tensors, the sample first; the timestep is a number.
        timestep: its shape, for those that want one for each sample.
    """

    network: type[torch.nn.Module]
    config: Mapping[str, Any]
    sizes: Mapping[str, Any]
    timestep: tuple[int, ...] = field(default=())

    def skips(self) -> list[SkipConnection]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = self.network(**self.config).eval().requires_grad_(False)
            sample, *others = _tensors(self.sizes).items()
            args = sample[1], torch.ones(self.timestep)
        leaves, form = CallForms(network.forward).flatten(args, dict(others))
        assert form is not None
        found = capture(network, network.forward, leaves, form.spec, form.samples)
        return find_skip_connections(found.graph_module, found.sample)


def _tensors(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _tensors(size) if isinstance(size, Mapping) else torch.empty(size)
        for name, size in sizes.items()
    }


def _of(name: str) -> Published:
    shape = UNETS[name]
    return Published(shape.network, shape.config, shape.sizes)


_SIMPLE_ATTENTION = {
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
}
_CASCADE = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")

PUBLISHED = {
    "Stable Diffusion 1.5, 512×512": _of("sd15"),
    "Stable Diffusion 2.1, 768×768": Published(
        UNet2DConditionModel,
        {
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        {"sample": (2, 4, 96, 96), "encoder_hidden_states": (2, 77, 1024)},
    ),
    "Stable Diffusion XL, 1024×1024": _of("sdxl"),
    "Stable Diffusion XL refiner, 1024×1024": Published(
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": (
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ),
            "up_block_types": (
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "UpBlock2D",
            ),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
            "use_linear_projection": True,
        },
        {
            "sample": (2, 4, 128, 128),
            "encoder_hidden_states": (2, 77, 1280),
            "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 5)},
        },
    ),
    "Stable Video Diffusion, 14 frames of 576×1024": _of("svd"),
    "AnimateDiff, 16 frames of 512×512": Published(
        UNetMotionModel,
        {"sample_size": 64, "cross_attention_dim": 768, "num_attention_heads": 8},
        {"sample": (2, 4, 16, 64, 64), "encoder_hidden_states": (32, 77, 768)},
    ),
    "Kandinsky 2.2 decoder, 768×768": Published(
        UNet2DConditionModel,
        {
            **_SIMPLE_ATTENTION,
            "sample_size": 64,
            "out_channels": 8,
            "block_out_channels": (384, 768, 1152, 1536),
            "layers_per_block": 3,
            "attention_head_dim": 64,
            "cross_attention_dim": 768,
            "encoder_hid_dim": 1280,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
            "resnet_time_scale_shift": "scale_shift",
        },
        {
            "sample": (2, 4, 96, 96),
            "encoder_hidden_states": (2, 0),
            "added_cond_kwargs": {"image_embeds": (2, 1280)},
        },
    ),
    "I2VGen-XL, 16 frames of 704×1280": Published(
        I2VGenXLUNet,
        {},
        {
            "sample": (2, 4, 16, 88, 160),
            "fps": (2,),
            "image_latents": (2, 4, 16, 88, 160),
            "image_embeddings": (2, 1024),
            "encoder_hidden_states": (2, 77, 1024),
        },
    ),
    "LDM-4 CelebA-HQ, 256×256": Published(
        UNet2DModel,
        {
            "sample_size": 64,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
            "attention_head_dim": 32,
        },
        {"sample": (1, 3, 64, 64)},
    ),
    "DDPM CIFAR-10, 32×32": Published(
        UNet2DModel,
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
        },
        {"sample": (1, 3, 32, 32)},
    ),
    "DDPM LSUN, 256×256": Published(
        UNet2DModel,
        {
            "sample_size": 256,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
            "attention_head_dim": None,
            "downsample_padding": 0,
        },
        {"sample": (1, 3, 256, 256)},
    ),
    "Stable Cascade prior, 1024×1024": Published(
        StableCascadeUNet,
        {
            "clip_text_in_channels": 1280,
            "clip_text_pooled_in_channels": 1280,
            "clip_image_in_channels": 768,
        },
        {
            "sample": (2, 16, 24, 24),
            "clip_text_pooled": (2, 1, 1280),
            "clip_text": (2, 77, 1280),
            "clip_img": (2, 1, 768),
        },
        timestep=(2,),
    ),
    "Stable Cascade decoder, 1024×1024": Published(
        StableCascadeUNet,
        {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "conditioning_dim": 1280,
            "block_out_channels": (320, 640, 1280, 1280),
            "num_attention_heads": (0, 0, 20, 20),
            "down_num_layers_per_block": (2, 6, 28, 6),
            "up_num_layers_per_block": (6, 28, 6, 2),
            "down_blocks_repeat_mappers": (1, 1, 1, 1),
            "up_blocks_repeat_mappers": (3, 3, 2, 2),
            "block_types_per_layer": (_CASCADE[:2], _CASCADE[:2], _CASCADE, _CASCADE),
            "clip_text_pooled_in_channels": 1280,
            "effnet_in_channels": 16,
            "pixel_mapper_in_channels": 3,
            "dropout": (0, 0, 0.1, 0.1),
            "timestep_conditioning_type": ("sca",),
        },
        {"sample": (2, 4, 256, 256), "clip_text_pooled": (2, 1, 1280), "effnet": (2, 16, 24, 24)},
        timestep=(2,),
    ),
}


def full_size_rows() -> list[dict[str, Any]]:
    """For bench/compatibility.py: how many depths each has, and r at depth 0."""
    rows = []
    for name, published in track(PUBLISHED.items(), description="capturing at full size"):
        skips = published.skips()
        rows.append(
            {
                "kind": "full size",
                "name": name,
                "depths": len(skips),
                "ratio": skips[0].ratio,
                "works": True,
            }
        )
    return rows
