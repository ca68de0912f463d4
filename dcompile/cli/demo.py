"""The demo: one model uncached and cached, same seeds; how much faster, and how close."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcompile import models
from dcompile.api import cache_compile, handle
from dcompile.cli.loading import (
    is_unconditional,
    load_pipeline,
    resolve_device,
    set_sample_size,
)
from dcompile.errors import DcompileError, ModelError
from dcompile.policy.fixed import Uniform
from dcompile.report.explain import Explanation

if TYPE_CHECKING:
    from PIL import Image, ImageFont

DEFAULT_COUNT = 8
WARM_UP_STEPS = 2  # one refresh and one reuse step
SMALLEST_FOR_SSIM = 11  # pixels: the side of its Gaussian window

Progress = Callable[[str, int, int], None]
"""Told what is running, how many of its steps are done, and how many there are."""


@dataclass(frozen=True)
class DemoSettings:
    """What to run.

    Attributes:
        model: see ``dcompile.cli.loading.locate``.
        prompts: for text-to-image pipelines; pictures take them in turn. None given: the model's
            own, see ``dcompile.models.defaults``.
        steps: denoising steps.
        intervals: one cached run for each.
        depth: the skip connection to cut at.
        backend: see ``cache_compile``.
        count: pictures, all in one batch; None is 8, or as many as there are prompts given if
            these are several.
        size: height and width in pixels; None is the model's own.
        guidance: guidance scale; None is the model's own.
        seed: of the first picture, the next one's is one more.
        repeat: runs of each kind; the fastest counts.
        device: "auto", or any torch device.
    """

    model: str = models.DEFAULT
    prompts: tuple[str, ...] = ()
    steps: int = 50
    intervals: tuple[int, ...] = (3, 5)
    depth: int = 0
    backend: str = "eager"
    count: int | None = None
    size: int | None = None
    guidance: float | None = None
    seed: int = 0
    repeat: int = 1
    device: str = "auto"

    @property
    def pictures(self) -> int:
        """How many are drawn."""
        if self.count is not None:
            return self.count
        return len(self.prompts) if len(self.prompts) > 1 else DEFAULT_COUNT


@dataclass(frozen=True)
class Run:
    """One sampling run.

    Attributes:
        interval: None for the uncached run.
        seconds: of the whole pipeline call, the fastest if it was repeated.
        pictures: ``(count, channels, height, width)``, float32 in [0, 1], on the CPU.
        refresh_steps: calls of the network that ran the full graph.
        reuse_steps: calls that ran the shallow graph.
        speed_limit: N / (1 + (N - 1) r): for the network alone, 1 uncached.
        speed_up: over the uncached run.
        psnr: in dB, against the uncached run; infinite if equal.
        ssim: against the uncached run; not a number for pictures under 11 pixels.
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
    """What ``run_demo`` found.

    Attributes:
        title: model, pictures and steps.
        subtitle: the other settings.
        prompts: one for each picture; none of an unconditional model.
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
        DcompileError: bad settings, a model that cannot be found or run, torchmetrics missing.
    """
    _check(settings)
    device = resolve_device(settings.device)
    progress("loading", 0, 1)
    sampler = Sampler(load_pipeline(settings.model, device), settings)
    first, *_ = settings.intervals or (1,)
    sampler.compile(first)
    sampler.run(WARM_UP_STEPS, "compiling", progress)
    found = handle(sampler.pipeline)
    explanation = found.explain()
    ratio = explanation.depths[settings.depth].ratio

    found.disable()
    sampler.run(WARM_UP_STEPS, "uncached: warming up", progress)
    pictures, seconds = sampler.best_run("uncached", progress)
    uncached = Run(None, seconds, pictures, 0, 0)
    runs = [uncached]
    for interval in dict.fromkeys(settings.intervals):
        runs.append(_cached_run(sampler, interval, uncached, ratio, settings.repeat, progress))
    found.remove()
    title = (
        f"{_short_name(settings.model)}: {_counted(settings.pictures, 'picture')}, "
        f"{_counted(settings.steps, 'step')}"
    )
    if len(set(sampler.prompts)) == 1:
        title += f', "{_one_line(sampler.prompts[0])}"'
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
        Uniform(interval)  # raises now rather than after the uncached run
    if settings.pictures < len(settings.prompts):
        raise DcompileError(
            f"count: expected at least {len(settings.prompts)}, a picture for each prompt, "
            f"got {settings.pictures}"
        )
    _require_torchmetrics()


