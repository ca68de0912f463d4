"""What is the same at every step is computed once for a run, and again when that is not so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import plain as plain_module
import pytest
import torch
from plain import compiled, picture, plain, sampled, steps_of, timesteps
from torch.fx import GraphModule

import dcompile
from dcompile.compiler import build

STEPS = 9
pytestmark = pytest.mark.usefixtures("graphs")


class Counted:
    """A backend that runs graphs as they are, and counts how often those without a sample ran."""

    def __init__(self) -> None:
        self.prologues = 0

    def __call__(self, graph_module: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        names = {str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")}
        if any("sample" in name for name in names):
            return graph_module

        def counted(*inputs: Any) -> Any:
            self.prologues += 1
            return graph_module(*inputs)

        return counted


def condition(seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, generator=generator, device="cpu").to(plain_module.DEVICE)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something with nothing hoisted."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(build, "hoists", lambda *_: False)
            return what()

    return run


def test_once_for_a_run() -> None:
    backend = Counted()
    network = compiled(backend=backend, interval=3, cuda_graphs=False)
    sampled(network, picture(), timesteps(STEPS), condition())
    first = backend.prologues  # and at compile time
    for _ in range(2):
        sampled(network, picture(), timesteps(STEPS), condition())
    assert backend.prologues - first == 2
    assert dcompile.handle(network).stats.cache_bytes == 0


@pytest.mark.parametrize("interval", [1, 3])
def test_the_same_bits(interval: int, without: Any) -> None:
    def run() -> torch.Tensor:
        return sampled(compiled(interval=interval), picture(), timesteps(STEPS), condition())

    found = run()
    assert torch.equal(found, without(run))
    if interval == 1:
        assert torch.equal(found, sampled(plain(), picture(), timesteps(STEPS), condition()))


def edited(network: Any, kind: str) -> torch.Tensor:
    """A run whose conditioning changes in the middle of it."""
    given, x = condition(), picture()
    for step, t in enumerate(timesteps(STEPS)):
        if step == 4:
            if kind == "replaced":
                given = condition(1)
            elif kind == "in place":
                given.mul_(2)
            elif kind == "data":
                given.data = condition(1)
            elif kind == "halved":
                given, x = given[:1], x[:1]
            elif kind == "left out":
                given = None
        if kind == "made at each step" and given is not None:
            given = given.clone()
        with torch.no_grad():
            x = x - 0.2 * network(x, t, given)[0]
    return x


KINDS = ["replaced", "in place", "data", "halved", "left out", "made at each step"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_that_changes_in_mid_run(kind: str, without: Any) -> None:
    assert torch.equal(edited(compiled(interval=1), kind), edited(plain(), kind))
    found = edited(compiled(interval=3), kind)
    assert torch.equal(found, without(lambda: edited(compiled(interval=3), kind)))


@torch.inference_mode()
def test_tensors_without_versions() -> None:
    """Nobody can know whether they were written to: the prologue runs at every step."""
    given, x, y = condition().clone(), picture().clone(), picture().clone()
    network, twin = compiled(interval=1), plain()
    for t in timesteps(STEPS):
        x, y = x - network(x, t, given)[0], y - twin(y, t, given)[0]
        assert torch.equal(x, y)
        given.mul_(1.1)


def test_weights_that_change() -> None:
    network, twin = compiled(interval=1), plain()
    steps = [steps_of(n, picture(), timesteps(STEPS), condition()) for n in (network, twin)]
    for step, (one, other) in enumerate(zip(*steps, strict=True)):
        assert torch.equal(one, other)
        if step == 3:
            for each in (network, twin):
                with torch.no_grad():
                    each.condition.weight.mul_(2)
    for each in (network, twin):
        each.condition.weight.data *= 2  # bears no version: seen by the next run
    expected = sampled(twin, picture(), timesteps(STEPS), condition())
    assert torch.equal(sampled(network, picture(), timesteps(STEPS), condition()), expected)


def test_guidance_in_two_calls(without: Any) -> None:
    def run(network: Any) -> torch.Tensor:
        x, positive, negative = picture(), condition(0), condition(1)
        for t in timesteps(STEPS):
            with torch.no_grad():
                x = x - 0.2 * (network(x, t, positive)[0] - network(x, t, negative)[0])
        return x

    backend = Counted()
    network = compiled(backend=backend, interval=3, cuda_graphs=False)
    found = run(network)
    first = backend.prologues
    assert torch.equal(run(network), found)
    assert backend.prologues - first == 2
    assert torch.equal(found, without(lambda: run(compiled(interval=3))))


def test_threads() -> None:
    network = compiled(interval=3)
    alone = [sampled(network, picture(s), timesteps(STEPS), condition(s)) for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda s: sampled(network, picture(s), timesteps(STEPS), condition(s)), range(4)
        )
        assert all(map(torch.equal, found, alone))


def test_calls_written_in_another_way() -> None:
    """What is hoisted follows the leaves, however many and in whatever order they are given."""
    network, twin = compiled(interval=1), plain()
    for t in timesteps(3):
        x, c = picture(), condition()
        with torch.no_grad():
            expected = twin(x, t, c)[0]
            for found in (
                network(x, t, c),
                network(condition=c, timestep=t, sample=x),
                network(x, condition=c, return_dict=False, timestep=t),
                network(x, t, c, 1.0, False),
            ):
                assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"forecast": "linear"},
        {"schedule": dcompile.Adaptive(0.1)},
        {"schedule": dcompile.MultiLevel([(0, 2), (1, 4)])},
    ],
    ids=str,
)
def test_with_every_other_kind_of_graph(settings: dict[str, Any], without: Any) -> None:
    def run() -> torch.Tensor:
        network = compiled(**settings)
        return sampled(network, picture(), timesteps(STEPS), condition())

    assert torch.equal(run(), without(run))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_saved_programs(backend: str, tmp_path: Path, graphs: str) -> None:
    if graphs == "simulated" and backend == "inductor":
        pytest.skip("what runs in the graphs makes no difference")
    network = compiled(backend=backend, interval=3)
    expected = sampled(network, picture(), timesteps(STEPS), condition())
    dcompile.handle(network).save(tmp_path / "programs")
    loaded = dcompile.load(plain(), tmp_path / "programs", verbose=False)
    assert torch.equal(sampled(loaded, picture(), timesteps(STEPS), condition()), expected)
    assert dcompile.handle(loaded).stats.captures == 0


@pytest.mark.full
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_open_sizes(backend: str, graphs: str) -> None:
    if graphs == "simulated" and backend == "inductor":
        pytest.skip("what runs in the graphs makes no difference")
    network = compiled(backend=backend, interval=1, dynamic=True)
    for batch, size in ((2, (8, 8)), (3, (12, 8)), (2, (8, 16))):
        x, c = picture(batch=batch, size=size), condition(batch=batch)
        found = sampled(network, x, timesteps(4), c)
        expected = sampled(plain(), x, timesteps(4), c)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert dcompile.handle(network).stats.captures == 1


def test_warm_up() -> None:
    network = compiled(interval=3)
    dcompile.handle(network).warmup((picture(), timesteps()[0], condition()))
    captured = dcompile.handle(network).stats.captures
    sampled(network, picture(), timesteps(STEPS), condition())
    assert dcompile.handle(network).stats.captures == captured
