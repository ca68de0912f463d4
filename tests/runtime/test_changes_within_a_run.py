"""What is changed between two steps of a run, such as by ``callback_on_step_end``."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Plain, compiled, picture, timesteps
from torch import nn

import dcompile
from dcompile.compiler.capture_limits import MAX_VALUES

STEPS = 12
AT = 5  # the step before which something changes
HELD, TABLE, NUMBER = SimpleNamespace(scale=1.0), {"scale": 1.0}, 1.0


TENSOR, PARTIAL = torch.tensor(1.0), functools.partial(float, 1.0)
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=1.0)
REGISTRY: dict[str, Callable[[], float]] = {}
OF_CLOSURE = [1.0]
CONV2D, CONV_FORWARD = F.conv2d, nn.Conv2d._conv_forward


class Named:
    share = 1.0

    @staticmethod
    def one() -> float:
        return 1.0


def first() -> float:
    return second()


def second() -> float:
    return third()


def third() -> float:
    return fourth()


def fourth() -> float:
    return fifth()


def fifth() -> float:
    return 1.0


FIFTH = fifth


def twice(self: nn.Conv2d, *arguments: Any) -> torch.Tensor:
    return 2 * CONV_FORWARD(self, *arguments)


def of_closure(held: list[float]) -> type:
    class Mixin:
        def by_mixin(self) -> float:
            return held[0]

    return Mixin


class Processor:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.scales, self.table = scale, [1.0], {"a": {"scale": 1.0}}

    def __call__(self) -> float:
        return self.scale * self.scales[0] * self.table["a"]["scale"]


class Louder(Processor):
    def __call__(self) -> float:
        return 1.5 * super().__call__()


class Processed(of_closure(OF_CLOSURE), Plain):  # type: ignore[misc]
    share = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.processor, self.config = 1.0, Processor(), {"inner": [1.0]}
        self.down.processor = Processor()  # type: ignore[assignment]
        self.by_closure = self._closure()

    def _closure(self) -> Callable[[], float]:
        state = {"scale": 1.0}
        self.set_closure = functools.partial(state.__setitem__, "scale")
        return lambda: state["scale"]

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        factor = self.scale * self.processor() * self.down.processor() * self.share  # type: ignore[operator]
        factor *= TENSOR * PARTIAL() * VARIABLE.get() * Named.one() * Named.share
        factor *= REGISTRY["one"]() * first() * self.by_mixin()
        factor *= HELD.scale * TABLE["scale"] * NUMBER * self.config["inner"][0]
        return (super().forward(sample, timestep, condition)[0] * (factor * self.by_closure()),)


def louder(module: Any, inputs: Any, output: Any) -> Any:
    return output * 1.5


def set_global(value: float) -> None:
    global NUMBER
    NUMBER = value


CHANGES: dict[str, Callable[[Processed], Any]] = {
    "attribute": lambda network: setattr(network, "scale", 1.5),
    "new attribute of a submodule": lambda network: setattr(network.down, "scale", 1.5),
    "object": lambda network: setattr(network.processor, "scale", 1.5),
    "object of a submodule": lambda network: setattr(network.down.processor, "scale", 1.5),
    "list in an object": lambda network: network.processor.scales.__setitem__(0, 1.5),
    "dict in a dict": lambda network: network.processor.table["a"].update(scale=1.5),
    "list in a dict": lambda network: network.config["inner"].__setitem__(0, 1.5),
    "another object": lambda network: setattr(network, "processor", Processor(1.5)),
    "another class": lambda network: setattr(network, "processor", Louder()),
    "closure": lambda network: network.set_closure(1.5),
    "hook": lambda network: network.down.register_forward_hook(louder),
    "class": lambda network: setattr(Processed, "share", 1.5),
    "method": lambda network: setattr(Processor, "__call__", lambda self: 1.5),
    "global object": lambda network: setattr(HELD, "scale", 1.5),
    "global dict": lambda network: TABLE.update(scale=1.5),
    "global number": lambda network: set_global(1.5),
    "global tensor": lambda network: globals().update(TENSOR=torch.tensor(1.5)),
    "global partial": lambda network: globals().update(PARTIAL=functools.partial(float, 1.5)),
    "context variable": lambda network: VARIABLE.set(1.5),
    "static method of a global class": lambda network: setattr(Named, "one", lambda: 1.5),
    "attribute of a global class": lambda network: setattr(Named, "share", 1.5),
    "registry of functions": lambda network: REGISTRY.update(one=lambda: 1.5),
    "function that functions call": lambda network: globals().update(fifth=lambda: 1.5),
    "closure of a method": lambda network: OF_CLOSURE.__setitem__(0, 1.5),
    "method of a layer's class": lambda network: setattr(nn.Conv2d, "_conv_forward", twice),
    "torch's function": lambda network: setattr(F, "conv2d", lambda *a: 1.5 * CONV2D(*a)),
    "submodule": lambda network: setattr(network.deep, "2", nn.ReLU()),
    "mode": lambda network: setattr(network.deep[1], "p", 0.2),
}


def as_they_were(called: Any = Processor.__call__) -> None:
    Processed.share, Processor.__call__ = 1.0, called  # type: ignore[method-assign]
    HELD.scale = TABLE["scale"] = 1.0
    set_global(1.0)
    globals().update(TENSOR=torch.tensor(1.0), PARTIAL=functools.partial(float, 1.0), fifth=FIFTH)
    VARIABLE.set(1.0)
    Named.share, Named.one, OF_CLOSURE[0] = 1.0, lambda: 1.0, 1.0  # type: ignore[method-assign, assignment]
    REGISTRY.update(one=lambda: 1.0)
    F.conv2d, nn.Conv2d._conv_forward = CONV2D, CONV_FORWARD  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    as_they_were()


def built() -> Processed:
    as_they_were()
    torch.manual_seed(0)
    return Processed().eval()


@torch.no_grad()
def run(network: Any, change: Callable[[int], Any]) -> list[torch.Tensor]:
    """The sample after each step."""
    x, found = picture(), []
    for step, t in enumerate(timesteps(STEPS)):
        change(step)
        x = x - 0.2 * network(x, t)[0]
        found.append(x)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_seen_at_the_next_refresh(name: str) -> None:
    def once(network: Any) -> Callable[[int], Any]:
        return lambda step: CHANGES[name](network) if step == AT else None

    network = compiled(built(), interval=1)
    got = run(network, once(network))
    reference = built()
    expected = run(reference, once(reference))
    assert all(map(torch.equal, got, expected))
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_a_value_for_each_step() -> None:
    """Each is a graph of its own: as many as of an argument's values, then uncached."""

    def ramp(network: Any) -> Callable[[int], Any]:
        return lambda step: setattr(network.processor, "scale", 1 + step / 10)

    reference = built()
    expected = run(reference, ramp(reference))
    network = compiled(built(), interval=1)
    assert all(map(torch.equal, run(network, ramp(network)), expected))
    stats = dcompile.handle(network).stats
    assert stats.captures == MAX_VALUES + 1
    assert stats.uncached_calls == STEPS - MAX_VALUES - 1
    (reason,) = stats.uncached_reasons
    assert "Processed changed within its runs (the network: processor changed)" in reason
    for _ in range(2):  # known by now
        assert all(map(torch.equal, run(network, ramp(network)), expected))
    assert dcompile.handle(network).stats.captures == MAX_VALUES + 1


def test_nothing_is_read_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = compiled(built(), interval=1)
    run(network, lambda step: None)
    monkeypatch.setattr(
        "dcompile.compiler.capture_cache.structure_of", lambda *_: pytest.fail("read again")
    )
    run(network, lambda step: None)
