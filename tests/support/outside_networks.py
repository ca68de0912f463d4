"""Small networks that are not from diffusers: of other packages, and as others write them."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from builders import BATCH, TEXT, TOKENS, Kwargs
from networks import Network, as_float, noise, per_sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 10


def awake(module: nn.Module) -> nn.Module:
    """Fill what is zero until it is trained: it would hide what is left out."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


# --- MONAI


def monai(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = getattr(importlib.import_module("monai.networks.nets"), name)
        return awake(
            network(
                **{
                    "spatial_dims": 2,
                    "in_channels": 1,
                    "out_channels": 1,
                    "channels": (8, 16, 16),
                    "attention_levels": (False, True, True),
                    "num_res_blocks": 1,
                    "norm_num_groups": 4,
                    "num_head_channels": 8,
                    **config,
                }
            )
        )

    return build


CROSS_ATTENTION = {"with_conditioning": True, "cross_attention_dim": TEXT}
VOLUME = {
    "spatial_dims": 3,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}


def context() -> Kwargs:
    return {"context": torch.randn(BATCH, TOKENS, TEXT)}


def monai_residuals() -> Kwargs:
    shapes = [(8, 16), (8, 16), (8, 8), (16, 8), (16, 4), (16, 4)]
    return {
        "down_block_additional_residuals": [
            torch.randn(BATCH, channels, size, size) for channels, size in shapes
        ],
        "mid_block_additional_residual": torch.randn(BATCH, 16, 4, 4),
    }


# --- denoising-diffusion-pytorch

# What its trainer imports, and its networks do not need.
TRAINER = {
    "ema_pytorch": ("EMA",),
    "pytorch_fid": (),
    "pytorch_fid.fid_score": ("calculate_frechet_distance",),
    "pytorch_fid.inception": ("InceptionV3",),
    "scipy": (),
    "scipy.optimize": ("linear_sum_assignment",),
    "torchvision": ("transforms", "utils"),
}


@contextmanager
def stand_ins(modules: dict[str, tuple[str, ...]]) -> Iterator[None]:
    """Empty modules with these names in them, in the place of those that are not installed."""
    missing = [name for name in modules if find_spec(name.partition(".")[0]) is None]
    for name in missing:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(modules[name]))
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def denoising_diffusion(module: str = "") -> ModuleType:
    """``denoising_diffusion_pytorch`` or a module of it, without what only training needs."""
    import accelerate  # noqa: F401  (it must not find the stand-ins)

    with stand_ins(TRAINER):
        return importlib.import_module(f"denoising_diffusion_pytorch{module and '.'}{module}")


def lucidrains(name: str, module: str = "", **config: Any) -> Callable[[], nn.Module]:
    return lambda: awake(getattr(denoising_diffusion(module), name)(**config))


SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 4, "attn_heads": 2}
SMALL_KARRAS = {
    "dim": 8,
    "dim_max": 16,
    "channels": 3,
    "num_downsamples": 2,
    "num_blocks_per_stage": 1,
    "attn_res": (8,),
    "attn_dim_head": 4,
}


# --- A U-Net in the style of latent-diffusion


