"""What is changed between two steps of a run, such as by ``callback_on_step_end``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, timesteps
from torch import nn

import dcompile
from dcompile.compiler.capture_cache import MAX_VALUES

STEPS = 12
AT = 5  # the step before which something changes
HELD, TABLE, NUMBER = SimpleNamespace(scale=1.0), {"scale": 1.0}, 1.0


class Processor:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.scales, self.table = scale, [1.0], {"a": {"scale": 1.0}}

    def __call__(self) -> float:
        return self.scale * self.scales[0] * self.table["a"]["scale"]


class Louder(Processor):
    def __call__(self) -> float:
        return 1.5 * super().__call__()


class Processed(Plain):
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
    "submodule": lambda network: setattr(network.deep, "2", nn.ReLU()),
    "mode": lambda network: setattr(network.deep[1], "p", 0.2),
}


def as_they_were(called: Any = Processor.__call__) -> None:
    Processed.share, Processor.__call__ = 1.0, called  # type: ignore[method-assign]
    HELD.scale = TABLE["scale"] = 1.0
    set_global(1.0)


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
