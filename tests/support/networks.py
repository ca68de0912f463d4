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
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dcompile.compiler.call import CallForms
from dcompile.compiler.capture import CapturedNetwork, capture
from dcompile.compiler.program import (
    CompiledGraph,
    Program,
    cache_layouts,
    convention_of,
    weights_of,
)
from dcompile.passes import SkipConnection, find_skip_connections, split_at

BATCH = 2
TEXT = 16  # width of a text embedding
TOKENS = 5

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """How to build one network and how its sampler calls it.

    Attributes:
        title: what it is known as, and its class.
        build: a fresh network; the same weights every time once the seed is set.
        sample: a noisy sample.
        conditioning: everything a call needs besides sample and timestep.
        timestep: what the network's pipeline makes of the scheduler's timestep.
        timestep_name: how the timestep is passed where it is not the second argument.
    """

    title: str
    build: Callable[[], nn.Module]
    sample: Callable[[], Tensor]
    conditioning: Callable[[], Kwargs] = dict
    timestep: Callable[[Tensor], Tensor] = lambda timestep: timestep
    timestep_name: str | None = None

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def example(self, timestep: int = 500) -> tuple[tuple[Tensor, ...], Kwargs]:
        """The arguments and keyword arguments of one call."""
        return self.call(self.sample(), torch.tensor(timestep), self.conditioning())

    def call(
        self, sample: Tensor, timestep: Tensor, conditioning: Kwargs
    ) -> tuple[tuple[Tensor, ...], Kwargs]:
        """The arguments and keyword arguments of a step of a sampling loop."""
        timestep = self.timestep(timestep)
        if self.timestep_name is None:
            return (sample, timestep), conditioning
        return (sample,), {**conditioning, self.timestep_name: timestep}


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


def deepfloyd_if(in_channels: int = 3, **config: Any) -> UNet2DConditionModel:
    return stable_diffusion(
        in_channels=in_channels,
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
        **config,
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


def sdxl_refiner() -> UNet2DConditionModel:
    return stable_diffusion(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 5 * 8,
    )


def sdxl_refiner_conditioning() -> Kwargs:
    sizes_and_score = torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).repeat(BATCH, 1)
    return {
        **text(),
        "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, TEXT), "time_ids": sizes_and_score},
    }


def latent_upscaler() -> UNet2DConditionModel:
    return stable_diffusion(
        in_channels=8,
        block_out_channels=(32, 32, 64, 64),  # its blocks have groups of 32 channels
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        mid_block_type=None,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        attention_head_dim=16,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        norm_num_groups=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_cond_proj_dim=24,
        timestep_post_act="gelu",
    )


def kandinsky21() -> UNet2DConditionModel:
    return stable_diffusion(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
        resnet_time_scale_shift="scale_shift",
    )


def kandinsky22_controlnet() -> UNet2DConditionModel:
    return stable_diffusion(
        in_channels=8,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image_hint",
        resnet_time_scale_shift="scale_shift",
    )


def unclip_decoder() -> UNet2DConditionModel:
    return stable_diffusion(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )


def consistency_model() -> UNet2DModel:
    return ddpm(
        block_out_channels=(32, 32, 64),  # its attention has groups of 32 channels
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=2,
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=10,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
    )


def gligen_conditioning() -> Kwargs:
    grounding = {
        "boxes": torch.rand(BATCH, 3, 4),
        "positive_embeddings": torch.randn(BATCH, 3, TEXT),
        "masks": torch.tensor([[1.0, 1.0, 0.0]]).repeat(BATCH, 1),
    }
    return {**text(), "cross_attention_kwargs": {"gligen": grounding}}


def gligen() -> UNet2DConditionModel:
    unet = stable_diffusion(attention_type="gated")
    for name, parameter in unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):  # gates start closed
            nn.init.ones_(parameter)
    return unet


def t2i_adapter_features() -> Kwargs:
    shapes = [(16, 8), (32, 4), (32, 2)]
    features = [torch.randn(BATCH, channels, size, size) for channels, size in shapes]
    return {**text(), "down_intrablock_additional_residuals": features}


def animatediff_sdxl() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
        use_linear_projection=True,
        use_motion_mid_block=False,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
    )


def animatediff_sdxl_conditioning() -> Kwargs:
    added = sdxl_conditioning()["added_cond_kwargs"]
    return {**text(batch=2 * BATCH), "added_cond_kwargs": added}