class Checkpoint(torch.autograd.Function):
    """Forward without a graph, and again with one in backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.inputs, ctx.parameters = list(tensors[:count]), list(tensors[count:])
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.inputs]
        with torch.enable_grad():
            result = ctx.function(*(tensor.view_as(tensor) for tensor in inputs))
        return (
            None,
            None,
            *torch.autograd.grad(result, inputs + ctx.parameters, gradients, allow_unused=True),
        )


class Checkpointed(nn.Module):
    """A block that saves memory in training, in one of three ways; ``inner`` computes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.way == "own":
            return Checkpoint.apply(self.inner, len(tensors), *tensors, *self.parameters())
        if self.way in ("reentrant", "not reentrant"):
            return checkpoint(self.inner, *tensors, use_reentrant=self.way == "reentrant")
        return self.inner(*tensors)

    def inner(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError


class WithTimestep:
    """Blocks that take the time embedding."""


class WithContext:
    """Blocks that take what the picture is conditioned on."""


class BlockSequence(nn.Sequential):
    """Hands each block what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for block in self:
            if isinstance(block, WithTimestep):
                x = block(x, emb)
            elif isinstance(block, WithContext) and context is not None:
                x = block(x, context)
            else:
                x = block(x)
        return x


class FloatNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ScaleShiftBlock(Checkpointed, WithTimestep):
    def __init__(self, channels: int, out_channels: int, time_channels: int, way: str) -> None:
        super().__init__(way)
        self.in_layers = nn.Sequential(
            FloatNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            FloatNorm(4, out_channels),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def inner(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class SelfAttention(Checkpointed):
    def __init__(self, channels: int, heads: int, way: str) -> None:
        super().__init__(way)
        self.heads = heads
        self.norm = FloatNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def inner(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (3 * self.heads, -1)).chunk(3, dim=1)
        weights = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(q.shape[2])
        h = torch.einsum("bhts,bhcs->bhct", weights.softmax(dim=-1), v).flatten(1, 2)
        return (flat + self.proj_out(h)).view_as(x)


class CrossAttention(Checkpointed, WithContext):
    def __init__(self, channels: int, context_channels: int, heads: int, way: str) -> None:
        super().__init__(way)
        self.norm = FloatNorm(4, channels)
        self.attention = nn.MultiheadAttention(
            channels, heads, kdim=context_channels, vdim=context_channels, batch_first=True
        )
        self.ff = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GLU(dim=-1)
        )

    def inner(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, context, context, need_weights=False)[0]
        tokens = tokens + self.ff(tokens)
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class LatentDiffusionUNet(nn.Module):
    """``input_blocks``, ``middle_block`` and ``output_blocks``, as LDM-4-G on ImageNet has them.

    Args:
        context_channels: of what cross-attention reads; None for attention of the picture alone.
        num_classes: of a label embedding that is added to the time embedding.
        way: of checkpointing: "none", "own", "reentrant", "not reentrant".
    """

    def __init__(
        self,
        channels: int = 8,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention_levels: tuple[int, ...] = (1, 2),
        context_channels: int | None = None,
        num_classes: int | None = None,
        way: str = "none",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.dtype = torch.float32
        time = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time)

        def attention(width: int) -> nn.Module:
            if context_channels is None:
                return SelfAttention(width, 2, way)
            return CrossAttention(width, context_channels, 2, way)

        self.input_blocks = nn.ModuleList([BlockSequence(nn.Conv2d(3, channels, 3, padding=1))])
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers = [ScaleShiftBlock(width, multiplier * channels, time, way)]
                width = multiplier * channels
                if level in attention_levels:
                    layers.append(attention(width))
                self.input_blocks.append(BlockSequence(*layers))
                skips.append(width)
            if level < len(multipliers) - 1:
                down = nn.Conv2d(width, width, 3, stride=2, padding=1)
                self.input_blocks.append(BlockSequence(down))
                skips.append(width)
        self.middle_block = BlockSequence(
            ScaleShiftBlock(width, width, time, way),
            attention(width),
            ScaleShiftBlock(width, width, time, way),
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                layers = [ScaleShiftBlock(width + skips.pop(), multiplier * channels, time, way)]
                width = multiplier * channels
                if level in attention_levels:
                    layers.append(attention(width))
                if level > 0 and block == blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(BlockSequence(*layers))
        self.out = nn.Sequential(
            FloatNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert (y is not None) == (self.num_classes is not None)
        emb = self.time_embed(self.timestep_embedding(timesteps))
        if y is not None:
            emb = emb + self.label_emb(y)
        hs = []
        h = x.type(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb, context)
            hs.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, hs.pop()], dim=1), emb, context)
        return self.out(h.type(x.dtype))

    def timestep_embedding(self, timesteps: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32) / half
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * steps).to(
            timesteps.device
        )
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def checkpointed(way: str) -> LatentDiffusionUNet:
    return LatentDiffusionUNet(
        multipliers=(1, 2), blocks=1, attention_levels=(1,), context_channels=TEXT, way=way
    )


def class_context() -> Kwargs:
    return {"context": torch.randn(BATCH, 1, TEXT)}


picture = noise(BATCH, 1, 16, 16)
color = noise(BATCH, 3, 16, 16)

MONAI: dict[str, Network] = {
    "monai_2d": Network(
        "MONAI, 2-D (DiffusionModelUNet)",
        monai("DiffusionModelUNet"),
        picture,
        timestep=per_sample,
    ),
    "monai_2d_classes": Network(
        "MONAI, 2-D with classes (DiffusionModelUNet)",
        monai("DiffusionModelUNet", num_class_embeds=CLASSES, resblock_updown=True),
        picture,
        lambda: {"class_labels": torch.tensor([3, 7])},
        per_sample,
    ),
    "monai_2d_cross_attention": Network(
        "MONAI, 2-D with cross-attention (DiffusionModelUNet)",
        monai("DiffusionModelUNet", transformer_num_layers=2, **CROSS_ATTENTION),
        picture,
        context,
        per_sample,
    ),
    "monai_2d_controlnet": Network(
        "MONAI, 2-D with ControlNet residuals (DiffusionModelUNet)",
        monai("DiffusionModelUNet"),
        picture,
        monai_residuals,
        per_sample,
    ),
    "monai_2d_flash": Network(
        "MONAI, 2-D with flash attention (DiffusionModelUNet)",
        monai("DiffusionModelUNet", use_flash_attention=True, use_combined_linear=True),
        picture,
        timestep=per_sample,
    ),
    "monai_3d": Network(
        "MONAI, 3-D (DiffusionModelUNet)",
        monai("DiffusionModelUNet", **VOLUME),
        noise(BATCH, 1, 8, 8, 8),
        timestep=per_sample,
    ),
    "monai_3d_cross_attention": Network(
        "MONAI, 3-D with cross-attention and classes (DiffusionModelUNet)",
        monai("DiffusionModelUNet", num_class_embeds=CLASSES, **VOLUME, **CROSS_ATTENTION),
        noise(BATCH, 1, 8, 8, 8),
        lambda: {**context(), "class_labels": torch.tensor([3, 7])},
        per_sample,
    ),
    "monai_spade": Network(
        "MONAI, 2-D with a segmentation (SPADEDiffusionModelUNet)",
        monai("SPADEDiffusionModelUNet", label_nc=3),
        picture,
        lambda: {"seg": torch.rand(BATCH, 3, 16, 16)},
        per_sample,
    ),
}

DENOISING_DIFFUSION: dict[str, Network] = {
    "ddpm_pytorch": Network(
        "denoising-diffusion-pytorch (Unet)",
        lucidrains("Unet", **SMALL),
        color,
        timestep=per_sample,
    ),
    "ddpm_pytorch_self_condition": Network(
        "denoising-diffusion-pytorch with self-conditioning (Unet)",
        lucidrains(
            "Unet", self_condition=True, learned_sinusoidal_cond=True, flash_attn=True, **SMALL
        ),
        color,
        lambda: {"x_self_cond": torch.randn(BATCH, 3, 16, 16)},
        as_float,
    ),
    "ddpm_pytorch_guidance": Network(
        "denoising-diffusion-pytorch with classes (classifier_free_guidance.Unet)",
        lucidrains("Unet", "classifier_free_guidance", num_classes=CLASSES, **SMALL),
        color,
        lambda: {"classes": torch.tensor([3, 7]), "cond_drop_prob": 0.0},
        per_sample,
    ),
    "ddpm_pytorch_1d": Network(
        "denoising-diffusion-pytorch, 1-D (Unet1D)",
        lucidrains("Unet1D", **SMALL),
        noise(BATCH, 3, 32),
        timestep=per_sample,
    ),
    "ddpm_pytorch_karras": Network(
        "denoising-diffusion-pytorch, EDM2 (KarrasUnet)",
        lucidrains("KarrasUnet", image_size=16, num_classes=CLASSES, **SMALL_KARRAS),
        color,
        lambda: {"class_labels": torch.tensor([3, 7])},
        as_float,
    ),
    "ddpm_pytorch_karras_1d": Network(
        "denoising-diffusion-pytorch, EDM2, 1-D (KarrasUnet1D)",
        lucidrains("KarrasUnet1D", seq_len=16, **SMALL_KARRAS),
        noise(BATCH, 3, 16),
        timestep=as_float,
    ),
    "ddpm_pytorch_karras_3d": Network(
        "denoising-diffusion-pytorch, EDM2, 3-D (KarrasUnet3D)",
        lucidrains("KarrasUnet3D", image_size=8, frames=4, **SMALL_KARRAS),
        noise(BATCH, 3, 4, 8, 8),
        timestep=as_float,
    ),
    "ddpm_pytorch_uvit": Network(
        "denoising-diffusion-pytorch, simple diffusion (UViT)",
        lucidrains("UViT", "simple_diffusion", vit_depth=1, **SMALL),
        color,
        timestep=as_float,
    ),
}

LATENT_DIFFUSION: dict[str, Network] = {
    "ldm_imagenet": Network(
        "LDM-4-G, as CompVis writes it",
        lambda: LatentDiffusionUNet(context_channels=TEXT),
        color,
        class_context,
        per_sample,
    ),
    "ldm_labels": Network(
        "A guided-diffusion U-Net with labels",
        lambda: LatentDiffusionUNet(num_classes=CLASSES),
        color,
        lambda: {"y": torch.tensor([3, 7])},
        per_sample,
    ),
    "ldm_own_checkpoint": Network(
        "LDM-4-G with checkpointing of its own",
        lambda: checkpointed("own"),
        color,
        class_context,
        per_sample,
    ),
    "ldm_reentrant_checkpoint": Network(
        "LDM-4-G with torch.utils.checkpoint, reentrant",
        lambda: checkpointed("reentrant"),
        color,
        class_context,
        per_sample,
    ),
    "ldm_checkpoint": Network(
        "LDM-4-G with torch.utils.checkpoint",
        lambda: checkpointed("not reentrant"),
        color,
        class_context,
        per_sample,
    ),
}

OUTSIDE = {**MONAI, **DENOISING_DIFFUSION, **LATENT_DIFFUSION}
