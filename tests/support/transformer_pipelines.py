"""Real pipelines of diffusers around small diffusion transformers.

No text encoders and, unless an image comes in, no autoencoders: prompts are given as embeddings,
results taken as latents. Each builder returns the pipeline and the arguments of a call without
``num_inference_steps``. ``PIPELINES`` has those of the installed diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    SD3ControlNetModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import Tensor
from transformers_small import TEXT, TOKENS, moved, small_transformer

Called = tuple[Any, dict[str, Any]]

_BUILDERS: dict[str, tuple[str, Callable[[type], Called]]] = {}


def _of(class_name: str) -> Callable[[Callable[[Any], Called]], Callable[[Any], Called]]:
    """Register a builder for a class that this diffusers may or may not have."""

    def register(builder: Callable[[Any], Called]) -> Callable[[Any], Called]:
        _BUILDERS[builder.__name__] = (class_name, builder)
        return builder

    return register


def pipeline(name: str) -> Called:
    """A pipeline and the arguments of a call."""
    class_name, builder = _BUILDERS[name]
    torch.manual_seed(0)
    pipe, kwargs = builder(getattr(diffusers, class_name))
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs


def assembled(kind: Any, transformer: str, scheduler: Any, **components: Any) -> Any:
    """A pipeline with this transformer and scheduler, and nothing for all else that it may have."""
    network, _ = small_transformer(transformer)
    names = inspect.signature(kind.__init__).parameters
    nothing = {
        name: None
        for name, parameter in names.items()
        if name != "self" and parameter.default is parameter.empty
    }
    return kind(**{**nothing, "transformer": network, "scheduler": scheduler, **components})


def autoencoder(channels: int) -> AutoencoderKL:
    """It takes an eighth of each side."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=channels,
        shift_factor=0.0,
    ).eval()


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(1, 3, height, width)


class NothingToCheck:
    """In place of a safety checker."""

    def to(self, device: Any) -> NothingToCheck:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def embeds(width: int = TEXT) -> Tensor:
    return torch.randn(1, TOKENS, width)


def guided(**more: Any) -> dict[str, Any]:
    """Text and negative text."""
    return {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(), **more}


