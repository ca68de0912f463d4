"""Times the steps of a run without getting in their way."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """Times each step of one run.

    On CUDA with events, which are read when the run is over: nothing waits for the device before.
    On the CPU with its clock. On any other device every step is waited for.

    Args:
        device: where the network runs.
        look: called after every step; what it takes is not timed.

    Attributes:
        seen: what ``look`` returned after each step.
    """

    def __init__(self, device: torch.device, look: Callable[[], Any] = lambda: None) -> None:
        self._device = device
        self._look = look
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self.seen: list[Any] = []

    def begin(self) -> None:
        """The first step begins now."""
        self._begun = self._now()

    def end_step(self) -> None:
        """A step ends now, and the next one begins."""
        self._spans.append((self._begun, self._now()))
        self.seen.append(self._look())
        self._begun = self._now()

    def milliseconds(self) -> list[float]:
        """Of each step; waits for the device."""
        synchronize(self._device)
        if self._device.type == "cuda":
            return [begun.elapsed_time(ended) for begun, ended in self._spans]
        return [1e3 * (ended - begun) for begun, ended in self._spans]

    def _now(self) -> Any:
        if self._device.type == "cuda":
            cuda: Any = torch.cuda  # its events have no types
            event = cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronize(self._device)
        return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def at_each_step(scheduler: Any, clock: StepClock | None) -> Iterator[None]:
    """End the clock's steps where the scheduler has updated the sample."""
    if clock is None:
        yield
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def timed(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        clock.end_step()
        return result

    scheduler.step = timed
    try:
        yield
    finally:
        del scheduler.step
