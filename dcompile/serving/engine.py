"""Runs jobs on one pipeline, one batch after another: the part that needs torch.

An engine is used by one thread at a time. Whoever shares it among requests, see
``dcompile.integrations.serve``, runs batches one after another.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image

from dcompile import models
from dcompile.api import cache_compile, handle, load
from dcompile.errors import JobError, ModelError, ScheduleError
from dcompile.handles import Handle
from dcompile.integrations.pipelines import denoisers_of, network_of
from dcompile.models.loading import (
    is_unconditional,
    load_pipeline,
    resolve_device,
    with_few_steps,
)
from dcompile.policy.self_tuned import SelfTuned
from dcompile.progress import StepBar
from dcompile.runtime.counters import Stats
from dcompile.runtime.dispatcher import Dispatcher, dispatcher_of
from dcompile.runtime.settings import Settings
from dcompile.serving.adapters import Adapters
from dcompile.serving.jobs import DEFAULT, Caching, Job
from dcompile.serving.pictures import PARTIAL, REFRESH, REUSE, UNCACHED, Picture, Trace
from dcompile.serving.samplers import Samplers
from dcompile.serving.settings import EngineSettings


class RunCancelled(Exception):  # noqa: N818 - nothing is wrong
    """Nobody waits for this run any more."""


class Watcher(Protocol):
    """Sees a run go on, from the thread that computes it."""

    def step(self, done: int, steps: int) -> None:
        """So many steps are done. May raise ``RunCancelled``, which ends the run."""
        ...

    def wants_preview(self, done: int, steps: int) -> bool:
        """Whether to decode what there is after this step."""
        ...

    def preview(self, images: Sequence[Image]) -> None:
        """What there is, one image for each job."""
        ...


class _Nobody:
    def step(self, done: int, steps: int) -> None:
        pass

    def wants_preview(self, done: int, steps: int) -> bool:
        return False

    def preview(self, images: Sequence[Image]) -> None:
        pass


class Engine:
    """One pipeline, cached.

    Args:
        pipeline: a text-to-image or unconditional pipeline of diffusers.
        settings: how it is cached.

    Attributes:
        settings: see above.
        pipeline: the pipeline.

    Raises:
        ModelError: the pipeline is of another kind.
    """

    def __init__(self, pipeline: Any, settings: EngineSettings) -> None:
        self.settings = settings
        self.pipeline = pipeline
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self._is_unconditional = is_unconditional(pipeline)
        if not self._is_unconditional and "prompt" not in self._parameters:
            raise ModelError(
                f"{type(pipeline).__name__} is neither a text-to-image nor an unconditional "
                "pipeline: others are not served"
            )
        self._samplers = Samplers(pipeline)
        config = network_of(pipeline).config
        self._size, self._multiple = _default_size(pipeline, config), _multiple(pipeline, config)
        self._adapters = Adapters(pipeline, settings.loras)
        self._own: list[tuple[Dispatcher, Settings]] = []  # what DEFAULT means, once it is settled
        self._caching = DEFAULT
        self._is_paused = False
        if settings.programs is None:
            self.configure(**settings.caching_arguments())
        else:
            self.adopt(Path(settings.programs), settings.new_calls)

    @classmethod
    def of(cls, settings: EngineSettings) -> Engine:
        """Load the model that the settings name.

        Raises:
            ModelError: see ``load_pipeline``.
            DcompileError: there is no such device, or a setting is wrong.
        """
        pipeline = load_pipeline(settings.model, resolve_device(settings.device))
        return cls(with_few_steps(pipeline) if is_unconditional(pipeline) else pipeline, settings)

    @property
    def handle(self) -> Handle:
        """Of the pipeline's denoisers."""
        return handle(self.pipeline)

    def adopt(self, programs: Path, new_calls: Literal["compile", "uncached"] = "compile") -> None:
        """Go on with saved programs and their schedule. Loading them runs code: see ``load``.

        Args:
            programs: what ``Handle.save`` wrote.
            new_calls: see ``load``.

        Raises:
            ArtifactError: they are damaged, or for something else. Everything stays as it was.
        """
        load(
            self.pipeline,
            programs,
            new_calls=new_calls,
            components=self.settings.components,
            verbose=self.settings.verbose,
        )
        self._is_paused = False
        self._settle()

    def configure(self, **arguments: Any) -> None:
        """Cache another way: ``cache_compile`` with the backend of the settings."""
        cache_compile(
            self.pipeline,
            **arguments,
            backend=self.settings.backend,
            options=self.settings.options or None,
            components=self.settings.components,
            verbose=self.settings.verbose,
        )

    def restore(self, programs: Path) -> None:
        """Go on with these saved programs and no others; uncached if they cannot be loaded.

        Raises:
            ArtifactError: they cannot.
        """
        self.handle.remove()
        try:
            self.adopt(programs, "uncached")
        except BaseException:
            self.configure(**self.settings.caching_arguments())
            self._settle()
            self.pause()
            raise

    def pause(self) -> None:
        """Run uncached until ``adopt``."""
        self._is_paused = True

    def freeze(self) -> None:
        """Go on with what was found by watching runs, and watch no more.

        From now on a job's picture depends on the job alone, and not on those before it.
        """
        schedule = self.handle.schedule
        if isinstance(schedule, SelfTuned) and schedule.watch is not None:
            self.configure(schedule=replace(schedule, watch=None))
        self._settle()

    def describe(self) -> dict[str, Any]:
        """What it can do, for those who check jobs elsewhere; JSON.

        ``size`` and ``multiple`` are in pixels; ``tokens`` is how many the text encoder reads.
        """
        own = models.defaults(self.settings.model)
        width, height = self._size
        return {
            "model": self.settings.name,
            "pipeline": type(self.pipeline).__name__,
            "prompt": not self._is_unconditional,
            "negative_prompt": "negative_prompt" in self._parameters,
            "guidance": own.guidance if "guidance_scale" in self._parameters else None,
            "takes_guidance": "guidance_scale" in self._parameters,
            "steps": self.settings.steps,
            "width": width,
            "height": height,
            "multiple": self._multiple,
            "resizes": not self._is_unconditional,
            "samplers": self._samplers.names,
            "sampler": type(self.pipeline.scheduler).__name__,
            "loras": sorted(self.settings.loras),
            "schedule": list(self.handle.schedule.describe()),
        }

    def generate(self, jobs: Sequence[Job], watcher: Watcher | None = None) -> list[Picture]:
        """Run a batch of jobs of one kind.

        Args:
            jobs: all of the same ``Job.kind``.
            watcher: is told of each step.

        Returns:
            A picture for each job, in order.

        Raises:
            JobError: this pipeline does not do such a job.
            RunCancelled: the watcher says so. Nothing of the run is left behind.
        """
        kinds = {job.kind for job in jobs}
        if len(kinds) != 1:
            raise ValueError(f"expected jobs of one kind, got {len(kinds)}")
        self._adapters.use(jobs[0].lora)
        self._use(jobs[0].caching)
        pipeline = copy.copy(self.pipeline)  # with a sampler of its own
        pipeline.scheduler = self._samplers.make(jobs[0].sampler)
        arguments = _arguments(jobs, self._is_unconditional)
        run = _Run(self.handle, jobs[0].steps, watcher or _Nobody())
        pipeline.progress_bar = run.progress_bar
        if "callback_on_step_end" in self._parameters:
            arguments["callback_on_step_end"] = run.after_step(pipeline)
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        try:
            images = pipeline(
                **arguments,
                generator=generators[0] if len(jobs) == 1 else generators,
                num_inference_steps=jobs[0].steps,
            ).images
        except BaseException as error:
            self.handle.reset()  # whoever keeps the error keeps the run's timesteps alive with it
            if isinstance(error, ScheduleError) and self._caching != DEFAULT:
                raise JobError("caching", str(error)) from error
            raise
        trace = run.trace(len(jobs))
        return [
            Picture(image.convert("RGB"), job.seed, trace, _notes(self.pipeline, job))
            for job, image in zip(jobs, images, strict=True)
        ]

    def check(self, job: Job) -> None:
        """Refuse what this pipeline does not do, before it takes time.

        Raises:
            JobError: names the field.
        """
        if self._is_unconditional and (job.prompt or job.negative_prompt):
            raise JobError("prompt", f"{self.settings.name} takes none")
        multiple = self._multiple
        width, height = self._size
        for field, value, own in (("width", job.width, width), ("height", job.height, height)):
            if value % multiple:
                raise JobError(field, f"expected a multiple of {multiple}, got {value}")
            if self._is_unconditional and value != own:
                raise JobError(field, f"{self.settings.name} makes pictures of {own} only")
        self._samplers.require(job.sampler, job.steps)
        if job.lora and job.lora not in self.settings.loras:
            known = ", ".join(sorted(self.settings.loras)) or "none here"
            raise JobError("lora", f"expected one of: {known}")

    def default_job(self, prompt: str = "", seed: int = 0) -> Job:
        """A job with the model's own settings."""
        width, height = self._size
        prompts = models.defaults(self.settings.model).prompts
        return Job(
            prompt="" if self._is_unconditional else prompt or prompts[0],
            seed=seed,
            steps=self.settings.steps,
            width=width,
            height=height,
            guidance=models.defaults(self.settings.model).guidance,
        )

    def _use(self, caching: Caching) -> None:
        """Cache as a job asks for. Programs for other ways are kept."""
        if self._is_paused:
            caching = Caching("off")
        if caching == self._caching:
            return
        if not self._own:
            self.freeze()
        if caching.mode == "off":
            self.handle.disable()
        else:
            if caching.mode == "interval":
                self.configure(interval=int(caching.value))
            elif caching.mode == "speedup":
                self.configure(speedup=caching.value, autotune=False)
            else:
                for dispatcher, settings in self._own:
                    dispatcher.configure(settings)
            self.handle.enable()
        self._caching = caching

    def _settle(self) -> None:
        """Remember how it is cached now."""
        self.handle.enable()
        found = map(dispatcher_of, denoisers_of(self.pipeline).values())
        self._own = [(one, one.settings) for one in found if one is not None]
        self._caching = DEFAULT