def masks(dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    mask = torch.ones(1, TOKENS, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}


def pooled() -> Tensor:
    return torch.randn(1, 16)


@_of("DiTPipeline")
def dit(kind: Any) -> Called:
    pipe = assembled(kind, "dit", DDIMScheduler(), vae=autoencoder(4))
    return pipe, {"class_labels": [3], "output_type": "pt"}


@_of("PixArtAlphaPipeline")
def pixart_alpha(kind: Any) -> Called:
    pipe = assembled(kind, "pixart", DPMSolverMultistepScheduler())
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return pipe, {**guided(**masks()), **size, "negative_prompt": None}


@_of("PixArtSigmaPipeline")
def pixart_sigma(kind: Any) -> Called:
    return pixart_alpha(kind)


@_of("StableDiffusion3Pipeline")
def sd3(kind: Any) -> Called:
    pipe = assembled(kind, "sd3", FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipe, {
        **guided(pooled_prompt_embeds=pooled(), negative_pooled_prompt_embeds=pooled()),
        "height": 64,
        "width": 64,
    }


@_of("FluxPipeline")
def flux(kind: Any) -> Called:
    pipe = assembled(kind, "flux", FlowMatchEulerDiscreteScheduler())
    return pipe, {
        "prompt_embeds": embeds(),
        "pooled_prompt_embeds": pooled(),
        "height": 64,
        "width": 64,
    }


@_of("FluxPipeline")
def flux_true_guidance(kind: Any) -> Called:
    pipe, kwargs = flux(kind)
    return pipe, {
        **kwargs,
        "negative_prompt_embeds": embeds(),
        "negative_pooled_prompt_embeds": pooled(),
        "true_cfg_scale": 3.0,
    }


@_of("Flux2Pipeline")
def flux2(kind: Any) -> Called:
    pipe = assembled(kind, "flux2", FlowMatchEulerDiscreteScheduler())
    return pipe, {"prompt_embeds": embeds(), "height": 64, "width": 64}


@_of("ChromaPipeline")
def chroma(kind: Any) -> Called:
    pipe = assembled(kind, "chroma", FlowMatchEulerDiscreteScheduler())
    return pipe, guided(**masks(torch.bool), height=64, width=64)


@_of("AuraFlowPipeline")
def aura_flow(kind: Any) -> Called:
    pipe = assembled(kind, "aura_flow", FlowMatchEulerDiscreteScheduler())
    return pipe, guided(**masks(), height=64, width=64)


@_of("SanaPipeline")
def sana(kind: Any) -> Called:
    pipe = assembled(kind, "sana", FlowMatchEulerDiscreteScheduler())
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return pipe, {**guided(**masks()), **size, "negative_prompt": None}


@_of("QwenImagePipeline")
def qwen_image(kind: Any) -> Called:
    pipe = assembled(kind, "qwen_image", FlowMatchEulerDiscreteScheduler())
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    return pipe, guided(
        prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask.clone(), height=64, width=64
    )


@_of("ZImagePipeline")
def z_image(kind: Any) -> Called:
    pipe = assembled(kind, "z_image", FlowMatchEulerDiscreteScheduler())
    return pipe, {
        "prompt_embeds": [torch.randn(TOKENS, TEXT)],
        "negative_prompt_embeds": [torch.randn(TOKENS, TEXT)],
        "height": 64,
        "width": 64,
    }


@_of("HunyuanDiTPipeline")
def hunyuan_dit(kind: Any) -> Called:
    pipe = assembled(kind, "hunyuan_dit", DDIMScheduler(), requires_safety_checker=False)
    two = {f"{name}_2": tensor for name, tensor in {**guided(), **masks()}.items()}
    return pipe, {
        **guided(**masks()),
        **two,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
    }


@_of("HunyuanVideoPipeline")
def hunyuan_video(kind: Any) -> Called:
    pipe = assembled(kind, "hunyuan_video", FlowMatchEulerDiscreteScheduler())
    return pipe, {
        "prompt_embeds": embeds(),
        "prompt_attention_mask": masks()["prompt_attention_mask"],
        "pooled_prompt_embeds": pooled(),
        "height": 64,
        "width": 64,
        "num_frames": 5,
    }


@_of("CogVideoXPipeline")
def cogvideox(kind: Any) -> Called:
    pipe = assembled(kind, "cogvideox", CogVideoXDDIMScheduler())
    return pipe, guided(height=64, width=64, num_frames=5)


def wan_sampler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@_of("WanPipeline")
def wan(kind: Any) -> Called:
    pipe = assembled(kind, "wan", wan_sampler())
    return pipe, guided(height=64, width=64, num_frames=5)


@_of("WanPipeline")
def wan22(kind: Any) -> Called:
    """Two transformers: the first for much noise, the second for little."""
    torch.manual_seed(1)
    second, _ = small_transformer("wan")
    pipe = assembled(kind, "wan", wan_sampler(), transformer_2=second, boundary_ratio=0.6)
    return pipe, guided(height=64, width=64, num_frames=5)


@_of("LTXPipeline")
def ltx(kind: Any) -> Called:
    pipe = assembled(kind, "ltx", FlowMatchEulerDiscreteScheduler())
    return pipe, guided(**masks(), height=128, width=128, num_frames=9)


@_of("AllegroPipeline")
def allegro(kind: Any) -> Called:
    pipe = assembled(kind, "allegro", DDIMScheduler())
    return pipe, {**guided(**masks(), height=64, width=64, num_frames=8), "negative_prompt": None}


@_of("LattePipeline")
def latte(kind: Any) -> Called:
    pipe = assembled(kind, "latte", DDIMScheduler())
    return pipe, {**guided(height=64, width=64, video_length=2), "negative_prompt": None}


@_of("CosmosTextToWorldPipeline")
def cosmos(kind: Any) -> Called:
    checker = NothingToCheck()
    pipe = assembled(kind, "cosmos", EDMEulerScheduler(), safety_checker=checker)
    return pipe, guided(height=64, width=64, num_frames=9)


@_of("StableAudioPipeline")
def stable_audio(kind: Any) -> Called:
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=TEXT, conditioning_dim=TEXT, min_value=0, max_value=32
    )
    pipe = assembled(
        kind,
        "stable_audio",
        CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
        vae=vae.eval(),
        projection_model=projection.eval(),
    )
    return pipe, guided()


@_of("CogView4Pipeline")
def cogview4(kind: Any) -> Called:
    pipe = assembled(kind, "cogview4", FlowMatchEulerDiscreteScheduler())
    return pipe, guided(height=64, width=64)


@_of("Kandinsky5T2VPipeline")
def kandinsky5(kind: Any) -> Called:
    pipe = assembled(kind, "kandinsky5", FlowMatchEulerDiscreteScheduler())
    lengths = torch.tensor([0, TOKENS])
    texts = {
        f"{negative}prompt_{what}": value
        for negative in ("", "negative_")
        for what, value in (
            ("embeds_qwen", embeds()),
            ("embeds_clip", pooled()),
            ("cu_seqlens", lengths),
        )
    }
    return pipe, {**texts, "height": 128, "width": 128, "num_frames": 5}


@_of("PRXPipeline")
def prx(kind: Any) -> Called:
    pipe = assembled(kind, "prx", FlowMatchEulerDiscreteScheduler())
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return pipe, {**guided(**masks(torch.bool)), **size, "negative_prompt": None}


@_of("FluxImg2ImgPipeline")
def flux_img2img(kind: Any) -> Called:
    _, kwargs = flux(diffusers.FluxPipeline)
    sampler = FlowMatchEulerDiscreteScheduler()
    pipe = assembled(kind, "flux", sampler, vae=autoencoder(1))
    return pipe, {**kwargs, "image": image(), "strength": 0.7}


@_of("FluxInpaintPipeline")
def flux_inpaint(kind: Any) -> Called:
    pipe, kwargs = flux_img2img(kind)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:] = 1
    return pipe, {**kwargs, "mask_image": mask}


