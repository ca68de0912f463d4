"""How close pictures come to the PSNR that self-tuning predicts for them.

    python bench/predicted_psnr.py    # some ten minutes on two cores

For each model, sampler and number of steps a run is watched at several speed-ups, and six further
pictures are compared with their uncached twins, by the span of the uncached sample. Writes
bench/results/predicted_psnr.json, from which ``GUIDED`` and ``UNGUIDED`` of
``dcompile.prediction.choice`` were set.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from rich.console import Console

import dcompile
from dcompile import models
from dcompile.policy.self_tuned import SelfTuned

RESULT = Path(__file__).resolve().parent / "results/predicted_psnr.json"
PROMPTS = ("dog", "rocket", "apple", "house", "cat", "tree")
SPEEDUPS = (1.3, 1.5, 2.0, 2.5, 3.0, 4.0)
CASES: tuple[tuple[str, type[Any], int], ...] = (
    ("emoji-sd", DPMSolverMultistepScheduler, 20),
    ("emoji-sd", DPMSolverMultistepScheduler, 12),
    ("emoji-sd", EulerDiscreteScheduler, 12),
    ("emoji-sd", DDIMScheduler, 50),
    ("ddpm-emoji", DDIMScheduler, 100),
)
console = Console(stderr=True)


def drawing(model: str, sampler: type[Any], steps: int) -> tuple[Any, Callable[[int], Any]]:
    """A pipeline, and what draws the final sample of a number."""
    pipe: Any = DiffusionPipeline.from_pretrained(models.path(model))
    scheduler = sampler.from_config(pipe.scheduler.config)
    if model == "ddpm-emoji":
        pipe = DDIMPipeline(unet=pipe.unet, scheduler=scheduler)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)

    def draw(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + number)
        given: dict[str, Any] = {"generator": generator, "num_inference_steps": steps}
        if model == "ddpm-emoji":
            return torch.from_numpy(pipe(**given, output_type="np").images)
        images: torch.Tensor = pipe(PROMPTS[number], **given, output_type="latent").images
        return images

    return pipe, draw


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """By the span of ``expected``; at most 120 dB, as predictions are."""
    span = float(expected.max() - expected.min())
    share = float((found - expected).square().mean()) / span**2
    return -10 * math.log10(max(share, 1e-12))


def main() -> None:
    """Measure all cases, and write the result."""
    rows = []
    for model, sampler, steps in CASES:
        pipe, draw = drawing(model, sampler, steps)
        expected = [draw(number) for number in range(len(PROMPTS))]
        for speedup in SPEEDUPS:
            dcompile.cache_compile(
                pipe, speedup=speedup, backend="eager", autotune="first", verbose=False
            )
            draw(0)
            schedule = dcompile.handle(pipe).schedule
            found = [psnr(draw(number), own) for number, own in enumerate(expected)]
            assert isinstance(schedule, SelfTuned)
            (placed,) = schedule.known.values()
            assert placed.psnr is not None
            mean = statistics.fmean(found)
            rows.append(
                {
                    "model": model,
                    "sampler": sampler.__name__,
                    "steps": steps,
                    "speedup": speedup,
                    "predicted": round(placed.psnr, 1),
                    "measured": [round(one, 1) for one in found],
                    "mean": round(mean, 1),
                }
            )
            console.print(f"{model}, {steps} steps, {speedup:g}x: {placed.psnr:.1f}, {mean:.1f}")
            dcompile.handle(pipe).remove()
    off = [row["mean"] - row["predicted"] for row in rows]
    single = [min(row["measured"]) - row["predicted"] for row in rows]
    summary = {
        "mean minus predicted, dB": {
            "least": round(min(off), 1),
            "mean": round(statistics.fmean(off), 1),
            "most": round(max(off), 1),
        },
        "worst picture minus predicted, dB": {
            "least": round(min(single), 1),
            "mean": round(statistics.fmean(single), 1),
        },
    }
    RESULT.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    console.print(summary)


if __name__ == "__main__":
    typer.run(main)
