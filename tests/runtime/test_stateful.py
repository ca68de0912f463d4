"""What users do, in any order: at interval 1 nothing changes, at 3 each run is as if it were alone.

Or closer to uncached: after two runs in a row that were given up at their first step, the next ones
are told apart by timestep values, and in doubt they refresh once more. That is counted.

``DCOMPILE_EXAMPLES=2000 pytest tests/runtime/test_stateful.py`` looks longer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain import Plain, picture, sampled, steps_of, timesteps
from torch import nn

import dcompile

EXAMPLES = int(os.environ.get("DCOMPILE_EXAMPLES", "15"))
SEEDS = st.integers(0, 3)
COUNTS = st.integers(1, 7)

WALKS: dict[str, Callable[[int], Iterable[Any]]] = {
    "numbers": lambda count: timesteps(count).tolist(),
    "own": lambda count: [t.clone() for t in timesteps(count)],
    "floats": lambda count: [float(t) for t in timesteps(count)],
    "second": lambda count: timesteps(2 * count)[::2],
    "falling": lambda count: (lambda ts: [ts[count - 1 - i] for i in range(count)])(
        timesteps(count).flip(0)
    ),
    "column": lambda count: torch.stack([timesteps(count), timesteps(count)], 1)[:, 0],
}


class Gain(nn.Module):
    """Something on the way whose code and attributes change."""

    gain = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Subject(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.by = Gain()

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(self.by(sample), timestep, condition)


def louder(self: Gain, x: torch.Tensor) -> torch.Tensor:
    return x * self.gain * 1.5


class Users(RuleBasedStateMachine):
    """One network that is cached, and its twin that never was."""

    @initialize(interval=st.sampled_from([1, 3]))
    def begin(self, interval: int) -> None:
        torch.manual_seed(0)
        self.network = Subject().eval()
        self.twin = copy.deepcopy(self.network)
        self.feats: list[torch.Tensor] = []
        self.hook: Any = None
        self.interval = interval
        self._compile()

    def teardown(self) -> None:
        Gain.forward = _GAIN  # type: ignore[method-assign]

    def _compile(self) -> None:
        dcompile.cache_compile(self.network, interval=self.interval, backend="eager", verbose=False)

    def _forced(self) -> int:
        """Refreshes so far that no schedule asked for; a reset counts anew."""
        return dcompile.handle(self.network).stats.forced_steps

    def _alone(self, seed: int, count: int, batch: int) -> torch.Tensor:
        """The run as it is without anything before or beside it."""
        network = copy.deepcopy(self.twin)
        if self.interval > 1 and self.hook is None:
            dcompile.cache_compile(network, interval=self.interval, backend="eager", verbose=False)
        return sampled(network, picture(seed, batch), timesteps(count))

    def _require_as_alone(
        self, found: torch.Tensor, expected: torch.Tensor, seed: int, count: int, forced: int
    ) -> None:
        if self.interval == 1 or self._forced() == forced:
            assert torch.equal(found, expected)
        else:
            first = picture(seed, len(found))
            uncached = sampled(copy.deepcopy(self.twin), first, timesteps(count))
            assert (found - uncached).norm() <= 1.5 * (expected - uncached).norm()

    @rule(seed=SEEDS, count=COUNTS, batch=st.sampled_from([1, 2, 3]))
    def run(self, seed: int, count: int, batch: int) -> None:
        expected = self._alone(seed, count, batch)
        before, forced = len(self.feats), self._forced()
        found = sampled(self.network, picture(seed, batch), timesteps(count))
        self._require_as_alone(found, expected, seed, count, forced)
        if self.hook is not None:
            assert len(self.feats) - before == count

    @precondition(lambda self: self.interval == 1)
    @rule(seed=SEEDS, count=COUNTS, walk=st.sampled_from(sorted(WALKS)))
    def run_over(self, seed: int, count: int, walk: str) -> None:
        ts = list(WALKS[walk](count))
        expected = sampled(copy.deepcopy(self.twin), picture(seed), ts)
        assert torch.equal(sampled(self.network, picture(seed), ts), expected)

    @rule(seed=SEEDS, done=st.integers(1, 5))
    def interrupt(self, seed: int, done: int) -> None:
        walk = iter(steps_of(self.network, picture(seed), timesteps(7)))
        for _ in range(done):
            next(walk)

    @rule(seeds=st.tuples(SEEDS, SEEDS), count=COUNTS)
    def interleave(self, seeds: tuple[int, int], count: int) -> None:
        expected = [self._alone(seed, count, 2) for seed in seeds]
        runs = [steps_of(self.network, picture(seed), timesteps(count)) for seed in seeds]
        forced = self._forced()
        *_, found = zip(*runs, strict=True)
        for seed, own, other in zip(seeds, found, expected, strict=True):
            self._require_as_alone(own, other, seed, count, forced)

    @rule(factor=st.sampled_from([0.5, 1.25]))
    def swap_attribute(self, factor: float) -> None:
        self.network.by.gain = self.twin.by.gain = factor

    @rule()
    def change_weights_in_place(self) -> None:
        for network in (self.network, self.twin):
            with torch.no_grad():
                network.enter.weight.mul_(1.01)

    @rule(width=st.sampled_from([3, 5]))
    def replace_a_part(self, width: int) -> None:
        torch.manual_seed(width)
        part = nn.Conv2d(16, 3, width, padding=width // 2).requires_grad_(False)
        self.network.leave, self.twin.leave = part, copy.deepcopy(part)

    @rule()
    def patch_a_class(self) -> None:
        Gain.forward = _GAIN if Gain.forward is louder else louder  # type: ignore[method-assign]

    @precondition(lambda self: self.hook is None)
    @rule()
    def collect(self) -> None:
        self.hook = self.network.deep.register_forward_hook(lambda m, i, o: self.feats.append(o))

    @precondition(lambda self: self.hook is not None)
    @rule()
    def stop_collecting(self) -> None:
        self.hook.remove()
        self.hook = None

    @rule(seed=SEEDS)
    def copy_it(self, seed: int) -> None:
        t = timesteps()[0]
        with torch.no_grad():
            expected = self.twin(picture(seed), t)[0]
            assert torch.equal(copy.deepcopy(self.network)(picture(seed), t)[0], expected)
            assert torch.equal(copy.copy(self.network)(picture(seed), t)[0], expected)

    @rule(interval=st.sampled_from([1, 3]))
    def compile_again(self, interval: int) -> None:
        self.interval = interval
        self._compile()

    @rule()
    def reset(self) -> None:
        dcompile.handle(self.network).reset()

    @invariant()
    def no_trace_is_left(self) -> None:
        assert all(type(value) is torch.Tensor for value in getattr(self, "feats", []))


_GAIN = Gain.forward

LOOKING = settings(
    max_examples=EXAMPLES,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.full
class TestUsers(Users.TestCase):  # type: ignore[misc]
    settings = LOOKING


class TestUsersBriefly(Users.TestCase):  # type: ignore[misc]
    settings = settings(LOOKING, max_examples=3)
