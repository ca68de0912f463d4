"""How close cached pictures are to uncached ones, for the compute they take.

    python bench/fidelity.py                        # everything: some 90 minutes on two cores
    python bench/fidelity.py --subject ddpm --minutes 9
    python bench/fidelity.py --interval 3 --interval 5    # DeepCache at these intervals only
    python bench/fidelity.py --times                # afterwards, with nothing else running

Each method draws the same pictures from the same seeds as an uncached run of the same process. What
is measured is kept in bench/results/fidelity.json after every method, and the same command goes on
where it stopped. The table and the plots are rewritten each time. Times are measured separately,
of four pictures, with an uncached run's after every few methods.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from emoji_data import Captioned, captions
from rich.console import Console
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

import dcompile
from dcompile import GainWeighted, MultiLevel, models
from dcompile.policy.codec import from_json as schedule_from_json
from dcompile.policy.codec import to_json as schedule_to_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
DEPTHS = (0, 1, 2)
OURS_AT = (2, 3, 5)
PYRAMIDS = {
    2: [
        [(0, 2), (1, 4)],
        [(0, 2), (1, 6)],
        [(0, 2), (2, 4)],
        [(0, 2), (3, 6)],
        [(0, 2), (3, 8)],
        [(0, 2), (1, 4), (3, 8)],
    ],
    3: [[(0, 3), (1, 6)], [(0, 3), (1, 9)], [(0, 3), (2, 6)]],
}
VARIED_AT = 3  # where all that was tried is compared
console = Console(stderr=True)


@dataclass(frozen=True)
class Drawn:
    """Pictures in 0..1, shape (n, 3, height, width), and the final latents they came from."""

    pictures: torch.Tensor
    latents: torch.Tensor


@dataclass(frozen=True)
class Subject:
    """A model, a sampler, and what it draws.

    Attributes:
        name: of its rows.
        pipe: the pipeline.
        steps: network evaluations in a run.
        draw: pictures of the given numbers; numbers below 0 are for tuning only.
        count: pictures that are scored.
    """

    name: str
    pipe: Any
    steps: int
    draw: Callable[[list[int]], Drawn]
    count: int

    def scored(self) -> Drawn:
        drawn = [self.draw(list(part)) for part in _parts(range(self.count), 16)]
        return Drawn(
            torch.cat([one.pictures for one in drawn]), torch.cat([one.latents for one in drawn])
        )


def ddpm(count: int) -> Subject:
    """The bundled DDPM, 100 DDIM steps."""
    loaded = DiffusionPipeline.from_pretrained(models.path("ddpm-emoji"))
    scheduler = DDIMScheduler.from_config(loaded.scheduler.config)
    pipe = DDIMPipeline(unet=loaded.unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw(numbers: list[int]) -> Drawn:
        images = pipe(
            batch_size=len(numbers),
            generator=[_generator(n) for n in numbers],
            num_inference_steps=100,
            output_type="np",
        ).images
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return Drawn(pictures, pictures * 2 - 1)

    return Subject("ddpm, DDIM, 100 steps", pipe, 100, draw, count)


def emoji_sd(count: int, sampler: str) -> Subject:
    """emoji-sd with guidance 5: 50 DDIM steps or 20 of DPM-Solver++."""
    pipe = StableDiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.set_progress_bar_config(disable=True)
    steps = 50
    if sampler == "DPM-Solver++":
        steps = 20
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    names = Captioned.render(16).names
    prompts = [captions(name)[0][0] for name in names]

    def draw(numbers: list[int]) -> Drawn:
        # Prompts of even place are scored, of odd place tuned on.
        chosen = [prompts[(2 * n if n >= 0 else -2 * n - 1) * 7 % len(prompts)] for n in numbers]
        latents = pipe(
            chosen,
            generator=[_generator(n) for n in numbers],
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="latent",
        ).images
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return Drawn((decoded / 2 + 0.5).clamp(0, 1), latents)

    return Subject(f"emoji-sd, {sampler}, {steps} steps", pipe, steps, draw, count)


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + number)


def _parts(numbers: range, size: int) -> Iterator[range]:
    for start in range(numbers.start, numbers.stop, size):
        yield numbers[start - numbers.start :][:size]


# Methods ------------------------------------------------------------------------------------------


@dataclass
class Method:
    """One way to cache.

    Attributes:
        name: of its row.
        active: switches it on around a run; gives, at the end, what a run took.
        settings: of ``cache_compile``, if it is one of ours.
    """

    name: str
    active: Callable[[Subject], Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Spent:
    """What one run took, on average.

    Attributes:
        refreshes: full evaluations of the network.
        flops_speedup: FLOPs of an uncached run over those of this one.
        depth: that was cut at, the outermost of several.
        schedule: what ran, if it had to be found first.
    """

    refreshes: float = 0.0
    flops_speedup: float = 1.0
    depth: int = 0
    schedule: Any = None


def deepcache(subject: Subject, interval: int, depth: int) -> Method:
    count = -(-subject.steps // interval)

    @contextmanager
    def active(subject: Subject) -> Iterator[Spent]:
        ratio = ratios(subject)[depth]
        helper = DeepCacheSDHelper(pipe=subject.pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=depth)
        helper.enable()
        try:
            yield Spent(count, steps_over(subject.steps, count, ratio), depth)
        finally:
            helper.disable()

    return Method(f"DeepCache, N={interval}, depth {depth}", active)


def ours(name: str, **settings: Any) -> Method:
    """With settings of ``cache_compile``; ``schedule`` may be a function that finds one first."""
    chosen = dict(settings)

    @contextmanager
    def active(subject: Subject) -> Iterator[Spent]:
        found = callable(chosen.get("schedule"))
        if found:
            chosen["schedule"] = chosen["schedule"](subject)
        dcompile.cache_compile(subject.pipe, **{"backend": "eager", "verbose": False, **chosen})
        schedule = chosen.get("schedule")
        spent = Spent(depth=chosen.get("depth", getattr(schedule, "depth", 0)))
        if found:
            spent.schedule = schedule
        try:
            yield spent
        finally:
            stats = dcompile.handle(subject.pipe).stats
            calls = stats.refresh_steps + stats.partial_steps + stats.reuse_steps
            spent.refreshes = stats.refresh_steps * subject.steps / calls
            spent.flops_speedup = stats.flops_speedup
            dcompile.handle(subject.pipe).disable()

    return Method(name, active, settings)


def as_json(schedule: Any) -> dict[str, Any] | None:
    """A schedule without how it was found."""
    if schedule is None:
        return None
    return schedule_to_json(
        replace(schedule, trials=()) if hasattr(schedule, "trials") else schedule
    )


def as_found(method: Method, schedule: dict[str, Any]) -> dict[str, Any]:
    """The settings of a method with the schedule that it found."""
    return {**method.settings, "schedule": schedule_from_json(schedule)}


def methods(subject: Subject, intervals: list[int]) -> Iterator[Method]:
    for interval in intervals:
        for depth in DEPTHS:
            yield deepcache(subject, interval, depth)
        if interval in OURS_AT:
            yield from ours_at(subject, interval)


def ours_at(subject: Subject, interval: int) -> Iterator[Method]:
    """What takes the FLOPs of this interval at depth 0, and MultiLevel schedules around them."""
    count = -(-subject.steps // interval)
    varied = interval == VARIED_AT
    for forecast in ("linear", "damped", "taylor", *(("quadratic",) if varied else ())):
        yield ours(f"uniform, {forecast}, N={interval}", interval=interval, forecast=forecast)
    yield ours(f"speedup=, as N={interval}", schedule=GainWeighted(count), forecast="auto")
    for power in (0.25, 0.5, 1.0) if varied else ():
        for forecast in ("reuse", "linear"):
            name = f"GainWeighted, power {power:g}, {forecast}, as N={interval}"
            yield ours(name, schedule=GainWeighted(count, power=power), forecast=forecast)
    for power in (0.0, 1.0) if varied else (1.0,):
        for forecast in ("linear", "damped"):
            name = f"Adaptive, power {power:g}, {forecast}, as N={interval}"
            yield ours(name, schedule=calibrated(interval, power, forecast), forecast=forecast)
    for depth in DEPTHS[1:]:
        name = f"uniform, damped, N={interval}, depth {depth}"
        yield ours(name, interval=interval, forecast="damped", depth=depth)
    for levels in PYRAMIDS.get(interval, ()):
        outer, *inner = levels
        name = f"MultiLevel, damped, every {outer[1]} at {outer[0]}"
        name += "".join(f", {every} at {depth}" for depth, every in inner)
        yield ours(name, schedule=MultiLevel(levels), forecast="damped")
    speedup = speedup_of(subject, interval)
    yield ours(f"tuned, at the FLOPs of N={interval}", schedule=tuned(speedup))
    if interval == 2:
        name = "tuned in 40 trials, at 1.8 times fewer FLOPs than N=2"
        yield ours(name, schedule=tuned(1.8 * speedup, trials=40))


TUNING = list(range(-8, 0))  # pictures that are not scored


def calibrated(
    interval: int, power: float, forecast: str
) -> Callable[[Subject], dcompile.Schedule]:
    return lambda subject: dcompile.calibrate(
        subject.pipe,
        lambda: subject.draw(TUNING[:4]),
        speedup=speedup_of(subject, interval),
        power=power,
        forecast=forecast,
        min_interval=max(1, interval - 1),
        max_interval=interval + 1,
        trials=8,
    )


def tuned(speedup: float, trials: int = 24) -> Callable[[Subject], dcompile.Schedule]:
    return lambda subject: dcompile.tune(
        subject.pipe,
        lambda: subject.draw(TUNING).pictures,
        speedup=speedup,
        trials=trials,
        verbose=False,
    )


def speedup_of(subject: Subject, interval: int) -> float:
    """In FLOPs, of an interval at depth 0."""
    return steps_over(subject.steps, -(-subject.steps // interval), ratios(subject)[0])


def steps_over(steps: int, refreshes: int, ratio: float) -> float:
    """Speed-up in FLOPs."""
    return steps / (refreshes + (steps - refreshes) * ratio)


_ratios: dict[str, dict[int, float]] = {}


def ratios(subject: Subject) -> dict[int, float]:
    """r of each depth."""
    if subject.name not in _ratios:
        dcompile.cache_compile(subject.pipe, interval=1, backend="eager", verbose=False)
        subject.draw([0])
        handle = dcompile.handle(subject.pipe)
        _ratios[subject.name] = {row.depth: row.ratio for row in handle.explain().depths}
        handle.disable()
    return _ratios[subject.name]


# Measuring ----------------------------------------------------------------------------------------


def scores(found: Drawn, expected: Drawn) -> dict[str, list[float]]:
    """Of each picture: PSNR in dB, SSIM, and relative L2 distance of the final latents."""
    pairs = list(zip(found.pictures, expected.pictures, strict=True))
    return {
        "psnr": [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in pairs],
        "ssim": [
            float(structural_similarity_index_measure(a[None], b[None], data_range=1.0))
            for a, b in pairs
        ],
        "latent_l2": [
            float((a - b).norm() / b.norm())
            for a, b in zip(found.latents, expected.latents, strict=True)
        ],
    }


def interval_of(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return (finite[0] if finite else math.inf), 0.0
    return statistics.mean(finite), 1.96 * statistics.stdev(finite) / math.sqrt(len(finite))


def measure(
    subject: Subject, intervals: list[int], rows: dict[str, Any], deadline: float, save: Any
) -> None:
    """Add rows for all methods that have none yet."""
    missing = [m for m in methods(subject, intervals) if m.name not in rows]
    if not missing:
        return
    ratios(subject)
    expected = subject.scored()
    for method in missing:
        if time.monotonic() > deadline:
            console.print("out of time; the same command goes on")
            return
        with method.active(subject) as spent:
            found = subject.scored()
        rows[method.name] = {
            "depth": spent.depth,
            "refreshes": round(spent.refreshes, 3),
            "steps": subject.steps,
            "flops_speedup": spent.flops_speedup,
            "wall_speedup": None,
            "schedule": as_json(spent.schedule),
            **scores(found, expected),
        }
        mean, half = interval_of(rows[method.name]["psnr"])
        console.print(f"{subject.name}: {method.name}: {mean:.2f} ± {half:.2f} dB")
        save()


def add_times(subject: Subject, intervals: list[int], rows: dict[str, Any], save: Any) -> None:
    """Wall-clock speed-ups for all rows that have none yet."""
    batch = list(range(4))

    def seconds() -> float:
        started = time.perf_counter()
        subject.draw(batch)
        return time.perf_counter() - started

    dcompile.cache_compile(subject.pipe, backend="eager", verbose=False)
    dcompile.handle(subject.pipe).disable()
    subject.draw(batch)
    uncached: float | None = None
    for number, method in enumerate(methods(subject, intervals)):
        row = rows.get(method.name)
        if row is None or row["wall_speedup"] is not None:
            continue
        if row.get("schedule"):  # what was found then, without another search
            method = ours(method.name, **as_found(method, row["schedule"]))
        if number % 4 == 0 or uncached is None:
            uncached = seconds()
        with method.active(subject):
            subject.draw(batch)  # captured, and warm
            cached = seconds()
        row["wall_speedup"] = uncached / cached
        save()


# Pages --------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Fidelity",
        "",
        "Made by `bench/fidelity.py`: cached against uncached pictures of the same seeds, on CPU, "
        "eager. Speed-ups are in FLOPs; measured ones, of a batch of 4, are next to them. PSNR, "
        "SSIM and the relative L2 distance of the final latents are means over the pictures with "
        "95 % confidence intervals. MultiLevel schedules are written by hand, and the one of "
        "every 2 at 0 and 8 at 3 was added after the tuner had missed 1.8 times fewer FLOPs at "
        "50 steps: it is chosen on the pictures that are scored, as nothing tuned or calibrated "
        "is.",
    ]
    for subject, rows in results.items():
        lines += [
            "",
            f"## {subject}",
            "",
            f"{len(next(iter(rows.values()))['psnr'])} pictures.",
            "",
            "| method | refreshes | FLOPs | measured | PSNR, dB | SSIM | latents |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in rows.items():
            measured = f"{row['wall_speedup']:.2f}x" if row["wall_speedup"] else "–"
            psnr, ssim, latents = (interval_of(row[key]) for key in ("psnr", "ssim", "latent_l2"))
            lines.append(
                f"| {name} | {row['refreshes']:.3g} of {row['steps']} | "
                f"{row['flops_speedup']:.2f}x | {measured} | "
                f"{psnr[0]:.2f} ± {psnr[1]:.2f} | {ssim[0]:.4f} ± {ssim[1]:.4f} | "
                f"{latents[0]:.4f} ± {latents[1]:.4f} |"
            )
        lines += ["", *bars(rows, "ddpm" in subject)]
    return "\n".join(lines) + "\n"


def bars(rows: dict[str, Any], ddpm: bool) -> Iterator[str]:
    """The numbers to reach, as far as they were measured."""

    def psnr(name: str) -> float | None:
        return interval_of(rows[name]["psnr"])[0] if name in rows else None

    wanted = {
        **{f"uniform, linear, N={n}": 3 for n in (2, 3)},
        "speedup=, as N=3": 7 if ddpm else 5,
        "tuned, at the FLOPs of N=3": 10 if ddpm else 7,
        "tuned, at the FLOPs of N=5": 8 if ddpm else 5,
    }
    yield "| against DeepCache at depth 0 and equal FLOPs | PSNR gained | bar |"
    yield "| --- | --- | --- |"
    for interval in OURS_AT:
        base = psnr(f"DeepCache, N={interval}, depth 0")
        for name in (
            f"uniform, linear, N={interval}",
            f"uniform, damped, N={interval}",
            f"uniform, taylor, N={interval}",
            f"speedup=, as N={interval}",
            f"Adaptive, power 1, linear, as N={interval}",
            f"Adaptive, power 1, damped, as N={interval}",
            f"tuned, at the FLOPs of N={interval}",
        ):
            value = psnr(name)
            if base is not None and value is not None:
                gained, bar = value - base, wanted.get(name)
                verdict = "reached" if bar and gained >= bar else "**missed**"
                said = f"{bar} dB, {verdict}" if bar else ""
                yield f"| {name} | {gained:+.1f} dB | {said} |"
    target = psnr("DeepCache, N=2, depth 0")
    if target is not None:
        spent = rows["DeepCache, N=2, depth 0"]["flops_speedup"]
        enough = {
            name: row["flops_speedup"] / spent
            for name, row in rows.items()
            if not name.startswith("DeepCache") and interval_of(row["psnr"])[0] >= target
        }
        if enough:
            best = max(enough, key=lambda name: enough[name])
            verdict = "reached" if enough[best] >= 1.8 else "**missed**"
            yield (
                f"| fewer FLOPs at the PSNR of DeepCache N=2 ({best}) | {enough[best]:.2f}x | "
                f"1.8x, {verdict} |"
            )
    yield from ["", "| against | at | PSNR gained |", "| --- | --- | --- |"]
    for interval in OURS_AT:
        for forecast in ("linear", "damped"):
            base = psnr(f"uniform, {forecast}, N={interval}")
            for power in (0, 1):
                adaptive = f"Adaptive, power {power}, {forecast}, as N={interval}"
                value = psnr(adaptive)
                if base is not None and value is not None:
                    taken = rows[adaptive]["flops_speedup"]
                    given = rows[f"uniform, {forecast}, N={interval}"]["flops_speedup"]
                    yield (
                        f"| Adaptive, power {power}, {taken:.2f}x, against uniform, both "
                        f"{forecast} | N={interval}, {given:.2f}x | {value - base:+.1f} dB |"
                    )
    single = {name: row for name, row in rows.items() if name.startswith(("uniform", "speedup="))}
    for name, row in rows.items():
        if name.startswith("MultiLevel"):
            rivals = [n for n, r in single.items() if r["flops_speedup"] >= row["flops_speedup"]]
            if rivals:
                best = max(rivals, key=lambda n: interval_of(single[n]["psnr"])[0])
                gained = interval_of(row["psnr"])[0] - interval_of(single[best]["psnr"])[0]
                yield f"| {name}, against one cut as fast | {best} | {gained:+.1f} dB |"


def plot(results: dict[str, Any], file: Path) -> None:
    """PSNR over speed-up: all methods, and each side's Pareto front."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for axis, (subject, rows) in zip(axes[0], results.items(), strict=True):
        for label, colour, chosen in (
            ("DeepCache", "tab:grey", [n for n in rows if n.startswith("DeepCache")]),
            ("dcompile", "tab:blue", [n for n in rows if not n.startswith("DeepCache")]),
        ):
            points = sorted(
                (rows[name]["flops_speedup"], interval_of(rows[name]["psnr"])[0]) for name in chosen
            )
            axis.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.5)
            front = [
                p for p in points if all(q[1] < p[1] for q in points if q != p and q[0] >= p[0])
            ]
            axis.plot(*zip(*front, strict=True), color=colour, label=label)
        axis.set_title(subject)
        axis.set_xlabel("speed-up in FLOPs")
        axis.set_ylabel("PSNR against uncached, dB")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(
    subject: Annotated[
        list[str] | None, typer.Option(help="ddpm, emoji-sd, emoji-sd-20; repeat. Default: all.")
    ] = None,
    interval: Annotated[list[int] | None, typer.Option(help="Default: 2 to 10.")] = None,
    count: Annotated[int, typer.Option(help="Pictures of each method.")] = 64,
    minutes: Annotated[float, typer.Option(help="Stop in time to go on later.")] = math.inf,
    times: Annotated[bool, typer.Option("--times", help="Only times, of what was scored.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = RESULTS,
) -> None:
    deadline = time.monotonic() + 60 * minutes
    makers = {
        "ddpm": lambda: ddpm(count),
        "emoji-sd": lambda: emoji_sd(count, "DDIM"),
        "emoji-sd-20": lambda: emoji_sd(count, "DPM-Solver++"),
    }
    file = out / "fidelity.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name in subject or list(makers):
        if name not in makers:
            raise SystemExit(f"unknown subject {name!r}; known are {', '.join(makers)}")
        made = makers[name]()
        rows = results.setdefault(made.name, {})

        intervals = interval or list(range(2, 11))

        order = {method.name: n for n, method in enumerate(methods(made, list(range(2, 11))))}

        def save(name: str = made.name, rows: Any = rows, order: dict[str, int] = order) -> None:
            results[name] = dict(sorted(rows.items(), key=lambda row: order.get(row[0], 999)))
            file.write_text(json.dumps(results, indent=1) + "\n")

        if times:
            add_times(made, intervals, rows, save)
        else:
            measure(made, intervals, rows, deadline, save)
    results = {name: rows for name, rows in results.items() if rows}
    (out / "fidelity.md").write_text(page(results))
    plot(results, ROOT / "docs/fidelity.png" if out == RESULTS else out / "fidelity.png")


if __name__ == "__main__":
    typer.run(main)
