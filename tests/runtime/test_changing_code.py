"""Code that changes between runs, or in a copy, is seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from heard import noticed
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn

import dcompile

STEPS = 7


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(x)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 1.5


class Processor:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.25


class Patched(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.processor = Processor()

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(self.processor(self.scale(sample)), timestep, condition)


def made() -> Patched:
    torch.manual_seed(0)
    return Patched().eval()


def patch_submodule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "forward", lambda self, x: x * 0.5)


def patch_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processor, "__call__", lambda self, x: x - 0.25)


def halve_input_of(kind: type[Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    own = kind.forward

    def forward(self: Any, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return own(self, sample * 0.5, timestep, condition)

    monkeypatch.setattr(kind, "forward", forward)


def patch_network(monkeypatch: pytest.MonkeyPatch) -> None:
    halve_input_of(Patched, monkeypatch)


def patch_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    halve_input_of(Plain, monkeypatch)


def patch_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "scaled", lambda x: x * 0.5)


@pytest.mark.parametrize(
    "patch",
    [patch_submodule, patch_processor, patch_network, patch_base_class, patch_function],
    ids=lambda f: f.__name__,
)
def test_a_patch_between_two_runs_is_seen(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = dcompile.cache_compile(made(), interval=1, backend="eager", verbose=False)
    before = sampled(network, picture(), timesteps(STEPS))
    with monkeypatch.context() as patched:
        patch(patched)
        found = sampled(network, picture(), timesteps(STEPS))
        assert torch.equal(found, sampled(made(), picture(), timesteps(STEPS)))
        assert not torch.equal(found, before)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), before)
    assert dcompile.handle(network).stats.uncached_calls == 0
    assert dcompile.handle(network).stats.captures == 2  # the first one is used again


class Headed(Plain):
    head: Any = staticmethod(lambda x: x)

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        (result,) = super().forward(sample, timestep, condition)
        return (self.head(result),)


def test_a_shallow_copy_runs_its_own_head() -> None:
    torch.manual_seed(0)
    network = Headed().eval()
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    expected = sampled(network, picture(), timesteps(STEPS))
    other = copy.copy(network)
    other.head = lambda x: -x
    with torch.no_grad(), noticed("a shallow copy of Headed"):
        found = other(picture(), timesteps(STEPS)[0])[0]
    with torch.no_grad():
        assert torch.equal(found, -network(picture(), timesteps(STEPS)[0])[0])
    assert dcompile.handle(network).stats.uncached_calls == 1
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(other)
    dcompile.cache_compile(other, interval=1, backend="eager", verbose=False)
    with torch.no_grad():
        assert torch.equal(other(picture(), timesteps(STEPS)[0])[0], found)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)


def test_adapter_scales_that_change_during_a_run() -> None:
    class Adapted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.deep.scaling = {"default": 1.0}  # type: ignore[assignment]

        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            scale = self.deep.scaling["default"]  # type: ignore[index, union-attr]
            return super().forward(sample * scale, timestep, condition)

    def run(network: Any) -> torch.Tensor:
        network.deep.scaling["default"] = 1.0
        x = picture()
        with torch.no_grad():
            for number, t in enumerate(timesteps(STEPS)):
                network.deep.scaling["default"] = 1.0 if number < 3 else 0.5
                x = x - 0.2 * network(x, t)[0]
        return x

    torch.manual_seed(0)
    expected = run(Adapted().eval())
    torch.manual_seed(0)
    network = dcompile.cache_compile(Adapted().eval(), interval=1, backend="eager", verbose=False)
    assert torch.equal(run(network), expected)
    assert dcompile.handle(network).stats.captures == 2


def test_what_is_unchanged_is_captured_once() -> None:
    network = compiled()
    for _ in range(3):
        sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.captures == 1


def test_weights_that_are_swapped_for_a_call() -> None:
    network = dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)
    other = {name: value * 1.1 for name, value in network.named_parameters()}
    ts = timesteps(STEPS)

    def run(module: Any, swapped: set[int]) -> list[torch.Tensor]:
        x, results = picture(), []
        with torch.no_grad():
            for step, t in enumerate(ts.clone()):
                given = other if step in swapped else {}
                results.append(torch.func.functional_call(module, given, (x, t))[0])
                x = x - 0.1
        return results

    everywhere = set(range(STEPS))
    assert torch.equal(run(network, everywhere)[0], run(plain(), everywhere)[0])
    found, expected = run(network, {2}), run(plain(), {2})
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])
    with torch.no_grad():
        x, t = picture(), ts[0]
        assert torch.equal(network(x, t)[0], plain()(x, t)[0])


@pytest.mark.parametrize("name", ["enter.weight", "deep.0.bias", "leave.bias"])
def test_a_single_weight_that_is_swapped_for_some_calls(name: str) -> None:
    network, reference, ts = compiled(interval=1), plain(), timesteps(STEPS)
    for step, t in enumerate(ts):
        given = {}
        if step in (2, 3, 5):
            given[name] = dict(reference.named_parameters())[name] + 0.1
        with torch.no_grad():
            found, expected = (
                torch.func.functional_call(module, given, (picture(), t))[0]
                for module in (network, reference)
            )
        assert torch.equal(found, expected), step


def test_transformed_calls_run_uncached() -> None:
    network, reference, t = compiled(), plain(), timesteps()[0]

    def call(module: Any) -> Any:
        return lambda x: module(x[None], t)[0]

    x = picture()
    assert torch.equal(torch.func.vmap(call(network))(x), torch.func.vmap(call(reference))(x))
    found = torch.func.jvp(call(network), (x[0],), (x[1],))
    assert all(map(torch.equal, found, torch.func.jvp(call(reference), (x[0],), (x[1],))))
    sampled(network, picture(), timesteps(STEPS))
    stats = dcompile.handle(network).stats
    assert (stats.uncached_calls, stats.reuse_steps) == (2, 4)
