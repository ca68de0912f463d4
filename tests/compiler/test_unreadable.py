"""Objects beside a network that raise when somebody looks at them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, plain, sampled, timesteps

import dcompile


class Owner:
    pass


class Lazy:
    """Has no ``__dict__``, and makes what it stands for when it is asked for anything."""

    __slots__ = ("made",)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: cannot be made here")


class Local:
    """A proxy of what only another thread has, such as a request's."""

    _of_thread = threading.local()

    @property
    def __class__(self) -> Any:
        return self._of_thread.object.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_thread.object, name)


class Unprintable:
    __slots__ = ()

    def __repr__(self) -> str:
        raise ValueError("cannot be printed")


def dead() -> Any:
    owner = Owner()
    return weakref.proxy(owner)


unreadable = pytest.mark.parametrize("make", [dead, Lazy, Local, Unprintable])
BESIDE: dict[str, Any] = {}


class Holding(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None, beside: Any = None) -> Any:
        BESIDE.get("thing")
        return super().forward(sample, timestep, condition)


def built(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()


def result_of(network: Any) -> torch.Tensor:
    return sampled(network, picture(), timesteps())


def expected() -> torch.Tensor:
    return result_of(compiled(plain()))


def in_an_attribute(network: Any, thing: Any) -> torch.Tensor:
    network.deep.beside = [thing]
    return result_of(compiled(network))


def in_a_global(network: Any, thing: Any) -> torch.Tensor:
    BESIDE["thing"] = thing
    try:
        return result_of(compiled(network))
    finally:
        BESIDE.clear()


def in_a_hook(network: Any, thing: Any) -> torch.Tensor:
    network.deep.register_forward_hook(
        lambda module, given, result: None if thing is None else result
    )
    return result_of(compiled(network))


def with_the_caller(network: Any, thing: Any) -> torch.Tensor:
    beside = thing
    found = result_of(compiled(network))
    del beside
    return found


@unreadable
@pytest.mark.parametrize("place", [in_an_attribute, in_a_global, in_a_hook, with_the_caller])
def test_a_network_beside_it_is_cached(
    make: Callable[[], Any], place: Callable[[Any, Any], torch.Tensor]
) -> None:
    network = built(Holding)
    assert torch.equal(place(network, make()), expected())
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == 0
    assert stats.reuse_steps > 0


@unreadable
def test_as_an_argument(make: Callable[[], Any]) -> None:
    network = built(Holding)
    compiled(network)
    thing, uncached = make(), built(Holding)
    with torch.no_grad():
        for t in timesteps():
            expected = uncached(picture(), t, beside=thing)[0]
            found = network(picture(), t, beside=thing)[0]
            assert torch.allclose(found, expected, atol=0.1)
