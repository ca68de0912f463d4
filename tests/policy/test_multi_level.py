"""Cuts at several depths, each refreshed at its own interval."""

from __future__ import annotations

import json
from typing import Any

import pytest
import seam
import torch
from networks import capture_call
from plain import Plain, compiled, picture, plain, sampled, steps_of, timesteps

import dcompile
from dcompile import MultiLevel, ScheduleError, Steps
from dcompile.errors import DepthError, ExportError
from dcompile.passes import find_skip_connections, split_levels
from dcompile.policy.codec import from_json, to_json
from dcompile.policy.forecast import Taylor, resolve_forecast

LEVELS = [(0, 2), (1, 6)]


@pytest.fixture
def each_way(graphs: str) -> str:
    """With plain calls, recorded graphs and on a GPU."""
    return graphs


def with_levels(levels: Any = LEVELS, **settings: Any) -> Plain:
    return compiled(schedule=MultiLevel(levels), **settings)


@torch.no_grad()
def by_hand(x: torch.Tensor, ts: torch.Tensor, forecasts: tuple[str, str]) -> torch.Tensor:
    """``LEVELS`` with the graphs of the split and arithmetic in the open."""
    network = plain()
    captured, _ = capture_call(network, (x, ts[0]), {})
    skips = find_skip_connections(captured.graph_module, captured.sample)
    graphs = split_levels(captured.graph_module, skips)
    weights = dict(network.named_parameters())
    past: list[list[tuple[int, torch.Tensor]]] = [[], []]

    def call(level: int, x: torch.Tensor, t: torch.Tensor, *cached: torch.Tensor) -> Any:
        names = [str(n.target) for n in graphs[level].graph.find_nodes(op="placeholder")]
        given = {name: weights[path] for name, path in captured.parameters.items()}
        given |= dict.fromkeys(captured.inputs, t) | {captured.sample: x}
        rest = iter(cached)
        return graphs[level](*[given[n] if n in given else next(rest) for n in names])

    def foreseen(cut: int, step: int) -> torch.Tensor:
        forecast = resolve_forecast(forecasts[cut])
        latest = past[cut][: forecast.history]
        factors = forecast.coefficients(step, [at for at, _ in latest])
        return sum(c * b for c, (_, b) in zip(factors, latest, strict=False))

    for step, t in enumerate(ts):
        if step % 6 == 0:
            output, *made = call(2, x, t)
        elif step % 2 == 0:
            output, *made = call(1, x, t, foreseen(1, step))
        else:
            output, *made = call(0, x, t, foreseen(0, step))
        for cut, boundary in enumerate(made):
            past[cut].insert(0, (step, boundary))
        x = x - 0.2 * output
    return x


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(
    "forecasts",
    [("reuse", "reuse"), ("linear", "linear"), ("reuse", "taylor"), ("linear", "reuse")],
)
def test_a_run_is_what_it_is_by_hand(forecasts: tuple[str, str]) -> None:
    levels = [(*level, forecast) for level, forecast in zip(LEVELS, forecasts, strict=True)]
    network, x, ts = with_levels(levels), picture(), timesteps(15)
    found = sampled(network, x, ts)
    torch.testing.assert_close(found, by_hand(x, ts, forecasts))
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.partial_steps, stats.reuse_steps) == (3, 5, 7)
    if forecasts == ("linear", "linear"):
        same = with_levels(forecast="linear")
        assert torch.equal(sampled(same, x, timesteps(15)), found)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("forecast", ["reuse", "linear"])