def stable_cascade_decoder() -> StableCascadeUNet:
    attention = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(8, 16, 32),
        num_attention_heads=(0, 2, 2),
        down_num_layers_per_block=(1, 2, 1),
        up_num_layers_per_block=(1, 2, 1),
        down_blocks_repeat_mappers=(1, 1, 1),
        up_blocks_repeat_mappers=(2, 2, 1),
        block_types_per_layer=(attention[:2], attention, attention),
        clip_text_pooled_in_channels=TEXT,
        clip_seq=2,
        effnet_in_channels=6,
        pixel_mapper_in_channels=3,
        dropout=(0.1, 0.1, 0.1),
        timestep_conditioning_type=("sca",),
    )


def diffuser_1d() -> UNet1DModel:
    return UNet1DModel(
        in_channels=6,
        out_channels=6,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"),
        mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D", "UpResnetBlock1D"),
        out_block_type="OutConv1DBlock",
        act_fn="mish",
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_each_block=False,
    )


def wuerstchen() -> WuerstchenDiffNeXt:
    decoder = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=16,
        c_hidden=[8, 16, 16],
        nhead=[-1, 2, 2],
        blocks=[1, 2, 1],
        level_config=["CT", "CTA", "CTA"],
        inject_effnet=[False, True, True],
        effnet_embd=6,
        clip_embd=TEXT,
    )
    nn.init.normal_(decoder.clf[1].weight)  # zero until it is trained
    return decoder


def unidiffuser() -> UniDiffuserModel:
    return UniDiffuserModel(
        text_dim=TEXT,
        clip_img_dim=12,
        num_text_tokens=TOKENS,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=5,
        sample_size=8,
        patch_size=2,
        out_channels=4,
        norm_type="layer_norm",
        use_data_type_embedding=True,
    )


