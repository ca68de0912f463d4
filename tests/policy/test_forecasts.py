"""Forecasts: their coefficients, and what reaches the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import seam
import torch
from plain import Plain, compiled, picture, plain, sampled, steps_of, timesteps

import dcompile
from dcompile import Forecast, ScheduleError, Steps
from dcompile.passes import find_skip_connections, split_at
from dcompile.policy.forecast import (
    Damped,
    Lagrange,
    Reuse,
    Taylor,
    coefficients_of,
    name_of,
    resolve_forecast,
)


def forecasted(forecast: Forecast, values: dict[int, float], step: int) -> float:
    """Of a scalar feature that had these values when it was refreshed."""
    refreshed = sorted(values, reverse=True)
    given = coefficients_of(forecast, step, refreshed)
    return sum(f * values[s] for f, s in zip(given, refreshed, strict=False))


def test_reuse_is_the_latest() -> None:
    assert forecasted(Reuse(), {0: 5.0}, 2) == 5.0


@pytest.mark.parametrize(("order", "refreshed"), [(1, (4, 1)), (2, (7, 4, 2)), (3, (9, 8, 4, 0))])
def test_lagrange_is_exact_for_polynomials(order: int, refreshed: tuple[int, ...]) -> None:
    def polynomial(x: float) -> float:
        return 3 - 2 * x + 0.5 * x**order

    found = forecasted(Lagrange(order), {s: polynomial(s) for s in refreshed}, 11)
    assert found == pytest.approx(polynomial(11))


def test_taylor_of_order_one_is_linear() -> None:
    values = {6: 1.0, 2: 3.0}
    assert forecasted(Taylor(1), values, 9) == pytest.approx(forecasted(Lagrange(1), values, 9))


def test_taylor_takes_differences_of_the_past() -> None:
    # TaylorSeer with interval 3: F + k (dF)/3 + k^2/2 (ddF)/9.
    newest, middle, oldest = 7.0, 4.0, 3.0
    values, k = {6: newest, 3: middle, 0: oldest}, 2
    expected = newest + k * (newest - middle) / 3 + k**2 / 2 * (newest - 2 * middle + oldest) / 9
    assert forecasted(Taylor(2), values, 8) == pytest.approx(expected)


@pytest.mark.parametrize("forecast", [Lagrange(1), Lagrange(2), Taylor(2)])
def test_with_too_little_history_it_makes_do(forecast: Forecast) -> None:
    assert coefficients_of(forecast, 3, [2])[0] == 1.0
    assert len(coefficients_of(forecast, 3, [2])) == forecast.history
    two = coefficients_of(forecast, 3, [2, 1])
    assert two[:2] == pytest.approx((2.0, -1.0))
    assert not any(two[2:])


def test_names() -> None:
    for name in ("reuse", "linear", "damped", "quadratic", "taylor"):
        assert name_of(resolve_forecast(name)) == name
    assert name_of(Lagrange(5)) is None
    assert isinstance(Lagrange(1), Forecast)


@pytest.mark.parametrize("bad", ["cubic", 3, None, object(), Lagrange(-1)])
def test_what_is_no_forecast(bad: Any) -> None:
    with pytest.raises(ScheduleError, match=r"forecast: expected 'reuse', 'linear'"):
        resolve_forecast(bad)


@pytest.mark.parametrize("answer", [(1.0, 2.0, 3.0), (), None, 1.0, ["a"]])
def test_bad_coefficients(answer: Any) -> None:
    class Bad:
        history = 2

        def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
            return answer  # type: ignore[no-any-return]

    with pytest.raises(ScheduleError, match=r"gave .* coefficients"):
        coefficients_of(Bad(), 3, [2, 1])


# In a run -----------------------------------------------------------------------------------------


@pytest.fixture
def each_way(graphs: str) -> str:
    return graphs


def forecasting(forecast: Any, schedule: Any = None, **settings: Any) -> Plain:
    return compiled(schedule=schedule or Steps([0, 2, 5]), forecast=forecast, **settings)


def by_hand(forecast: Forecast, x: torch.Tensor, ts: torch.Tensor, refresh: set[int]) -> Any:
    """The same run with the two graphs of the split, and arithmetic in the open."""
    network = plain()
    probe = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    captured = seam.captured(probe, x, ts[0])
    full, shallow = split_at(
        captured.graph_module, find_skip_connections(captured.graph_module, captured.sample)[0]
    )
    weights = dict(network.named_parameters())

    def call(graph: Any, x: torch.Tensor, t: torch.Tensor, *cached: torch.Tensor) -> Any:
        given = {captured.sample: x}
        given |= {name: t for name in captured.inputs if name != captured.sample}
        names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
        inputs = [
            weights[captured.parameters[name]] if name in captured.parameters else given[name]
            for name in names[: len(names) - len(cached)]
        ]
        return graph(*inputs, *cached)

    past: list[tuple[int, torch.Tensor]] = []
    trust = [0.0, 0.0]  # the latest last; what a GPU measures is used one refresh later
    right = claimed = 0.0
    for step, t in enumerate(ts):
        if step in refresh:
            output, boundary = call(full, x, t)
            if isinstance(forecast, Damped) and len(past) > 1:
                given = forecast.coefficients(step, [s for s, _ in past])
                added = sum(c * b for c, (_, b) in zip(given, past, strict=True)) - past[0][1]
                change = boundary - past[0][1]
                right = float((change * added).sum()) + right / 2
                claimed = float(added.square().sum()) + claimed / 2
                trust.append(round(min(1.0, max(0.0, right / claimed)) * 32) / 32)
            past = [(step, boundary), *past][: forecast.history]
        else:
            given = forecast.coefficients(step, [s for s, _ in past])
            if isinstance(forecast, Damped):
                given = forecast.apply(given, trust[-1 if x.device.type == "cpu" else -2])
            total = sum(c * b for c, (_, b) in zip(given, past, strict=False))
            (output,) = call(shallow, x, t, total)
        x = x - 0.2 * output
    return x


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("name", ["linear", "quadratic", "taylor"])
def test_a_run_is_what_it_is_by_hand(name: str) -> None:
    x, ts = picture(), timesteps(9)
    found = sampled(forecasting(name), x, ts)
    with torch.no_grad():
        expected = by_hand(resolve_forecast(name), x, ts, {0, 2, 5})
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, sampled(forecasting("reuse"), x, ts), atol=1e-5)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("refresh", [{0, 2, 4, 7, 9}, {0, 3, 6, 9}])
def test_a_checked_forecast_by_hand(refresh: set[int]) -> None:
    x, ts = picture(), timesteps(12)
    schedule = Steps(sorted(refresh))
    found = sampled(forecasting("damped", schedule), x, ts)
    with torch.no_grad():
        expected = by_hand(Damped(), x, ts, refresh)
    torch.testing.assert_close(found, expected)
    for other in ("reuse", "linear"):
        assert not torch.allclose(found, sampled(forecasting(other, schedule), x, ts), atol=1e-6)


def test_what_is_trusted_is_a_share_of_what_is_added() -> None:
    given = coefficients_of(Lagrange(1), 5, (3, 0))
    assert Damped.apply(given, 1.0) == pytest.approx(given)
    assert Damped.apply(given, 0.0) == (1.0, 0.0)
    assert sum(Damped.apply(given, 0.3)) == pytest.approx(1.0)


@pytest.mark.usefixtures("each_way")
def test_features_that_swing_are_reused() -> None:
    """Features that go back and forth: what a line adds is wrong each time, so nothing is."""

    class Swinging(Plain):
        def forward(self, sample: Any, timestep: Any, *more: Any, **named: Any) -> Any:
            swing = torch.cos(timestep.to(sample) * torch.pi)
            return super().forward(sample * 0.01 + swing, timestep, *more, **named)

    torch.manual_seed(0)
    device = picture().device
    network = Swinging().eval().to(device)
    ts = torch.arange(24, 0, -1).to(device)
    found = {}
    for forecast in ("reuse", "damped", "linear"):
        dcompile.cache_compile(
            network, interval=3, forecast=forecast, backend="eager", verbose=False
        )
        found[forecast] = sampled(network, picture(), ts)
    assert torch.equal(found["damped"], found["reuse"])
    assert not torch.allclose(found["linear"], found["reuse"], atol=1e-5)


@pytest.mark.usefixtures("each_way")
def test_a_forecast_of_its_own() -> None:
    class Halfway:
        history = 2

        def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
            return (0.5, 0.5) if len(refreshed) == 2 else (1.0,)

    x, ts = picture(), timesteps(9)
    with torch.no_grad():
        expected = by_hand(Halfway(), x, ts, {0, 2, 5})
    torch.testing.assert_close(sampled(forecasting(Halfway()), x, ts), expected)


@pytest.mark.usefixtures("each_way")
def test_interleaved_runs_keep_their_own_history() -> None:
    network = forecasting("linear")
    pictures = [picture(seed) for seed in range(3)]
    expected = [sampled(forecasting("linear"), x, timesteps(9)) for x in pictures]
    runs = [steps_of(network, x, timesteps(9)) for x in pictures]
    found = [list(step) for step in zip(*runs, strict=True)][-1]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("each_way")
def test_until_the_second_refresh_features_are_reused() -> None:
    x, ts = picture(), timesteps(6)
    found = sampled(forecasting("linear", dcompile.Uniform(6)), x, ts)
    assert torch.equal(found, sampled(forecasting("reuse", dcompile.Uniform(6)), x, ts))


def test_interval_one_is_exact_with_any_forecast() -> None:
    x, ts = picture(), timesteps()
    expected = sampled(plain(), x, ts)
    for name in ("linear", "quadratic", "taylor"):
        assert torch.equal(sampled(forecasting(name, dcompile.Uniform(1)), x, ts), expected)


def test_history_of_different_length_shares_the_full_graph() -> None:
    compilations = []

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph_module)
        return graph_module

    network = forecasting("reuse", backend=backend)
    sampled(network, picture(), timesteps(9))
    settings: dict[str, Any] = {"backend": backend, "verbose": False}
    dcompile.cache_compile(network, schedule=Steps([0, 2, 5]), forecast="linear", **settings)
    x = picture()
    assert torch.equal(
        sampled(network, x, timesteps(9)), sampled(forecasting("linear"), x, timesteps(9))
    )
    assert dcompile.handle(network).stats.captures == 0
    assert len(compilations) == 3


def test_dynamic_sizes() -> None:
    network = forecasting("linear", dynamic={"height": (8, 16)})
    for height in (8, 12, 16):
        x = picture(size=(height, 8))
        expected = sampled(forecasting("linear"), x, timesteps(9))
        assert torch.equal(sampled(network, x, timesteps(9)), expected)
    assert dcompile.handle(network).stats.captures == 1


def test_inductor() -> None:
    x, ts = picture(), timesteps(9)
    found = sampled(forecasting("linear", backend="inductor"), x, ts)
    torch.testing.assert_close(found, sampled(forecasting("linear"), x, ts), rtol=1e-3, atol=1e-4)


def test_saved_and_loaded(tmp_path: Any) -> None:
    network = forecasting("linear")
    x, ts = picture(), timesteps(9)
    expected = sampled(network, x, ts)
    folder = dcompile.handle(network).save(tmp_path / "saved")
    fresh = dcompile.load(plain(), folder, verbose=False)
    assert torch.equal(sampled(fresh, x, timesteps(9)), expected)
    assert dcompile.handle(fresh).stats.captures == 0
    with pytest.raises(ScheduleError, match="saved for forecasts from 2 refreshes and no probe"):
        dcompile.load(plain(), folder, forecast="quadratic", verbose=False)