def _cached_run(
    sampler: Sampler, interval: int, uncached: Run, ratio: float, repeat: int, progress: Progress
) -> Run:
    """Warm up and time one interval, and compare its pictures with the uncached ones."""
    sampler.compile(interval)
    sampler.run(WARM_UP_STEPS, f"interval {interval}: warming up", progress)
    sampler.compile(interval)  # counts from zero; the compiled programs are kept
    pictures, seconds = sampler.best_run(f"interval {interval}", progress)
    stats = handle(sampler.pipeline).stats
    psnr, ssim = fidelity(pictures, uncached.pictures)
    return Run(
        interval=interval,
        seconds=seconds,
        pictures=pictures,
        refresh_steps=stats.refresh_steps // repeat,
        reuse_steps=stats.reuse_steps // repeat,
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
    _require_torchmetrics()
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    psnr = float(peak_signal_noise_ratio(pictures, reference, data_range=1.0))
    if min(pictures.shape[-2:]) < SMALLEST_FOR_SSIM:
        return psnr, math.nan
    return psnr, float(structural_similarity_index_measure(pictures, reference, data_range=1.0))


def _require_torchmetrics() -> None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise DcompileError(
            'PSNR and SSIM need torchmetrics: pip install "dcompile[demo]"'
        ) from error


class Sampler:
    """A pipeline with all settled but the number of steps.

    Attributes:
        pipeline: what is called.
        scheduler: its scheduler's class.
        prompts: one for each picture; none of an unconditional model.
    """

    def __init__(self, pipeline: Any, settings: DemoSettings) -> None:
        self.settings = settings
        self.prompts: tuple[str, ...] = ()
        parameters = inspect.signature(pipeline.__call__).parameters
        if is_unconditional(pipeline):
            import diffusers

            if settings.prompts or settings.guidance is not None:
                raise ModelError(
                    f"{type(pipeline).__name__} takes no prompt and no guidance: leave out "
                    "--prompt and --guidance"
                )
            if settings.size is not None:
                set_sample_size(pipeline, settings.size)
            # DDPM's own sampler needs 1000 steps; DDIM draws from the same model in 50.
            pipeline = diffusers.DDIMPipeline(
                pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
            )
            self._arguments: dict[str, Any] = {"batch_size": settings.pictures, "eta": 0.0}
        elif "prompt" in parameters and "num_images_per_prompt" in parameters:
            defaults = models.defaults(settings.model)
            prompts = settings.prompts or defaults.prompts
            self.prompts = tuple(islice(cycle(prompts), settings.pictures))
            self._arguments = (
                {"prompt": prompts[0], "num_images_per_prompt": settings.pictures}
                if len(prompts) == 1  # read once, not for every picture
                else {"prompt": list(self.prompts)}
            )
            if settings.size is not None:
                self._arguments |= {"height": settings.size, "width": settings.size}
            guidance = defaults.guidance if settings.guidance is None else settings.guidance
            if guidance is not None:
                self._arguments["guidance_scale"] = guidance
        else:
            raise ModelError(
                f"the demo runs unconditional and text-to-image pipelines; "
                f"{type(pipeline).__name__} is neither"
            )
        self.pipeline = pipeline
        self.scheduler = type(pipeline.scheduler).__name__

    def compile(self, interval: int) -> None:
        """(Re)set caching; compiled programs are kept."""
        settings = self.settings
        cache_compile(
            self.pipeline,
            interval=interval,
            depth=settings.depth,
            backend=settings.backend,
            verbose=False,
        )

    def best_run(self, stage: str, progress: Progress) -> tuple[torch.Tensor, float]:
        """Pictures, the same in every run, and seconds of the fastest run."""
        settings = self.settings
        runs = [self.run(settings.steps, stage, progress) for _ in range(settings.repeat)]
        return runs[-1][0], min(seconds for _, seconds in runs)

    def pictures(self) -> torch.Tensor:
        """Of one call, always the same, without a sign of life."""
        return self.run(self.settings.steps, "", lambda stage, done, of: None)[0]

    def run(self, steps: int, stage: str, progress: Progress) -> tuple[torch.Tensor, float]:
        """Pictures and seconds of one call of the pipeline, always with the same seeds."""
        progress(stage, 0, steps)
        self.pipeline.progress_bar = _step_bar(lambda done: progress(stage, done, steps))
        seeds = range(self.settings.seed, self.settings.seed + self.settings.pictures)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        try:
            output = self.pipeline(
                **self._arguments,
                generator=generators,
                num_inference_steps=steps,
                output_type="pt",
            )
        except DcompileError:
            raise
        except (TypeError, ValueError) as error:  # what pipelines say of arguments they dislike
            raise ModelError(f"{type(self.pipeline).__name__}: {error}") from error
        pictures = output.images.float().cpu()  # waits for the device
        seconds = time.perf_counter() - started
        progress(stage, steps, steps)
        return pictures, seconds


def _step_bar(tick: Callable[[int], None]) -> Callable[..., _StepBar]:
    def progress_bar(iterable: Iterable[Any] = (), total: int | None = None) -> _StepBar:
        return _StepBar(iterable, tick)

    return progress_bar


class _StepBar:
    """Stands in for the tqdm bar a pipeline makes: the only sign of life all pipelines give."""

    def __init__(self, iterable: Iterable[Any], tick: Callable[[int], None]) -> None:
        self._iterable, self._tick, self._done = iterable, tick, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self._done += count
        self._tick(self._done)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short_name(model: str) -> str:
    return models.ALIASES.get(model) or Path(model).name or model


def _one_line(text: str) -> str:
    return " ".join(text.split())


# The picture grid. Pillow's built-in font has no ×, – or ∞: captions do without.

PAD, GAP, CAPTION_WIDTH, HEADER = 36, 10, 236, 92
PICTURES_WIDTH, MOST_COLUMNS, LARGEST_TILE = 1100, 8, 256
LINE = 26
LABEL = 26  # the height of a prompt beneath its picture
CAPTION_HEIGHT = 4 * LINE
INK, GREY, BLUE, RULE = "#0f172a", "#64748b", "#1d4ed8", "#e2e8f0"


@dataclass(frozen=True)
class GridLayout:
    """Sizes in pixels of a grid of pictures, one block for each run.

    Attributes:
        columns: of pictures.
        rows: of pictures, in each block.
        tile: width and height of a picture.
        pitch: from one row to the next.
        block: height of a block.
        size: width and height of it all.
    """

    columns: int
    rows: int
    tile: tuple[int, int]
    pitch: int
    block: int
    size: tuple[int, int]

    @classmethod
    def of(
        cls, runs: int, count: int, height: int, width: int, labelled: bool = False
    ) -> GridLayout:
        """Small pictures are enlarged by a whole factor, large ones reduced to fit."""
        columns = min(count, MOST_COLUMNS)
        rows = math.ceil(count / columns)
        most = min(LARGEST_TILE, (PICTURES_WIDTH + GAP) // columns - GAP)
        side = max(height, width)
        scale = most // side if side <= most else most / side
        tile = (max(1, round(width * scale)), max(1, round(height * scale)))
        pitch = tile[1] + (LABEL if labelled else 0) + GAP
        block = max(rows * pitch - GAP, CAPTION_HEIGHT)
        # A single picture leaves room for the title all the same.
        pictures = max(columns * (tile[0] + GAP) - GAP, 560)
        return cls(
            columns,
            rows,
            tile,
            pitch,
            block,
            (
                2 * PAD + CAPTION_WIDTH + pictures,
                2 * PAD + HEADER + runs * block + (runs - 1) * PAD,
            ),
        )


def picture_grid(result: DemoResult) -> Image.Image:
    """One image: a block of pictures for each run, with its time and fidelity next to it.

    Prompts stand beneath the pictures if they differ.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = result.runs[0].pictures.shape
    labelled = len(set(result.prompts)) > 1
    layout = GridLayout.of(len(result.runs), count, height, width, labelled)
    grid = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(grid)
    fonts = {size: ImageFont.load_default(size=size) for size in (15, 16, 17, 20, 22, 30)}
    title = _fitted(result.title, fonts[30], layout.size[0] - 2 * PAD)
    draw.text((PAD, PAD - 6), title, INK, fonts[30])
    draw.text((PAD, PAD + 36), result.subtitle, GREY, fonts[16])
    enlarge = layout.tile[0] >= width
    resampling = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    y = PAD + HEADER
    for index, run in enumerate(result.runs):
        if index:
            middle = y - PAD // 2
            draw.line((PAD, middle, layout.size[0] - PAD, middle), RULE)
        draw.text((PAD, y + 18), run.method, INK, fonts[22], anchor="ls")
        for line, (text, colour, font) in enumerate(_caption(run), start=1):
            draw.text((PAD, y + 20 + line * LINE), text, colour, fonts[font], anchor="ls")
        for position, picture in enumerate(run.pictures):
            row, column = divmod(position, layout.columns)
            corner = (
                PAD + CAPTION_WIDTH + column * (layout.tile[0] + GAP),
                y + row * layout.pitch,
            )
            grid.paste(_image(picture).resize(layout.tile, resampling), corner)
            if labelled:
                label = _fitted(_one_line(result.prompts[position]), fonts[15], layout.tile[0])
                below = (corner[0] + layout.tile[0] / 2, corner[1] + layout.tile[1] + LABEL / 2)
                draw.text(below, label, GREY, fonts[15], anchor="mm")
        y += layout.block + PAD
    return grid


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of its beginning as the width has room for."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _caption(run: Run) -> list[tuple[str, str, int]]:
    """Lines with their colour and size."""
    seconds = (f"{run.seconds:.2f} s", GREY, 17)
    if run.interval is None:
        return [seconds]
    psnr = "identical" if math.isinf(run.psnr) else f"PSNR {run.psnr:.1f} dB"
    return [(f"{run.speed_up:.2f}x as fast", BLUE, 20), seconds, (psnr, GREY, 17)]


def _image(picture: torch.Tensor) -> Image.Image:
    from PIL import Image

    pixels = (picture.expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
