"""What was captured and compiled stays within a budget, and can be dropped."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import seam
import torch
from heard import heard, silent
from plain import compiled, picture, plain, sampled, timesteps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import graph_module

import dcompile
from dcompile.compat import sources
from dcompile.compiler.capture_cache import MAX_UNUSED_STRUCTURES
from dcompile.compiler.program_memory import bytes_of_networks

STEPS = 7
SIZES = [(8, 8), (8, 12), (12, 8)]


def run(network: Any, size: tuple[int, int]) -> torch.Tensor:
    return sampled(network, picture(size=size), timesteps(STEPS))


def captures_of(network: Any) -> int:
    return dcompile.handle(network).stats.captures


def bytes_of_one() -> int:
    network = compiled()
    run(network, SIZES[0])
    return bytes_of_networks(seam.dispatcher_of(network).programs.captures.networks())


def test_the_least_recently_used_program_goes() -> None:
    network = compiled(program_memory=2 * bytes_of_one() + 1)
    first, second, third = SIZES
    expected = {size: run(compiled(), size) for size in SIZES}
    with heard() as messages:
        for size, captures in [(first, 1), (second, 2), (first, 2), (third, 3), (first, 3)]:
            assert torch.equal(run(network, size), expected[size])
            assert captures_of(network) == captures, size
        assert torch.equal(run(network, second), expected[second])
    assert captures_of(network) == 4
    assert dcompile.handle(network).stats.uncached_calls == 0
    (message,) = messages
    assert message.startswith("dcompile: the programs of Plain take more than program_memory=")


def test_a_budget_for_less_than_one_keeps_the_latest() -> None:
    network = compiled(program_memory=1)
    for _ in range(2):
        run(network, SIZES[0])
    assert captures_of(network) == 1
    run(network, SIZES[1])
    gc.collect()
    assert len(seam.dispatcher_of(network).programs.captures.networks()) == 1


def test_dropped_programs_are_freed() -> None:
    network = compiled(program_memory=1)
    run(network, SIZES[0])
    (held,) = seam.dispatcher_of(network).programs.captures.networks()
    reference = weakref.ref(held)
    del held
    run(network, SIZES[1])
    gc.collect()
    assert reference() is None


def test_reset_keeps_programs_unless_asked() -> None:
    network = compiled()
    expected = run(network, SIZES[0])
    dcompile.handle(network).reset()
    run(network, SIZES[0])
    assert captures_of(network) == 1
    reference = weakref.ref(seam.dispatcher_of(network).programs.captures.networks()[0])
    with silent():
        dcompile.handle(network).reset(programs=True)
        gc.collect()
        assert reference() is None
        assert torch.equal(run(network, SIZES[0]), expected)
    assert captures_of(network) == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2GB", None])
def test_the_budget_is_a_number_of_bytes(wrong: Any) -> None:
    with pytest.raises(dcompile.DcompileError, match="program_memory: expected a positive number"):
        dcompile.cache_compile(plain(), program_memory=wrong)


def modes() -> int:
    gc.collect()
    return sum(isinstance(thing, FakeTensorMode) for thing in gc.get_objects())


@pytest.mark.full
def test_a_capture_leaves_nothing_behind() -> None:
    network = compiled()
    counts = []
    for _ in range(4):
        dcompile.handle(network).reset(programs=True)
        sampled(network, picture(), timesteps())
        counts.append(modes())
    assert counts[1] == counts[3]


def test_source_text_of_old_graphs_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT", 100_000)
    network = compiled()
    sizes = []
    for _ in range(6):
        dcompile.handle(network).reset(programs=True)
        sampled(network, picture(), timesteps())
        sizes.append(sum(map(len, graph_module._loader.eval_cache.values())))
    assert sizes[-1] <= sizes[0] + 100_000


def test_structures_of_hooks_that_come_and_go_are_forgotten() -> None:
    network = compiled()
    captures = seam.dispatcher_of(network).programs.captures
    expected = sampled(plain(), picture(), timesteps())
    for _ in range(2 * MAX_UNUSED_STRUCTURES):
        seen: list[int] = []
        hook = network.deep.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert torch.equal(sampled(network, picture(), timesteps()), expected)  # uncached
        assert len(seen) == len(timesteps())
        hook.remove()
    assert len(captures._structures) <= MAX_UNUSED_STRUCTURES + 1
    assert len(captures._refused) <= MAX_UNUSED_STRUCTURES + 1
    sampled(network, picture(), timesteps())
    assert dcompile.handle(network).stats.reuse_steps
