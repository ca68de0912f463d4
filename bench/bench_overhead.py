"""The overhead of caching: dispatch, capture, compiling, memory.

pytest bench/bench_overhead.py --benchmark-only --benchmark-json=bench/results/overhead.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import seam
import shapes
import torch

import dcompile
from dcompile.backends import resolve
from dcompile.compiler.build import build
from dcompile.compiler.call import CallForms
from dcompile.compiler.program import ProgramSpec, weights_of
from dcompile.policy.forecast import coefficients_of, resolve_forecast
from dcompile.progress import Display
from dcompile.runtime.run import Run

REUSE = ProgramSpec((0,), (1,))


@pytest.mark.benchmark(group="overhead")
def test_dispatch_of_a_reuse_step(benchmark: Any) -> None:
    """A reuse call of the module against a call of its shallow graph, in turns.

    Both get a timestep they have not seen, as in a sampling loop: a tensor that was never touched
    costs some 50 microseconds of its own on the machine this was written on.
    """
    network, call = shapes.sdxl()
    dcompile.cache_compile(network, interval=10_000, backend="eager", verbose=False)
    steps, others = iter(torch.arange(2000, 0, -1)), iter(torch.arange(2000, 0, -1))
    network(timestep=next(steps), **call)
    leaves, form = CallForms(network.forward).flatten((), {"timestep": next(others), **call})
    assert form is not None
    position = form.timestep
    (run,) = seam.runs_of(network)
    (bound,) = run.programs.values()
    (lane,) = run.lanes

    def dispatched() -> None:
        network(timestep=next(steps), **call)

    def direct() -> None:
        leaves[position] = next(others)
        bound.graphs[0](leaves, lane.cached)

    seconds: dict[Callable[[], None], list[float]] = {dispatched: [], direct: []}
    for _ in range(1000):
        for run, taken in seconds.items():
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    benchmark.pedantic(direct, rounds=20)
    difference = statistics.median(seconds[dispatched]) - statistics.median(seconds[direct])
    benchmark.extra_info.update(
        dispatch_microseconds=difference * 1e6,
        submodules=sum(1 for _ in network.modules()),
        parameters=sum(1 for _ in network.parameters()),
    )
    assert dcompile.handle(network).stats.reuse_steps == 1000


@pytest.mark.benchmark(group="overhead")
def test_start_of_a_run(benchmark: Any) -> None:
    """What the first call of a run does beyond others: finds the program, binds the weights.

    While nothing has changed since the run before, and with everything read again; in turns.
    """
    network, call = shapes.sdxl()
    dcompile.cache_compile(network, interval=10_000, backend="eager", verbose=False)
    for _ in range(2):  # a capture, and a run after it
        network(timestep=torch.arange(9, 0, -1)[0], **call)
    dispatcher = seam.dispatcher_of(network)
    state, captures = dispatcher.state, dispatcher.programs.captures
    read = state.reader.read((), {"timestep": torch.arange(9, 0, -1)[0], **call})

    def unchanged() -> None:
        dispatcher.runners.bind(state, Run(9), read)

    def read_again() -> None:
        captures._watch = None
        dispatcher.runners.bind(state, Run(9), read)

    seconds: dict[Callable[[], None], list[float]] = {unchanged: [], read_again: []}
    for _ in range(50):
        for bind in (read_again, unchanged, unchanged):
            started = time.perf_counter()
            bind()
            seconds[bind].append(time.perf_counter() - started)
    benchmark.pedantic(unchanged, rounds=20)
    benchmark.extra_info.update(
        unchanged_milliseconds=statistics.median(seconds[unchanged]) * 1e3,
        read_again_milliseconds=statistics.median(seconds[read_again]) * 1e3,
    )


def standard_leaves(network: Any, call: dict[str, Any]) -> list[Any]:
    """A call's leaves in the order of what is captured of it."""
    forms = CallForms(network.forward)
    leaves, form = forms.flatten((), call)
    assert form is not None
    return forms.standard(form, leaves).leaves


