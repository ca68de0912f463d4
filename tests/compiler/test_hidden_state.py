"""Places where a call may leave something: each is seen, undone after tracing, and refused."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextvars
import queue
import random
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import dcompile
from dcompile.compiler.side_effects import Snapshot

VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default=None)
STEPS = 7


class Registry:
    """A class without attributes of its own."""


class Slotted:
    __slots__ = ("__private", "latest")

    def keep(self, value: Any) -> None:
        self.__private = value

    @property
    def kept(self) -> Any:
        return self.__private


def holders() -> dict[str, Any]:
    """Objects that take any attribute."""
    return {
        "thread": threading.local(),
        "namespace": argparse.Namespace(),
        "simple namespace": SimpleNamespace(),
        "class": Registry,
        "slot": Slotted(),
        "tensor": torch.ones(1),
        "parameter": nn.Parameter(torch.ones(1)),
        "function": lambda: None,
    }


def containers() -> dict[str, tuple[Any, Callable[[Any, Any], Any]]]:
    """Objects, and what puts a tensor into them."""
    return {
        "queue": (queue.Queue(), lambda held, o: held.put(o)),
        "simple queue": (queue.SimpleQueue(), lambda held, o: held.put(o)),
        "asyncio": (asyncio.Queue(), lambda held, o: held.put_nowait(o)),
        "chain": (collections.ChainMap({}), lambda held, o: held.update(o=o)),
        "weak keys": (weakref.WeakKeyDictionary(), lambda held, o: held.update({Registry: o})),
        "variable": (VARIABLE, lambda held, o: held.set(o)),
        "mock": (mock.Mock(), lambda held, o: held(o)),
        "array of objects": (
            np.array([None], dtype=object),
            lambda held, o: held.__setitem__(0, o),
        ),
        "array of numbers": (np.zeros(1), lambda held, o: held.__iadd__(1)),
    }


def tried(network: Plain) -> Any:
    """Statistics after a run that must equal an uncached one."""
    expected = sampled(plain(), picture(), timesteps(STEPS))
    compiled(network, interval=3)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    stats = dcompile.handle(network).stats
    dcompile.handle(network).remove()
    return stats


@pytest.mark.parametrize("name", holders())
def test_an_attribute_that_was_not_there(name: str) -> None:
    held, network = holders()[name], plain()
    try:
        network.down.register_forward_hook(lambda m, i, o: setattr(held, "latest", o))
        assert tried(network).uncached_calls == STEPS
        assert type(held.latest) is torch.Tensor
    finally:
        if name == "class":
            del held.latest


def test_a_private_slot() -> None:
    held, network = Slotted(), plain()
    network.down.register_forward_hook(lambda m, i, o: held.keep(o))
    assert tried(network).uncached_calls == STEPS
    assert type(held.kept) is torch.Tensor


@pytest.mark.parametrize("name", containers())
def test_a_container_of_the_standard_library(name: str) -> None:
    (held, put), network = containers()[name], plain()
    network.down.register_forward_hook(lambda m, i, o: (put(held, o), None)[1])
    assert tried(network).uncached_calls == STEPS


def test_a_hook_that_keeps_what_it_sees_on_itself() -> None:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        hook.latest = output  # type: ignore[attr-defined]

    network = plain()
    network.down.register_forward_hook(hook)
    assert tried(network).uncached_calls == STEPS
    assert type(hook.latest) is torch.Tensor  # type: ignore[attr-defined]


def test_a_global_that_was_not_there() -> None:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        global NEVER_SET_BEFORE
        NEVER_SET_BEFORE = output  # type: ignore[name-defined]

    network = plain()
    network.down.register_forward_hook(hook)
    assert tried(network).uncached_calls == STEPS
    assert not isinstance(globals().pop("NEVER_SET_BEFORE"), FakeTensor)


def test_a_hook_of_all_modules() -> None:
    seen: list[Any] = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(o))
    try:
        assert tried(plain()).uncached_calls == STEPS
    finally:
        hook.remove()
    assert not any(isinstance(value, FakeTensor) for value in seen)


def test_memory_that_another_module_is_given() -> None:
    other, twin = nn.Linear(2, 2), nn.Linear(2, 2)
    twin.load_state_dict(other.state_dict())
    for network, held in ((plain(), other), (plain(), twin)):
        network.down.register_forward_hook(
            lambda m, i, o, held=held: setattr(held.weight, "data", held.weight + o.mean())
        )
        if held is other:
            assert tried(network).uncached_calls == STEPS
        else:
            sampled(network, picture(), timesteps(STEPS))
    assert torch.equal(other.weight, twin.weight)


def test_memory_that_moves_and_keeps_its_values() -> None:
    """As when weights are stored in 8 bits, and converted while their layer runs."""
    layer = nn.Linear(2, 2).to(torch.float8_e4m3fn)
    before = Snapshot([(layer, "layer")])
    layer.to(torch.float32).to(torch.float8_e4m3fn)
    assert all(change.harmless for change in before.changes(before.again()).values())
    layer.weight.data = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    (change,) = (c for c in before.changes(before.again()).values() if not c.harmless)
    assert change.where == "layer.weight"


def test_a_gradient() -> None:
    other, network = nn.Linear(2, 2), plain()
    network.down.register_forward_hook(
        lambda m, i, o: setattr(other.weight, "grad", o.mean().expand(2, 2).clone())
    )
    assert tried(network).uncached_calls == STEPS
    assert type(other.weight.grad) is torch.Tensor


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng, np.random.RandomState])
def test_a_random_number_generator_of_its_own(make: Callable[[int], Any]) -> None:
    results = []
    for cached in (True, False):
        generator, network = make(0), plain()
        draw = getattr(generator, "random", None) or generator.rand
        network.down.register_forward_hook(lambda m, i, o, draw=draw: o * float(draw()))
        if cached:
            compiled(network, interval=1)
        results.append(sampled(network, picture(), timesteps(STEPS)))
    assert torch.equal(*results)