def unidiffuser_conditioning() -> Kwargs:
    return {
        "image_embeds": torch.randn(BATCH, 1, 12),
        "prompt_embeds": torch.randn(BATCH, TOKENS, TEXT),
        "timestep_text": 0,
    }


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
    "ddpm": Network("DDPM (UNet2DModel)", ddpm, image),
    "ddpm_class_conditional": Network(
        "DDPM with classes (UNet2DModel)",
        lambda: ddpm(num_class_embeds=10, resnet_time_scale_shift="scale_shift"),
        image,
        lambda: {"class_labels": torch.tensor([3, 7])},
        per_sample,
    ),
    "ncsnpp": Network(
        "Score SDE, NCSN++ (UNet2DModel)",
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
    "sd15": Network(
        "Stable Diffusion 1.5 (UNet2DConditionModel)",
        lambda: stable_diffusion(layers_per_block=2),
        latent,
        text,
    ),
    "sd15_free_u": Network(
        "Stable Diffusion 1.5 with FreeU (UNet2DConditionModel)", free_u, latent, text
    ),
    "sd15_controlnet": Network(
        "Stable Diffusion 1.5 with ControlNet residuals (UNet2DConditionModel)",
        stable_diffusion,
        latent,
        controlnet_residuals,
    ),
    "sd15_inpainting": Network(
        "Stable Diffusion 1.5 inpainting (UNet2DConditionModel)",
        lambda: stable_diffusion(in_channels=9),
        noise(BATCH, 9, 8, 8),
        text,
    ),
    "sdxl": Network("Stable Diffusion XL (UNet2DConditionModel)", sdxl, latent, sdxl_conditioning),
    "x4_upscaler": Network(
        "Stable Diffusion x4 upscaler (UNet2DConditionModel)",
        lambda: stable_diffusion(
            in_channels=7, num_class_embeds=1000, only_cross_attention=(True, True, False)
        ),
        noise(BATCH, 7, 8, 8),
        lambda: {**text(), "class_labels": torch.tensor([20, 20])},
    ),
    "lcm": Network(
        "Latent Consistency Model (UNet2DConditionModel)",
        lambda: stable_diffusion(time_cond_proj_dim=12),
        latent,
        lambda: {**text(), "timestep_cond": torch.randn(BATCH, 12)},
    ),
    "kandinsky22": Network(
        "Kandinsky 2.2 (UNet2DConditionModel)",
        kandinsky22,
        latent,
        lambda: {
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": torch.randn(BATCH, 24)},
        },
    ),
    "deepfloyd_if": Network(
        "DeepFloyd IF (UNet2DConditionModel)", deepfloyd_if, noise(BATCH, 3, 8, 8), lambda: text(24)
    ),
    "dreamlite": Network(
        "DreamLite (DreamLiteUNetModel)",
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
        "ControlNet-XS (UNetControlNetXSModel)",
        controlnet_xs,
        latent,
        lambda: {**text(), "controlnet_cond": torch.rand(BATCH, 3, 16, 16)},
    ),
    "unet_3d": Network(
        "ModelScope text-to-video (UNet3DConditionModel)", unet_3d, noise(BATCH, 4, 2, 8, 8), text
    ),
    "stable_video": Network(
        "Stable Video Diffusion (UNetSpatioTemporalConditionModel)",
        stable_video,
        noise(BATCH, 2, 8, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(BATCH, 1, TEXT),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(BATCH, 1),
        },
    ),
    "animatediff": Network(
        "AnimateDiff (UNetMotionModel)",
        animatediff,
        noise(BATCH, 4, 2, 8, 8),
        lambda: text(batch=2 * BATCH),
    ),
    "i2vgen_xl": Network(
        "I2VGen-XL (I2VGenXLUNet)",
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
        "Kandinsky 3 (Kandinsky3UNet)",
        kandinsky3,
        latent,
        lambda: {**text(24), "encoder_attention_mask": torch.ones(BATCH, TOKENS)},
    ),
    "stable_cascade": Network(
        "Stable Cascade prior (StableCascadeUNet)",
        stable_cascade,
        latent,
        lambda: {"clip_text_pooled": torch.randn(BATCH, 1, TEXT)},
        as_ratio,
    ),
    "unet_1d": Network(
        "Dance Diffusion (UNet1DModel)",
        lambda: UNet1DModel(block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=32),
        noise(BATCH, 2, 32),
    ),
    "hunyuan_dit": Network(
        "Hunyuan-DiT (HunyuanDiT2DModel)", hunyuan_dit, latent, hunyuan_dit_conditioning, as_float
    ),
    "hunyuan_dit_controlnet": Network(
        "Hunyuan-DiT with ControlNet residuals (HunyuanDiT2DModel)",
        hunyuan_dit,
        latent,
        lambda: {
            **hunyuan_dit_conditioning(),
            "controlnet_block_samples": [torch.randn(BATCH, 16, 16) for _ in range(2)],
        },
        as_float,
    ),
    "audioldm": Network(
        "AudioLDM and MusicLDM (UNet2DConditionModel)",
        audioldm,
        latent,
        lambda: {"encoder_hidden_states": None, "class_labels": torch.randn(BATCH, TEXT)},
    ),
    "audioldm2": Network(
        "AudioLDM 2 (AudioLDM2UNet2DConditionModel)",
        audioldm2,
        latent,
        lambda: {**text(), "encoder_hidden_states_1": torch.randn(BATCH, TOKENS, 24)},
    ),
    "ldm_super_resolution": Network(
        "LDM super-resolution (UNet2DModel)",
        lambda: ddpm(in_channels=6, layers_per_block=2),
        noise(BATCH, 6, 16, 16),
    ),
    "unclip_super_resolution": Network(
        "UnCLIP super-resolution (UNet2DModel)",
        lambda: ddpm(
            in_channels=6,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D",) * 3,
            up_block_types=("ResnetUpsampleBlock2D",) * 3,
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
        ),
        noise(BATCH, 6, 16, 16),
    ),
    "consistency_model": Network(
        "Consistency Model (UNet2DModel)",
        consistency_model,
        image,
        lambda: {"class_labels": torch.tensor([3, 7])},
    ),
    "ldm_text_to_image": Network(
        "LDM text-to-image (UNet2DConditionModel)",
        lambda: stable_diffusion(center_input_sample=True, freq_shift=1, flip_sin_to_cos=False),
        latent,
        text,
    ),
    "sd15_t2i_adapter": Network(
        "Stable Diffusion 1.5 with T2I-Adapter features (UNet2DConditionModel)",
        stable_diffusion,
        latent,
        t2i_adapter_features,
    ),
    "instruct_pix2pix": Network(
        "InstructPix2Pix and Marigold (UNet2DConditionModel)",
        lambda: stable_diffusion(in_channels=8),
        noise(BATCH, 8, 8, 8),
        text,
    ),
    "gligen": Network("GLIGEN (UNet2DConditionModel)", gligen, latent, gligen_conditioning),
    "sd21": Network(
        "Stable Diffusion 2.1 (UNet2DConditionModel)",
        lambda: stable_diffusion(attention_head_dim=(2, 4, 4), use_linear_projection=True),
        latent,
        text,
    ),
    "stable_unclip": Network(
        "Stable UnCLIP (UNet2DConditionModel)",
        lambda: stable_diffusion(
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=24,
        ),
        latent,
        lambda: {**text(), "class_labels": torch.randn(BATCH, 24)},
    ),
    "sdxl_refiner": Network(
        "Stable Diffusion XL refiner (UNet2DConditionModel)",
        sdxl_refiner,
        latent,
        sdxl_refiner_conditioning,
    ),
    "latent_upscaler": Network(
        "Stable Diffusion latent upscaler (UNet2DConditionModel)",
        latent_upscaler,
        noise(BATCH, 8, 16, 16),
        lambda: {**text(), "timestep_cond": torch.randn(BATCH, 24)},
        as_sigma,
    ),
    "kandinsky21": Network(
        "Kandinsky 2.1 (UNet2DConditionModel)",
        kandinsky21,
        latent,
        lambda: {
            **text(24),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(BATCH, TEXT),
                "image_embeds": torch.randn(BATCH, TEXT),
            },
        },
    ),
    "kandinsky22_controlnet": Network(
        "Kandinsky 2.2 ControlNet (UNet2DConditionModel)",
        kandinsky22_controlnet,
        latent,
        lambda: {
            "encoder_hidden_states": None,
            "added_cond_kwargs": {
                "image_embeds": torch.randn(BATCH, 24),
                "hint": torch.rand(BATCH, 3, 64, 64),
            },
        },
    ),
    "unclip_decoder": Network(
        "UnCLIP decoder (UNet2DConditionModel)",
        unclip_decoder,
        noise(BATCH, 3, 8, 8),
        lambda: {
            **text(),
            "class_labels": torch.randn(BATCH, 64),
            "attention_mask": torch.tensor([[True] * 4 + [False]]).repeat(BATCH, 1),
        },
    ),
    "deepfloyd_if_upscaler": Network(
        "DeepFloyd IF super-resolution (UNet2DConditionModel)",
        lambda: deepfloyd_if(in_channels=6, class_embed_type="timestep"),
        noise(BATCH, 6, 8, 8),
        lambda: {**text(24), "class_labels": torch.tensor([250, 250])},
    ),
    "animatediff_sdxl": Network(
        "AnimateDiff SDXL (UNetMotionModel)",
        animatediff_sdxl,
        noise(BATCH, 4, 2, 8, 8),
        animatediff_sdxl_conditioning,
    ),
    "stable_cascade_decoder": Network(
        "Stable Cascade decoder (StableCascadeUNet)",
        stable_cascade_decoder,
        noise(BATCH, 4, 16, 16),
        lambda: {
            "clip_text_pooled": torch.randn(BATCH, 1, TEXT),
            "effnet": torch.randn(BATCH, 6, 4, 4),
        },
        as_ratio,
    ),
    "wuerstchen": Network(
        "Würstchen decoder (WuerstchenDiffNeXt)",
        wuerstchen,
        noise(BATCH, 4, 16, 16),
        lambda: {"effnet": torch.randn(BATCH, 6, 4, 4), "clip": torch.randn(BATCH, 2, TEXT)},
        as_ratio,
    ),
    "diffuser_1d": Network("Diffuser for planning (UNet1DModel)", diffuser_1d, noise(BATCH, 6, 16)),
    "unidiffuser": Network(
        "UniDiffuser (UniDiffuserModel)",
        unidiffuser,
        latent,
        unidiffuser_conditioning,
        timestep_name="timestep_img",
    ),
    "plain": Network("A plain torch.nn U-Net", PlainUNet, image),
}


