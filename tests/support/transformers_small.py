"""Small diffusion transformers of diffusers, with random weights and an example call each.

Each builder returns the network and the keyword arguments of one call. ``TRANSFORMERS`` has those
of the installed diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Call = tuple[nn.Module, dict[str, Any]]

BATCH = 2
TEXT = 24  # width of a text embedding
TOKENS = 5  # of a text
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

_BUILDERS: dict[str, tuple[str, Callable[[type], Call]]] = {}


def _of(class_name: str) -> Callable[[Callable[[Any], Call]], Callable[[Any], Call]]:
    """Register a builder for a class that this diffusers may or may not have."""

    def register(builder: Callable[[Any], Call]) -> Callable[[Any], Call]:
        _BUILDERS[builder.__name__] = (class_name, builder)
        return builder

    return register


def small_transformer(name: str) -> Call:
    """A network whose every layer has a say in its output, and a call of it."""
    class_name, builder = _BUILDERS[name]
    torch.manual_seed(0)
    module, kwargs = builder(getattr(diffusers, class_name))
    moved(module)
    return module.eval(), {**kwargs, "return_dict": False}


def moved(module: nn.Module) -> None:
    """Give weights that are all zero values: many blocks start as if they were not there."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter.detach(), std=0.05)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def text(width: int = TEXT) -> Tensor:
    return torch.randn(BATCH, TOKENS, width)


def time() -> Tensor:
    return torch.tensor([500.0] * BATCH)


def text_mask() -> Tensor:
    return torch.tensor([[1] * TOKENS] * BATCH)


