"""Invariant 5: what one run cached never reaches another."""

import gc
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import seam
import torch
from plain import Plain, picture, plain, sampled, steps_of, timesteps

import dcompile

N = 3


SETTINGS: dict[str, Any] = {"backend": "eager", "verbose": False}


@pytest.fixture(autouse=True, params=["reuse", "linear", "damped"])
def each_way(graphs: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this with plain calls, recorded graphs and on a GPU, without and with a forecast."""
    monkeypatch.setitem(SETTINGS, "forecast", request.param)
    _reference.cache_clear()


@pytest.fixture
def network() -> Plain:
    return dcompile.cache_compile(plain(), interval=N, **SETTINGS)


@lru_cache
def _reference() -> Plain:
    return dcompile.cache_compile(plain(), interval=N, **SETTINGS)


def alone(x: torch.Tensor, ts: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
    """The cached result of a network that holds nothing else."""
    dcompile.handle(_reference()).reset()
    return sampled(_reference(), x, ts.clone(), condition)


def test_caching_changes_the_result_so_these_tests_can_fail(network: Plain) -> None:
    assert not torch.equal(
        sampled(network, picture(), timesteps()), sampled(plain(), picture(), timesteps())
    )


def test_next_run_with_another_picture_and_condition(network: Plain) -> None:
    sampled(network, picture(1), timesteps(), torch.ones(2, 4))
    condition = torch.zeros(2, 4)
    expected = alone(picture(2), timesteps(), condition)
    assert torch.equal(sampled(network, picture(2), timesteps(), condition), expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 11)])
def test_next_run_with_another_size(network: Plain, size: tuple[int, int]) -> None:
    sampled(network, picture(1), timesteps())
    x = picture(2, batch=1, size=size)
    assert torch.equal(sampled(network, x, timesteps()), alone(x, timesteps()))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_interrupted_run(network: Plain, done: int) -> None:
    ts = timesteps()
    sampled(network, picture(1), ts[:done])
    new = timesteps()
    assert torch.equal(sampled(network, picture(2), new), alone(picture(2), timesteps()))
    # Over the very same timesteps it may refresh once more, but never reuse the old run.
    again = sampled(network, picture(3), ts)
    assert not torch.equal(again, sampled(plain(), picture(3), ts))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_the_middle(network: Plain, error: type[BaseException]) -> None:
    ts = timesteps()

    calls = 0
    run = seam.settings_of(network).schedule

    class Interrupting:
        def refresh(self, step: int, steps: int | None) -> bool:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise error("in the middle")
            return run.refresh(step, steps)

    dcompile.cache_compile(network, schedule=Interrupting(), **SETTINGS)
    with pytest.raises(error, match="in the middle"):
        sampled(network, picture(1), ts)
    assert dcompile.handle(network).stats.cache_bytes == 0
    assert torch.equal(sampled(network, picture(2), ts), alone(picture(2), timesteps()))


def test_another_start_between_runs(network: Plain) -> None:
    for start in (3, 0, 5, 2):
        ts = timesteps()[start:]
        assert torch.equal(
            sampled(network, picture(start), ts), alone(picture(start), timesteps()[start:])
        )


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs(network: Plain, steps: int) -> None:
    for seed in range(3):
        ts = timesteps(steps)
        assert torch.equal(
            sampled(network, picture(seed), ts), alone(picture(seed), timesteps(steps))
        )
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (3, 3 * (steps - 1))


def test_two_runs_step_by_step(network: Plain) -> None:
    one = steps_of(network, picture(1), timesteps())
    two = steps_of(network, picture(2), timesteps())
    for last_one, last_two in zip(one, two, strict=True):  # noqa: B007
        pass
    assert torch.equal(last_one, alone(picture(1), timesteps()))
    assert torch.equal(last_two, alone(picture(2), timesteps()))


def test_two_runs_over_one_timesteps_tensor_are_never_mixed(network: Plain) -> None:
    ts = timesteps()
    one, two = steps_of(network, picture(1), ts), steps_of(network, picture(2), ts)
    for last_one, last_two in zip(one, two, strict=True):  # noqa: B007
        pass
    # In doubt it refreshes: each result is the uncached one.
    assert torch.equal(last_one, sampled(plain(), picture(1), ts))
    assert torch.equal(last_two, sampled(plain(), picture(2), ts))


def test_threads(network: Plain) -> None:
    sampled(network, picture(), timesteps())  # compile once
    results: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = sampled(network, picture(seed), timesteps(20))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        assert torch.equal(results[seed], alone(picture(seed), timesteps(20)))
    stats = dcompile.handle(network).stats
    assert stats.refresh_steps + stats.reuse_steps == 7 + 8 * 20


def test_threads_that_compile_at_once() -> None:
    network = dcompile.cache_compile(plain(), interval=N, **SETTINGS)
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        results[seed] = sampled(network, picture(seed), timesteps())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(results[seed], alone(picture(seed), timesteps()))
    assert dcompile.handle(network).stats.captures == 1


@torch.no_grad()
def guided(
    network: Callable[..., tuple[torch.Tensor]], x: torch.Tensor, ts: torch.Tensor, until: int
) -> torch.Tensor:
    """Unbatched guidance that stops after ``until`` steps."""
    uncond, cond = torch.zeros(2, 4), torch.ones(2, 4)
    for step, t in enumerate(ts):
        if step < until:
            base = network(x, t, uncond)[0]
            x = x - 0.2 * (base + 3 * (network(x, t, cond)[0] - base))
        else:
            x = x - 0.2 * network(x, t, cond)[0]
    return x


@pytest.mark.one_in(4)
@pytest.mark.parametrize("until", [9, 4, 5])
def test_unbatched_guidance_equals_two_networks(network: Plain, until: int) -> None:
    ts = timesteps(9)
    uncond = dcompile.cache_compile(plain(), interval=N, **SETTINGS)
    cond = dcompile.cache_compile(plain(), interval=N, **SETTINGS)
    zeros = torch.zeros(2, 4)

    def separate(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor]:
        return (uncond if torch.equal(condition, zeros) else cond)(x, t, condition)

    expected = guided(separate, picture(), ts, until)
    assert torch.equal(guided(network, picture(), timesteps(9), until), expected)


def test_batched_guidance_that_stops_refreshes(network: Plain) -> None:
    ts = timesteps(6)
    with torch.no_grad():
        x = picture(batch=1)
        for step, t in enumerate(ts):
            batch = 2 if step < 4 else 1
            given = x.expand(batch, -1, -1, -1).contiguous()
            result = network(given, t)[0]
            if step == 4:  # not a scheduled refresh, but the cache is of another batch
                assert torch.equal(result, plain()(given, t)[0])
            x = x - 0.2 * result[-1:]
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (3, 3)


def test_two_samplers_share_one_network(network: Plain) -> None:
    expected = [alone(picture(seed), timesteps(count)) for seed, count in ((1, 7), (2, 11))]
    found = [sampled(network, picture(seed), timesteps(count)) for seed, count in ((1, 7), (2, 11))]
    assert all(map(torch.equal, found, expected))


def test_the_cache_is_freed_at_the_last_step(network: Plain) -> None:
    ts = timesteps()
    for seed in (1, 2):
        sampled(network, picture(seed), ts)
        assert dcompile.handle(network).stats.cache_bytes == 0


def test_the_cache_of_an_interrupted_run_is_freed_with_the_timesteps(network: Plain) -> None:
    ts = timesteps()
    sampled(network, picture(), ts[:-1])
    boundaries = dcompile.policy.forecast.resolve_forecast(SETTINGS["forecast"]).history
    assert dcompile.handle(network).stats.cache_bytes == boundaries * 2 * 8 * 8 * 8 * 4
    del ts
    gc.collect()
    assert dcompile.handle(network).stats.cache_bytes == 0


def test_reset_in_the_middle_refreshes(network: Plain) -> None:
    ts = timesteps()
    sampled(network, picture(), ts[:2])
    dcompile.handle(network).reset()
    with torch.no_grad():
        assert torch.equal(network(picture(5), ts[2])[0], plain()(picture(5), ts[2])[0])


@pytest.mark.parametrize("kind", [int, float, lambda t: t.clone(), lambda t: t.repeat(2)])
def test_timesteps_of_other_kinds_refresh_once_more(
    network: Plain, kind: Callable[[torch.Tensor], object]
) -> None:
    ts = timesteps(9)
    found = sampled(network, picture(), [kind(t) for t in ts])
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.captures) == (4, 5, 1)
    if SETTINGS["forecast"] != "reuse":
        return  # what a doubtful step cached is no history, so this is no other run's equal
    schedule = dcompile.Steps([0, 1, 3, 6])
    dcompile.cache_compile(network, schedule=schedule, **SETTINGS)
    batch = kind(ts[0]).numel() if isinstance(kind(ts[0]), torch.Tensor) else 1
    told = [t.expand(batch) if batch > 1 else t for t in ts]  # CPUs may round by the batch
    assert torch.equal(found, sampled(network, picture(), told))


def test_a_change_between_one_step_runs_at_one_timestep_is_seen(network: Plain) -> None:
    expected = plain()
    t = timesteps()[0]
    for scale in (1.0, 2.0):
        for each in (network, expected):
            each.leave = torch.nn.Conv2d(16, 3, 3, padding=1, bias=False)
            torch.nn.init.constant_(each.leave.weight, scale)
        condition = torch.full((2, 4), scale)
        with torch.no_grad():
            found = network(picture(), t, condition)[0]
            assert torch.equal(found, expected(picture(), t, condition)[0])


def test_reset_keeps_count_of_the_run(network: Plain) -> None:
    schedule = dcompile.Steps([0, 2, 5])
    dcompile.cache_compile(network, schedule=schedule, **SETTINGS)
    ts = timesteps()
    sampled(network, picture(), ts[:4])
    dcompile.handle(network).reset()
    assert dcompile.handle(network).stats.cache_bytes == 0
    sampled(network, picture(), ts[4:])
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (4, 3)  # 0 2 5, and 4 after the reset


def test_what_the_caller_does_to_a_result_does_not_reach_the_cache() -> None:
    class Telling(Plain):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:  # type: ignore[override]
            outer = self.enter(sample)
            up = torch.nn.functional.interpolate(self.deep(self.down(outer)), size=outer.shape[-2:])
            return self.leave(torch.cat([up, outer], 1)), up

    torch.manual_seed(0)
    network = dcompile.cache_compile(Telling().eval(), **SETTINGS)
    with torch.no_grad():
        for t in timesteps(3):
            _, up = network(picture(), t)
            if t == 999:
                first = up.clone()
            assert torch.equal(up, first)
            up.mul_(100)


def test_a_pass_that_goes_back_reuses_again_after_two_steps() -> None:
    network = dcompile.cache_compile(plain(), interval=10, **SETTINGS)
    ts = timesteps(14)
    x = picture()
    with torch.no_grad():
        for step in (*range(13), *range(4, 10)):
            network(x, ts[step])
    stats = dcompile.handle(network).stats
    # Steps 0 and 10; then 4, which has nothing, and 5, which may be either pass's.
    assert (stats.refresh_steps, stats.reuse_steps) == (4, 15)
