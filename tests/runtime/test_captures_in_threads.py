"""A capture in one thread, and whatever others do meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn

import dcompile

LONG = 60


class Waiting(Plain):
    """Lets other threads work while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.traced = threading.Event()
        self.others = threading.Event()

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        if torch.compiler.is_exporting():
            self.traced.set()
            assert self.others.wait(LONG)
        return super().forward(sample, timestep, condition)


def waiting() -> Any:
    torch.manual_seed(0)
    return Waiting().eval()


def test_other_modules_run_while_one_is_traced() -> None:
    network = waiting()
    other = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.SiLU(), nn.Linear(4, 4)))
    expected = other(torch.ones(2, 4))
    compiled(network)

    def others() -> list[torch.Tensor]:
        try:
            assert network.traced.wait(LONG)
            return [other(torch.ones(2, 4)) for _ in range(20)]
        finally:
            network.others.set()

    with ThreadPoolExecutor(2) as pool:
        results = pool.submit(others)
        found = pool.submit(sampled, network, picture(), timesteps())
        assert all(torch.equal(result, expected) for result in results.result(LONG))
        assert torch.equal(found.result(LONG), sampled(compiled(plain()), picture(), timesteps()))
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_networks_are_captured_one_after_the_other() -> None:
    networks = [compiled(plain(seed)) for seed in range(6)]
    expected = [sampled(compiled(plain(seed)), picture(), timesteps()) for seed in range(6)]
    barrier = threading.Barrier(len(networks))

    def run(network: Any) -> torch.Tensor:
        barrier.wait(LONG)
        return sampled(network, picture(), timesteps())

    with ThreadPoolExecutor(len(networks)) as pool:
        assert all(map(torch.equal, pool.map(run, networks), expected))
    for network in networks:
        assert dcompile.handle(network).stats.captures == 1
        assert dcompile.handle(network).stats.uncached_calls == 0


@pytest.mark.full
def test_an_uncached_call_waits_for_a_capture_of_its_network() -> None:
    network = waiting()
    compiled(network)
    handle = dcompile.handle(network)

    def uncached() -> torch.Tensor:
        assert network.traced.wait(LONG)
        handle.disable()
        with torch.no_grad():
            started = pool.submit(network.others.wait, LONG)
            threading.Timer(0.2, network.others.set).start()
            result = network(picture(), timesteps()[0])[0]
            assert started.result(LONG)
        return result

    with ThreadPoolExecutor(4) as pool:
        run = pool.submit(sampled, network, picture(), timesteps())
        found = pool.submit(uncached).result(LONG)
        run.result(LONG)
    with torch.no_grad():
        assert torch.equal(found, plain()(picture(), timesteps()[0])[0])


def test_threads_that_are_building_something() -> None:
    """Whoever holds a tuple while another thread fills it makes that thread fail."""
    over = threading.Event()

    def build() -> int:
        count = 0
        while not over.is_set():
            tuple(part for part in range(300) if part % 50 or not over.wait(0.0005))
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        building = [pool.submit(build) for _ in range(3)]
        try:
            for seed in range(3):
                sampled(compiled(plain(seed)), picture(), timesteps())
        finally:
            over.set()
        assert all(work.result(LONG) > 0 for work in building)


@pytest.mark.full
def test_a_capture_that_reaches_a_network_which_is_being_traced() -> None:
    """While it is traced, its parameters have no values: they must not be taken for its state."""
    traced = waiting()
    compiled(traced)
    other = plain(1)
    other.deep.register_forward_hook(lambda module, given, result: traced.traced and None)
    compiled(other)

    def capture_the_other() -> torch.Tensor:
        assert traced.traced.wait(LONG)
        threading.Timer(1.0, traced.others.set).start()
        return sampled(other, picture(), timesteps())

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(capture_the_other)
        first = pool.submit(sampled, traced, picture(), timesteps())
        first.result(LONG)
        assert torch.equal(second.result(LONG), sampled(compiled(plain(1)), picture(), timesteps()))
    assert all(type(parameter) is nn.Parameter for parameter in traced.parameters())
    assert torch.equal(
        sampled(traced, picture(), timesteps()),
        sampled(compiled(plain()), picture(), timesteps()),
    )
