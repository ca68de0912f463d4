"""What the bundled emoji-sd can do: numbers, and a sheet of pictures to look at.

    python bench/eval_emoji_sd.py

Writes bench/results/emoji_sd.json and emoji_sd.md, and docs/emoji-sd.png.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from emoji_data import FONT, Captioned, captions
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from torchmetrics.functional.image import peak_signal_noise_ratio
from train_emoji_sd import SIZE, LatentBank
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE, STEPS = 5.0, 50
SHEET = """
red apple; grinning face; blue heart; dog; pizza; rocket; cat face; car
tree; house; sun; star; banana; strawberry; fish; penguin
octopus; hamburger; red heart; fire; snowman; robot face; clown face; face with tears of joy
guitar; soccer ball; airplane; rainbow; cactus; mushroom; ghost; skull
crown; present; balloon; birthday cake; coffee; beer; lemon; watermelon
tiger face; frog face; panda face; bee; butterfly; whale; snail; turtle
sunflower; rose; umbrella; key; light bulb; bicycle; ambulance; tractor
green apple on a blue background; ghost on a purple background; an emoji of pizza; drawing of a \
rocket; heart, green; smiling face with sunglasses; thumbs up; alien
"""


def prompts_of_sheet() -> list[str]:
    return [prompt.strip() for line in SHEET.strip().splitlines() for prompt in line.split(";")]


def draw(pipeline: Any, prompts: list[str], seed: int, batch: int = 20) -> torch.Tensor:
    """One picture for each prompt: float32 in 0..1, shape (prompts, 3, SIZE, SIZE)."""
    pictures = []
    for start in track(range(0, len(prompts), batch), description="drawing"):
        some = prompts[start : start + batch]
        seeds = [seed + start + i for i in range(len(some))]
        output = pipeline(
            some,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="pt",
        )
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


@torch.no_grad()
def reconstruction_psnr(vae: Any, data: Captioned) -> float:
    """Mean PSNR in dB of decoded against given glyphs, all of them, on white."""
    values = []
    for which in torch.arange(len(data.names)).split(128):
        pictures = data.pictures(which, torch.zeros(len(which), dtype=torch.long), moved=0.0)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        values += [
            float(peak_signal_noise_ratio(one, two, data_range=2.0))
            for one, two in zip(decoded, pictures, strict=True)
        ]
    return sum(values) / len(values)


@torch.no_grad()
def ranks(pictures: torch.Tensor, wanted: list[int], data: Captioned, vae: Any) -> list[int]:
    """For each picture, how many glyphs are nearer to it than the wanted one, in latents.

    A glyph's distance is that of its nearest variant: as drawn, or moved, shrunk and mirrored as
    it was trained on, always on white.
    """
    bank = LatentBank(data, vae, variants=24, seed=2, white=True)
    known = bank.latents.float().flatten(2)  # (glyphs, variants, values)
    given = vae.encode(pictures * 2 - 1).latent_dist.mean.flatten(1)
    found = []
    for latent, glyph in zip(given, wanted, strict=True):
        distance = (known - latent).square().sum(-1).amin(1)
        found.append(int((distance < distance[glyph]).sum()))
    return found


def contact_sheet(pictures: torch.Tensor, prompts: list[str], columns: int = 8) -> Image.Image:
    """Pictures, each with its prompt beneath, twice their size."""
    tile, label, gap = 2 * SIZE, 34, 12
    rows = math.ceil(len(prompts) / columns)
    sheet = Image.new(
        "RGB", (columns * (tile + gap) + gap, rows * (tile + label + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        row, column = divmod(index, columns)
        x, y = gap + column * (tile + gap), gap + row * (tile + label + gap)
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        image = Image.fromarray(pixels.contiguous().numpy())
        sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        for line, text in enumerate(_two_lines(prompt, font, tile)):
            middle = x + tile / 2
            pen.text((middle, y + tile + 3 + 15 * line), text, "#334155", font, anchor="ma")
    return sheet


def _two_lines(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:2]


def main(
    model: Annotated[Path, typer.Option(help="The pipeline's folder.")] = ROOT
    / "dcompile/models/emoji-sd",
    count: Annotated[int, typer.Option(help="Prompts of each kind to draw.")] = 200,
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "bench/results",
    sheet: Annotated[Path, typer.Option(help="The contact sheet.")] = ROOT / "docs/emoji-sd.png",
) -> None:
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    try:
        data = Captioned.render(SIZE, font)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(model).to(device)
    pipeline.set_progress_bar_config(disable=True)

    shown = prompts_of_sheet()
    contact_sheet(draw(pipeline, shown, seed=0), shown).save(sheet)

    chance = random.Random(0)
    held_out = [(c, glyph) for glyph, name in enumerate(data.names) for c in captions(name)[1]]
    named = [(captions(name)[0][0], glyph) for glyph, name in enumerate(data.names)]
    drawn = chance.sample(held_out, count) + chance.sample(named, count)
    prompts, wanted = [c for c, _ in drawn], [glyph for _, glyph in drawn]
    pictures = draw(pipeline, prompts, seed=1000)
    again = draw(pipeline, prompts[:40], seed=5000)
    pipeline.to("cpu")
    found = ranks(pictures, wanted, data, pipeline.vae)
    between_seeds = [
        float(peak_signal_noise_ratio(one, two, data_range=1.0))
        for one, two in zip(again, pictures[:40], strict=True)
    ]

    def share(ranks: list[int], most: int) -> float:
        return sum(rank < most for rank in ranks) / len(ranks)

    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "glyphs": len(data.names),
        "autoencoder_psnr_db": round(reconstruction_psnr(pipeline.vae, data), 2),
        "prompts": count,
        "guidance": GUIDANCE,
        "steps": STEPS,
        "top1_held_out": share(found[:count], 1),
        "top5_held_out": share(found[:count], 5),
        "top1_names": share(found[count:], 1),
        "top5_names": share(found[count:], 5),
        "chance_top5": 5 / len(data.names),
        "median_psnr_between_seeds_db": round(sorted(between_seeds)[20], 2),
    }
    (out / "emoji_sd.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "emoji_sd.md").write_text(
        "# emoji-sd\n\n"
        f"Made by `bench/eval_emoji_sd.py`: {STEPS} DDIM steps, guidance {GUIDANCE:g}; {count} "
        f"captions it was not trained on, and the plain names of {count} glyphs.\n\n"
        "| what | value | bar |\n| --- | --- | --- |\n"
        f"| autoencoder, PSNR of all {len(data.names)} glyphs | "
        f"{result['autoencoder_psnr_db']:.1f} dB | 26 dB |\n"
        f"| held-out captions: the glyph asked for is the nearest | "
        f"{result['top1_held_out']:.0%} | |\n"
        f"| ... is among the nearest five | {result['top5_held_out']:.0%} | 60 % if trained on a "
        "GPU |\n"
        f"| plain names: it is the nearest | {result['top1_names']:.0%} | |\n"
        f"| ... is among the nearest five | {result['top5_names']:.0%} | |\n"
        f"| ... by chance | {result['chance_top5']:.1%} | |\n"
        f"| PSNR between two seeds of one prompt, median | "
        f"{result['median_psnr_between_seeds_db']:.1f} dB | |\n"
    )
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
