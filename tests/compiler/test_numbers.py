"""Numbers among the arguments that differ from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heard import heard, noticed
from plain import Plain, picture, timesteps

import dcompile
from dcompile.compiler.capture_limits import MAX_VALUES

STEPS = 20


class Scaled(Plain):
    def forward(self, sample: Any, timestep: Any, scale: float = 1.0) -> Any:  # type: ignore[override]
        return super().forward(sample * scale, timestep)


class Branching(Plain):
    def forward(self, sample: Any, timestep: Any, scale: float = 1.0) -> Any:  # type: ignore[override]
        return super().forward(sample * scale if scale > 0.5 else sample, timestep)


class Counted(Plain):
    def forward(self, sample: Any, timestep: Any, number: int = 0) -> Any:  # type: ignore[override]
        for _ in range(number % 3):
            sample = sample * 0.9
        return super().forward(sample, timestep)


class Truncating(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long)
        return super().forward(sample, timestep, condition)


def made(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()


def run(network: Any, **step_of: Any) -> list[torch.Tensor]:
    x, results = picture(), []
    with torch.no_grad():
        for step, t in enumerate(timesteps(STEPS)):
            given = {name: value(step) for name, value in step_of.items()}
            results.append(network(x, t, **given)[0])
            x = x - 0.2 * results[-1]
    return results


def compiled_like(kind: type[Plain], interval: int) -> Any:
    return dcompile.cache_compile(made(kind), interval=interval, backend="eager", verbose=False)


def test_a_float_that_differs_at_each_step_becomes_an_input() -> None:
    def scale(step: int) -> float:
        return 1.0 - step / 25

    expected = run(made(Scaled), scale=scale)
    for interval in (1, 3):
        network = compiled_like(Scaled, interval)
        found = run(network, scale=scale)
        stats = dcompile.handle(network).stats
        assert stats.captures == 3  # twice as a constant, and as an input
        assert stats.uncached_calls == 0
        if interval == 1:
            assert all(map(torch.equal, found, expected))
        else:
            assert stats.reuse_steps >= 11


def test_one_that_never_changes_stays_a_constant() -> None:
    network = compiled_like(Branching, 1)
    expected = run(made(Branching), scale=lambda step: 0.75)
    assert all(map(torch.equal, run(network, scale=lambda step: 0.75), expected))
    assert dcompile.handle(network).stats.captures == 1


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Branching, "scale", lambda step: 1.0 - step / 25),
        (Counted, "number", lambda step: step),
    ],
)
def test_what_code_branches_on_is_a_constant_up_to_a_limit(
    kind: Any, name: str, value: Any
) -> None:
    network = compiled_like(kind, 1)
    expected = run(made(kind), **{name: value})
    with noticed(f"was captured for {MAX_VALUES} values of {name}"):
        found = run(network, **{name: value})
    assert all(map(torch.equal, found, expected))
    stats = dcompile.handle(network).stats
    assert stats.captures <= MAX_VALUES + 3
    assert stats.uncached_calls >= STEPS - MAX_VALUES - 3


def test_a_network_that_makes_an_integer_of_a_float() -> None:
    network, reference = compiled_like(Truncating, 1), made(Truncating)
    with torch.no_grad(), noticed("computes something else from a number as timestep"):
        for t in (981.5, 900.25, 7.0):
            assert torch.equal(network(picture(), t)[0], reference(picture(), t)[0])
    with torch.no_grad(), heard() as messages:
        t = torch.tensor(981.5)
        assert torch.equal(network(picture(), t)[0], reference(picture(), t)[0])
    assert not messages
    assert dcompile.handle(network).stats.uncached_calls == 3
