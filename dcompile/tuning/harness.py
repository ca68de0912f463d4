"""Runs a user's sampling function with one schedule after the other, then restores everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from dcompile.api import cache_compile, handle
from dcompile.compiler.build import choose_cut
from dcompile.compiler.fingerprint import identity_of
from dcompile.errors import TuneError
from dcompile.handles import Handle
from dcompile.integrations.pipelines import denoiser_name, denoisers_of, is_pipeline, network_of
from dcompile.policy.fixed import Uniform
from dcompile.policy.sampler import error_gains
from dcompile.policy.schedule import RunInfo, Schedule
from dcompile.policy.tuned import Levels, Tuned
from dcompile.runtime.components import components_of, restore_components
from dcompile.runtime.dispatcher import Dispatcher, dispatcher_of
from dcompile.runtime.install import detach
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.state import RefreshRecord
from dcompile.runtime.wrapper import wrapper_of
from dcompile.tuning.images import IDENTICAL, pictures_of, psnr_between

# PSNR in dB of two uncached runs below which nothing can be compared with them.
LEAST_REPEATABLE = 50.0
_UNCACHED = (
    "run called the network in training mode or for gradients, where it is never cached: call "
    "eval(), and sample under torch.no_grad()"
)


class Harness:
    """A context in which a network runs with one schedule after the other.

    At its end the network, its companions and the pipeline are as they were before.

    Args:
        module: the network, or a pipeline.
        runs: one function for each sample, which generates it.
        backend: runs the graphs; see ``cache_compile``.
        sampler: a diffusers scheduler, or None for the pipeline's.
        verbose: show progress on standard error.

    Attributes:
        network: the network that is measured.
        runs: see above.
        expected: for each sample so far, the result of its uncached run, a flat tensor.
    """

    def __init__(
        self,
        module: Any,
        runs: list[Callable[[], Any]],
        backend: str,
        sampler: Any,
        verbose: bool,
    ) -> None:
        self.runs = runs
        self.expected: list[torch.Tensor] = []
        self._module = module
        self._settings = {"backend": backend, "sampler": sampler, "verbose": False}
        self._verbose = verbose

    def __enter__(self) -> Harness:
        # cache_compile takes torch.compile's wrapper off a pipeline's network.
        self._component = None
        denoisers = denoisers_of(self._module)
        if len(denoisers) > 1:
            raise TuneError(
                f"{type(self._module).__name__} has several denoisers: "
                f"{', '.join(denoisers)}. Measure one at a time: give the network, such as "
                f"pipe.{next(reversed(denoisers))}, and runs of the whole pipeline"
            )
        if is_pipeline(self._module):
            name = denoiser_name(self._module)
            self._component = name, getattr(self._module, name)
        self.network = network_of(self._module)
        components = getattr(self._module, "components", {}).values()
        found = [wrapper_of(part) for part in components if isinstance(part, nn.Module)]
        self._companions = {one: one.state() for one in found if isinstance(one, LazyNetwork)}
        dispatcher = dispatcher_of(self.network)
        self._before = dispatcher.state if dispatcher else None
        self._known_companions = list(dispatcher.companions) if dispatcher else []
        self._components = components_of(dispatcher) if dispatcher else []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            disable=not self._verbose,
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._component is not None:
            setattr(self._module, *self._component)
        dispatcher = dispatcher_of(self.network)
        if dispatcher is None:  # cache_compile refused the settings
            return
        if self._before is None:
            Handle(dispatcher).remove()
        else:
            dispatcher.state = self._before
            known = self._known_companions
            detach(dispatcher, [one for one in dispatcher.companions if one not in known])
            restore_components(self._components, dispatcher)
        for companion, state in self._companions.items():
            companion.restore(state)

    def task(self, name: str, total: int) -> Callable[[], None]:
        """A progress bar; the function returned is called when one of ``total`` parts is done."""
        task = self._progress.add_task(name, total=total)
        return lambda: self._progress.advance(task)

    def uncached(
        self,
        number: int,
        schedule: Schedule,
        observer: Callable[[RefreshRecord], None] | None = None,
    ) -> torch.Tensor:
        """Run sample ``number`` with a schedule that refreshes at every step.

        Returns:
            The result, as a flat tensor.

        Raises:
            TuneError: the run calls the network less than twice, or not for inference.
        """
        dispatcher = self._compiled(schedule=schedule)
        dispatcher.observer = observer
        try:
            picture = pictures_of(self.runs[number]())
        finally:
            dispatcher.observer = None
        stats = dispatcher.stats()
        if stats.refresh_steps < 2 and stats.uncached_calls:
            raise TuneError(_UNCACHED)
        if stats.refresh_steps < 2:
            raise TuneError("run called the network less than twice: there is nothing to cache")
        return picture

    def expect(self, number: int, picture: torch.Tensor) -> None:
        """Keep the result of an uncached run of sample ``number``.

        Raises:
            TuneError: an earlier run of it had another result.
        """
        if number == len(self.expected):
            self.expected.append(picture)
            return
        repeated = psnr_between(picture, self.expected[number])
        if not repeated >= LEAST_REPEATABLE:
            raise TuneError(
                f"run does not repeat: two uncached runs of sample {number} differ ({repeated:.1f} "
                "dB). Seed everything it draws: generator=torch.Generator().manual_seed(...)"
            )

    def psnr(self, levels: Levels, forecast: str, timesteps: int) -> float:
        """Mean PSNR in dB of all samples with these cuts; infinite if all are exact.

        Args:
            levels: cuts with their refresh steps; see ``policy.tuned.Levels``.
            forecast: name of the forecast used at all of them.
            timesteps: number of timesteps of a run.
        """
        *outer, (depth, steps) = levels
        identity = identity_of(self.network)
        self._compiled(
            schedule=Tuned(steps, timesteps, depth, forecast, identity, 1.0, 0.0, (), tuple(outer))
        )
        values = [
            psnr_between(pictures_of(run()), expected)
            for run, expected in zip(self.runs, self.expected, strict=True)
        ]
        if all(math.isinf(value) for value in values):
            return math.inf
        # One exact picture must not dominate the mean.
        return sum(min(value, IDENTICAL) for value in values) / len(values)

    def flops_speedup(self, **settings: Any) -> float:
        """Speed-up in FLOPs with these settings, over all samples.

        Raises:
            TuneError: the runs never call the network, or not for inference.
        """
        dispatcher = self._compiled(**settings)
        for run in self.runs:
            run()
        stats = dispatcher.stats()
        if not stats.refresh_steps and stats.uncached_calls:
            raise TuneError(_UNCACHED)
        if not stats.refresh_steps:
            raise TuneError("run never called the network: there is nothing to cache")
        return stats.flops_speedup

    def first_run(self) -> dict[int, float]:
        """Run the first sample uncached. Returns depth -> r for all cuts."""
        self.expect(0, self.uncached(0, Uniform(1)))
        return {row.depth: row.ratio for row in handle(self.network).explain().depths}

    def refuse_depth(self, depth: int) -> None:
        """Raise the DepthError of a depth that the network does not have."""
        dispatcher = self._dispatcher()
        current = dispatcher.programs.captures.current_networks(dispatcher.settings.dynamic)
        choose_cut(current[-1], depth)

    def describe_run(self, timesteps: int, ratio: float) -> RunInfo:
        """What a schedule is given to plan a run; see ``policy.schedule.RunInfo``."""
        return self._dispatcher().state.planner.describe_run(timesteps, ratio)

    def has_gains(self) -> bool:
        """Whether the sampler has noise levels that can be read."""
        find = self._dispatcher().settings.sampler
        return find is not None and error_gains(find()) is not None

    def _compiled(self, **settings: Any) -> Dispatcher:
        cache_compile(self._module, cuda_graphs=False, **{**self._settings, **settings})
        return self._dispatcher()

    def _dispatcher(self) -> Dispatcher:
        dispatcher = dispatcher_of(self.network)
        assert dispatcher is not None
        return dispatcher
