"""Networks shaped like the ones people run, with random weights, and example calls for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

Call = dict[str, Any]
Subject = tuple[UNet2DConditionModel, Call]


def _random(network: torch.nn.Module) -> None:
    """Weights that keep activations of order one, filled in place: faster than initializing."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
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


@dataclass(frozen=True)
class Shape:
    """A network as people run it on GPUs, and its sampler.

    Attributes:
        title: for tables.
        network: class of the network.
        scheduler: the sampler its pipeline comes with.
        config: the published configuration, where it is not the class's default.
        tiny: what differs in the tiny one, which only serves to try a script.
        sizes: shapes of a call's tensors; batches of 2 are guidance's.
        tiny_sizes: the same for the tiny network.
        sample: name of the network's first argument.
        half: the dtype people run it in on GPUs.
        scale: of the random weights. Many blocks with large ones amplify rounding: results of two
            ways to compute the same could not be compared.
        timestep: what its pipeline passes for an element of the scheduler's timesteps, given that
            and the sample's dtype.
    """

    title: str
    network: type[torch.nn.Module]
    scheduler: Callable[[], Any]
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Any]
    tiny_sizes: Mapping[str, Any]
    sample: str = "sample"
    half: str = "float16"
    scale: float = 1.0
    timestep: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = lambda t, dtype: t

    def build(
        self, device: torch.device, dtype: torch.dtype, tiny: bool = False
    ) -> tuple[torch.nn.Module, Call]:
        """The network with random weights, made on the device, and a call without timestep."""
        network = self.unfilled(device, dtype, tiny)
        _random(network)
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(self.scale)
            for table in network.buffers():  # of rotary embeddings: their values are not kept
                table.uniform_(-1, 1, generator=generator)
            for name, parameter in network.named_parameters():
                if parameter.dim() == 1 and name.endswith("weight"):  # a norm's scale
                    parameter.add_(1)

        def noise(size: Any) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        return network, self.call(noise, tiny)

    def unfilled(
        self, device: torch.device, dtype: torch.dtype, tiny: bool = False
    ) -> torch.nn.Module:
        """The network; memory for its weights is reserved, or not even that on the meta device."""
        with torch.device("meta"):
            network = self.network(**{**self.config, **(self.tiny if tiny else {})})
        torch.nn.Module.to(network, dtype)  # diffusers' own to() warns about what does not apply
        return network.to_empty(device=device).eval().requires_grad_(False)

    def call(self, tensor: Callable[[Any], torch.Tensor], tiny: bool = False) -> Call:
        """A call without timestep, of tensors that are made from their sizes."""

        def made(size: Any) -> Any:
            if isinstance(size, dict):
                return {name: made(inner) for name, inner in size.items()}
            return tensor(size)

        return {**made(self.tiny_sizes if tiny else self.sizes), "return_dict": False}


_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

UNETS = {
    "sd15": Shape(
        title="SD 1.5-shaped, 512x512, batch 1 with guidance",
        network=UNet2DConditionModel,
        scheduler=lambda: DDIMScheduler(
            **_STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False
        ),
        config={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
        },
        tiny={
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
        },
        sizes={"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 768)},
        tiny_sizes={"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 16)},
    ),
    "sdxl": Shape(
        title="SDXL-shaped, 1024x1024, batch 1 with guidance",
        network=UNet2DConditionModel,
        scheduler=lambda: EulerDiscreteScheduler(**_STABLE_DIFFUSION),
        config={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        tiny={
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (1, 2),
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        sizes={
            "sample": (2, 4, 128, 128),
            "encoder_hidden_states": (2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
        },
        tiny_sizes={
            "sample": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 16),
            "added_cond_kwargs": {"text_embeds": (2, 16), "time_ids": (2, 6)},
        },
    ),
    "svd": Shape(
        title="SVD-shaped, 14 frames at 576x1024, with guidance",
        network=UNetSpatioTemporalConditionModel,
        scheduler=lambda: EulerDiscreteScheduler(
            **_STABLE_DIFFUSION,
            prediction_type="v_prediction",
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        config={"sample_size": 96, "num_frames": 14},
        tiny={
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "layers_per_block": 1,
            "num_attention_heads": (1, 2),
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 3 * 8,
            "num_frames": 2,
        },
        sizes={
            "sample": (2, 14, 8, 72, 128),
            "encoder_hidden_states": (2, 1, 1024),
            "added_time_ids": (2, 3),
        },
        tiny_sizes={
            "sample": (2, 2, 8, 8, 8),
            "encoder_hidden_states": (2, 1, 16),
            "added_time_ids": (2, 3),
        },
    ),
}

TRANSFORMERS = {
    "flux": Shape(
        title="FLUX.1-shaped, 1024x1024, batch 1, bfloat16",
        network=FluxTransformer2DModel,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        config={"guidance_embeds": True},
        tiny={
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        sizes={
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
            "guidance": (1,),
        },
        tiny_sizes={
            "hidden_states": (1, 16, 16),
            "encoder_hidden_states": (1, 5, 32),
            "pooled_projections": (1, 16),
            "img_ids": (16, 3),
            "txt_ids": (5, 3),
            "guidance": (1,),
        },
        sample="hidden_states",
        half="bfloat16",
        scale=0.4,
        timestep=lambda t, dtype: t.expand(1).to(dtype) / 1000,
    ),
    "wan": Shape(
        title="Wan 2.1 1.3B-shaped, 33 frames at 480x832, one call of guidance, bfloat16",
        network=WanTransformer3DModel,
        scheduler=lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
        },
        sizes={
            "hidden_states": (1, 16, 9, 60, 104),
            "encoder_hidden_states": (1, 512, 4096),
        },
        tiny_sizes={"hidden_states": (1, 16, 2, 4, 4), "encoder_hidden_states": (1, 5, 16)},
        sample="hidden_states",
        half="bfloat16",
        timestep=lambda t, dtype: t.expand(1),
    ),
}

GPU_SHAPES = {**UNETS, **TRANSFORMERS}