def ids(height: int, width: int) -> Tensor:
    """FLUX's positions: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


@_of("DiTTransformer2DModel")
def dit(kind: Any) -> Call:
    network = kind(
        **HEADS,
        num_layers=4,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": torch.tensor([500] * BATCH),
        "class_labels": torch.tensor([3, 7]),
    }


@_of("PixArtTransformer2DModel")
def pixart(kind: Any) -> Call:
    network = kind(
        **HEADS,
        num_layers=4,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": time(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": text_mask(),
    }


@_of("SD3Transformer2DModel")
def sd3(kind: Any) -> Call:
    network = kind(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "pooled_projections": noise(BATCH, 16),
        "timestep": time(),
    }


@_of("SD3Transformer2DModel")
def sd35(kind: Any) -> Call:
    _, kwargs = sd3(kind)
    network = kind(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return network, kwargs


@_of("SD3Transformer2DModel")
def sd3_controlnet(kind: Any) -> Call:
    network, kwargs = sd3(kind)
    return network, {
        **kwargs,
        "block_controlnet_hidden_states": [noise(BATCH, 16, 32) for _ in range(2)],
    }


@_of("FluxTransformer2DModel")
def flux(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=4,
        joint_attention_dim=TEXT,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return network, {
        "hidden_states": noise(BATCH, 16, 4),
        "encoder_hidden_states": text(),
        "pooled_projections": noise(BATCH, 16),
        "timestep": time() / 1000,
        "guidance": torch.full((BATCH,), 3.5),
        "img_ids": ids(4, 4),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


@_of("FluxTransformer2DModel")
def flux_controlnet(kind: Any) -> Call:
    network, kwargs = flux(kind)
    return network, {
        **kwargs,
        "controlnet_block_samples": [noise(BATCH, 16, 32) for _ in range(2)],
        "controlnet_single_block_samples": [noise(BATCH, 16, 32) for _ in range(2)],
    }


@_of("Flux2Transformer2DModel")
def flux2(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    positions = torch.cat([ids(4, 4), torch.zeros(16, 1)], dim=1)
    return network, {
        "hidden_states": noise(BATCH, 16, 4),
        "encoder_hidden_states": text(),
        "timestep": time() / 1000,
        "guidance": torch.full((BATCH,), 3.5),
        "img_ids": positions.expand(BATCH, -1, -1),
        "txt_ids": torch.zeros(BATCH, TOKENS, 4),
    }


@_of("ChromaTransformer2DModel")
def chroma(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return network, {
        "hidden_states": noise(BATCH, 16, 4),
        "encoder_hidden_states": text(),
        "timestep": time() / 1000,
        "img_ids": ids(4, 4),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


@_of("WanTransformer3DModel")
def wan(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": time(),
    }


@_of("WanTransformer3DModel")
def wan_image(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=8,
        out_channels=4,
        num_layers=3,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
        image_dim=TEXT,
        added_kv_proj_dim=32,
    )
    return network, {
        "hidden_states": noise(BATCH, 8, 2, 8, 8),
        "encoder_hidden_states": noise(BATCH, 512, TEXT),  # it splits the text off by this length
        "encoder_hidden_states_image": noise(BATCH, 3, TEXT),
        "timestep": time(),
    }


@_of("WanVACETransformer3DModel")
def wan_vace(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "encoder_hidden_states": text(),
        "control_hidden_states": noise(BATCH, 6, 2, 8, 8),
        "timestep": time(),
    }


@_of("SkyReelsV2Transformer3DModel")
def skyreels(kind: Any) -> Call:
    return wan(kind)


@_of("LTXVideoTransformer3DModel")
def ltx(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=32,
        caption_channels=TEXT,
    )
    return network, {
        "hidden_states": noise(BATCH, 2 * 4 * 4, 4),
        "encoder_hidden_states": text(),
        "timestep": time(),
        "encoder_attention_mask": text_mask(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


@_of("SanaTransformer2DModel")
def sana(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=8,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": time(),
    }


@_of("AuraFlowTransformer2DModel")
def aura_flow(kind: Any) -> Call:
    network = kind(
        **HEADS,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": time() / 1000,
    }


@_of("HunyuanVideoTransformer3DModel")
def hunyuan_video(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "timestep": time(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": noise(BATCH, 16),
        "guidance": torch.full((BATCH,), 6000.0),
    }


@_of("HunyuanVideoTransformer3DModel")
def hunyuan_video_image(kind: Any) -> Call:
    _, kwargs = hunyuan_video(kind)
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
        image_condition_type="token_replace",
    )
    return network, kwargs


@_of("HunyuanImageTransformer2DModel")
def hunyuan_image(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        rope_axes_dim=(8, 8),
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 4, 4),
        "timestep": time(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
    }


@_of("Lumina2Transformer2DModel")
def lumina2(kind: Any) -> Call:
    network = kind(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 16, 16),
        cap_feat_dim=TEXT,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": time() / 1000,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask().bool(),
    }


@_of("QwenImageTransformer2DModel")
def qwen_image(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )
    return network, {
        "hidden_states": noise(BATCH, 16, 16),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": time() / 1000,
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }


@_of("CogVideoXTransformer3DModel")
def cogvideox(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
    )
    return network, {
        "hidden_states": noise(BATCH, 2, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([500] * BATCH),
    }


@_of("CogView4Transformer2DModel")
def cogview4(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    sizes = torch.tensor([[64, 64]] * BATCH)
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([500] * BATCH),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": torch.zeros_like(sizes),
    }


@_of("MochiTransformer3DModel")
def mochi(kind: Any) -> Call:
    network = kind(
        **HEADS,
        num_layers=4,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        max_sequence_length=TOKENS,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([500] * BATCH),
        "encoder_attention_mask": text_mask().bool(),
    }


@_of("AllegroTransformer3DModel")
def allegro(kind: Any) -> Call:
    network = kind(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=4,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=TEXT,
    )
    rotary = [torch.randn(4, 8) for _ in range(6)]
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T[:, None]
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "encoder_hidden_states": noise(BATCH, 1, TOKENS, TEXT),
        "timestep": torch.tensor([500] * BATCH),
        "attention_mask": torch.ones(BATCH, 2, 8, 8),
        "encoder_attention_mask": torch.ones(BATCH, 1, TOKENS),
        "image_rotary_emb": (
            tuple((rotary[2 * axis], rotary[2 * axis + 1]) for axis in range(3)),
            tuple(positions),
        ),
    }


@_of("LatteTransformer3DModel")
def latte(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=2,
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 2, 8, 8),
        "timestep": torch.tensor([500] * BATCH),
        "encoder_hidden_states": text(),
    }


@_of("CosmosTransformer3DModel")
def cosmos(kind: Any) -> Call:
    network = kind(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        mlp_ratio=2,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # resizing it takes torchvision
    )
    return network, {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, TOKENS, TEXT),
        "fps": 24,
    }


@_of("StableAudioDiTModel")
def stable_audio(kind: Any) -> Call:
    network = kind(
        **HEADS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=2 * TEXT,
        cross_attention_input_dim=TEXT,
    )
    angles = torch.randn(17, 8)
    return network, {
        "hidden_states": noise(BATCH, 4, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text(),
        "global_hidden_states": noise(BATCH, 1, 2 * TEXT),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


@_of("OmniGenTransformer2DModel")
def omnigen(kind: Any) -> Call:
    network = kind(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=4,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pos_embed_max_size=8,
        time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )
    length = TOKENS + 1 + 16
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": time() / 1000,
        "input_ids": torch.randint(1, 60, (BATCH, TOKENS)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(BATCH, length, length),
        "position_ids": torch.arange(length).expand(BATCH, -1),
    }


@_of("ZImageTransformer2DModel")
def z_image(kind: Any) -> Call:
    network = kind(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    return network, {
        "x": [noise(4, 1, 8, 8) for _ in range(BATCH)],
        "t": time() / 1000,
        "cap_feats": [noise(TOKENS, TEXT) for _ in range(BATCH)],
    }


@_of("HunyuanDiT2DModel")
def hunyuan_dit(kind: Any) -> Call:
    network = kind(
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        hidden_size=32,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT,
        pooled_projection_dim=8,
        text_len=TOKENS,
        text_len_t5=TOKENS,
        use_style_cond_and_image_meta_size=False,
    )
    angles = torch.randn(16, 16)
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": time(),
        "encoder_hidden_states": text(),
        "text_embedding_mask": torch.ones(BATCH, TOKENS),
        "encoder_hidden_states_t5": text(),
        "text_embedding_mask_t5": torch.ones(BATCH, TOKENS),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@_of("Kandinsky5Transformer3DModel")
def kandinsky5(kind: Any) -> Call:
    network = kind(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
    )
    return network, {
        "hidden_states": noise(BATCH, 2, 8, 8, 4),
        "encoder_hidden_states": text(),
        "timestep": time(),
        "pooled_projections": noise(BATCH, 16),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TOKENS),
    }


@_of("PRXTransformer2DModel")
def prx(kind: Any) -> Call:
    network = kind(
        in_channels=4,
        context_in_dim=TEXT,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=4,
        axes_dim=[8, 8],
    )
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": time() / 1000,
        "encoder_hidden_states": text(),
    }


@_of("BriaTransformer2DModel")
def bria(kind: Any) -> Call:
    network, kwargs = flux(
        lambda **config: kind(**{**config, "guidance_embeds": False, "axes_dims_rope": [4, 4, 8]})
    )
    kwargs.pop("guidance")
    kwargs.pop("pooled_projections")
    return network, kwargs


@_of("LuminaNextDiT2DModel")
def lumina_next(kind: Any) -> Call:
    network = kind(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT,
    )
    angles = torch.randn(16, 16, 8)
    return network, {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": time() / 1000,
        "encoder_hidden_states": text(),
        "encoder_mask": text_mask(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


@_of("PriorTransformer")
def prior(kind: Any) -> Call:
    network = kind(**HEADS, num_layers=4, embedding_dim=TEXT, num_embeddings=TOKENS)
    return network, {
        "hidden_states": noise(BATCH, TEXT),
        "timestep": 500,
        "proj_embedding": noise(BATCH, TEXT),
        "encoder_hidden_states": text(),
    }


TRANSFORMERS = [name for name, (kind, _) in _BUILDERS.items() if hasattr(diffusers, kind)]
