"""How a loop goes over its timesteps, and how often it refreshes: the table of docs/runs.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from plain import compiled, picture, plain, sampled, steps_of, timesteps

import dcompile

STEPS = 13
AS_SCHEDULED = [0, 3, 6, 9, 12]


def ascending() -> torch.Tensor:
    return torch.linspace(0, 999, STEPS).round().long()


def falling() -> torch.Tensor:
    return ascending().flip(0)


# What a loop passes at each step; steps that refresh in the first run, and in the second.
WALKS: dict[str, tuple[Callable[[], Iterable[Any]], list[int], list[int]]] = {
    "elements": (falling, AS_SCHEDULED, AS_SCHEDULED),
    "expanded": (
        lambda: [t.expand(2) for t in falling()],
        AS_SCHEDULED,
        AS_SCHEDULED,
    ),
    "every second": (
        lambda: torch.linspace(999, 0, 2 * STEPS).round().long()[::2],
        [0, 1, 3, 6, 9, 12],
        AS_SCHEDULED,
    ),
    "falling offsets": (
        lambda: (lambda ts: [ts[STEPS - 1 - i] for i in range(STEPS)])(ascending()),
        [0, 1, 3, 6, 9, 12],
        AS_SCHEDULED,
    ),
    "a column": (
        lambda: torch.stack([falling(), falling() * 2], 1)[:, 0],
        AS_SCHEDULED,
        AS_SCHEDULED,
    ),
    "made again at every step": (
        lambda: (ascending().flip(0)[i] for i in range(STEPS)),
        [0, 1, 2, 3, 5, 8, 11],
        [0, 1, 3, 6, 9, 12],
    ),
    "made again at every step, and kept": (
        lambda: [ascending().flip(0)[i] for i in range(STEPS)],
        [0, 1, 2, 3, 4, 6, 9, 12],
        [0, 1, 3, 6, 9, 12],
    ),
    "numbers": (
        lambda: falling().tolist(),
        [0, 1, 3, 6, 9, 12],
        [0, 1, 3, 6, 9, 12],
    ),
    "tensors of their own": (
        lambda: [torch.full((2,), t) for t in falling().tolist()],
        [0, 1, 3, 6, 9, 12],
        [0, 1, 3, 6, 9, 12],
    ),
}


# Refreshes in both runs that the schedule did not ask for. A step that is taken for another run's
# first is asked for.
FORCED = {
    "elements": 0,
    "expanded": 0,
    "every second": 1,
    "falling offsets": 1,
    "a column": 0,
    "made again at every step": 2,
    "made again at every step, and kept": 2,
    "numbers": 2,
    "tensors of their own": 2,
}


def refreshes_of(network: Any, walk: Iterable[Any]) -> list[int]:
    found, x = [], picture()
    handle = dcompile.handle(network)
    for step, t in enumerate(walk):
        before = handle.stats.refresh_steps
        with torch.no_grad():
            x = x - 0.2 * network(x, t)[0]
        if handle.stats.refresh_steps > before:
            found.append(step)
    return found


@pytest.mark.parametrize("name", WALKS)
def test_steps_that_refresh(name: str) -> None:
    walk, first, second = WALKS[name]
    network = compiled(interval=3)
    assert refreshes_of(network, walk()) == first
    assert refreshes_of(network, walk()) == second
    stats = dcompile.handle(network).stats
    assert stats.forced_steps == FORCED[name]


@pytest.mark.parametrize("name", WALKS)
def test_what_is_reused_is_this_run_s(name: str) -> None:
    """Each refresh leaves what a run with just these refreshes leaves."""
    walk, first, _ = WALKS[name]
    network = compiled(interval=3)
    expected = compiled(schedule=dcompile.Steps(first))
    values = [torch.as_tensor(t) for t in walk()]
    elements = torch.stack([value.reshape(-1)[0] for value in values])
    x, y = picture(), picture()
    for t, value, element in zip(walk(), values, elements, strict=True):
        with torch.no_grad():
            x = x - 0.2 * network(x, t)[0]
            y = y - 0.2 * expected(y, element.expand(value.shape))[0]
    assert torch.equal(x, y)


@pytest.mark.parametrize("kind", [float, int, torch.tensor])
def test_two_runs_in_turns_that_nothing_tells_apart(kind: Callable[[Any], Any]) -> None:
    """Their values go one way, as those of one run do: nothing is reused."""
    schedules = [[999, 750, 500, 250, 1], [999, 666, 334, 1]]
    network = compiled(interval=3)
    pictures = [picture(1), picture(2)]
    with torch.no_grad():
        for step in range(5):
            for number, schedule in enumerate(schedules):
                if step < len(schedule):
                    x = pictures[number]
                    pictures[number] = x - 0.2 * network(x, kind(schedule[step]))[0]
    for number, schedule in enumerate(schedules):
        x = picture(number + 1)
        with torch.no_grad():
            for value in schedule:
                x = x - 0.2 * plain()(x, kind(value))[0]
        assert torch.equal(pictures[number], x)
    assert dcompile.handle(network).stats.reuse_steps == 0


def test_after_two_runs_given_up_at_their_first_step() -> None:
    """They look like a loop whose timesteps are made again at every step."""
    network = compiled(plain())
    handle = dcompile.handle(network)

    def forced() -> int:
        before = handle.stats.forced_steps
        sampled(network, picture(), timesteps(7))
        return handle.stats.forced_steps - before

    assert forced() == 0
    for _ in range(2):
        next(iter(steps_of(network, picture(), timesteps(7))))
    assert [forced() for _ in range(3)] == [1, 0, 0]
