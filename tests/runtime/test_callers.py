"""Timesteps that a loop computes from its own: found in the loop, or identified by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from torch import Tensor

from dcompile.runtime.by_value import BY_VALUE
from dcompile.runtime.tracking import StepTracker

NOTHING: list[Tensor] = []
STEPS = 6


def sampler(kind: Any = DDIMScheduler) -> Any:
    scheduler = kind()
    scheduler.set_timesteps(STEPS)
    return scheduler


def entered(tracker: StepTracker, timestep: Any) -> int:
    """The step; -1 if it would be refreshed because the step is not certain."""
    run, lane, step = tracker.enter(timestep, NOTHING)
    if step and not lane.cached:
        assert run.why_forced(lane)
        lane.cached = ("again",)
        return -1
    lane.cached = ("cached",)
    return step


def loop(tracker: StepTracker, scheduler: Any, given: Callable[[Tensor], Any]) -> list[int]:
    """What a pipeline does."""
    found = []
    for t in scheduler.timesteps:
        found.append(entered(tracker, given(t)))
    return found


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "divided": lambda t: t.expand(2) / 1000,
    "from one to zero": lambda t: (1000 - t.expand(2)) / 1000,
    "converted": lambda t: t.to(torch.float32),
    "repeated": lambda t: t.unsqueeze(0).repeat(3),
    "a number": lambda t: t.item(),
    "bfloat16": lambda t: t.to(torch.bfloat16).expand(2) / 1000,
    "logarithm": lambda t: (t.double() + 1).log() / 4,
    "nothing of it": lambda t: torch.zeros(2),
    "one for each token, some zero": lambda t: torch.tensor([[0, 0, 1, 1]]) * t,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_timestep_computed_from_the_loops_own(way: str) -> None:
    tracker, scheduler = StepTracker(), sampler()
    for run in range(1, 3):
        assert loop(tracker, scheduler, WAYS[way]) == list(range(STEPS))
        assert tracker.runs == run
        scheduler.set_timesteps(STEPS)


def test_a_sampler_that_visits_a_timestep_twice() -> None:
    scheduler = sampler(HeunDiscreteScheduler)
    count = len(scheduler.timesteps)
    assert loop(StepTracker(), scheduler, WAYS["divided"]) == list(range(count))


def test_from_the_middle_on() -> None:
    tracker, scheduler = StepTracker(), sampler()
    found = []
    for t in scheduler.timesteps[2:]:
        found.append(entered(tracker, t / 1000))
    assert found == list(range(STEPS - 2))
    run, _, _ = tracker.enter(scheduler.timesteps[2], NOTHING)
    assert run.steps == STEPS - 2


def test_the_scheduler_may_be_an_attribute() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.scheduler = sampler()

        def __call__(self, tracker: StepTracker) -> list[int]:
            found = []
            for t in self.scheduler.timesteps:
                found.append(entered(tracker, t / 1000))
            return found

    assert Pipeline()(StepTracker()) == list(range(STEPS))


def test_nothing_is_read_once_the_code_is_known() -> None:
    tracker, scheduler = StepTracker(), sampler()
    assert loop(tracker, scheduler, WAYS["divided"]) == list(range(STEPS))
    scheduler.set_timesteps(STEPS)
    meta = loop(tracker, scheduler, lambda t: torch.empty(2, device="meta"))  # reading would raise
    assert meta == list(range(STEPS))


VALUES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


def test_a_variable_that_stays_where_it_is() -> None:
    """The second call, at the same element, has another timestep: values count from there on."""
    tracker, scheduler = StepTracker(), sampler()
    t = scheduler.timesteps[0]
    found = [entered(tracker, value) for value in VALUES if t.numel() == 1]
    assert found == [0, 0, -1, 2, 3, 4]


def test_a_loop_within_the_loop() -> None:
    """Each pass over the inner timesteps is a run."""
    tracker, scheduler = StepTracker(), sampler()
    found = []
    for t in scheduler.timesteps[:2]:
        for value in VALUES:
            assert t.numel() == 1
            found.append(entered(tracker, value))
    assert found == [0, 0, -1, 2, 3, 4, 0, -1, 2, 3, 4, 5]


def test_a_step_of_two_halves() -> None:
    """Heun's second half is at the next noise level: two timesteps at one element."""
    tracker, scheduler = StepTracker(), sampler()
    found = []
    for t in scheduler.timesteps:
        found.append(entered(tracker, t.item() / 1000))
        found.append(entered(tracker, t.item() / 1000 - 0.08))
    assert found[:3] == [0, 0, -1]


def test_two_elements_at_once_are_not_certain() -> None:
    tracker, scheduler = StepTracker(), sampler()
    found = []
    for t, t_next in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        assert t_next.numel() == 1
        found.append(entered(tracker, t.item()))
    assert found == [0, -1, 2, 3, 4]


def test_why_it_was_not_certain() -> None:
    tracker = StepTracker()
    tracker.enter(0.9, NOTHING)
    run, lane, _ = tracker.enter(0.8, NOTHING)
    assert run.why_forced(lane) == BY_VALUE
