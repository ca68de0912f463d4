"""Train emoji-sd, a small Stable Diffusion that draws emoji from their names, from scratch.

    python bench/train_emoji_sd.py                 # two CPU cores: two hours; a GPU: minutes
    python bench/train_emoji_sd.py --minutes 8     # stop in time; the same line goes on later
    python bench/train_emoji_sd.py --from dcompile/models/emoji-sd    # train the bundled one on

One command does everything: render the glyphs, train the autoencoder, then the text encoder, then
the diffusion network, then the autoencoder's decoder a little more, write samples and checkpoints
on the way, and export the averaged weights as a stock ``StableDiffusionPipeline``
folder. It may be killed at any point; the next run goes on from the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_data import FONT, GROUNDS, SHIFT, SHRINK, TILT, Captioned, captions, with_ground
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training import Stage, replace_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
TOKENS = 32
PARTS = ("vae", "text_encoder", "unet")
SHOWN = """
red apple; grinning face; blue heart; dog; pizza; rocket; cat face; car; tree; house; sun; star;
banana; strawberry; fish; penguin; octopus; hamburger; red heart; fire; snowman; robot face;
clown face; face with tears of joy; guitar; soccer ball; airplane; rainbow; cactus; mushroom;
ghost; skull; crown; present; a picture of green apple; rocket on a blue background
"""
CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# emoji-sd

A small, genuine Stable Diffusion that draws {size}x{size} emoji from a prompt. It is the subject
of `dcompile demo` and of the fidelity benchmark: small enough to ship and to run on a CPU,
trained, so that its features behave as a real network's do. Stock
`StableDiffusionPipeline.from_pretrained` loads it; guidance 5 and 50 DDIM steps suit it.

- **Network**: `UNet2DConditionModel`, {unet:.1f} M parameters, channels {channels}, 2 layers per
  block, cross-attention and pooled text, predicts the velocity; `AutoencoderKL`, {vae:.1f} M,
  4 latent channels, a quarter of the side; `CLIPTextModel`, {text:.1f} M, {tokens} tokens. Averaged
  (EMA) weights in fp16.
- **Data**: {glyphs} glyphs of Noto Color Emoji (SIL Open Font License 1.1), on white and on nine
  plain colours, shifted by up to {shift} px, shrunk by up to {shrink:.0%}, tilted by up to {tilt}
  degrees and mirrored where their name allows; captions are their Unicode names, some synonyms and
  plain paraphrases. One caption in ten was held out.
- **Training**: `bench/train_emoji_sd.py`, AdamW:
{training}
- **Limits**: it knows nothing but these emoji and their names. Unknown words give some emoji or
  a blend; on coloured grounds shapes suffer; lettering is illegible. Most glyphs have one picture:
  from seed to seed it is moved, tilted or resized, not another one.
"""


def autocast(device: torch.device) -> Any:
    """bfloat16 where the hardware has it: a CPU that only emulates it takes ten times longer."""
    native = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


# --- the four parts -------------------------------------------------------------------------------


