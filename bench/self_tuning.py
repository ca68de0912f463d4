"""``speedup=`` beside DeepCache's intervals, at equal FLOPs.

    python bench/self_tuning.py

The first generation of a kind is watched, and the others are compared with uncached ones of the
same seeds; none of them was seen before. Writes bench/results/self_tuning.json and .md.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import diffusers
import torch
import typer
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from training import replace_file

import dcompile
from dcompile import models, selftuning

os.environ["DCOMPILE_CACHE_DIR"] = ""  # nothing is known beforehand
RESULTS = Path(__file__).parent / "results"
PROMPTS = models.defaults("emoji-sd").prompts
PROMPTS += ("ghost", "skull", "crown", "tree", "fish", "star", "house", "clock")
FIRST_SEED = 1000

Draw = Callable[[int], torch.Tensor]


class Subject(NamedTuple):
    """Pictures by their number, from one network, sampler and number of steps."""

    title: str
    pipe: Any
    draw: Draw


def emoji_sd(sampler: Any, steps: int) -> Subject:
    pipe = StableDiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(number: int) -> torch.Tensor:
        seed = torch.Generator().manual_seed(FIRST_SEED + number)
        prompt = PROMPTS[number % len(PROMPTS)]
        call = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "pt"}
        images: torch.Tensor = pipe(prompt, generator=seed, **call).images
        return images.float()

    name = sampler.__name__.removesuffix("Scheduler")
    return Subject(f"emoji-sd, {steps} steps of {name}", pipe, draw)


def ddpm(steps: int) -> Subject:
    known = DiffusionPipeline.from_pretrained(models.path("ddpm-emoji"))
    pipe = DDIMPipeline(known.unet, DDIMScheduler.from_config(known.scheduler.config))
    pipe.set_progress_bar_config(disable=True)

    def draw(number: int) -> torch.Tensor:
        seed = torch.Generator().manual_seed(FIRST_SEED + number)
        call = {"num_inference_steps": steps, "output_type": "np", "batch_size": 1}
        return torch.from_numpy(pipe(generator=seed, **call).images).float()

    return Subject(f"DDPM, {steps} steps of DDIM", pipe, draw)


SUBJECTS: dict[str, tuple[Callable[[], Subject], tuple[int, ...]]] = {
    "ddpm-100": (lambda: ddpm(100), (3, 5)),
    "sd-50": (lambda: emoji_sd(DDIMScheduler, 50), (3, 5)),
    "sd-20": (lambda: emoji_sd(DPMSolverMultistepScheduler, 20), (3, 5)),
    "dpm-8": (lambda: emoji_sd(DPMSolverMultistepScheduler, 8), (2,)),
    "dpm-10": (lambda: emoji_sd(DPMSolverMultistepScheduler, 10), (2,)),
    "dpm-12": (lambda: emoji_sd(DPMSolverMultistepScheduler, 12), (2,)),
    "euler-8": (lambda: emoji_sd(EulerDiscreteScheduler, 8), (2,)),
    "euler-10": (lambda: emoji_sd(EulerDiscreteScheduler, 10), (2,)),
    "euler-12": (lambda: emoji_sd(EulerDiscreteScheduler, 12), (2,)),
}
# To be reached: dB over DeepCache at equal FLOPs.
BARS = {
    ("ddpm-100", 3): 12,
    ("sd-50", 3): 10,
    ("sd-20", 3): 14,
    ("ddpm-100", 5): 9,
    ("sd-50", 5): 9,
    ("sd-20", 5): 9,
}


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * math.log10(max(float((found - expected).square().mean()), 1e-10))


@contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Seconds in all that preparing takes, and the search for levels."""
    seconds = {"_prepare": 0.0, "choose": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    prepare, search = selftuning.SelfTuner._prepare, selftuning.choose
    with (
        mock.patch.object(selftuning.SelfTuner, "_prepare", timed("_prepare", prepare)),
        mock.patch.object(selftuning, "choose", timed("choose", search)),
    ):
        yield seconds


def measured(subject: Subject, interval: int, pictures: int) -> dict[str, Any]:
    pipe, draw = subject.pipe, subject.draw
    numbers = range(1, pictures + 1)
    expected = {number: draw(number) for number in range(pictures + 1)}
    uncached = min(timed(lambda: draw(0)) for _ in range(3))
    settings = {"backend": "eager", "verbose": False}
    dcompile.cache_compile(pipe, interval=interval, **settings)
    plain = [psnr(draw(number), expected[number]) for number in numbers]
    speedup = dcompile.handle(pipe).stats.flops_speedup
    dcompile.handle(pipe).remove()
    with parts_timed() as parts:
        dcompile.cache_compile(pipe, speedup=speedup, autotune="first", **settings)
        first = timed(lambda: exact(draw(0), expected[0]))
    before = dcompile.handle(pipe).stats
    own = [psnr(draw(number), expected[number]) for number in numbers]
    after = dcompile.handle(pipe).stats
    later = min(timed(lambda: draw(1)) for _ in range(3))
    schedule: Any = dcompile.handle(pipe)._dispatcher.settings.schedule
    (placed,) = schedule.known.values()
    calls = after.refresh_steps + after.partial_steps + after.reuse_steps - before.refresh_steps
    spent = _cost(after) - _cost(before)
    dcompile.handle(pipe).remove()
    return {
        "interval": interval,
        "deepcache": statistics.mean(plain),
        "deepcache_worst": min(plain),
        "own": statistics.mean(own),
        "own_worst": min(own),
        "speedup": speedup,
        "own_speedup": calls / spent,
        "cuts": {depth: len(own) for depth, own in zip(schedule.cuts, placed.refresh, strict=True)},
        "forecast": schedule.forecast,
        "watching": (first - sum(parts.values())) / uncached,
        "search_seconds": parts["choose"],
        "capture_seconds": parts["_prepare"],
        "time_speedup": uncached / later,
    }


def _cost(stats: Any) -> float:
    """In refresh steps."""
    cost: float = (
        stats.refresh_steps + stats.partial_steps + stats.reuse_steps
    ) / stats.flops_speedup
    return cost


def exact(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        raise RuntimeError("the run that is watched differs from an uncached one")


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Self-tuning",
        "",
        "Written by `python bench/self_tuning.py`: `cache_compile(pipe, speedup=..., "
        'autotune="first")` with the FLOPs of DeepCache\'s interval. One generation was watched; '
        f"PSNR in dB of {results['pictures']} others against uncached ones of their seeds, mean "
        "and worst. Watching: time of the first generation over an uncached one, without capturing "
        "and cutting the network and without the search, which follow, but with building the "
        "graphs that watch, which weighs much where a picture takes a fraction of a second. "
        f"Bar: 1.3x. On {results['threads']} thread of {results['processor']}, torch "
        f"{results['torch']}, "
        "eager backend.",
        "",
        "| subject | N | FLOPs | DeepCache | worst | ours | worst | gain | bar | cuts: refreshes | "
        "forecast | watching | search, s | capture, s |",
        "|" + " --- |" * 14,
    ]
    few = []
    for name, entry in results["subjects"].items():
        for row in entry["rows"]:
            gain = row["own"] - row["deepcache"]
            bar = BARS.get((name, row["interval"]))
            if bar is None:
                few.append(gain)
            judged = "–" if bar is None else f"{bar}, {'reached' if gain >= bar else '**missed**'}"
            cuts = ", ".join(f"{depth}: {count}" for depth, count in row["cuts"].items())
            lines.append(
                f"| {entry['title']} | {row['interval']} | {row['own_speedup']:.2f}x | "
                f"{row['deepcache']:.1f} | {row['deepcache_worst']:.1f} | {row['own']:.1f} | "
                f"{row['own_worst']:.1f} | {gain:+.1f} | {judged} | {cuts} | {row['forecast']} | "
                f"{row['watching']:.2f}x | {row['search_seconds']:.1f} | "
                f"{row['capture_seconds']:.1f} |"
            )
    if few:
        reached = "reached" if min(few) >= 0 and statistics.mean(few) >= 6 else "**missed**"
        lines += [
            "",
            f"At 8 to 12 steps: {statistics.mean(few):+.1f} dB on average, at least "
            f"{min(few):+.1f} (bar: +6, never below DeepCache): {reached}.",
        ]
    return "\n".join([*lines, ""])


def main(
    pictures: Annotated[int, typer.Option(min=1, help="To compare, for each row.")] = 16,
    subjects: Annotated[str, typer.Option(help="Of these, separated by commas.")] = ",".join(
        SUBJECTS
    ),
    only_page: Annotated[bool, typer.Option("--page", help="Rewrite the page only.")] = False,
) -> None:
    """Measure all subjects, and write the page."""
    file = RESULTS / "self_tuning.json"
    if only_page:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # small networks, compared bit for bit
    results: dict[str, Any] = {
        "pictures": pictures,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "subjects": {},
    }
    for name in subjects.split(","):
        make, intervals = SUBJECTS[name]
        subject = make()
        rows = results["subjects"][name] = {"title": subject.title, "rows": []}
        for interval in intervals:
            rows["rows"].append(measured(subject, interval, pictures))
            print(name, rows["rows"][-1], flush=True)
        replace_file(file, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
        replace_file(file.with_suffix(".md"), lambda path: path.write_text(page(results)))


if __name__ == "__main__":
    typer.run(main)
