"""Networks that count their calls: left alone, unless anything depends on the count."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, sampled, timesteps

import dcompile
from dcompile.compiler.call_counts import Count

STEPS = 14
COUNTED = 0


class Counting(Plain):
    """Does something with the number of its calls, and keeps that in several places."""

    total = 0

    def __init__(self, factor: Callable[[Counting, Any], Any]) -> None:
        super().__init__()
        self.__dict__["factor"] = factor
        self.calls, self.share, self.left = 0, 0.0, 100
        self.holder = SimpleNamespace(calls=0)
        self.table = {"calls": 0}
        self.kept: list[Any] = []
        self.by_call: dict[int, Any] = {}

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        global COUNTED
        COUNTED += 1
        type(self).total += 1
        self.calls += 1
        self.share += 0.125
        self.left = self.left - 1
        self.holder.calls = 1 + self.holder.calls
        self.table["calls"] += 1
        (result,) = super().forward(sample, timestep, condition)
        return (result * self.factor(self, result),)


def kept(network: Counting, result: Any) -> float:
    network.kept.append(result)
    return 1.0


def kept_by_call(network: Counting, result: Any) -> float:
    network.by_call[network.calls] = result
    return 1.0


def toggled(network: Counting, result: Any) -> float:
    network.odd = not getattr(network, "odd", False)  # type: ignore[assignment]
    return 1.0 + network.odd  # type: ignore[operator]


def spelled(network: Counting, result: Any) -> float:
    network.name = getattr(network, "name", "") + "x"  # type: ignore[assignment, operator]
    return 1.0 + network.name.endswith("x" * 9)  # type: ignore[operator]


# What happens at the eighth call and later is seen at the first.
READ: dict[str, Callable[[Counting, Any], Any]] = {
    "compared": lambda network, _: 1.5 if network.calls > 8 else 1.0,
    "equal": lambda network, _: 1.5 if network.calls == 9 else 1.0,
    "in a sum": lambda network, _: 1.5 if network.calls + 3 > 11 else 1.0,
    "as the other operand": lambda network, _: 1.5 if network.calls > 8 else 1.0,
    "remainder": lambda network, _: 1.0 + (network.calls % 5 == 0),
    "factor": lambda network, _: network.calls // 8 + 1,
    "index": lambda network, _: ([1.0] * 8 + [1.5] * 200)[network.calls],
    "key": lambda network, _: {9: 1.5}.get(network.calls, 1.0),
    "text": lambda network, _: 1.5 if f"{network.calls}" == "9" else 1.0,
    "truth": lambda network, _: 1.0 if network.left - 91 else 1.5,
    "tensor": lambda network, result: 1.0 + torch.full_like(result, network.calls // 9),
    "filled": lambda network, result: torch.full((1,), network.calls),
    "added to a tensor": lambda network, result: torch.ones(1) + network.calls,
    "range": lambda network, _: 1.0 + len(range(network.calls)) // 9,
    "float": lambda network, _: 1.5 if network.share > 1 else 1.0,
    "method": lambda network, _: network.calls.bit_length(),
    "library": lambda network, _: math.sqrt(network.calls),
    "object": lambda network, _: 1.5 if network.holder.calls > 8 else 1.0,
    "dict": lambda network, _: 1.5 if network.table["calls"] > 8 else 1.0,
    "class": lambda network, _: 1.5 if type(network).total > 8 else 1.0,
    "global": lambda network, _: 1.5 if COUNTED > 8 else 1.0,
    "side effect": lambda network, o: kept(network, o) if network.calls > 8 else 1.0,
    "alternating": lambda network, o: kept(network, o) if network.calls % 2 else 1.0,
    "under its number": kept_by_call,
    "toggle": toggled,
    "string": spelled,
}


@pytest.fixture(autouse=True)
def counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "COUNTED", 0)
    monkeypatch.setattr(Counting, "total", 0)


def built(factor: Callable[[Counting, Any], Any]) -> Counting:
    global COUNTED
    COUNTED = Counting.total = 0
    torch.manual_seed(0)
    return Counting(factor).eval()


@pytest.mark.parametrize("name", READ)
def test_a_count_that_decides_something(name: str) -> None:
    reference = built(READ[name])
    expected = sampled(reference, picture(), timesteps(STEPS))
    network = compiled(built(READ[name]), interval=3)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    assert len(network.kept) == len(reference.kept)
    assert len(network.by_call) == len(reference.by_call)
    assert type(network.calls) is type(network.total) is type(COUNTED) is int
    for reason in stats.uncached_reasons:
        assert "changes" in reason
        assert "It runs uncached" in reason


def test_who_reads_it_is_said() -> None:
    network = compiled(built(READ["compared"]), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    (reason,) = dcompile.handle(network).stats.uncached_reasons
    assert "each call of Counting changes Counting.calls, and test_call_counts.py:" in reason
    assert "reads it: what depends on how often the network was called" in reason


def test_a_count_that_nobody_reads() -> None:
    expected = sampled(built(lambda *_: 1.0), picture(), timesteps(STEPS))
    network = compiled(built(lambda *_: 1.0), interval=1)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    assert dcompile.handle(network).stats.uncached_calls == 0
    assert (network.calls, network.holder.calls, network.left) == (1, 1, 99)  # the call at capture
    assert type(network.calls) is int


def test_what_is_set_once_may_be_read() -> None:
    """Such as for which length a table of rotary positions was made."""

    def longest(network: Counting, result: Any) -> float:
        if getattr(network, "longest", 0) < result.shape[-1]:
            network.longest = result.shape[-1]  # type: ignore[assignment]
        return 1.0

    network = compiled(built(longest), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_what_another_thread_changes_is_not_the_network_s() -> None:
    busy, ended = threading.Event(), threading.Event()
    network = built(lambda *_: 1.0)

    def monitor() -> None:
        while not ended.wait(0.3):
            network.kept.append(torch.ones(1))
            busy.set()

    thread = threading.Thread(target=monitor)
    thread.start()
    try:
        busy.wait()
        sampled(compiled(network, interval=3), picture(), timesteps(STEPS))
    finally:
        ended.set()
        thread.join()
    assert dcompile.handle(network).stats.uncached_calls == 0


# --- the stand-in ---------------------------------------------------------------------------------


def test_sums_and_differences_are_counts_again() -> None:
    readings: list[str] = []
    count = Count(3, readings)
    assert isinstance(count, int)
    total = 10 - ((count + 1) + Count(2, readings) - 4)
    assert type(total) is Count
    assert readings == []
    assert total == 8
    assert len(readings) == 1


@pytest.mark.parametrize(
    "read",
    [
        bool,
        int,
        float,
        str,
        repr,
        hash,
        abs,
        round,
        math.floor,
        copy.copy,
        lambda count: -count,
        lambda count: count * 2,
        lambda count: 2**count,
        lambda count: divmod(count, 2),
        lambda count: count < Count(4, []),
        lambda count: count.real,
        lambda count: "abcdef"[count],
        lambda count: f"{count:03d}",
    ],
)
def test_all_else_is_noted_and_gives_what_the_number_gives(read: Callable[[Any], Any]) -> None:
    readings: list[str] = []
    assert read(Count(3, readings)) == read(3)
    assert readings
