"""What a network takes from elsewhere than its arguments: found by its result, and refused."""

from __future__ import annotations

import cProfile
import datetime
import gc
import io
import itertools
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps

import dcompile
from dcompile.compiler.verification import difference_of_results

STEPS = 7


class Scaled(Plain):
    """Divides its result by what a function without arguments returns."""

    def __init__(self, factor: Callable[[], Any], held: Any = None) -> None:
        super().__init__()
        self.__dict__["factor"] = factor
        self.held = held

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return (super().forward(sample, timestep, condition)[0] / self.factor(),)


class Counting(Plain):
    calls = 0

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        self.calls += 1
        return (super().forward(sample, timestep, condition)[0] / self.calls,)


class OtherwiseTraced(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        (result,) = super().forward(sample, timestep, condition)
        return (2 * result if torch.compiler.is_exporting() else result,)


def numbers() -> Iterator[int]:
    for number in range(1, 1000):  # noqa: UP028 (a frame of its own)
        yield number


def delegated() -> Iterator[int]:
    yield from iter(range(1, 1000))


ITERATORS: dict[str, Callable[[], Iterator[int]]] = {
    "count": lambda: itertools.count(1),
    "list": lambda: iter([*range(1, 1000)]),
    "generator": numbers,
    "generator expression": lambda: (number for number in range(1, 1000)),
    "delegated": delegated,
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "map": lambda: map(abs, iter(range(1, 1000))),
}


def built(make: Callable[[], Plain]) -> Plain:
    torch.manual_seed(0)
    return make().eval()


def refused(make: Callable[[], Plain]) -> str:
    """Why a network runs uncached, and as if nobody had looked at it."""
    expected = sampled(built(make), picture(), timesteps(STEPS))
    network = compiled(built(make), interval=3)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    ((reason, calls),) = dcompile.handle(network).stats.uncached_reasons.items()
    assert calls == STEPS
    return str(reason)


@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator(name: str) -> None:
    def make() -> Plain:
        iterator = ITERATORS[name]()
        return Scaled(lambda: next(iterator))

    assert "every call changes" in refused(make)


def test_a_counter() -> None:
    assert "each call of Counting changes Counting.calls" in refused(Counting)


def test_code_that_is_traced_otherwise() -> None:
    assert "takes another path while it is traced" in refused(OtherwiseTraced)


@pytest.mark.parametrize(
    "clock",
    [
        time.time,
        time.monotonic_ns,
        lambda: time.perf_counter() - 1e6,
        lambda: int(time.time()) // 3600,
        lambda: datetime.datetime.now().hour + 1,
        lambda: os.urandom(1)[0] + 1,
        lambda: uuid.uuid4().int % 7 + 1,
    ],
)
def test_a_clock(clock: Callable[[], float]) -> None:
    """Also one that moves by less than two calls of float32 can show."""
    network = compiled(built(lambda: Scaled(clock)), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    (reason,) = stats.uncached_reasons
    assert "Scaled calls" in reason
    assert ".py:" in reason
    assert sys.getprofile() is None


def test_clocks_of_garbage_collection() -> None:
    def collected() -> float:
        gc.collect()
        return 2.0

    def timed(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()

    gc.callbacks.append(timed)
    try:
        network = compiled(built(lambda: Scaled(collected)), interval=3)
        sampled(network, picture(), timesteps(STEPS))
    finally:
        gc.callbacks.remove(timed)
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_clocks_of_log_records(caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> float:
        logging.getLogger("a network").warning("called")
        return 2.0

    network = compiled(built(lambda: Scaled(logged)), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_clocks_that_others_read_for_log_records() -> None:
    """Such as Ray, which replaces the factory of log records in the whole process."""
    made = logging.getLogRecordFactory()

    def stamped(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        record.created = time.time_ns() / 1e9
        return record

    def logged() -> float:
        logging.getLogger("a network").warning("called")
        return 2.0

    logging.setLogRecordFactory(stamped)
    try:
        network = compiled(built(lambda: Scaled(logged)), interval=3)
        sampled(network, picture(), timesteps(STEPS))
    finally:
        logging.setLogRecordFactory(made)
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_a_profiler_is_left_alone() -> None:
    with cProfile.Profile() as profile:
        network = compiled(built(lambda: Scaled(lambda: 2.0)), interval=3)
        sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps > 0
    assert profile.getstats()


def test_a_file() -> None:
    """Written to by each call, and by nothing else."""
    file = io.StringIO()

    def make() -> Plain:
        return Scaled(lambda: file.write("x"))

    assert "every call changes" in refused(make)
    assert len(file.getvalue()) == 2 * STEPS


def test_numbers_that_stay() -> None:
    network = compiled(built(lambda: Scaled(lambda: 2.0)), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_a_result_that_is_not_finite() -> None:
    network = plain()
    torch.nn.init.constant_(network.leave.bias, float("nan"))
    compiled(network, interval=3)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_differences_of_results() -> None:
    one = torch.tensor([1.0, float("nan"), float("inf"), -4.0])
    assert difference_of_results(one, one.clone()) == 0.0
    assert difference_of_results({"x": one}, {"x": one + torch.tensor([1.0, 0, 0, 0])}) == 0.25
    infinite = float("inf")
    for other in (one[:3], one.double(), one.nan_to_num(), None, -one):
        assert difference_of_results(one, other) in (infinite, 2.0)
    assert difference_of_results([one], [one, one]) == infinite
    assert difference_of_results((one, "a"), (one, "b")) == infinite
    assert difference_of_results(torch.zeros(2), torch.ones(2)) > 1e6
    assert difference_of_results(torch.zeros(0), torch.zeros(0)) == 0.0
