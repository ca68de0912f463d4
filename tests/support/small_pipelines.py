"""Real pipeline classes around small networks with random weights, and one that is trained."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dcompile import models

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


def unet(in_channels: int = 4, xl: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(3)
    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=2,
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    ).eval()


def stable_diffusion(kind: Any = StableDiffusionPipeline, scheduler: Any = DDIM) -> Any:
    pipe = kind(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(9 if kind is StableDiffusionInpaintPipeline else 4),
        scheduler=scheduler.from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def emoji_sd() -> Any:
    """The bundled Stable Diffusion: the features of a trained network, which change little."""
    pipe = StableDiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl() -> Any:
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(xl=True),
        scheduler=DDIM.from_config(DDIM.config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unconditional(kind: Any) -> Any:
    torch.manual_seed(4)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = DDIMScheduler() if kind is DDIMPipeline else DDPMScheduler()
    pipe = kind(unet=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, seed: int = 0, **more: Any) -> torch.Tensor:
    """The pipeline's final latents, or the picture of an unconditional one."""
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {"generator": generator, "num_inference_steps": 9}
    if isinstance(pipe, (DDPMPipeline, DDIMPipeline)):
        arguments |= {"output_type": "np", "batch_size": 2}
    else:
        arguments |= {"prompt": "a cat", "output_type": "latent"}
        if isinstance(pipe, StableDiffusionImg2ImgPipeline):
            arguments |= {"image": image(seed), "strength": 0.7}
        elif isinstance(pipe, StableDiffusionInpaintPipeline):
            arguments |= {"image": image(seed), "mask_image": image(seed + 1)[:, :1].round()}
            arguments |= {"height": 16, "width": 16}
    images = pipe(**(arguments | more)).images
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images)


PIPELINES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "img2img": lambda: stable_diffusion(StableDiffusionImg2ImgPipeline),
    "inpaint": lambda: stable_diffusion(StableDiffusionInpaintPipeline),
    "ddpm": lambda: unconditional(DDPMPipeline),
    "ddim": lambda: unconditional(DDIMPipeline),
    "emoji-sd": emoji_sd,
}
