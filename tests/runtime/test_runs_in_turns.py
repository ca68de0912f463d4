"""Runs under way in turns: what a reuse step is served is its own run's, or nothing is reused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Plain, compiled, picture, plain, timesteps

import dcompile

NINE = timesteps(9)


def karras(count: int) -> list[float]:
    ramp = torch.linspace(0, 1, count)
    most, least = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
    return ((most + ramp * (least - most)) ** 7).tolist()  # type: ignore[no-any-return]


def falling(count: int, first: float = 999.0) -> list[float]:
    return torch.linspace(first, 0, count).tolist()  # type: ignore[no-any-return]


def columns() -> list[Any]:
    table = torch.stack([NINE, NINE], 1)
    return [table[:, 0], table[:, 1]]


# Timesteps of two runs.
WALKS: dict[str, Callable[[random.Random], Sequence[Any]]] = {
    "one tensor": lambda rng: [NINE, NINE],
    "the same values": lambda rng: [NINE.tolist(), NINE.tolist()],
    "other values": lambda rng: [
        falling(rng.randint(6, 12)),
        falling(rng.randint(6, 12), rng.choice([999, 900, 700])),
    ],
    "ascending": lambda rng: [
        torch.linspace(0, 1, rng.randint(6, 12)).tolist(),
        torch.linspace(0, 1, rng.randint(6, 12)).tolist(),
    ],
    "noise levels": lambda rng: [karras(rng.randint(12, 20)), karras(rng.randint(12, 20))],
    "new tensors": lambda rng: [[torch.full((2,), t) for t in falling(9)] for _ in range(2)],
    "every second": lambda rng: [NINE[::2], NINE],
    "backwards": lambda rng: [NINE, NINE.flip(0)],
    "columns of a table": lambda rng: columns(),
}


def shuffled(rng: random.Random, counts: Sequence[int]) -> list[int]:
    order = [run for run, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(order)
    return order


def in_blocks(rng: random.Random, counts: Sequence[int]) -> list[int]:
    order, left = [], [*counts]
    while any(left):
        run = rng.choice([run for run, count in enumerate(left) if count])
        taken = min(left[run], rng.randint(1, 5))
        order += [run] * taken
        left[run] -= taken
    return order


def after_one_given_up(rng: random.Random, counts: Sequence[int]) -> list[int]:
    return [0] * rng.randint(1, counts[0] - 1) + [1] * counts[1]


ORDERS = [shuffled, in_blocks, after_one_given_up]


def deep_features(network: Plain, x: torch.Tensor, t: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``Plain.forward`` concatenates last."""
    bias = network.time(torch.as_tensor(t).to(x).reshape(-1, 1) / 1000)
    outer = network.enter(x) + bias[:, :, None, None]
    inner = F.silu(network.down(outer))
    deep = F.interpolate(network.deep(inner), size=inner.shape[-2:])
    up = F.silu(network.up(torch.cat([deep, inner], 1)))
    return outer, F.interpolate(up, size=outer.shape[-2:])


@torch.no_grad()
def foreign(walks: Sequence[Any], order: Iterable[int], seed: int) -> tuple[int, int]:
    """How many steps were served what another run cached; and how many reused anything."""
    network, own = compiled(interval=3, depth=0), plain()
    handle = dcompile.handle(network)
    samples = [picture(10 * seed + run) for run in range(len(walks))]
    steps, cached = [0] * len(walks), [[] for _ in walks]  # type: ignore[var-annotated]
    wrong, reused = 0, 0
    for run in order:
        x, t = samples[run], walks[run][steps[run]]
        steps[run] += 1
        before = handle.stats.reuse_steps
        (result,) = network(x, t)
        outer, deep = deep_features(own, x, t)
        if handle.stats.reuse_steps == before:
            assert torch.equal(result, own(x, t)[0])
            cached[run].append(deep)
        else:
            reused += 1
            wrong += not any(
                torch.equal(result, own.leave(torch.cat([each, outer], 1))) for each in cached[run]
            )
        samples[run] = x - 0.2 * result
    return wrong, reused


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WALKS)
def test_no_run_is_served_what_another_one_cached(
    name: str, order: Callable[[random.Random, Sequence[int]], list[int]]
) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        walks = WALKS[name](rng)
        wrong, _ = foreign(walks, order(rng, [len(walk) for walk in walks]), seed)
        assert wrong == 0, seed


def test_a_call_that_fits_two_runs_refreshes() -> None:
    assert foreign([falling(5), falling(7)], [1, 1, 0, 0, 1, 0], 0)[0] == 0


@pytest.mark.parametrize("count", [8, 10, 20])
def test_noise_levels_are_the_steps_of_one_run(count: int) -> None:
    """They fall by a third and more at each step."""
    assert foreign([karras(count)], [0] * count, 0) == (0, count - -(-(count - 2) // 3) - 2)


def test_runs_whose_samples_differ_are_told_apart_by_them() -> None:
    """Numbers alone would not do: each value lies ahead of both."""
    order = [0, 0, *[1, 0] * 7, 1, 1]
    wrong, reused = foreign([falling(9), falling(9, 998.0)], order, 1)
    assert wrong == 0
    assert reused > 0
