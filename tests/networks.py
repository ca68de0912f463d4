"""Small networks of every skip-connection family, and the invariants each has to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DreamLiteUNetModel,
    HunyuanDiT2DModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    StableCascadeUNet,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dcompile.call import CallForms
from dcompile.capture import CapturedNetwork, capture
from dcompile.program import CompiledGraph, Program, cached_by, convention_of, weights_of
from passes import SkipConnection, find_skip_connections, split_at

BATCH = 2
TEXT = 16  # width of a text embedding
TOKENS = 5

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """How to build one network and how its sampler calls it.

    Attributes:
        build: a fresh network; the same weights every time once the seed is set.
        sample: a noisy sample.
        conditioning: everything a call needs besides sample and timestep.
        timestep: what the network's pipeline makes of the scheduler's timestep.
    """

    build: Callable[[], nn.Module]
    sample: Callable[[], Tensor]
    conditioning: Callable[[], Kwargs] = dict
    timestep: Callable[[Tensor], Tensor] = lambda timestep: timestep

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def example(self, timestep: int = 500) -> tuple[tuple[Tensor, Tensor], Kwargs]:
        """The arguments and keyword arguments of one call."""
        return (self.sample(), self.timestep(torch.tensor(timestep))), self.conditioning()


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def text(width: int = TEXT, batch: int = BATCH) -> Kwargs:
    return {"encoder_hidden_states": torch.randn(batch, TOKENS, width)}


def ddpm(**config: Any) -> UNet2DModel:
    return UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            **config,
        }
    )


def stable_diffusion(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": TEXT,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **config,
        }
    )


def free_u() -> UNet2DConditionModel:
    unet = stable_diffusion()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return unet


def sdxl() -> UNet2DConditionModel:
    return stable_diffusion(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
    )


def sdxl_conditioning() -> Kwargs:
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(BATCH, 1)
    return {
        **text(),
        "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, TEXT), "time_ids": sizes},
    }


def kandinsky22() -> UNet2DConditionModel:
    return stable_diffusion(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )


def deepfloyd_if() -> UNet2DConditionModel:
    return stable_diffusion(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        cross_attention_dim=32,  # cross_attention_norm has 32 groups, whatever the configuration
        encoder_hid_dim=24,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )


def controlnet_residuals() -> Kwargs:
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4), (32, 2), (32, 2)]
    return {
        **text(),
        "down_block_additional_residuals": tuple(
            torch.randn(BATCH, channels, size, size) for channels, size in shapes
        ),
        "mid_block_additional_residual": torch.randn(BATCH, 32, 2, 2),
    }


def controlnet_xs() -> UNetControlNetXSModel:
    return UNetControlNetXSModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(4, 8),
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
    )


def unet_3d() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def stable_video() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),  # its norms have 32 groups, whatever the configuration
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=2,
    )


def animatediff() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
    )


def i2vgen_xl() -> I2VGenXLUNet:
    return I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def kandinsky3() -> Kandinsky3UNet:
    return Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 32),
        cross_attention_dim=TEXT,
        encoder_hid_dim=24,
    )


def stable_cascade() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_pooled_in_channels=TEXT,
        clip_seq=2,
    )


def hunyuan_dit() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT,
        pooled_projection_dim=8,
        text_len=TOKENS,
        text_len_t5=TOKENS,
    )


def hunyuan_dit_conditioning() -> Kwargs:
    return {
        **text(),
        "encoder_hidden_states_t5": torch.randn(BATCH, TOKENS, TEXT),
        "text_embedding_mask": torch.ones(BATCH, TOKENS),
        "text_embedding_mask_t5": torch.ones(BATCH, TOKENS),
        "image_meta_size": torch.tensor([[8.0, 8.0, 8.0, 8.0, 0.0, 0.0]]).repeat(BATCH, 1),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    }


def audioldm() -> UNet2DConditionModel:
    return stable_diffusion(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        attention_head_dim=8,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=TEXT,
        class_embeddings_concat=True,
    )


def audioldm2() -> AudioLDM2UNet2DConditionModel:
    return AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=[[None, TEXT, 24], [None, TEXT, 24]],
        attention_head_dim=4,
        norm_num_groups=4,
    )


class ResBlock(nn.Module):
    """Convolutions around a time embedding, with a shortcut."""

    def __init__(self, channels: int, out_channels: int, time_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, out_channels),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class PlainUNet(nn.Module):
    """A U-Net as CompVis writes them: no diffusers in it, and a tensor comes out."""

    def __init__(self, channels: int = 8, time_channels: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        wide = 2 * channels
        self.input_blocks = nn.ModuleList(
            [
                nn.Conv2d(3, channels, 3, padding=1),
                ResBlock(channels, channels, time_channels),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                ResBlock(channels, wide, time_channels),
            ]
        )
        self.middle_block = ResBlock(wide, wide, time_channels)
        self.output_blocks = nn.ModuleList(
            [
                ResBlock(wide + wide, wide, time_channels),
                ResBlock(wide + channels, wide, time_channels),
                ResBlock(wide + channels, channels, time_channels),
                ResBlock(channels + channels, channels, time_channels),
            ]
        )
        self.out = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(self.channels // 2, device=x.device))
        angles = timesteps.float().reshape(-1, 1) * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        hs = []
        for block in self.input_blocks:
            x = block(x, emb) if isinstance(block, ResBlock) else block(x)
            hs.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            skip = hs.pop()
            if x.shape[-1] != skip.shape[-1]:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skip], dim=1), emb)
        return self.out(x)


def per_sample(timestep: Tensor) -> Tensor:
    return timestep.expand(BATCH)


def as_float(timestep: Tensor) -> Tensor:
    return timestep.expand(BATCH).float()


def as_sigma(timestep: Tensor) -> Tensor:
    return timestep + 0.01  # its embedding takes the logarithm


def as_ratio(timestep: Tensor) -> Tensor:
    return timestep.expand(BATCH) / 1000


latent = noise(BATCH, 4, 8, 8)
image = noise(BATCH, 3, 16, 16)

NETWORKS: dict[str, Network] = {
    "ddpm": Network(ddpm, image),
    "ddpm_class_conditional": Network(
        lambda: ddpm(num_class_embeds=10, resnet_time_scale_shift="scale_shift"),
        image,
        lambda: {"class_labels": torch.tensor([3, 7])},
        per_sample,
    ),
    "ncsnpp": Network(
        lambda: ddpm(
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
            block_out_channels=(32, 32, 32),  # norms of its skip blocks have up to 32 groups
            time_embedding_type="fourier",
            mid_block_scale_factor=2**0.5,
        ),
        image,
        timestep=as_sigma,
    ),
    "sd15": Network(lambda: stable_diffusion(layers_per_block=2), latent, text),
    "sd15_free_u": Network(free_u, latent, text),
    "sd15_controlnet": Network(stable_diffusion, latent, controlnet_residuals),
    "sd15_inpainting": Network(
        lambda: stable_diffusion(in_channels=9), noise(BATCH, 9, 8, 8), text
    ),
    "sdxl": Network(sdxl, latent, sdxl_conditioning),
    "x4_upscaler": Network(
        lambda: stable_diffusion(
            in_channels=7, num_class_embeds=1000, only_cross_attention=(True, True, False)
        ),
        noise(BATCH, 7, 8, 8),
        lambda: {**text(), "class_labels": torch.tensor([20, 20])},
    ),
    "lcm": Network(
        lambda: stable_diffusion(time_cond_proj_dim=12),
        latent,
        lambda: {**text(), "timestep_cond": torch.randn(BATCH, 12)},
    ),
    "kandinsky22": Network(
        kandinsky22,
        latent,
        lambda: {
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": torch.randn(BATCH, 24)},
        },
    ),
    "deepfloyd_if": Network(deepfloyd_if, noise(BATCH, 3, 8, 8), lambda: text(24)),
    "dreamlite": Network(
        lambda: DreamLiteUNetModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            cross_attention_dim=TEXT,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        latent,
        text,
    ),
    "controlnet_xs": Network(
        controlnet_xs,
        latent,
        lambda: {**text(), "controlnet_cond": torch.rand(BATCH, 3, 16, 16)},
    ),
    "unet_3d": Network(unet_3d, noise(BATCH, 4, 2, 8, 8), text),
    "stable_video": Network(
        stable_video,
        noise(BATCH, 2, 8, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(BATCH, 1, TEXT),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(BATCH, 1),
        },
    ),
    "animatediff": Network(animatediff, noise(BATCH, 4, 2, 8, 8), lambda: text(batch=2 * BATCH)),
    "i2vgen_xl": Network(
        i2vgen_xl,
        noise(BATCH, 4, 2, 8, 8),
        lambda: {
            **text(),
            "fps": torch.tensor([16, 16]),
            "image_latents": torch.randn(BATCH, 4, 2, 8, 8),
            "image_embeddings": torch.randn(BATCH, TEXT),
        },
    ),
    "kandinsky3": Network(
        kandinsky3,
        latent,
        lambda: {**text(24), "encoder_attention_mask": torch.ones(BATCH, TOKENS)},
    ),
    "stable_cascade": Network(
        stable_cascade,
        latent,
        lambda: {"clip_text_pooled": torch.randn(BATCH, 1, TEXT)},
        as_ratio,
    ),
    "unet_1d": Network(
        lambda: UNet1DModel(block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=32),
        noise(BATCH, 2, 32),
    ),
    "hunyuan_dit": Network(hunyuan_dit, latent, hunyuan_dit_conditioning, as_float),
    "audioldm": Network(
        audioldm,
        latent,
        lambda: {"encoder_hidden_states": None, "class_labels": torch.randn(BATCH, TEXT)},
    ),
    "audioldm2": Network(
        audioldm2,
        latent,
        lambda: {**text(), "encoder_hidden_states_1": torch.randn(BATCH, TOKENS, 24)},
    ),
    "plain": Network(PlainUNet, image),
}


def identical(actual: Any, expected: Any) -> bool:
    """Same type, same structure, and every bit of every tensor."""
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    return (
        type(actual) is type(expected)
        and len(ours) == len(theirs)
        and all(map(torch.equal, ours, theirs))
    )


def capture_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
) -> tuple[CapturedNetwork, list[Any]]:
    leaves, form = CallForms(module.forward).flatten(args, kwargs)
    assert form is not None, "the call has no sample or no timestep"
    return capture(module, module.forward, leaves, form.spec, form.sample), leaves


def eager_program(network: CapturedNetwork, skip: SkipConnection) -> Program:
    full, shallow = split_at(network.graph_module, skip)
    assert len(shallow.graph.nodes) < len(full.graph.nodes)
    graphs = tuple(
        CompiledGraph(graph.forward, convention_of(graph, network)) for graph in (shallow, full)
    )
    return Program(network.out_spec, graphs, cached_by([len(skip.boundary)], [1]))


@torch.no_grad()
def check_every_depth(
    module: nn.Module, args: tuple[Tensor, Tensor], kwargs: Kwargs
) -> list[SkipConnection]:
    """Assert that full is exact, that a fresh cache is exact, and that a stale one is not."""
    expected = module(*args, **kwargs)
    network, leaves = capture_call(module, args, kwargs)
    sample, timestep = args
    earlier = tree_leaves(((torch.randn_like(sample), timestep), kwargs))
    skips = find_skip_connections(network.graph_module, network.sample)
    for skip in skips:
        program = eager_program(network, skip).bind(weights_of(module))
        full, boundary = program.refresh(leaves)
        assert identical(full, expected), f"full at depth {skip.depth}"
        assert identical(program.reuse(leaves, boundary)[0], expected), f"depth {skip.depth}"
        _, stale = program.refresh(earlier)
        assert not identical(program.reuse(leaves, stale)[0], expected), f"depth {skip.depth}"
    return skips
