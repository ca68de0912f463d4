"""Which argument is the sample and which the timestep, whatever they are called and wherever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, timesteps

import dcompile
from dcompile.errors import TimestepError

STEPS = 7


class TimeFirst(Plain):
    def forward(self, t: Any, x: Any) -> Any:  # type: ignore[override]
        return super().forward(x, t)


class GradTTS(Plain):
    def forward(self, x: Any, mask: Any, mu: Any, t: Any) -> Any:  # type: ignore[override]
        return super().forward(x * mask + 0.1 * mu, t)


class LowResolution(Plain):
    def forward(self, x: Any, lr: Any, t: Any) -> Any:  # type: ignore[override]
        up = torch.nn.functional.interpolate(lr, scale_factor=2)
        return super().forward(x + 0.1 * up, t)


class LowResolutionFirst(Plain):
    def forward(self, lr: Any, noisy: Any, r: Any) -> Any:  # type: ignore[override]
        up = torch.nn.functional.interpolate(lr, scale_factor=2)
        return super().forward(noisy + 0.1 * up, r)


class Labelled(Plain):
    def forward(self, img: Any, y: Any, sigma: Any) -> Any:  # type: ignore[override]
        return super().forward(img + 0.01 * y.view(-1, 1, 1, 1), sigma)


class Listed(Plain):
    """Each batch element a tensor of its own, such as Z-Image takes them."""

    def forward(self, x: Any, t: Any) -> Any:  # type: ignore[override]
        (result,) = super().forward(torch.stack(list(x)), t)
        return (list(result),)


class Alike(Plain):
    def forward(self, one: Any, first: Any, second: Any) -> Any:  # type: ignore[override]
        return super().forward(one + 0.01 * first.view(-1, 1, 1, 1), second)


def made(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()


BATCH = picture().shape[0]
MASK = torch.ones(BATCH, 1, 8, 8)
MU = torch.full_like(picture(), 0.3)
SMALL = torch.full((BATCH, 3, 4, 4), 0.3)
LABELS = torch.arange(BATCH)

CALLS: list[tuple[type[Plain], Callable[[Any, Any, Any], Any]]] = [
    (TimeFirst, lambda net, x, t: net(t, x)),
    (TimeFirst, lambda net, x, t: net(x=x, t=t.expand(BATCH))),
    (GradTTS, lambda net, x, t: net(x, MASK, MU, t.expand(BATCH))),
    (LowResolution, lambda net, x, t: net(x, SMALL, t)),
    (LowResolutionFirst, lambda net, x, t: net(SMALL, x, t)),
    (LowResolutionFirst, lambda net, x, t: net(r=t, noisy=x, lr=SMALL)),
    (Labelled, lambda net, x, t: net(x, LABELS, t.expand(BATCH))),
    (Listed, lambda net, x, t: [torch.stack(net(list(x), t.expand(BATCH))[0])]),
    (Listed, lambda net, x, t: [torch.stack(net(x=tuple(x), t=t)[0])]),
]


def run(net: Any, call: Callable[[Any, Any, Any], Any], x: torch.Tensor) -> list[torch.Tensor]:
    results = []
    with torch.no_grad():
        for t in timesteps(STEPS):
            results.append(call(net, x, t)[0])
            x = x - 0.2 * results[-1]
    return results


@pytest.mark.parametrize(("kind", "call"), CALLS)
def test_exact_at_interval_1_and_reusing_at_3(
    kind: type[Plain], call: Callable[[Any, Any, Any], Any]
) -> None:
    expected = run(made(kind), call, picture())
    for interval in (1, 3):
        network = made(kind)
        dcompile.cache_compile(network, interval=interval, backend="eager", verbose=False)
        found = run(network, call, picture())
        stats = dcompile.handle(network).stats
        assert stats.uncached_calls == stats.forced_steps == 0
        if interval == 1:
            assert all(map(torch.equal, found, expected))
        else:
            assert (stats.refresh_steps, stats.reuse_steps) == (3, 4)
        # Another run's features are not served, whatever its pixels are.
        other = run(network, call, picture(5))
        again = made(kind)
        dcompile.cache_compile(again, interval=interval, backend="eager", verbose=False)
        assert all(map(torch.equal, other, run(again, call, picture(5))))


def test_an_ambiguity_says_how_to_say_it() -> None:
    def call(net: Any, x: Any, t: Any) -> Any:
        return net(x, LABELS, t.expand(BATCH))

    network = made(Alike)
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    with pytest.raises(TimestepError, match=r'first, second look alike.*timestep="first"'):
        run(network, call, picture())
    dcompile.cache_compile(network, interval=3, timestep="second", backend="eager", verbose=False)
    run(network, call, picture())
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (3, 4)


@pytest.mark.parametrize("role", ["sample", "timestep"])
def test_a_name_that_is_no_parameter(role: str) -> None:
    with pytest.raises(
        TimestepError, match=rf"{role}='nothing': forward has no such parameter; it has sample"
    ):
        dcompile.cache_compile(made(Plain), backend="eager", **{role: "nothing"})


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    network = made(Plain)
    dcompile.cache_compile(network, interval=1, backend="eager", verbose=False)
    for number in (numpy.int64(981), numpy.float32(0.5), numpy.float64(0.25)):
        with torch.no_grad():
            found = network(picture(), number)[0]
            assert torch.equal(found, made(Plain)(picture(), torch.tensor(number))[0])
    assert dcompile.handle(network).stats.uncached_calls == 0


@pytest.mark.parametrize("batch", [1, BATCH])
def test_sizes_of_a_list_are_not_dynamic(batch: int, caplog: pytest.LogCaptureFixture) -> None:
    """Not of a list of one tensor either, whose first size is no batch."""
    caplog.set_level("DEBUG", "dcompile")
    network = made(Listed)
    dcompile.cache_compile(network, interval=3, dynamic=True, backend="eager")
    run(network, CALLS[-1][1], picture()[:batch])
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.uncached_calls) == (3, 4, 0)
    assert "the sample is a list of tensors: captured for these sizes alone" in caplog.text


def test_a_name_of_the_sample_that_is_not_given() -> None:
    network = made(GradTTS)
    dcompile.cache_compile(network, sample="mu", backend="eager", verbose=False)
    with torch.no_grad(), pytest.raises(TypeError, match="mu"):
        network(picture(), MASK, t=timesteps(3)[0])


def with_parameters(text: str, uses: str) -> type[Plain]:
    """A network whose forward has these parameters, and passes them on so."""
    names: dict[str, Any] = {"Plain": Plain, "torch": torch}
    exec(f"def forward(self, {text}):\n return {uses}", names)
    return type("Network", (Plain,), {"forward": names["forward"]})


SIX, LABEL = torch.full((BATCH, 6), 5.0), torch.tensor([3.0, 7.0])
MEAN = "(Plain.forward(self, x, t)[0] * (1 + 0.01 * torch.as_tensor(other).float().mean()),)"
Called = Callable[[Any, Any, Any], Any]
NOT_TIME: dict[str, tuple[str, str, Called]] = {
    "time_ids": ("x, t, time_ids", "time_ids", lambda net, x, t: net(x, t, SIX)),
    "added_time_ids": (
        "x, t, added_time_ids=None",
        "added_time_ids",
        lambda net, x, t: net(x, t, added_time_ids=SIX),
    ),
    "timestep_cond": (
        "x, t, timestep_cond=None",
        "timestep_cond",
        lambda net, x, t: net(x, t, SIX),
    ),
    "num_timesteps": (
        "x, t, num_timesteps=10",
        "num_timesteps",
        lambda net, x, t: net(x, t, num_timesteps=10),
    ),
    "num_timesteps first": (
        "x, num_timesteps, t",
        "num_timesteps",
        lambda net, x, t: net(x, 10, t),
    ),
    "time_max": ("x, t, time_max", "time_max", lambda net, x, t: net(x, t, torch.tensor(1000.0))),
    "noise_aug": ("x, noise_aug, t", "noise_aug", lambda net, x, t: net(x, LABEL, t)),
    "labels of (batch, 1)": ("x, y, t", "y", lambda net, x, t: net(x, LABEL[:, None], t)),
}


@pytest.mark.parametrize("name", NOT_TIME)
def test_what_is_no_timestep(name: str) -> None:
    parameters, other, call = NOT_TIME[name]
    kind = with_parameters(parameters, MEAN.replace("other", other))
    torch.manual_seed(0)
    network = dcompile.cache_compile(kind().eval(), interval=3, backend="eager", verbose=False)
    run(network, call, picture(batch=BATCH))
    assert dcompile.handle(network).stats.reuse_steps == 4


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH, 1, 1, 1), (1, 1), (BATCH, 1, 8, 8)], ids=str)
def test_a_timestep_of_more_dimensions(shape: tuple[int, ...]) -> None:
    kind = with_parameters("x, t", "Plain.forward(self, x, t.reshape(len(t), -1)[:, 0])")
    torch.manual_seed(0)
    network = dcompile.cache_compile(kind().eval(), interval=3, backend="eager", verbose=False)
    run(network, lambda net, x, t: net(x, t.expand(shape)), picture(batch=BATCH))
    assert dcompile.handle(network).stats.reuse_steps >= 3


def test_calls_that_all_look_like_first_steps_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = compiled(interval=3)
    for _ in range(20):
        network(picture(), 500)
    (said,) = [each.message for each in caplog.records if "16 calls in a row" in each.message]
    assert "were each taken for the first step of a run" in said
    assert "'timestep'" in said
