"""Builds small networks and parts of pipelines, with random weights: the one place for it."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    HunyuanDiT2DModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    MotionAdapter,
    StableCascadeUNet,
    T2IAdapter,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    VQModel,
)
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

BATCH = 2
TEXT = 16  # width of a text embedding
TOKENS = 5

Kwargs = dict[str, Any]

# Networks


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


def simple_attention(**config: Any) -> UNet2DConditionModel:
    """The blocks of Kandinsky, unCLIP and DeepFloyd's IF."""
    return stable_diffusion(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        **config,
    )


def kandinsky22() -> UNet2DConditionModel:
    return simple_attention(
        out_channels=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )


def deepfloyd_if(in_channels: int = 3, **config: Any) -> UNet2DConditionModel:
    return simple_attention(
        in_channels=in_channels,
        out_channels=6,
        cross_attention_dim=32,  # cross_attention_norm has 32 groups, whatever the configuration
        encoder_hid_dim=24,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        **config,
    )


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


def unet_3d(kind: Any = UNet3DConditionModel) -> Any:
    return kind(
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
    return unet_3d(I2VGenXLUNet)


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


def stable_cascade(**config: Any) -> StableCascadeUNet:
    return StableCascadeUNet(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_pooled_in_channels": TEXT,
            "clip_seq": 2,
            **config,
        }
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


def latent_upscaler(**config: Any) -> UNet2DConditionModel:
    return stable_diffusion(
        **{
            "in_channels": 8,
            "block_out_channels": (32, 32, 64, 64),  # its blocks have groups of 32 channels
            "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
            "mid_block_type": None,
            "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
            "attention_head_dim": 16,
            "act_fn": "gelu",
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
            "norm_num_groups": None,
            "only_cross_attention": False,
            "resnet_time_scale_shift": "scale_shift",
            "time_embedding_type": "fourier",
            "time_cond_proj_dim": 24,
            "timestep_post_act": "gelu",
            **config,
        }
    )


def kandinsky21() -> UNet2DConditionModel:
    return simple_attention(
        out_channels=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
    )


def kandinsky22_controlnet() -> UNet2DConditionModel:
    return simple_attention(
        in_channels=8,
        out_channels=8,
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image_hint",
    )


def unclip_decoder() -> UNet2DConditionModel:
    return simple_attention(
        in_channels=3,
        out_channels=6,
        class_embed_type="identity",
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


def gligen(**config: Any) -> UNet2DConditionModel:
    """A network whose boxes matter; in a new one the gates are shut."""
    network = stable_diffusion(attention_type="gated", **config)
    for name, parameter in network.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            nn.init.ones_(parameter)
    return network


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


def stable_cascade_decoder() -> StableCascadeUNet:
    attention = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return stable_cascade(
        patch_size=2,
        block_out_channels=(8, 16, 32),
        num_attention_heads=(0, 2, 2),
        down_num_layers_per_block=(1, 2, 1),
        up_num_layers_per_block=(1, 2, 1),
        down_blocks_repeat_mappers=(1, 1, 1),
        up_blocks_repeat_mappers=(2, 2, 1),
        block_types_per_layer=(attention[:2], attention, attention),
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


# Parts of pipelines


DDIM = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
)


@cache
def tokenizer() -> CLIPTokenizer:
    folder = Path(mkdtemp())
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    words += list("abcdefghijklmnopqrstuvwxyz")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def text_encoder(projected: bool = False) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(config).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def image(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ddim() -> DDIMScheduler:
    return DDIMScheduler.from_config(DDIM.config)


# Two levels are enough for a pipeline.
SHALLOW = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(**config: Any) -> UNet2DConditionModel:
    return stable_diffusion(**{**SHALLOW, **config})


def unet_xl(**config: Any) -> UNet2DConditionModel:
    return unet(
        **{
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT + 6 * 8,
            "cross_attention_dim": 2 * TEXT,
            **config,
        }
    )


def unconditional(**config: Any) -> UNet2DModel:
    return ddpm(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **config,
        }
    )


def deepfloyd_upscaler() -> UNet2DConditionModel:
    config = deepfloyd_if().config
    return UNet2DConditionModel.from_config(config, in_channels=6, class_embed_type="timestep")


def cascade_prior() -> StableCascadeUNet:
    return stable_cascade(
        clip_text_in_channels=TEXT, clip_image_in_channels=TEXT, switch_level=(False,)
    )


def cascade_decoder() -> StableCascadeUNet:
    return stable_cascade(effnet_in_channels=4)


def controlnet(network: UNet2DConditionModel) -> ControlNetModel:
    """With something to add, which a new one has not."""
    control = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8))
    for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.normal_(part.weight, std=0.1)
    return control.eval()


def adapter() -> T2IAdapter:
    return T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)


def motion_adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )


def picture_encoder(size: int) -> Any:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
        projection_dim=TEXT,
    )
    return CLIPVisionModelWithProjection(config).eval()


def picture_extractor(size: int) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)


def vq(latent_channels: int = 4) -> VQModel:
    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        num_vq_embeddings=8,
        norm_num_groups=4,
    )


def bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=64,
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=TEXT,
        )
    )


def vocoder() -> Any:
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        sampling_rate=16,
    )
    return SpeechT5HifiGan(config).eval()


def mel_vae() -> AutoencoderKL:
    return AutoencoderKL.from_config(vae().config, in_channels=1, out_channels=1)


def pipeline(kind: Any, **parts: Any) -> Any:
    """A pipeline with the usual components, unless others are given; None where it has no use."""
    usual = {
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": lambda: text_encoder(projected=True),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": ddim,
        "unet": unet,
        "requires_safety_checker": lambda: False,
    }
    made = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in parts:
            made[name] = parts[name]
        elif name in usual:
            made[name] = usual[name]()
        elif parameter.default is parameter.empty and name != "self":
            made[name] = None
    for part in made.values():
        if isinstance(part, nn.Module):
            part.eval()
    return kind(**made)
