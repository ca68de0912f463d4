"""The demo: one model uncached and cached with the same seeds; speed-up and fidelity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dcompile import models
from dcompile.api import cache_compile, handle
from dcompile.cli.sampling import Progress, Sampler
from dcompile.cli.settings import DemoSettings
from dcompile.errors import DcompileError
from dcompile.models.loading import load_pipeline, resolve_device
from dcompile.policy.fixed import Uniform
from dcompile.report.explain import Explanation

WARM_UP_STEPS = 2  # one refresh and one reuse step
SMALLEST_FOR_SSIM = 11  # pixels: the side of its Gaussian window


@dataclass(frozen=True)
class Run:
    """One sampling run.

    Attributes:
        interval: refresh interval; None for the uncached run.
        seconds: time of the whole pipeline call, of the fastest if it was repeated.
        pictures: ``(count, channels, height, width)``, float32 in [0, 1], on the CPU.
        refresh_steps: number of calls of the network that ran the full graph.
        reuse_steps: number of calls that ran the shallow graph.
        speed_limit: N / (1 + (N - 1) r), of the network alone; 1 for the uncached run.
        speed_up: over the uncached run.
        psnr: in dB, against the uncached run; infinite if equal.
        ssim: against the uncached run; NaN for pictures smaller than 11 pixels.
    """

    interval: int | None
    seconds: float
    pictures: torch.Tensor
    refresh_steps: int
    reuse_steps: int
    speed_limit: float = 1.0
    speed_up: float = 1.0
    psnr: float = math.inf
    ssim: float = 1.0

    @property
    def method(self) -> str:
        return "uncached" if self.interval is None else f"interval {self.interval}"


@dataclass(frozen=True)
class DemoResult:
    """The result of ``run_demo``.

    Attributes:
        title: model, number of pictures and of steps.
        subtitle: the other settings.
        prompts: one for each picture; empty for an unconditional model.
        explanation: what each depth would save.
        runs: the uncached run first, then one for each interval.
    """

    title: str
    subtitle: str
    prompts: tuple[str, ...]
    explanation: Explanation
    runs: tuple[Run, ...]


def run_demo(
    settings: DemoSettings, progress: Progress = lambda stage, done, of: None
) -> DemoResult:
    """Run the model uncached, then cached at each interval, with the same seeds.

    Everything is compiled and warmed up before anything is timed.

    Raises:
        DcompileError: invalid settings, a model that cannot be found or run, or torchmetrics is not
            installed.
    """
    _check(settings)
    device = resolve_device(settings.device)
    progress("loading", 0, 1)
    sampler = Sampler(load_pipeline(settings.model, device), settings)
    first, *_ = settings.intervals or (1,)
    _compile(sampler, settings, first)
    sampler.run(WARM_UP_STEPS, "compiling", progress)
    found = handle(sampler.pipeline)
    explanation = found.explain()
    ratio = explanation.depths[settings.depth].ratio

    found.disable()
    sampler.run(WARM_UP_STEPS, "uncached: warming up", progress)
    pictures, seconds = _best_run(sampler, settings, "uncached", progress)
    uncached = Run(None, seconds, pictures, 0, 0)
    runs = [uncached]
    for interval in dict.fromkeys(settings.intervals):
        runs.append(_cached_run(sampler, settings, interval, uncached, ratio, progress))
    found.remove()
    title = (
        f"{short_name(settings.model)}: {counted(settings.pictures, 'picture')}, "
        f"{counted(settings.steps, 'step')}"
    )
    if len(set(sampler.prompts)) == 1:
        title += f', "{one_line(sampler.prompts[0])}"'
    return DemoResult(
        title=title,
        subtitle=(
            f"{sampler.scheduler}, same seeds, {device.type}, backend {settings.backend}, "
            f"cut at depth {settings.depth} (r = {ratio:.3f})"
        ),
        prompts=sampler.prompts,
        explanation=explanation,
        runs=tuple(runs),
    )


def _check(settings: DemoSettings) -> None:
    for interval in settings.intervals:
        Uniform(interval)  # raises before the uncached run instead of after it
    settings.require_a_picture_for_each_prompt()
    require_torchmetrics()


def _compile(sampler: Sampler, settings: DemoSettings, interval: int) -> None:
    """Cache at this interval, with counters at 0; compiled programs are kept."""
    cache_compile(
        sampler.pipeline,
        interval=interval,
        depth=settings.depth,
        backend=settings.backend,
        verbose=False,
    )


def _best_run(
    sampler: Sampler, settings: DemoSettings, stage: str, progress: Progress
) -> tuple[torch.Tensor, float]:
    """Pictures, the same in every run, and the time of the fastest run in seconds."""
    runs = [sampler.run(settings.steps, stage, progress) for _ in range(settings.repeat)]
    return runs[-1][0], min(seconds for _, seconds in runs)


def _cached_run(
    sampler: Sampler,
    settings: DemoSettings,
    interval: int,
    uncached: Run,
    ratio: float,
    progress: Progress,
) -> Run:
    """Warm up and time one interval, and compare its pictures with the uncached ones."""
    _compile(sampler, settings, interval)
    sampler.run(WARM_UP_STEPS, f"interval {interval}: warming up", progress)
    _compile(sampler, settings, interval)  # resets the counters
    pictures, seconds = _best_run(sampler, settings, f"interval {interval}", progress)
    stats = handle(sampler.pipeline).stats
    psnr, ssim = fidelity(pictures, uncached.pictures)
    return Run(
        interval=interval,
        seconds=seconds,
        pictures=pictures,
        refresh_steps=stats.refresh_steps // settings.repeat,
        reuse_steps=stats.reuse_steps // settings.repeat,
        speed_limit=interval / (1 + (interval - 1) * ratio),
        speed_up=uncached.seconds / seconds,
        psnr=psnr,
        ssim=ssim,
    )


def fidelity(pictures: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB over all pixels of all pictures, and mean SSIM; values lie in [0, 1].

    Raises:
        DcompileError: torchmetrics is not installed.
    """
    require_torchmetrics()
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    psnr = float(peak_signal_noise_ratio(pictures, reference, data_range=1.0))
    if min(pictures.shape[-2:]) < SMALLEST_FOR_SSIM:
        return psnr, math.nan
    return psnr, float(structural_similarity_index_measure(pictures, reference, data_range=1.0))


def require_torchmetrics() -> None:
    """Raises DcompileError if torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise DcompileError(
            'PSNR and SSIM need torchmetrics: pip install "dcompile[demo]"'
        ) from error


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it has to be."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short_name(model: str) -> str:
    """A bundled model's name, the last part of a folder or of an id on the hub."""
    return models.ALIASES.get(model) or Path(model).name or model


def one_line(text: str) -> str:
    """The text with single spaces in place of all white space."""
    return " ".join(text.split())
