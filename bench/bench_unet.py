"""One network, five ways to run it, in one process:

    pytest bench/bench_unet.py --benchmark-only --benchmark-json=bench/results/unet.json
    python bench/tables.py

Each way is timed on whole cycles of INTERVAL steps, as a sampler makes them: one refresh and
INTERVAL - 1 reuse steps where the way caches, INTERVAL full steps where it does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import shapes
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler

import dcompile

INTERVAL = 3
ROUNDS = 3
# The fastest of Inductor's settings for convolutional networks on CPUs that we found.
CPU_OPTIONS = {"freezing": True, "layout_optimization": False}


def cycle(network: Any, call: dict[str, Any], steps: int = INTERVAL) -> Callable[[], list[float]]:
    """A run of ``steps`` sampling steps; returns the seconds of each."""

    def run() -> list[float]:
        seconds = []
        for t in torch.arange(steps, 0, -1) * 100:
            started = time.perf_counter()
            network(timestep=t, **call)
            seconds.append(time.perf_counter() - started)
        return seconds

    return run


def measure(benchmark: Any, run: Callable[[], list[float]], **info: Any) -> None:
    steps: list[list[float]] = []
    benchmark.pedantic(lambda: steps.append(run()), rounds=ROUNDS, iterations=1, warmup_rounds=1)
    counted = steps[1:]
    benchmark.extra_info.update(
        step_seconds=statistics.median(sum(s) / len(s) for s in counted),
        first_seconds=statistics.median(s[0] for s in counted),
        later_seconds=statistics.median(x for s in counted for x in s[1:]),
        interval=INTERVAL,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **info,
    )


@pytest.mark.benchmark(group="step")
def test_diffusers_eager(benchmark: Any, subject: shapes.Subject) -> None:
    measure(benchmark, cycle(*subject))


@pytest.mark.benchmark(group="step")
def test_deepcache_package(benchmark: Any, subject: shapes.Subject) -> None:
    network, call = subject
    scheduler = DDIMScheduler()
    scheduler.timesteps = torch.arange(INTERVAL, 0, -1) * 100
    helper = DeepCacheSDHelper(SimpleNamespace(unet=network, scheduler=scheduler))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    helper.enable()
    rest = {name: value for name, value in call.items() if name != "sample"}

    def run() -> list[float]:
        helper.start_timestep = None
        seconds = []
        for t in scheduler.timesteps:
            started = time.perf_counter()
            network(call["sample"], t, **rest)  # it wants the timestep by position
            seconds.append(time.perf_counter() - started)
        return seconds

    try:
        measure(benchmark, run)
    finally:
        helper.disable()


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", None), ("inductor", CPU_OPTIONS)],
    ids=["eager", "inductor"],
)
def test_dcompile(benchmark: Any, subject: shapes.Subject, backend: str, options: Any) -> None:
    network, call = subject
    dcompile.cache_compile(network, interval=INTERVAL, backend=backend, options=options)
    handle = dcompile.handle(network)
    try:
        measure(benchmark, cycle(network, call), options=options or {})
        table = handle.explain()
        benchmark.extra_info.update(
            ratio=table.depths[0].ratio,
            limit=table.depths[0].speed_limits[INTERVAL],
            compile_seconds=handle.stats.compile_seconds,
        )
    finally:
        handle.remove()


@pytest.mark.benchmark(group="step")
def test_torch_compile(benchmark: Any, subject: shapes.Subject) -> None:
    network, call = subject
    measure(benchmark, cycle(torch.compile(network), call))
