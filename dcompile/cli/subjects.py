"""What ``dcompile bench`` runs: a pipeline on prompts, or a bare network on random inputs."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dcompile.cli.clock import StepClock, synchronize
from dcompile.cli.loading import load_network
from dcompile.cli.sampling import Progress, Sampler
from dcompile.cli.settings import SampleSettings
from dcompile.errors import ModelError
from dcompile.integrations.pipelines import denoiser_name, network_of
from dcompile.models.loading import is_network, load_pipeline

TRAINING_TIMESTEPS = 1000


class Subject(Protocol):
    """Runs a network over the steps of a sampler.

    Attributes:
        cacheable: what ``cache_compile`` takes.
        network: the network in it.
        sampler: name of the class that updates the sample, or what is done instead.
        prompts: one for each picture; empty without prompts.
        draws: whether it makes pictures.
        remarks: what a reader of its numbers has to know.
    """

    cacheable: Any
    network: nn.Module
    sampler: str
    prompts: tuple[str, ...]
    draws: bool
    remarks: tuple[str, ...]

    def use(self, network: Any) -> None:
        """Call this one from now on, which takes the same arguments."""
        ...

    def run(self, steps: int, clock: StepClock | None = None) -> tuple[torch.Tensor | None, float]:
        """Sample, always with the same seeds.

        Args:
            steps: number of steps.
            clock: times every step.

        Returns:
            Pictures, ``(count, channels, height, width)``, float32 in [0, 1] on the CPU, or None if
            it makes none; and the seconds all of it took.
        """
        ...


class PipelineSubject:
    """A pipeline with prompts; see ``Subject``.

    Raises:
        ModelError: the pipeline cannot be loaded, or does not take these settings.
    """

    draws = True
    remarks: tuple[str, ...] = ()

    def __init__(self, settings: SampleSettings, device: torch.device) -> None:
        self._sampler = Sampler(load_pipeline(settings.model, device), settings)
        self.cacheable = self._sampler.pipeline
        self.network = network_of(self.cacheable)
        self.sampler = self._sampler.scheduler
        self.prompts = self._sampler.prompts
        self._component = denoiser_name(self.cacheable)

    def use(self, network: Any) -> None:
        setattr(self.cacheable, self._component, network)

    def run(self, steps: int, clock: StepClock | None = None) -> tuple[torch.Tensor | None, float]:
        return self._sampler.run(steps, "", _no_progress, clock)


def _no_progress(stage: str, done: int, of: int) -> None:
    """Showing steps would take time of them."""


class NetworkSubject:
    """A bare network on random inputs, the same at every step; see ``Subject``.

    Raises:
        ModelError: it cannot be loaded, takes other arguments, or the settings have prompts.
    """

    sampler = "random inputs"
    prompts: tuple[str, ...] = ()
    draws = False

    def __init__(self, settings: SampleSettings, device: torch.device) -> None:
        self.network, shapes, trained = load_network(settings.model, device, settings.size)
        if settings.prompts or settings.guidance is not None:
            raise ModelError(
                f"{type(self.network).__name__} takes no prompt and no guidance: omit --prompt and "
                "--guidance"
            )
        self.cacheable = self._called = self.network
        self.remarks = (
            "a bare network on random inputs: no sampler, and no pictures to compare",
            *(() if trained else ("random weights: there are none in the folder",)),
        )
        self._device = device
        generator = torch.Generator().manual_seed(settings.seed)
        dtype = next(self.network.parameters()).dtype
        batch = settings.pictures

        def filled(shape: Any) -> Any:
            if not isinstance(shape, torch.Tensor):
                return shape
            sizes = (batch, *shape.shape[1:])
            if shape.is_floating_point():
                return torch.randn(sizes, generator=generator).to(device, dtype)
            return torch.zeros(sizes, dtype=shape.dtype, device=device)

        self._sample = filled(shapes.pop("sample"))
        del shapes["timestep"]
        self._conditioning: dict[str, Any] = tree_map(filled, shapes)

    def use(self, network: Any) -> None:
        self._called = network

    @torch.no_grad()
    def run(self, steps: int, clock: StepClock | None = None) -> tuple[torch.Tensor | None, float]:
        # One tensor of timesteps, as a sampler has it, and another one for every run.
        timesteps = torch.linspace(TRAINING_TIMESTEPS - 1, 0, steps).round().long()
        timesteps = timesteps.to(self._device)
        synchronize(self._device)
        started = time.perf_counter()
        if clock is not None:
            clock.begin()
        for timestep in timesteps:
            self._called(self._sample, timestep, **self._conditioning)
            if clock is not None:
                clock.end_step()
        synchronize(self._device)
        return None, time.perf_counter() - started


def load_subject(settings: SampleSettings, device: torch.device, progress: Progress) -> Subject:
    """The pipeline or network of a model.

    Raises:
        ModelError: there is none, it cannot be loaded, or it does not take these settings.
    """
    progress("loading", 0, 1)
    kind = NetworkSubject if is_network(settings.model) else PipelineSubject
    return kind(settings, device)