def build_tokenizer(vocabulary: int, corpus: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level pairs were learnt from the captions.

    Every byte is in the vocabulary, within and at the end of a word, so that any prompt has tokens.
    """
    begin, end = "<|startoftext|>", "<|endoftext|>"
    stock = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(alphabet),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    tokens = [token for token, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1])]
    tokens += [byte + "</w>" for byte in alphabet if byte + "</w>" not in learnt["vocab"]]
    tokens += [begin, end]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=TOKENS,
    )


def kept_tokenizer(folder: Path, vocabulary: int, corpus: list[str]) -> CLIPTokenizer:
    """This training's tokenizer, built once: pairs of equal counts may be merged in any order."""
    if not (folder / "tokenizer_config.json").is_file():
        build_tokenizer(vocabulary, corpus).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(channels: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    """Stable Diffusion's kind of network, which also adds the pooled text to the time embedding.

    By cross-attention alone a short training learns to do without the text.
    """
    attending = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=text_width,
        encoder_hid_dim=text_width,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",),
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule.

    The network predicts the velocity: at high noise that is (minus) the picture itself, so that a
    short training gets grounds and colours right.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


# --- first stage: the autoencoder -----------------------------------------------------------------


def slopes(pictures: torch.Tensor) -> torch.Tensor:
    """Differences of neighbouring pixels, down and across, flattened together."""
    down = pictures[..., 1:, :] - pictures[..., :-1, :]
    across = pictures[..., 1:] - pictures[..., :-1]
    return torch.cat([down.flatten(), across.flatten()])


def autoencoder_stage(
    data: Captioned, channels: tuple[int, ...], steps: int, batch: int, device: torch.device
) -> Stage:
    vae = build_autoencoder(channels).to(device, memory_format=torch.channels_last)
    grounds = torch.tensor([0.5] + [0.5 / (len(GROUNDS) - 1)] * (len(GROUNDS) - 1))

    def loss() -> torch.Tensor:
        which = torch.randint(0, len(data.names), (batch,))
        ground = torch.multinomial(grounds, batch, replacement=True)
        pictures = data.pictures(which, ground, moved=0.5).to(device)
        with autocast(device):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        edges = F.l1_loss(slopes(decoded), slopes(pictures))
        likeness = F.l1_loss(decoded, pictures) + 2 * F.mse_loss(decoded, pictures)
        return likeness + edges + 1e-6 * posterior.kl().float().mean()

    def sheet(averaged: torch.nn.ModuleDict) -> torch.Tensor:
        which = torch.arange(0, len(data.names), len(data.names) // 32)[:32]
        pictures = data.pictures(which, torch.arange(32) % len(GROUNDS), moved=0.0).to(device)
        decoded = averaged["vae"](pictures).sample
        return torch.stack([pictures, decoded], dim=1).flatten(0, 1)

    return Stage(
        "autoencoder",
        torch.nn.ModuleDict({"vae": vae}),
        loss,
        steps,
        peak=1e-3,
        settings={"channels": list(channels)},
        sheet=sheet,
        average=0.995,
    )


@torch.no_grad()
def standardize(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Make each latent channel's mean 0 and deviation 1, by the 1x1 convolutions around them.

    Args:
        vae: changed in place: what it encodes changes, what it decodes that to does not.
        latents: posterior means of training pictures, shape (n, 4, height, width).
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    count = len(mean)
    into.weight[:count] /= deviation.view(-1, 1, 1, 1)
    into.bias[:count] = (into.bias[:count] - mean) / deviation
    into.bias[count:] -= 2 * deviation.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation.view(1, -1, 1, 1)


class LatentBank:
    """Encoded training pictures: several variants of each glyph, the first plain and on white.

    Attributes:
        latents: float16, shape (glyphs, variants, 4, side, side).
        ground: numbers into GROUNDS, shape (glyphs, variants).
    """

    latents: torch.Tensor
    ground: torch.Tensor

    @torch.no_grad()
    def __init__(
        self,
        data: Captioned,
        vae: AutoencoderKL,
        variants: int,
        *,
        seed: int = 1,
        white: bool = False,
        moved: float = 1.0,
    ) -> None:
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        count, device = len(data.names), next(vae.parameters()).device
        ground = torch.where(
            torch.rand(count, variants) < 0.75, 0, torch.randint(1, len(GROUNDS), (count, variants))
        )
        ground[:, : variants if white else 1] = 0
        encoded = []
        for variant in range(variants):
            for which in torch.arange(count).split(128):
                pictures = data.pictures(
                    which, ground[which, variant], moved=moved if variant > 0 else 0.0
                )
                posterior = vae.encode(pictures.to(device)).latent_dist
                encoded.append(posterior.mean.half())
        torch.set_rng_state(generator_state)
        self.ground = ground
        self.latents = torch.cat(encoded).unflatten(0, (variants, count)).transpose(0, 1)


def kept_bank(file: Path, data: Captioned, vae: AutoencoderKL, variants: int) -> LatentBank:
    """The bank of this training, encoded once for each autoencoder."""
    made_by = sum(float(p.detach().abs().sum()) for p in vae.parameters())
    settings = {"autoencoder": round(made_by, 2), "glyphs": len(data.names), "variants": variants}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        if state["settings"] == settings:
            bank = LatentBank.__new__(LatentBank)
            bank.latents, bank.ground = state["latents"], state["ground"]
            return bank
    bank = LatentBank(data, vae, variants)
    content = {"settings": settings, "latents": bank.latents.cpu(), "ground": bank.ground}
    replace_file(file, lambda path: torch.save(content, path))
    return bank


def decoder_stage(
    data: Captioned, vae: AutoencoderKL, steps: int, batch: int, device: torch.device
) -> Stage:
    """The decoder alone, at the end: the latents that the diffusion network knows stay."""
    parts = torch.nn.ModuleDict({"decoder": vae.decoder, "into": vae.post_quant_conv})
    parts.requires_grad_(True)

    def latents_of(pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(device):
            return vae.encode(pictures).latent_dist.mean.float()

    def loss() -> torch.Tensor:
        which = torch.randint(0, len(data.names), (batch,))
        ground = torch.where(torch.rand(batch) < 0.6, 0, torch.randint(1, len(GROUNDS), (batch,)))
        pictures = data.pictures(which, ground, moved=0.5).to(device)
        latents = latents_of(pictures)
        with autocast(device):
            decoded = parts["decoder"](parts["into"](latents)).float()
        edges = F.l1_loss(slopes(decoded), slopes(pictures))
        return F.l1_loss(decoded, pictures) + 8 * F.mse_loss(decoded, pictures) + edges / 2

    def sheet(averaged: torch.nn.ModuleDict) -> torch.Tensor:
        which = torch.arange(0, len(data.names), len(data.names) // 32)[:32]
        pictures = data.pictures(which, torch.arange(32) % len(GROUNDS), moved=0.0).to(device)
        decoded = averaged["decoder"](averaged["into"](latents_of(pictures)))
        return torch.stack([pictures, decoded], dim=1).flatten(0, 1)

    return Stage("decoder", parts, loss, steps, peak=5e-4, settings={}, sheet=sheet, average=0.995)


# --- second stage: text encoder and diffusion network ---------------------------------------------


class Captions:
    """Draws training captions, as token ids."""

    def __init__(self, names: list[str], tokenizer: CLIPTokenizer) -> None:
        self.training = [captions(name)[0] for name in names]
        self.tokenizer = tokenizer
        self.grounds = list(GROUNDS)
        self._ids: dict[str, list[int]] = {}

    def draw(self, glyph: int, ground: int) -> str:
        """A caption: the plain name half of the time; the ground named if it is not white."""
        choices = self.training[glyph]
        caption = choices[0] if random.random() < 0.5 else random.choice(choices)
        if random.random() < (0.15 if ground == 0 else 0.9):
            caption = with_ground(caption, self.grounds[ground], random.randrange(3))
        return caption

    def ids(self, caption: str) -> list[int]:
        if caption not in self._ids:
            self._ids[caption] = self.tokenizer(
                caption, padding="max_length", truncation=True, max_length=TOKENS
            ).input_ids
        return self._ids[caption]


class Batches:
    """Draws latents with captions.

    Attributes:
        bank: what to draw from.
        text: how to call it.
    """

    def __init__(self, bank: LatentBank, text: Captions, batch: int, device: torch.device) -> None:
        self.bank, self.text = bank, text
        self._batch, self._device = batch, device
        self._latents = bank.latents.to(device)

    def draw(self, dropped: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, shape (batch, TOKENS), a share of them of no caption; and latents."""
        count, variants = self.bank.ground.shape
        which = torch.randint(0, count, (self._batch,))
        variant = torch.randint(0, variants, (self._batch,))
        random.seed(int(torch.randint(0, 2**31, ())))
        grounds = self.bank.ground[which, variant].tolist()
        ids = [
            self.text.ids("" if random.random() < dropped else self.text.draw(glyph, ground))
            for glyph, ground in zip(which.tolist(), grounds, strict=True)
        ]
        latents = self._latents[which.to(self._device), variant.to(self._device)].float()
        return torch.tensor(ids, device=self._device), latents


class Reading(torch.nn.Module):
    """What the last tokens of a caption say of its picture: each of them one patch.

    CLIP's tokens see only those before them, so it takes the last ones, which are padding: they
    have the whole caption before them. Trained by the diffusion network, the text encoder's output
    hardly differs from caption to caption for thousands of steps, and the network learns to do
    without. Taught to foretell the picture, it learns the emoji by heart, which is cheap, and all
    that is left to the diffusion network is to draw what the tokens tell.
    """

    PATCHES = 4  # per side

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side // self.PATCHES
        self.head = torch.nn.Linear(width, 4 * self.side**2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The latents foretold, shape (batch, 4, side, side).

        Args:
            tokens: the text encoder's last hidden state, shape (batch, TOKENS, width).
        """
        patches = self.head(tokens[:, -(self.PATCHES**2) :]).float()
        grid = patches.unflatten(2, (4, self.side, self.side)).unflatten(1, (self.PATCHES, -1))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def text_stage(
    batches: Batches,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    reading: Reading,
    steps: int,
    settings: dict[str, Any],
) -> Stage:
    """The text encoder learns what captions look like."""

    def loss() -> torch.Tensor:
        ids, latents = batches.draw(dropped=0.0)
        with autocast(latents.device):
            foretold = reading(text_encoder(ids).last_hidden_state)
        return F.mse_loss(foretold, latents)

    def sheet(averaged: torch.nn.ModuleDict) -> torch.Tensor:
        ids = torch.tensor([batches.text.ids(prompt.strip()) for prompt in SHOWN.split(";")])
        tokens = averaged["text_encoder"](ids.to(vae.device)).last_hidden_state
        pictures: torch.Tensor = vae.decode(averaged["reading"](tokens)).sample
        return pictures

    return Stage(
        "text",
        torch.nn.ModuleDict({"text_encoder": text_encoder, "reading": reading}),
        loss,
        steps,
        peak=1e-3,
        settings=settings,
        sheet=sheet,
        average=0.99,
    )


def diffusion_stage(
    batches: Batches,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    *,
    steps: int,
    peak: float,
    compiled: bool,
    settings: dict[str, Any],
) -> Stage:
    """The diffusion network learns to draw what the text encoder tells.

    The text encoder stays: trained on, even towards what it had learnt, it forgot most of that.
    """
    device = next(unet.parameters()).device
    scheduler = build_scheduler()
    network = torch.compile(unet) if compiled else unet

    def loss() -> torch.Tensor:
        ids, clean = batches.draw(dropped=0.1)
        noise = torch.randn_like(clean)
        # High noise more often: it is there that the caption decides.
        t = (1000 * torch.rand(len(clean), device=device).sqrt()).long()
        noisy = scheduler.add_noise(clean, noise, t)
        with autocast(device):
            with torch.no_grad():
                tokens = text_encoder(ids).last_hidden_state
            predicted = network(noisy, t, tokens).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, t))

    def sheet(averaged: torch.nn.ModuleDict) -> torch.Tensor:
        tokenizer = batches.text.tokenizer
        pipeline = assemble(vae, text_encoder, tokenizer, averaged["unet"])
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures = pipeline(
            [prompt.strip() for prompt in SHOWN.split(";")],
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=generator,
            output_type="pt",
        ).images
        return pictures * 2 - 1

    return Stage(
        "diffusion",
        torch.nn.ModuleDict({"unet": unet}),
        loss,
        steps,
        peak=peak,
        settings=settings,
        sheet=sheet,
    )


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Save the pipeline in fp16, so that older transformers (4.48) load it as newer ones do."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.to("cpu", torch.float16)
    pipeline.save_pretrained(out)
    export_text_encoder(out / "text_encoder")
    export_tokenizer(pipeline.tokenizer, out / "tokenizer")


def export_text_encoder(folder: Path) -> None:
    """Edit what was saved of a text encoder so that older transformers (4.48) load it, too."""
    # transformers loads a part in the precision its configuration names, diffusers in float32: the
    # two would not fit together.
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    # Older transformers leave weights without this prefix at random, newer ones take both.
    weights = folder / "model.safetensors"
    named = {
        k if k.startswith("text_projection") else f"text_model.{k.removeprefix('text_model.')}": w
        for k, w in load_file(weights).items()
    }
    save_file(named, weights, metadata={"format": "pt"})


def export_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add the two files that older transformers want."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


def main(
    steps: Annotated[int, typer.Option(help="Steps of the diffusion network.")] = 6500,
    batch: Annotated[int, typer.Option(help="Latents per step.")] = 32,
    peak: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3,
    channels: Annotated[str, typer.Option(help="Diffusion channels per resolution.")] = "32,64,128",
    text_width: Annotated[int, typer.Option(help="Width of the text encoder.")] = 256,
    text_layers: Annotated[int, typer.Option(help="Layers of the text encoder.")] = 3,
    text_steps: Annotated[int, typer.Option(help="Steps of the text encoder.")] = 4500,
    vocabulary: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    variants: Annotated[int, typer.Option(help="Encoded variants of each glyph.")] = 24,
    ae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = 2500,
    ae_batch: Annotated[int, typer.Option(help="Pictures per step of the autoencoder.")] = 16,
    decoder_steps: Annotated[int, typer.Option(help="Further steps of its decoder.")] = 1500,
    ae_channels: Annotated[str, typer.Option(help="Autoencoder channels.")] = "32,48,64",
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    sheet_every: Annotated[int, typer.Option(help="Steps between sample sheets.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Stop in time to go on later.")] = math.inf,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Train through torch.compile.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="Go on from an exported pipeline's weights.")
    ] = None,
    parts: Annotated[str, typer.Option(help="Which parts to take --from there.")] = ",".join(PARTS),
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    out: Annotated[Path, typer.Option(help="The exported pipeline folder.")] = ROOT
    / "dcompile/models/emoji-sd",
    work: Annotated[Path, typer.Option(help="Checkpoints and sample sheets.")] = ROOT
    / ".training/emoji-sd",
) -> None:
    deadline = time.monotonic() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers_logging.set_verbosity_error()
    try:
        data = Captioned.render(SIZE, font)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)

    def run(stage: Stage) -> Any:
        averaged = stage.run(work, every=every, sheet_every=sheet_every, deadline=deadline)
        if averaged is None:
            raise SystemExit("out of time; the same command goes on")
        return averaged

    taken = set(parts.split(",")) if start is not None else set()
    if taken - set(PARTS):
        raise SystemExit(f"--parts {parts}: choose from {', '.join(PARTS)}")
    torch.manual_seed(0)
    unet: Any
    text_encoder: Any
    if "vae" in taken:
        vae = AutoencoderKL.from_pretrained(start, subfolder="vae").to(device)
        vae.requires_grad_(False).eval()
    else:
        stage = autoencoder_stage(data, widths(ae_channels), ae_steps, ae_batch, device)
        vae = run(stage)["vae"]
        standardize(vae, LatentBank(data, vae, variants=2).latents.flatten(0, 1).float())
    torch.manual_seed(0)
    if "text_encoder" in taken:
        tokenizer = CLIPTokenizer.from_pretrained(start, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(start, subfolder="text_encoder").to(device)
    else:
        corpus = [caption for name in data.names for caption in captions(name)[0]]
        corpus += [with_ground("", g, frame) for g in GROUNDS for frame in range(3)] * 50
        tokenizer = kept_tokenizer(work / "tokenizer", vocabulary, corpus)
        text_encoder = build_text_encoder(tokenizer, text_width, text_layers).to(device)
    if "unet" in taken:
        unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet")
    else:
        unet = build_unet(widths(channels), text_encoder.config.hidden_size)
    # On a CPU the attention's copies cost more than such convolutions gain.
    unet = unet.to(
        device,
        memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format,
    )
    bank = kept_bank(work / "latents.pt", data, vae, variants)
    text = Captions(data.names, tokenizer)
    # Token numbers mean nothing under another vocabulary.
    spelling = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    config = text_encoder.config
    of_text = {
        "text": [config.hidden_size, config.num_hidden_layers, len(tokenizer)],
        "vocabulary": hashlib.sha256(spelling).hexdigest(),
    }
    if "text_encoder" not in taken:
        plain = LatentBank(data, vae, min(variants, 4), moved=0.0)
        reading = Reading(config.hidden_size, bank.latents.shape[-1]).to(device)
        drawn = Batches(plain, text, 128, device)
        read = run(text_stage(drawn, vae, text_encoder, reading, text_steps, of_text))
        text_encoder.load_state_dict(read["text_encoder"].state_dict())
    text_encoder.requires_grad_(False).eval()
    settings = {"channels": list(unet.config.block_out_channels), **of_text}
    trained = run(
        diffusion_stage(
            Batches(bank, text, batch, device),
            vae,
            text_encoder,
            unet,
            steps=steps,
            peak=peak,
            compiled=compiled,
            settings=settings,
        )
    )
    finished = run(decoder_stage(data, vae, decoder_steps, ae_batch, device))
    vae.decoder, vae.post_quant_conv = finished["decoder"], finished["into"]

    pipeline = assemble(vae, text_encoder, tokenizer, trained["unet"])

    def millions(part: torch.nn.Module) -> float:
        return sum(p.numel() for p in part.parameters()) / 1e6

    earlier = "went on from trained weights, " if "unet" in taken else ""
    told = [
        "autoencoder: "
        + ("as trained before" if "vae" in taken else f"{ae_steps} steps of {ae_batch} pictures"),
        "text encoder, to foretell latents from captions: "
        + ("as trained before" if "text_encoder" in taken else f"{text_steps} steps of 128"),
        f"diffusion network, with 10 % of the captions dropped: {earlier}{steps} steps of {batch}",
    ]
    if decoder_steps:
        told.append(f"decoder, alone: {decoder_steps} steps of {ae_batch} pictures")
    card = CARD.format(
        size=SIZE,
        unet=millions(pipeline.unet),
        vae=millions(vae),
        text=millions(pipeline.text_encoder),
        channels=tuple(pipeline.unet.config.block_out_channels),
        tokens=TOKENS,
        shift=SHIFT,
        shrink=SHRINK,
        tilt=TILT,
        glyphs=len(data.names),
        training="\n".join(f"  - {line}" for line in told),
    )
    export(pipeline, out)
    (out / "README.md").write_text(card)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
