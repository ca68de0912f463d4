"""Real pipeline classes around small networks with random weights, and one that is trained."""

import functools
from typing import Any

import builders
import torch
from builders import DDIM, image, text_encoder, tokenizer, vae
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from dcompile import models


def unet(in_channels: int = 4, xl: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(3)
    build = functools.partial(builders.unet_xl, use_linear_projection=True) if xl else builders.unet
    return build(
        in_channels=in_channels, layers_per_block=2, attention_head_dim=4, norm_num_groups=4
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
    network = builders.unconditional(layers_per_block=2, norm_num_groups=4, attention_head_dim=4)
    scheduler = DDIMScheduler() if kind is DDIMPipeline else DDPMScheduler()
    pipe = kind(unet=network.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
