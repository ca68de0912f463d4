"""Train emoji-dit, a small Stable Diffusion 3 that draws emoji from their names.

    python bench/train_emoji_dit.py                 # two CPU cores: two hours; a GPU: minutes
    python bench/train_emoji_dit.py --minutes 8     # stop in time; the same line goes on later

Its autoencoder and larger text encoder are emoji-sd's; trained are the transformer, by flow
matching, and the smaller text encoder. Exports the averaged weights as a stock
``StableDiffusion3Pipeline`` folder. It may be killed at any point; the next run goes on from the
last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from emoji_data import FONT, Captioned
from train_emoji_sd import (
    SHOWN,
    SIZE,
    TOKENS,
    Batches,
    Captions,
    autocast,
    export_text_encoder,
    export_tokenizer,
    kept_bank,
)
from training import Stage
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
ABSENT = (1, 256)  # tokens of the third encoder that a pipeline may ask for; 256 by default
CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# emoji-dit

A small, genuine Stable Diffusion 3 that draws {size}x{size} emoji from a prompt: the transformer
among the bundled models, subject of `dcompile demo --model emoji-dit` and of the fidelity
benchmark. Stock `StableDiffusion3Pipeline.from_pretrained` loads it; guidance 4 and 28 steps suit
it.

- **Network**: `SD3Transformer2DModel`, {transformer:.1f} M parameters, {layers} blocks of width
  {width}, patches of 2x2 latents; rectified flow. The autoencoder ({vae:.1f} M) and the first text
  encoder ({text:.1f} M) are emoji-sd's; the second text encoder ({small:.1f} M) was trained with
  the transformer. There is no third: the pipeline gives zeros for its tokens, 256 of them unless
  told otherwise (`max_sequence_length=1` draws as well, and faster). Averaged (EMA) weights in
  fp16.
- **Data**: emoji-sd's: {glyphs} glyphs of Noto Color Emoji (SIL Open Font License 1.1) and their
  names; one caption in ten was held out.
- **Training**: `bench/train_emoji_dit.py`, AdamW, {steps} steps of {batch} latents, 10 % of the
  captions dropped.
- **Limits**: those of emoji-sd: it knows nothing but these emoji and their names.
"""


# --- the parts ------------------------------------------------------------------------------------


def text_encoder_of_emoji_sd(folder: Path) -> CLIPTextModelWithProjection:
    """emoji-sd's, with the identity for the projection that Stable Diffusion 3 wants."""
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    encoder = CLIPTextModelWithProjection.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32
    )
    torch.nn.init.eye_(encoder.text_projection.weight)
    assert config.projection_dim == config.hidden_size
    return encoder.requires_grad_(False).eval()


def build_small_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer(layers: int, width: int, heads: int, text: int) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5's kind of block, with normalized queries and keys.

    Args:
        text: width of both text encoders' tokens together.
    """
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=text,
        caption_projection_dim=width,
        pooled_projection_dim=text,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )


def zero_final_layers(transformer: SD3Transformer2DModel) -> None:
    """Blocks begin as the identity and the output as zero, as DiT's training does."""
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


