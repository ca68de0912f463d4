"""One network, five ways to run it, in one process:

    pytest bench/bench_unet.py --benchmark-only --benchmark-json=bench/results/unet.json
    python bench/tables.py

Each way is timed on whole cycles of INTERVAL steps, as a sampler makes them: one refresh and
INTERVAL - 1 reuse steps where the way caches, INTERVAL full steps where it does not. The further
benchmarks measure what caching costs besides: dispatch, capture, compiling, memory.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import shapes
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler

import dcompile
from dcompile.backends import resolve
from dcompile.build import build
from dcompile.call import CallForms
from dcompile.display import Display

INTERVAL = 3
ROUNDS = 3
# The fastest of Inductor's settings for convolutional networks on CPUs that we found.
CPU_OPTIONS = {"freezing": True, "layout_optimization": False}

Subject = tuple[torch.nn.Module, dict[str, Any]]


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    return shapes.sd15(small=request.config.getoption("--width") == "small")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    with torch.no_grad():
        yield


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
def test_diffusers_eager(benchmark: Any, subject: Subject) -> None:
    measure(benchmark, cycle(*subject))


@pytest.mark.benchmark(group="step")
def test_deepcache_package(benchmark: Any, subject: Subject) -> None:
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
def test_dcompile(benchmark: Any, subject: Subject, backend: str, options: Any) -> None:
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
def test_torch_compile(benchmark: Any, subject: Subject) -> None:
    network, call = subject
    measure(benchmark, cycle(torch.compile(network), call))


@pytest.mark.benchmark(group="overhead")
def test_dispatch_of_a_reuse_step(benchmark: Any) -> None:
    """A reuse call of the module against a call of its shallow graph, in turns."""
    network, call = shapes.sdxl()
    dcompile.cache_compile(network, interval=1000, backend="eager", verbose=False)
    ts = torch.arange(1000, 0, -1)
    steps = iter(ts)
    network(timestep=next(steps), **call)
    dispatcher = dcompile.handle(network)._dispatcher
    leaves, _ = dispatcher._forms.flatten((), {"timestep": ts[0], **call})
    ((_, generation, _),) = dispatcher._tracker._by_storage.values()
    (bound,) = generation.programs.values()
    boundary = generation.lanes[0].boundary

    def once(call_it: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call_it()
        return time.perf_counter() - started

    pairs = [
        (
            once(lambda: network(timestep=next(steps), **call)),
            once(lambda: bound._shallow(leaves, boundary)),
        )
        for _ in range(900)
    ][100:]
    benchmark.pedantic(lambda: bound._shallow(leaves, boundary), rounds=20)
    dispatched, direct = (statistics.median(column) for column in zip(*pairs, strict=True))
    benchmark.extra_info.update(
        dispatch_microseconds=(dispatched - direct) * 1e6,
        submodules=sum(1 for _ in network.modules()),
        parameters=sum(1 for _ in network.parameters()),
    )
    assert dispatcher.stats().reuse_steps == 900


@pytest.mark.benchmark(group="overhead")
def test_capture_and_passes(benchmark: Any, subject: Subject) -> None:
    """torch.export alone, and capture plus passes, in turns."""
    network, call = subject
    t = torch.tensor(100)
    alone, ours = [], []

    def export() -> None:
        torch.export.export(network, (), {"timestep": t, **call}, strict=False)

    def capture() -> None:
        dcompile.cache_compile(network, backend="eager", verbose=False)
        try:
            dispatcher = dcompile.handle(network)._dispatcher
            captured = dispatcher.network_for((), {"timestep": t, **call})
            build(captured, 0, resolve("eager", None), network, [], Display("", False))
        finally:
            dcompile.handle(network).remove()

    export()
    for _ in range(3):
        for run, seconds in ((export, alone), (capture, ours)):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    benchmark.pedantic(capture, rounds=1)
    benchmark.extra_info.update(
        export_seconds=statistics.median(alone), capture_seconds=statistics.median(ours)
    )


@pytest.mark.benchmark(group="overhead")
def test_compiling_both_graphs(benchmark: Any, tmp_path: Any) -> None:
    """Seconds Inductor takes for the full graph and for the shallow one, in one process."""
    network, call = shapes.sd15(small=True)
    leaves, form = CallForms(network.forward).flatten((), {"timestep": torch.tensor(100), **call})
    assert form is not None
    dcompile.cache_compile(network, backend="eager", verbose=False)
    captured = dcompile.handle(network)._dispatcher.network_for(
        (), {"timestep": torch.tensor(100), **call}
    )
    dcompile.handle(network).remove()
    display = Display("", False)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)  # nothing compiled before
    try:
        benchmark.pedantic(
            lambda: build(captured, 0, resolve("inductor", None), network, leaves, display),
            rounds=1,
        )
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    benchmark.extra_info.update(
        full_seconds=display.seconds["compiling the full graph (inductor)"],
        shallow_seconds=display.seconds["compiling the shallow graph (inductor)"],
    )


MEMORY = """
import gc, sys
import psutil, shapes, torch
import dcompile
network, call = shapes.sd15(small={small})
resident = lambda: (gc.collect(), psutil.Process().memory_info().rss)[1]
ts = torch.arange(6, 0, -1)
with torch.no_grad():
    torch.export.export  # what torch loads to export is no cost of ours, but counted below
    for t in ts[:2]:
        network(timestep=t, **call)
    before = resident()
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    for t in ts[:3]:
        network(timestep=t, **call)
    after = resident()
weights = sum(p.numel() * p.element_size() for p in network.parameters())
print(before, after, weights, dcompile.handle(network).stats.cache_bytes)
"""


@pytest.mark.benchmark(group="overhead")
def test_resident_memory(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Growth of the process from uncached steps to cached ones, in a process of its own."""
    small = request.config.getoption("--width") == "small"
    code = MEMORY.format(small=small)
    found: list[str] = []

    def run() -> None:
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
        )
        found.extend(process.stdout.split()[-4:])

    benchmark.pedantic(run, rounds=1)
    before, after, weights, cached = map(int, found)
    benchmark.extra_info.update(
        extra_bytes=after - before - cached, weight_bytes=weights, cache_bytes=cached
    )
