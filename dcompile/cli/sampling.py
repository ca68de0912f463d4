"""Runs a pipeline with fixed arguments and seeds, and reports its progress."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any

import torch

from dcompile import models
from dcompile.cli.clock import StepClock, at_each_step
from dcompile.cli.loading import set_sample_size
from dcompile.cli.settings import SampleSettings
from dcompile.errors import DcompileError, ModelError
from dcompile.models.loading import is_unconditional, with_few_steps
from dcompile.progress import StepBar

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how many of its steps are done, and how many it has."""


class Sampler:
    """A pipeline with all its arguments but the number of steps.

    Args:
        pipeline: an unconditional or text-to-image pipeline of diffusers.
        settings: what to generate.

    Attributes:
        settings: see above.
        pipeline: the pipeline that is called.
        scheduler: name of its scheduler's class.
        prompts: one for each picture; empty for an unconditional model.

    Raises:
        ModelError: the pipeline is of another kind, or does not take these settings.
    """

    def __init__(self, pipeline: Any, settings: SampleSettings) -> None:
        self.settings = settings
        self.prompts: tuple[str, ...] = ()
        parameters = inspect.signature(pipeline.__call__).parameters
        if is_unconditional(pipeline):
            if settings.prompts or settings.guidance is not None:
                raise ModelError(
                    f"{type(pipeline).__name__} takes no prompt and no guidance: omit "
                    "--prompt and --guidance"
                )
            if settings.size is not None:
                set_sample_size(pipeline, settings.size)
            pipeline = with_few_steps(pipeline)
            self._arguments: dict[str, Any] = {"batch_size": settings.pictures, "eta": 0.0}
        elif "prompt" in parameters and "num_images_per_prompt" in parameters:
            defaults = models.defaults(settings.model)
            prompts = settings.prompts or defaults.prompts
            self.prompts = tuple(islice(cycle(prompts), settings.pictures))
            self._arguments = (
                {"prompt": prompts[0], "num_images_per_prompt": settings.pictures}
                if len(prompts) == 1  # encoded once, not for every picture
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

    def pictures(self) -> torch.Tensor:
        """Pictures of one run, always the same, without progress."""
        return self.run(self.settings.steps, "", lambda stage, done, of: None)[0]

    def run(
        self, steps: int, stage: str, progress: Progress, clock: StepClock | None = None
    ) -> tuple[torch.Tensor, float]:
        """Call the pipeline, always with the same seeds.

        Args:
            steps: number of denoising steps.
            stage: name of the run for ``progress``.
            progress: called after every step.
            clock: times every step, from one update of the sample to the next.

        Returns:
            Pictures, ``(count, channels, height, width)``, float32 in [0, 1] on the CPU, and the
            time in seconds.

        Raises:
            ModelError: the pipeline refuses its arguments.
        """
        progress(stage, 0, steps)
        begin = (lambda: None) if clock is None else clock.begin
        self.pipeline.progress_bar = _step_bar(begin, lambda done: progress(stage, done, steps))
        seeds = range(self.settings.seed, self.settings.seed + self.settings.pictures)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        try:
            with at_each_step(self.pipeline.scheduler, clock):
                output = self.pipeline(
                    **self._arguments,
                    generator=generators,
                    num_inference_steps=steps,
                    output_type="pt",
                )
        except DcompileError:
            raise
        except (TypeError, ValueError) as error:  # how pipelines refuse arguments
            raise ModelError(f"{type(self.pipeline).__name__}: {error}") from error
        pictures = output.images.float().cpu()  # waits for the device
        seconds = time.perf_counter() - started
        progress(stage, steps, steps)
        return pictures, seconds


def _step_bar(begin: Callable[[], None], tick: Callable[[int], None]) -> Callable[..., StepBar]:
    def progress_bar(iterable: Iterable[Any] = (), total: int | None = None) -> StepBar:
        begin()
        return StepBar(iterable, tick)

    return progress_bar