class _Run:
    """Follows one run by the pipeline's progress bar, the one hook that all pipelines have."""

    def __init__(self, handle: Handle, steps: int, watcher: Watcher) -> None:
        self._handle = handle
        self._steps = steps
        self._watcher = watcher
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last: float | None = None
        self._levels: list[str] = []
        self._before = self._seen = handle.stats

    def progress_bar(self, iterable: Iterable[Any] = (), total: int | None = None) -> StepBar:
        self._first = time.perf_counter()
        return StepBar(iterable, self._tick)

    def after_step(self, pipeline: Any) -> Callable[..., dict[str, Any]]:
        """A callback that shows previews, for pipelines whose latents can be decoded."""

        def callback(own: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors.get("latents")
            if self._watcher.wants_preview(step + 1, self._steps) and latents is not None:
                self._watcher.preview(_decoded(pipeline, latents))
            return tensors

        return callback

    def _tick(self, done: int) -> None:
        now = self._handle.stats
        self._levels.append(_level(self._seen, now))
        self._seen = now
        self._last = time.perf_counter()
        self._watcher.step(done, self._steps)

    def trace(self, batch: int) -> Trace:
        """How it went."""
        ended = time.perf_counter()
        first = self._first or ended
        last = self._last or first
        before, after = self._before, self._handle.stats
        cost = _cost(after) - _cost(before)
        reasons = {
            reason: more
            for reason, count in after.uncached_reasons.items()
            if (more := count - before.uncached_reasons.get(reason, 0)) > 0
        }
        return Trace(
            levels=tuple(self._levels),
            forced=after.forced_steps - before.forced_steps,
            flops_speedup=(after.calls - before.calls) / cost if cost else 1.0,
            seconds={
                "encode": first - self._began,
                "denoise": last - first,
                "decode": ended - last,
            },
            batch=batch,
            uncached_reasons=reasons,
            programs=after.captures - before.captures,
            compile_seconds=after.compile_seconds - before.compile_seconds,
        )


def _arguments(jobs: Sequence[Job], is_unconditional: bool) -> dict[str, Any]:
    """Of the pipeline's call."""
    first = jobs[0]
    if is_unconditional:
        return {"batch_size": len(jobs)}
    # One prompt is no list: some pipelines then expect lists everywhere.
    prompts: Any = [job.prompt for job in jobs] if len(jobs) > 1 else first.prompt
    arguments = {"prompt": prompts, "width": first.width, "height": first.height}
    if any(job.negative_prompt for job in jobs):
        negative = [job.negative_prompt for job in jobs]
        arguments["negative_prompt"] = negative if len(jobs) > 1 else negative[0]
    if first.guidance is not None:
        arguments["guidance_scale"] = first.guidance
    return arguments


def _notes(pipeline: Any, job: Job) -> tuple[str, ...]:
    tokenizer = getattr(pipeline, "tokenizer", None)
    longest = getattr(tokenizer, "model_max_length", None)
    if tokenizer is None or longest is None or len(job.prompt) < longest:
        return ()
    count = len(tokenizer(job.prompt).input_ids)
    if count <= longest:
        return ()
    return (f"the prompt has {count} tokens, of which the text encoder reads {longest}",)


def _default_size(pipeline: Any, config: Any) -> tuple[int, int]:
    """Width and height in pixels, from the configuration of the pipeline's denoiser."""
    size = getattr(config, "sample_size", None)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height is None or width is None:
        height = width = getattr(pipeline, "default_sample_size", None) or 64
    factor = 1 if is_unconditional(pipeline) else getattr(pipeline, "vae_scale_factor", 8)
    return int(width) * factor, int(height) * factor


def _multiple(pipeline: Any, config: Any) -> int:
    """What sizes in pixels are multiples of."""
    if is_unconditional(pipeline):
        return 1
    patch = getattr(config, "patch_size", None)
    factor = int(getattr(pipeline, "vae_scale_factor", 8))
    return max(8, factor * (patch if type(patch) is int else 1))


def _level(before: Stats, after: Stats) -> str:
    """What ran between two counts: the most expensive of a step's calls."""
    if after.refresh_steps > before.refresh_steps:
        return REFRESH
    if after.partial_steps > before.partial_steps:
        return PARTIAL
    if after.reuse_steps > before.reuse_steps:
        return REUSE
    return UNCACHED


def _cost(stats: Stats) -> float:
    """In full calls."""
    return stats.calls / stats.flops_speedup


def _decoded(pipeline: Any, latents: torch.Tensor) -> list[Image]:
    """Pictures of latents half way; empty for pipelines that decode in another way."""
    vae, processor = getattr(pipeline, "vae", None), getattr(pipeline, "image_processor", None)
    if vae is None or processor is None or latents.ndim != 4:
        return []
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        scaled = latents / vae.config.scaling_factor + shift
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    found: list[Image] = processor.postprocess(decoded, output_type="pil")
    return found