def test_interleaved_runs_keep_apart(forecast: str) -> None:
    network = with_levels(forecast=forecast)
    pictures = [picture(seed) for seed in range(3)]
    expected = [sampled(with_levels(forecast=forecast), x, timesteps(9)) for x in pictures]
    runs = [steps_of(network, x, timesteps(9)) for x in pictures]
    for latest in zip(*runs, strict=True):  # noqa: B007
        pass
    for found, wanted in zip(latest, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("each_way")
def test_a_second_lane_is_refreshed_as_deep_as_the_first() -> None:
    """Unbatched guidance: two calls a step, each with a cache of its own at every depth."""
    network, x, ts = with_levels(), picture(), timesteps(9)
    conditions = [torch.zeros(2, 4), torch.ones(2, 4)]
    with torch.no_grad():
        together = [[network(x, t, c)[0] for c in conditions] for t in ts]
        for number, condition in enumerate(conditions):
            alone, again = with_levels(), timesteps(9)
            for step, t in enumerate(again):
                assert torch.equal(together[step][number], alone(x, t, condition)[0])


def test_one_level_is_a_plain_interval() -> None:
    x, ts = picture(), timesteps(9)
    plainly = dcompile.cache_compile(plain(), interval=3, depth=1, backend="eager", verbose=False)
    assert torch.equal(sampled(with_levels([(1, 3)]), x, ts), sampled(plainly, x, timesteps(9)))


def test_equal_intervals_reuse_only_the_outermost() -> None:
    x, ts = picture(), timesteps(9)
    plainly = dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)
    assert torch.equal(
        sampled(with_levels([(0, 3), (1, 3)]), x, ts), sampled(plainly, x, timesteps(9))
    )


def test_saved_and_loaded(tmp_path: Any) -> None:
    network, x = with_levels([(0, 2), (1, 6, "linear")]), picture()
    expected = sampled(network, x, timesteps(9))
    folder = dcompile.handle(network).save(tmp_path / "saved")
    fresh = dcompile.load(plain(), folder, verbose=False)
    assert torch.equal(sampled(fresh, x, timesteps(9)), expected)
    assert dcompile.handle(fresh).stats.captures == 0
    with pytest.raises(
        ScheduleError, match=r"saved at depth 0, 1, Steps.* cuts at depth 0: compile"
    ):
        dcompile.load(plain(), folder, schedule=Steps([0]), verbose=False)
    with pytest.raises(ScheduleError, match=r"saved for forecasts from 1, 2 refreshes"):
        dcompile.load(plain(), folder, schedule=MultiLevel(LEVELS), forecast="reuse", verbose=False)


@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled(backend: str) -> None:
    levels = [(0, 2), (1, 6, "linear")]
    x = picture()
    found = sampled(with_levels(levels, backend=backend), x, timesteps(9))
    expected = sampled(with_levels(levels), x, timesteps(9))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_warmup_runs_every_graph(graphs: str) -> None:
    network = with_levels([(0, 2), (1, 6, "linear")])
    handle = dcompile.handle(network)
    handle.warmup((picture(), timesteps()[0]))
    captures = handle.stats.captures
    sampled(network, picture(), timesteps(9))
    assert handle.stats.captures == captures == 1
    if graphs != "plain":
        (recorded,) = seam.recorded_of(handle.module)
        assert sorted(recorded._graphs) == [0, 1, 2]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "expected"),
        (3, "expected"),
        ([(0,)], "expected"),
        ([0, 2], "expected"),
        ([(0, 0)], "MultiLevel interval"),
        ([(-1, 2)], "MultiLevel depth"),
        ([(0, True)], "MultiLevel interval"),
        ([(1, 2), (0, 4)], "depths have to ascend"),
        ([(0, 4), (1, 2)], "as rarely"),
        ([(0, 2, Taylor(2))], "expected a forecast's name"),
    ],
)
def test_bad_levels(levels: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        MultiLevel(levels)


def test_bad_use(tmp_path: Any) -> None:
    with pytest.raises(DepthError, match="brings its depths"):
        with_levels(depth=2)
    with pytest.raises(ScheduleError, match="forecast"):
        with_levels([(0, 2), (1, 4, "cubic")])
    with pytest.raises(DepthError, match="depth 7 is out of range"):
        with_levels([(0, 2), (7, 4)])(picture(), timesteps()[0])
    network = with_levels()
    with pytest.raises(ExportError, match="this schedule takes more"):
        dcompile.handle(network).export_onnx(tmp_path, picture(), timesteps()[0])


def test_as_json() -> None:
    for schedule in (MultiLevel(LEVELS), MultiLevel([(0, 2), (1, 6, "linear")])):
        assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule
