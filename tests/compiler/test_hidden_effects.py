"""Side effects in places that nothing leads to from the network; and what only looks like one."""

from __future__ import annotations

import array
import contextvars
import gc
import logging
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import TensorDataset

import dcompile

STEPS = 7
VARIABLE: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("VARIABLE")


class Bank:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, value: Any) -> None:
        self.kept.append(value)


class Meta(type):
    kept: ClassVar[list[Any]] = []


class OfMeta(metaclass=Meta): ...


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.kept.append(record.args[0])


def consumer(kept: list[Any]) -> Iterator[Any]:
    while True:
        kept.append((yield))


Collector = tuple[Callable[[Any], Any], Callable[[], list[Any]]]


def in_a_variable() -> Collector:
    VARIABLE.set([])
    return lambda o: VARIABLE.get().append(o), VARIABLE.get


def in_a_generator() -> Collector:
    kept: list[Any] = []
    generator: Any = consumer(kept)
    next(generator)
    return generator.send, lambda: kept


def behind_a_weak_reference() -> Collector:
    bank = Bank()
    reference = weakref.ref(bank)
    return lambda o: reference().keep(o), lambda: bank.kept  # type: ignore[union-attr]


def behind_a_weak_method() -> Collector:
    bank = Bank()
    method = weakref.WeakMethod(bank.keep)
    return lambda o: method()(o), lambda: bank.kept  # type: ignore[misc]


def in_a_module() -> Collector:
    sys.modules["a_bank"] = module = types.ModuleType("a_bank")
    module.kept = []  # type: ignore[attr-defined]

    def keep(o: Any) -> None:
        import a_bank  # type: ignore[import-not-found]

        a_bank.kept.append(o)

    return keep, lambda: module.kept  # type: ignore[attr-defined]


def in_a_metaclass() -> Collector:
    Meta.kept = []
    return lambda o: type(OfMeta).kept.append(o), lambda: Meta.kept  # type: ignore[attr-defined]


def in_log_records() -> Collector:
    logger, handler = logging.getLogger("features"), Records()
    logger.handlers = [handler]
    logger.setLevel("INFO")
    return lambda o: logger.info("%s", o), lambda: handler.kept


PLACES = [
    in_a_variable,
    in_a_generator,
    behind_a_weak_reference,
    behind_a_weak_method,
    in_a_module,
    in_a_metaclass,
    in_log_records,
]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_collected_out_of_sight(place: Callable[[], Collector]) -> None:
    keep, kept = place()
    network = plain()
    network.deep.register_forward_hook(lambda m, i, o: keep(o))
    expected = sampled(network, picture(), timesteps(STEPS))
    features = [*kept()]
    kept().clear()
    assert torch.equal(sampled(compiled(network), picture(), timesteps(STEPS)), expected)
    assert all(map(torch.equal, kept(), features))
    assert len(kept()) == STEPS
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    assert any("keeps a tensor that it gets at" in reason for reason in stats.uncached_reasons)


def test_a_table_that_is_made_at_the_first_call_and_kept_out_of_sight() -> None:
    """The second call shows that it is kept for good: from then on the network is cached."""
    dataset = TensorDataset(torch.zeros(1))

    class Tabled(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            if len(dataset.tensors[0]) != 8:
                dataset.tensors = (torch.linspace(0, 0.1, 8),)
            return (super().forward(sample, timestep, condition)[0] + dataset.tensors[0],)

    torch.manual_seed(0)
    network = compiled(Tabled().eval(), interval=1)
    sampled(network, picture(), timesteps(STEPS))
    stats = dcompile.handle(network).stats
    assert (stats.uncached_calls, stats.captures) == (1, 1)
    assert type(dataset.tensors[0]) is torch.Tensor
    assert not any(isinstance(each, FakeTensor) for each in dataset.tensors)


def test_a_table_that_is_made_again_at_every_call() -> None:
    dataset = TensorDataset(torch.zeros(1))

    class Tabled(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            dataset.tensors = (torch.linspace(0, 0.1, 8),)
            return (super().forward(sample, timestep, condition)[0] + dataset.tensors[0],)

    torch.manual_seed(0)
    network = compiled(Tabled().eval(), interval=3)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.uncached_calls == STEPS
    assert type(dataset.tensors[0]) is torch.Tensor


@pytest.mark.parametrize("kept", [array.array("l"), bytearray()])
def test_bytes(kept: Any) -> None:
    network = plain()
    network.deep.register_forward_hook(lambda m, i, o: kept.append(o.shape[0]))
    sampled(compiled(network), picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.uncached_calls == STEPS == len(kept)


@pytest.mark.parametrize("by_path", [False, True])
def test_a_file_that_is_opened_at_every_call(tmp_path: Path, by_path: bool) -> None:
    log, network = tmp_path / "log.txt", plain()

    def write(module: Any, inputs: Any, output: Any) -> None:
        if by_path:
            log.write_text((log.read_text() if log.exists() else "") + "x\n")
        else:
            with open(log, "a") as file:
                file.write("x\n")

    network.deep.register_forward_hook(write)
    sampled(compiled(network), picture(), timesteps(STEPS))
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS == len(log.read_text().splitlines())
    assert any("opens a file at test_hidden_effects.py:" in why for why in stats.uncached_reasons)


def test_garbage_is_not_kept() -> None:
    class Cyclic(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            cycle: list[Any] = [sample * 2]
            cycle.append(cycle)
            return super().forward(sample, timestep, condition)

    network = compiled(Cyclic().eval())
    gc.disable()
    try:
        sampled(network, picture(), timesteps(STEPS))
    finally:
        gc.enable()
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_what_a_gradient_would_need_is_not_kept() -> None:
    network = compiled()
    x = picture()
    for t in timesteps(STEPS):
        x = x - 0.2 * network(x, t)[0].detach()
    assert dcompile.handle(network).stats.uncached_calls == 0
