"""Train the demo's model: an unconditional DDPM on colour emoji, from scratch.

    python bench/train_demo.py                # 2 CPU cores: about two hours; a GPU: minutes
    python bench/train_demo.py --steps 12000  # go on from the last checkpoint for longer

One command does everything: render the glyphs, train, write samples and checkpoints on the
way, and export the averaged weights as a stock diffusers ``DDPMPipeline`` folder. It may be
killed at any point; the next run goes on from the last checkpoint.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from emoji_data import FONT, glyphs
from training import Stage

ROOT = Path(__file__).resolve().parent.parent
CARD = """---
license: apache-2.0
pipeline_tag: unconditional-image-generation
---
# ddpm-emoji

An unconditional DDPM that draws {size}x{size} emoji-like pictures. It is the subject of
`dcompile demo`: small enough to ship and to run on a CPU, trained, so that its features
behave as a real network's do.

- **Network**: `UNet2DModel`, {parameters:.1f} M parameters, channels {channels}, 2 layers per
  block, attention at the lowest resolution, predicts the velocity; averaged (EMA) weights in fp16.
- **Data**: the {glyphs} single-code-point glyphs of Noto Color Emoji (SIL Open Font License
  1.1) on white, shifted by up to {shift} px and mirrored.
- **Training**: `bench/train_demo.py`, {steps} steps of {batch} pictures, {samples:,} in all;
  AdamW, mean squared error, linear betas, 1000 steps.
- **Limits**: it knows nothing but emoji, many samples are blends of several glyphs, lettering
  is illegible, and mirrored symbols occur.
"""


def build(size: int, channels: tuple[int, ...]) -> UNet2DModel:
    plain = len(channels) - 1
    return UNet2DModel(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=16,
        attention_head_dim=32,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )


def augmented(pictures: torch.Tensor, shift: int) -> torch.Tensor:
    """Shift each picture by up to ``shift`` pixels (white comes in) and mirror half of them."""
    n, _, size, _ = pictures.shape
    padded = F.pad(pictures, (shift,) * 4, value=1.0)
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n)).tolist()
    moved = torch.stack(
        [padded[i, :, dy[i] : dy[i] + size, dx[i] : dx[i] + size] for i in range(n)]
    )
    mirrored = torch.rand(n, device=moved.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), moved.flip(-1), moved)


def draw(model: UNet2DModel, scheduler: DDPMScheduler, count: int = 64) -> torch.Tensor:
    """Draw ``count`` samples with 50 DDIM steps from seed 0."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(50)
    size = int(model.config.sample_size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, size, size, generator=generator).to(model.device)
    for t in ddim.timesteps:
        x = ddim.step(model(x, t).sample, t, x).prev_sample
    return x


def main(
    steps: Annotated[int, typer.Option(help="Training steps altogether.")] = 8000,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 48,
    size: Annotated[int, typer.Option(help="Pixels per side; a multiple of 4.")] = 32,
    channels: Annotated[str, typer.Option(help="Channels per resolution.")] = "32,64,96",
    peak: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 6e-4,
    shift: Annotated[int, typer.Option(help="Augmentation: pixels.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    sheet_every: Annotated[int, typer.Option(help="Steps between sample sheets.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Stop in time to go on later.")] = math.inf,
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    init: Annotated[Path | None, typer.Option(help="A checkpoint to take weights from.")] = None,
    out: Annotated[Path, typer.Option(help="The exported pipeline folder.")] = ROOT
    / "dcompile/models/ddpm-emoji",
    work: Annotated[Path, typer.Option(help="Checkpoints and sample sheets.")] = ROOT
    / ".training/ddpm-emoji",
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    widths = tuple(int(width) for width in channels.split(","))
    try:
        names, pictures = glyphs(size, font)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    data = (pictures.float() / 127.5 - 1).to(device)
    # Predicting the velocity, not the noise: at high noise it is (minus) the picture itself, so
    # that a short training gets backgrounds and colours right.
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="v_prediction"
    )
    model = build(size, widths).to(device)
    if init is not None:
        state = torch.load(init, map_location=device, weights_only=True)["averaged"]
        model.load_state_dict({name.removeprefix("unet."): w for name, w in state.items()})

    def loss() -> torch.Tensor:
        clean = augmented(data[torch.randint(0, len(data), (batch,), device=device)], shift)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (batch,), device=device)
        # Half the multiply-adds of float32 where the processor has bf16 units; 0.61 s
        # against 0.86 s per step on the two cores it was first trained on.
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(scheduler.add_noise(clean, noise, t), t).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, t))

    stage = Stage(
        "ddpm",
        torch.nn.ModuleDict({"unet": model}),
        loss,
        steps,
        peak=peak,
        settings={"size": size, "channels": list(widths)},
        sheet=lambda averaged: draw(averaged["unet"], scheduler),
    )
    deadline = time.monotonic() + 60 * minutes
    trained = stage.run(work, every=every, sheet_every=sheet_every, deadline=deadline)
    if trained is None:
        raise SystemExit("out of time; the same command goes on")
    ema: Any = trained["unet"]
    pipeline = DDPMPipeline(unet=ema.half().cpu(), scheduler=scheduler)
    pipeline.save_pretrained(out)
    card = CARD.format(
        size=size,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        channels=widths,
        glyphs=len(names),
        shift=shift,
        steps=steps,
        batch=batch,
        samples=steps * batch,
    )
    (out / "README.md").write_text(card)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
