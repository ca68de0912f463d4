"""Small networks of every skip-connection family, and the invariants each has to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from builders import (
    BATCH,
    TEXT,
    TOKENS,
    Kwargs,
    PlainUNet,
    animatediff,
    animatediff_sdxl,
    audioldm,
    audioldm2,
    consistency_model,
    controlnet_xs,
    ddpm,
    deepfloyd_if,
    diffuser_1d,
    free_u,
    gligen,
    hunyuan_dit,
    i2vgen_xl,
    kandinsky3,
    kandinsky21,
    kandinsky22,
    kandinsky22_controlnet,
    latent_upscaler,
    sdxl,
    sdxl_refiner,
    stable_cascade,
    stable_cascade_decoder,
    stable_diffusion,
    stable_video,
    unclip_decoder,
    unet_3d,
    unidiffuser,
    wuerstchen,
)
from diffusers import (
    DreamLiteUNetModel,
    UNet1DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
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


def sdxl_conditioning() -> Kwargs:
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(BATCH, 1)
    return {
        **text(),
        "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, TEXT), "time_ids": sizes},
    }


def controlnet_residuals() -> Kwargs:
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4), (32, 2), (32, 2)]
    return {
        **text(),
        "down_block_additional_residuals": tuple(
            torch.randn(BATCH, channels, size, size) for channels, size in shapes
        ),
        "mid_block_additional_residual": torch.randn(BATCH, 32, 2, 2),
    }


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


def sdxl_refiner_conditioning() -> Kwargs:
    sizes_and_score = torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).repeat(BATCH, 1)
    return {
        **text(),
        "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, TEXT), "time_ids": sizes_and_score},
    }


def gligen_conditioning() -> Kwargs:
    grounding = {
        "boxes": torch.rand(BATCH, 3, 4),
        "positive_embeddings": torch.randn(BATCH, 3, TEXT),
        "masks": torch.tensor([[1.0, 1.0, 0.0]]).repeat(BATCH, 1),
    }
    return {**text(), "cross_attention_kwargs": {"gligen": grounding}}


def t2i_adapter_features() -> Kwargs:
    shapes = [(16, 8), (32, 4), (32, 2)]
    features = [torch.randn(BATCH, channels, size, size) for channels, size in shapes]
    return {**text(), "down_intrablock_additional_residuals": features}


def animatediff_sdxl_conditioning() -> Kwargs:
    added = sdxl_conditioning()["added_cond_kwargs"]
    return {**text(batch=2 * BATCH), "added_cond_kwargs": added}


def unidiffuser_conditioning() -> Kwargs:
    return {
        "image_embeds": torch.randn(BATCH, 1, 12),
        "prompt_embeds": torch.randn(BATCH, TOKENS, TEXT),
        "timestep_text": 0,
    }


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
    return capture(module, module.forward, leaves, form.spec, form.samples), leaves


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
    skips = find_skip_connections(network.graph_module, network.samples)
    for skip in skips:
        program = eager_program(network, skip).bind(weights_of(module))
        full, boundary = program.refresh(leaves)
        assert identical(full, expected), f"full at depth {skip.depth}"
        assert identical(program.reuse(leaves, boundary)[0], expected), f"depth {skip.depth}"
        _, stale = program.refresh(earlier)
        assert not identical(program.reuse(leaves, stale)[0], expected), f"depth {skip.depth}"
    return skips
