"""Whatever changes a module's structure is seen by the watch over what it was read from."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seam
import torch
import torch.nn.functional as F
from plain import Plain, picture, plain, sampled, timesteps
from torch import nn

import dcompile
from dcompile.compiler.structure import structure_of
from dcompile.compiler.watch import Watch


class Slotted:
    __slots__ = ("inside", "scale")

    def __init__(self) -> None:
        self.scale = 1.0
        self.inside = {"a": [1, 2]}


class Settings:
    def __init__(self) -> None:
        self.heads = 4


class Named(list[int]):
    name = "one"


class Activation(nn.Module):
    slope = 1.0
    table = MappingProxyType({"a": 1})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activation(x) * self.factor()

    def factor(self, value: float = 1.0) -> float:
        return value * self.slope


class OtherModule(nn.Module): ...


BIAS = 1.0


def activation(x: torch.Tensor) -> torch.Tensor:
    return inner(x) + BIAS


def inner(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)


def closure(held: Any) -> Callable[[], Any]:
    return lambda: held


def scaled(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return x * scale


def of_all_kinds() -> Any:
    network: Any = plain()
    network.register_buffer("table", torch.ones(3))
    network.up.scale = 0.5
    network.up.options = {"a": {"b": [1, 2, {"c": 3}]}}
    network.up.listed = [[1, 2], [3]]
    network.up.chosen = {"one", "two"}
    network.up.processor = SimpleNamespace(heads=4, inner=SimpleNamespace(flags=[True]))
    network.up.bare = SimpleNamespace()
    network.up.slotted = Slotted()
    network.up.array = np.ones(3)
    network.up.constant = SimpleNamespace(values=torch.ones(3))
    network.up.partial = partial(scaled, scale=2.0)
    network.up.closure = closure({"deep": [1]})
    network.up.method = network.up.processor.__repr__
    network.up.function = scaled
    network.up.act = Activation()
    network.up.register_forward_hook(closure([1]))
    network.up.others = [nn.Linear(2, 2)]
    network.up.settings = Settings()
    network.up.bound = nn.Linear(2, 2).forward
    network.up.named = Named([1, 2])
    network.up.proxied = {"a": 1}
    network.up.proxy = MappingProxyType(network.up.proxied)
    return network.eval()


def cell(network: Any) -> dict[str, Any]:
    held: dict[str, Any] = network.up.closure()
    return held


def put(where: Any, name: str, value: Any) -> None:
    setattr(where, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda n: put(n.up, "scale", 0.25),
    "equal attribute of another type": lambda n: put(n.up, "scale", torch.tensor(0.5)),
    "new attribute": lambda n: put(n.up, "more", 1),
    "attribute removed": lambda n: delattr(n.up, "scale"),
    "mode": lambda n: n.up.train(),
    "deep in a dict": lambda n: n.up.options["a"]["b"][2].update(c=4),
    "a key renamed": lambda n: n.up.options.update(z=n.up.options.pop("a")),
    "an item moved to another list": lambda n: n.up.listed[1].insert(0, n.up.listed[0].pop()),
    "set": lambda n: n.up.chosen.add("three"),
    "object": lambda n: put(n.up.processor, "heads", 8),
    "object in an object": lambda n: n.up.processor.inner.flags.append(False),
    "object that had nothing": lambda n: put(n.up.bare, "anything", 1),
    "another object": lambda n: put(n.up, "processor", SimpleNamespace(heads=4)),
    "dict of an object replaced": lambda n: put(n.up.settings, "__dict__", {"heads": 8}),
    "dict of a submodule replaced": lambda n: put(n.up, "__dict__", {**vars(n.up), "scale": 2.0}),
    "class of an object": lambda n: put(n.up.slotted, "__class__", OtherSlotted),
    "slot": lambda n: put(n.up.slotted, "scale", 2.0),
    "dict in a slot": lambda n: n.up.slotted.inside["a"].append(3),
    "array": lambda n: n.up.array.fill(2),
    "constant": lambda n: n.up.constant.values.add_(1),
    "keywords of a partial": lambda n: n.up.partial.keywords.update(scale=3.0),
    "what a closure holds": lambda n: cell(n)["deep"].append(2),
    "cell of a closure": lambda n: put(n.up.closure.__closure__[0], "cell_contents", {}),
    "owner of a method": lambda n: put(n.up.method.__self__, "heads", 8),
    "hook": lambda n: n.up.register_forward_hook(closure(1)),
    "first hook": lambda n: n.enter.register_forward_pre_hook(closure(1)),
    "what a hook holds": lambda n: next(iter(n.up._forward_hooks.values()))().append(2),
    "hook removed": lambda n: n.up._forward_hooks.clear(),
    "table of hooks replaced": lambda n: put(n.up, "_forward_hooks", OrderedDict()),
    "table of no hooks replaced": lambda n: put(n.enter, "_forward_hooks", {1: closure(1)}),
    "partial": lambda n: n.up.partial.__setstate__((scaled, (), {"scale": 5.0}, {})),
    "weight of a module in a list": lambda n: put(n.up.others[0].weight, "data", torch.ones(2, 2)),
    "attribute of a module in a list": lambda n: put(n.up.others[0], "more", 1),
    "owner of a method that is a module": lambda n: put(n.up.bound.__self__, "more", 1),
    "items of a list that has attributes": lambda n: put(n.up.named, "name", "other"),
    "item of a proxy": lambda n: n.up.proxied.update(a=2),
    "attribute of a function": lambda n: put(scaled, "more", len(vars(scaled))),
    "submodule": lambda n: put(n, "up", nn.Sequential(n.up)),
    "submodule added": lambda n: put(n.enter, "more", nn.Identity()),
    "submodule renamed": lambda n: n._modules.update(above=n._modules.pop("up")),
    "class of a submodule": lambda n: put(n.up.act, "__class__", nn.SiLU),
    "no parameter": lambda n: put(n.up, "bias", None),
    "first parameter": lambda n: put(n.up.act, "more", nn.Parameter(torch.ones(1))),
    "first buffer": lambda n: n.up.act.register_buffer("more", torch.ones(1)),
    "buffer": lambda n: put(n, "table", torch.ones(4)),
    "dtype": lambda n: n.up.half(),
    "shape of the same parameter": lambda n: put(n.up.bias, "data", torch.zeros(1, 8)[0, :4]),
    "strides of the same parameter": lambda n: n.up.to(memory_format=torch.channels_last),
}


class OtherSlotted(Slotted):
    __slots__ = ()


def watched(network: nn.Module) -> tuple[Watch, Any]:
    watch = Watch(network)
    structure = structure_of(network, (), watch)
    assert watch.possible
    return watch, structure


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    network = of_all_kinds()
    watch, before = watched(network)
    assert watch.unchanged()
    CHANGES[name](network)
    assert structure_of(network) != before, "this test is about nothing"
    assert not watch.unchanged()


def code_changes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    return {
        "method": lambda: monkeypatch.setattr(Activation, "forward", lambda self, x: x),
        "helper method": lambda: monkeypatch.setattr(Activation, "factor", lambda self: 2.0),
        "number of a class": lambda: monkeypatch.setattr(Activation, "slope", 2.0),
        "defaults": lambda: monkeypatch.setattr(Activation.factor, "__defaults__", (3.0,)),
        "function": lambda: monkeypatch.setitem(globals(), "activation", torch.sigmoid),
        "function that it names": lambda: monkeypatch.setitem(globals(), "inner", torch.tanh),
        "number that it names": lambda: monkeypatch.setitem(globals(), "BIAS", 2.0),
        "part of a library": lambda: monkeypatch.setattr(F, "relu", torch.tanh),
        "forward of a library's class": lambda: monkeypatch.setattr(
            nn.SiLU, "forward", lambda self, x: x
        ),
        "hook of all modules": lambda: monkeypatch.setitem(
            nn.modules.module._global_forward_hooks, 10**9, closure(1)
        ),
    }


@pytest.mark.parametrize("name", code_changes(pytest.MonkeyPatch()))
def test_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = of_all_kinds()
    watch, before = watched(network)
    code_changes(monkeypatch)[name]()
    assert structure_of(network) != before
    assert not watch.unchanged()


def test_what_a_class_inherits_from() -> None:
    network = of_all_kinds()
    watch, before = watched(network)
    own = Activation.__bases__
    try:
        Activation.__bases__ = (OtherModule,)
        assert structure_of(network) != before
        assert not watch.unchanged()
    finally:
        Activation.__bases__ = own


def test_values_of_weights_do_not_matter() -> None:
    network = of_all_kinds()
    watch, _ = watched(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    network.register_forward_hook(closure(1))  # around what is captured
    assert watch.unchanged()


def test_a_parameter_replaced_by_an_equal_one_is_bound_again() -> None:
    network = of_all_kinds()
    watch, before = watched(network)
    network.up.weight = nn.Parameter(network.up.weight.detach().clone())
    assert structure_of(network) == before
    assert not watch.unchanged()


def test_a_parameter_that_moved_is_bound_again() -> None:
    network = of_all_kinds()
    watch, before = watched(network)
    network.up.weight.data = network.up.weight.detach().clone()
    assert structure_of(network) == before
    assert not watch.unchanged()


def test_what_is_replaced_is_not_kept() -> None:
    network = of_all_kinds()
    watch, _ = watched(network)
    old = [weakref.ref(network.up.weight), weakref.ref(network.up)]
    network.up.weight = nn.Parameter(network.up.weight.detach().clone())
    network.up = nn.Identity()
    gc.collect()
    assert [reference() for reference in old] == [None, None]
    assert not watch.unchanged()


def test_the_structure_is_read_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(*given: Any) -> Any:
        reads.append(1)
        return structure_of(*given)

    monkeypatch.setattr("dcompile.compiler.capture_cache.structure_of", counted)
    network: Any = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    for _ in range(2):  # the first run captures, after which everything is read again
        sampled(network, picture(), timesteps())
    before = len(reads)
    for _ in range(3):
        sampled(network, picture(), timesteps())
    assert len(reads) == before
    network.up.scale = 2.0
    sampled(network, picture(), timesteps())
    assert len(reads) == before + 3  # and after the capture: what it wrote, and to be watched


def test_weights_stay_bound_while_nothing_changes() -> None:
    network: Any = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    found = []
    for _ in range(4):
        ts = timesteps()
        sampled(network, picture(), ts[:-1])
        (run,) = seam.runs_of(network)
        (bound,) = run.programs.values()
        found.append(bound)
    assert found[1] is found[2] is found[3]
    with torch.no_grad():
        network.up.weight = nn.Parameter(network.up.weight * 2)
    assert torch.equal(
        sampled(network, picture(), timesteps()),
        sampled(
            dcompile.cache_compile(copy_of(network), backend="eager", verbose=False),
            picture(),
            timesteps(),
        ),
    )


def copy_of(network: Plain) -> Plain:
    made = plain()
    made.load_state_dict(network.state_dict())
    return made