@_of("FluxKontextPipeline")
def flux_kontext(kind: Any) -> Called:
    """The picture's tokens follow the sample's: the sequence is twice as long."""
    pipe, kwargs = flux_img2img(kind)
    del kwargs["strength"]
    return pipe, {**kwargs, "_auto_resize": False, "max_area": 64 * 64}


@_of("FluxControlNetPipeline")
def flux_controlnet(kind: Any) -> Called:
    _, kwargs = flux(diffusers.FluxPipeline)
    network, _ = small_transformer("flux")
    config = {**network.config, "num_layers": 2, "num_single_layers": 2}
    control = FluxControlNetModel.from_config(config)
    moved(control)
    sampler = FlowMatchEulerDiscreteScheduler()
    pipe = assembled(kind, "flux", sampler, vae=autoencoder(1), controlnet=control.eval())
    return pipe, {**kwargs, "control_image": image()}


@_of("StableDiffusion3Img2ImgPipeline")
def sd3_img2img(kind: Any) -> Called:
    _, kwargs = sd3(diffusers.StableDiffusion3Pipeline)
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = assembled(kind, "sd3", sampler, vae=autoencoder(4))
    return pipe, {**kwargs, "image": image(), "strength": 0.7}


@_of("StableDiffusion3ControlNetPipeline")
def sd3_controlnet(kind: Any) -> Called:
    _, kwargs = sd3(diffusers.StableDiffusion3Pipeline)
    network, _ = small_transformer("sd3")
    config = {**network.config, "num_layers": 2, "extra_conditioning_channels": 0}
    control = SD3ControlNetModel.from_config(config)
    moved(control)
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = assembled(kind, "sd3", sampler, vae=autoencoder(4), controlnet=control.eval())
    return pipe, {**kwargs, "control_image": image()}


PIPELINES = [name for name, (kind, _) in _BUILDERS.items() if hasattr(diffusers, kind)]