@pytest.mark.benchmark(group="overhead")
def test_capture_and_passes(benchmark: Any, subject: shapes.Subject) -> None:
    """torch.export alone, and capture plus passes, in turns."""
    network, call = subject
    t = torch.tensor(100)
    leaves = standard_leaves(network, {"timestep": t, **call})
    alone: list[float] = []
    ours: list[float] = []

    def export() -> None:
        torch.export.export(network, (), {"timestep": t, **call}, strict=False)

    def capture() -> None:
        dcompile.cache_compile(network, backend="eager", verbose=False)
        try:
            captured = seam.captured(network, timestep=t, **call)
            build(captured, REUSE, resolve("eager", None), network, leaves, Display("", False))
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
    leaves = standard_leaves(network, {"timestep": torch.tensor(100), **call})
    dcompile.cache_compile(network, backend="eager", verbose=False)
    captured = seam.captured(network, timestep=torch.tensor(100), **call)
    dcompile.handle(network).remove()
    display = Display("", False)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)  # nothing compiled before
    try:
        benchmark.pedantic(
            lambda: build(captured, REUSE, resolve("inductor", None), network, leaves, display),
            rounds=1,
        )
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    benchmark.extra_info.update(
        full_seconds=display.seconds["compiling the full graph (inductor)"],
        shallow_seconds=display.seconds["compiling the shallow graph (inductor)"],
    )


@pytest.mark.benchmark(group="overhead")
def test_forecasts_on_a_reuse_step(benchmark: Any) -> None:
    """Shallow graphs with a forecast, and with the drift measured, against plain reuse, in turns.

    By Inductor, which fuses the arithmetic with what comes after it.
    """
    network, call = shapes.sd15(small=True)
    leaves = standard_leaves(network, {"timestep": torch.tensor(100), **call})
    dcompile.cache_compile(network, backend="eager", verbose=False)
    captured = seam.captured(network, timestep=torch.tensor(100), **call)
    dcompile.handle(network).remove()
    kinds = {
        "reuse": ("reuse", None),
        "linear": ("linear", None),
        "taylor": ("taylor", None),
        "linear_and_drift": ("linear", "l1"),
    }
    steps: dict[str, Callable[[], Any]] = {}
    full = None
    for kind, (name, probe) in kinds.items():
        forecast = resolve_forecast(name)
        cuts = ProgramSpec((0,), (forecast.history,), probe)
        # A full graph that returns what a probe compares with is another one.
        kept = full if probe is None else None
        program = build(
            captured, cuts, resolve("inductor", None), network, leaves, Display("", False), kept
        )
        full = program.full
        bound = program.bind(weights_of(network))
        _, cached = bound.refresh(leaves)
        _, cached = bound.refresh(leaves, cached)
        given = None
        if forecast.history > 1:
            numbers = coefficients_of(forecast, 4, (3, 0))
            given = torch.tensor([*numbers, *(0.0,) * (forecast.history - len(numbers))])

        def step(bound: Any = bound, cached: Any = cached, given: Any = given) -> None:
            bound.reuse(leaves, cached, given)

        steps[kind] = step
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    with torch.no_grad():
        for _ in range(60):
            for kind, run in steps.items():
                started = time.perf_counter()
                run()
                seconds[kind].append(time.perf_counter() - started)
        benchmark.pedantic(steps["linear"], rounds=3)
    plain = statistics.median(seconds["reuse"])
    benchmark.extra_info["reuse_seconds"] = plain
    for kind in list(kinds)[1:]:
        benchmark.extra_info[f"{kind}_over_reuse"] = statistics.median(seconds[kind]) / plain


MEMORY = """
import gc, sys
import psutil, shapes, torch
import dcompile
network, call = shapes.sd15(small={small})
resident = lambda: (gc.collect(), psutil.Process().memory_info().rss)[1]
ts = torch.arange(6, 0, -1)
with torch.no_grad():
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


PROGRAMS = """
import ctypes, gc, sys
from pathlib import Path

sys.path.insert(0, "../tests/support")
import torch, dcompile, shapes, seam


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


network, call = shapes.sdxl()
steps = iter(torch.arange(2000, 0, -1))
dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)


def run(width):
    wider = {**call, "sample": torch.randn(2, 4, 8, width)}
    for t in torch.arange(9, 0, -1)[:2]:
        network(timestep=t, **wider)


run(8)  # imports, caches of torch
before = resident()
for width in (12, 16, 20, 24):
    run(width)
grown = resident() - before
captured = seam.networks_of(network)[-1]
print(grown // 4, len(captured.graph_module.graph.nodes))
"""


@pytest.mark.benchmark(group="overhead")
def test_memory_of_a_program(benchmark: Any) -> None:
    """Growth of the process with each further size of an SDXL-shaped network."""
    found: list[str] = []

    def run() -> None:
        process = subprocess.run(
            [sys.executable, "-c", PROGRAMS],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
        )
        found.extend(process.stdout.split()[-2:])

    benchmark.pedantic(run, rounds=1)
    grown, nodes = map(int, found)
    benchmark.extra_info.update(program_bytes=grown, nodes=nodes, bytes_per_node=grown / nodes)


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