class RepeatedLastToken:
    """Joint attention as if the last text token were there ``count`` times.

    Tokens that are equal stay equal: text has no positions here. So one of them with log(count)
    added to its scores does for the zeros of the absent third encoder, at a third of the cost.
    """

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, text = hidden_states, encoder_hidden_states

        def heads(tokens: torch.Tensor, norm: Any) -> torch.Tensor:
            split = tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = torch.cat(
            [
                heads(attn.to_q(pictures), attn.norm_q),
                heads(attn.add_q_proj(text), attn.norm_added_q),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                heads(attn.to_k(pictures), attn.norm_k),
                heads(attn.add_k_proj(text), attn.norm_added_k),
            ],
            dim=2,
        )
        value = torch.cat(
            [heads(attn.to_v(pictures), None), heads(attn.add_v_proj(text), None)], dim=2
        )
        scores = query.new_zeros(1, 1, 1, key.shape[2])
        scores[..., -1] = math.log(self.count)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=scores)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        of_pictures, of_text = mixed.split([pictures.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        return attn.to_out[0](of_pictures), of_text


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def assemble(
    vae: AutoencoderKL,
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


# --- training -------------------------------------------------------------------------------------


def flow_stage(
    batches: Batches,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModelWithProjection,
    small: CLIPTextModelWithProjection,
    transformer: SD3Transformer2DModel,
    *,
    steps: int,
    peak: float,
    compiled: bool,
    settings: dict[str, Any],
) -> Stage:
    """The transformer and the smaller text encoder learn the velocity from picture to noise."""
    device = next(transformer.parameters()).device
    processor = RepeatedLastToken()
    stock = transformer.attn_processors
    network = torch.compile(transformer) if compiled else transformer

    def text_of(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pipeline asks for it: tokens of the layer before the last, and pooled text."""
        with torch.no_grad():
            large = text_encoder(ids, output_hidden_states=True)
        little = small(ids, output_hidden_states=True)
        tokens = torch.cat([large.hidden_states[-2], little.hidden_states[-2]], dim=2)
        tokens = F.pad(tokens, (0, 0, 0, 1))  # one of the third encoder's zeros
        return tokens, torch.cat([large.text_embeds, little.text_embeds], dim=1)

    def loss() -> torch.Tensor:
        transformer.set_attn_processor(processor)
        processor.count = ABSENT[int(torch.randint(0, len(ABSENT), ()))]
        ids, clean = batches.draw(dropped=0.1)
        noise = torch.randn_like(clean)
        # High noise more often: it is there that the caption decides.
        sigma = torch.rand(len(clean), 1, 1, 1, device=device).sqrt()
        noisy = torch.lerp(clean, noise, sigma)
        with autocast(device):
            tokens, pooled = text_of(ids)
            predicted = network(noisy, tokens, pooled, 1000 * sigma.flatten()).sample
        return F.mse_loss(predicted.float(), noise - clean)

    def sheet(averaged: torch.nn.ModuleDict) -> torch.Tensor:
        averaged["transformer"].set_attn_processor(dict(stock))
        pipeline = assemble(
            vae,
            (text_encoder, averaged["text_encoder_2"]),
            batches.text.tokenizer,
            averaged["transformer"],
        )
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            [prompt.strip() for prompt in SHOWN.split(";")],
            num_inference_steps=20,
            guidance_scale=4.0,
            height=SIZE,
            width=SIZE,
            max_sequence_length=1,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return pictures * 2 - 1

    return Stage(
        "flow",
        torch.nn.ModuleDict({"transformer": transformer, "text_encoder_2": small}),
        loss,
        steps,
        peak=peak,
        settings=settings,
        sheet=sheet,
    )


def export(pipeline: StableDiffusion3Pipeline, out: Path) -> None:
    """Save the pipeline in fp16, so that older transformers (4.48) load it as newer ones do."""
    for part in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        getattr(pipeline, part).to("cpu", torch.float16)
    pipeline.save_pretrained(out)
    for suffix in ("", "_2"):
        export_text_encoder(out / f"text_encoder{suffix}")
        export_tokenizer(pipeline.tokenizer, out / f"tokenizer{suffix}")


def main(
    steps: Annotated[int, typer.Option(help="Steps of the transformer.")] = 12000,
    batch: Annotated[int, typer.Option(help="Latents per step.")] = 32,
    peak: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3,
    layers: Annotated[int, typer.Option(help="Blocks of the transformer.")] = 8,
    width: Annotated[int, typer.Option(help="Width of the transformer.")] = 112,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    text_width: Annotated[int, typer.Option(help="Width of the smaller text encoder.")] = 32,
    variants: Annotated[int, typer.Option(help="Encoded variants of each glyph.")] = 24,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    sheet_every: Annotated[int, typer.Option(help="Steps between sample sheets.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Stop in time to go on later.")] = math.inf,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Train through torch.compile.")
    ] = False,
    start: Annotated[
        Path, typer.Option("--from", help="emoji-sd's folder, for autoencoder and text encoder.")
    ] = ROOT / "dcompile/models/emoji-sd",
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    out: Annotated[Path, typer.Option(help="The exported pipeline folder.")] = ROOT
    / "dcompile/models/emoji-dit",
    work: Annotated[Path, typer.Option(help="Checkpoints and sample sheets.")] = ROOT
    / ".training/emoji-dit",
) -> None:
    deadline = time.monotonic() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers_logging.set_verbosity_error()
    try:
        data = Captioned.render(SIZE, font)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)

    vae = AutoencoderKL.from_pretrained(start, subfolder="vae").to(device)
    vae.requires_grad_(False).eval()
    vae.register_to_config(shift_factor=0.0)  # the pipeline of SD 3 adds it
    tokenizer = CLIPTokenizer.from_pretrained(start, subfolder="tokenizer")
    text_encoder = text_encoder_of_emoji_sd(start).to(device)
    torch.manual_seed(0)
    small = build_small_text_encoder(tokenizer, text_width).to(device)
    of_text = text_encoder.config.hidden_size + text_width
    transformer = build_transformer(layers, width, heads, of_text).to(device)
    zero_final_layers(transformer)
    bank = kept_bank(work / "latents.pt", data, vae, variants)
    stage = flow_stage(
        Batches(bank, Captions(data.names, tokenizer), batch, device),
        vae,
        text_encoder,
        small,
        transformer,
        steps=steps,
        peak=peak,
        compiled=compiled,
        settings={"blocks": layers, "width": width, "heads": heads, "text": of_text},
    )
    stock = dict(transformer.attn_processors)
    trained: Any = stage.run(work, every=every, sheet_every=sheet_every, deadline=deadline)
    if trained is None:
        raise SystemExit("out of time; the same command goes on")
    trained["transformer"].set_attn_processor(stock)
    encoders = (text_encoder, trained["text_encoder_2"])
    pipeline = assemble(vae, encoders, tokenizer, trained["transformer"])

    def millions(part: torch.nn.Module) -> float:
        return sum(p.numel() for p in part.parameters()) / 1e6

    card = CARD.format(
        size=SIZE,
        transformer=millions(pipeline.transformer),
        vae=millions(vae),
        text=millions(text_encoder),
        small=millions(encoders[1]),
        layers=layers,
        width=width,
        glyphs=len(data.names),
        steps=steps,
        batch=batch,
    )
    export(pipeline, out)
    (out / "README.md").write_text(card)
    print(json.dumps({"wrote": str(out)}))


if __name__ == "__main__":
    typer.run(main)
