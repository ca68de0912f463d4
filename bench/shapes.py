"""Networks shaped like the ones people run, with random weights, and example calls for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

Call = dict[str, Any]
Subject = tuple[UNet2DConditionModel, Call]


def _random(network: torch.nn.Module) -> None:
    """Weights that keep activations of order one, filled in place: faster than initializing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 10_000
        parameter.data.normal_(0, fan_in**-0.5, generator=generator)


def _built(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    _random(network)
    return network


def sd15(small: bool = False) -> Subject:
    """Stable Diffusion 1.5: 860 M parameters, 64x64 latents, guidance's batch of 2."""
    channels = (96, 192, 384, 384) if small else (320, 640, 1280, 1280)
    network = _built({"block_out_channels": channels, "cross_attention_dim": 768})
    size = 32 if small else 64
    call = {
        "sample": torch.randn(2, 4, size, size),
        "encoder_hidden_states": torch.randn(2, 77, 768),
        "return_dict": False,
    }
    return network, call


def sdxl(width: int = 32) -> Subject:
    """SDXL's 1,930 submodules and 1,680 parameters, narrow: what dispatch costs, not the maths."""
    network = _built(
        {
            "block_out_channels": (width, 2 * width, 4 * width),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 6 * 16 + 64,
            "use_linear_projection": True,
            "norm_num_groups": 8,
        }
    )
    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 77, 64),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 64), "time_ids": torch.randn(2, 6)},
        "return_dict": False,
    }
    return network, call