def identical(actual: Any, expected: Any) -> bool:
    """Same type, same structure, and every bit of every tensor."""
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    return (
        type(actual) is type(expected)
        and len(ours) == len(theirs)
        and all(map(torch.equal, ours, theirs))
    )


def call_once(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """Call a network that may empty the lists it is given."""
    return module(*args, **tree_map(lambda leaf: leaf, kwargs))


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
    return Program(network.out_spec, graphs, cache_layouts([len(skip.boundary)], [1]))


@torch.no_grad()
def check_every_depth(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: Kwargs
) -> list[SkipConnection]:
    """Assert that full is exact, that a fresh cache is exact, and that a stale one is not."""
    expected = call_once(module, args, kwargs)
    network, leaves = capture_call(module, args, kwargs)
    earlier = list(leaves)
    sample = network.inputs[network.sample]
    earlier[sample] = torch.randn_like(leaves[sample])
    skips = find_skip_connections(network.graph_module, network.sample)
    for skip in skips:
        program = eager_program(network, skip).bind(weights_of(module))
        full, boundary = program.refresh(leaves)
        assert identical(full, expected), f"full at depth {skip.depth}"
        assert identical(program.reuse(leaves, boundary)[0], expected), f"depth {skip.depth}"
        _, stale = program.refresh(earlier)
        assert not identical(program.reuse(leaves, stale)[0], expected), f"depth {skip.depth}"
    return skips
