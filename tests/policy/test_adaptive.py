"""A schedule that refreshes when features have changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import seam
import torch
from diffusers import DDIMScheduler
from heard import noticed, silent
from plain import Plain, picture, plain, sampled, steps_of, timesteps

import dcompile
from dcompile import Adaptive, RunInfo, ScheduleError
from dcompile.policy.codec import from_json, to_json

pytestmark = pytest.mark.filterwarnings("ignore:.*Adaptive")


@pytest.fixture
def each_way(graphs: str) -> str:
    """With plain calls, recorded graphs and on a GPU."""
    return graphs


class Told:
    """A drift as the schedule gets it."""

    def __init__(self, value: float, late: bool = False) -> None:
        self.value, self.late = float(value), late

    def __float__(self) -> float:
        return self.value


def refreshed(schedule: Adaptive, drifts: list[float], late: bool = False, **run: Any) -> list[int]:
    """The refresh steps of a run whose step i drifts by ``drifts[i]``."""
    warned: list[str] = []
    planned: Any = schedule.plan(RunInfo(len(drifts), warn=warned.append, **run))
    found = []
    for step, drift in enumerate(drifts):
        if planned.level(step):
            found.append(step)
        else:
            planned.observe(step, Told(drift, late))
    return found


def test_the_step_after_the_sum_has_reached_the_threshold() -> None:
    assert refreshed(Adaptive(1.0), [0.5] * 9) == [0, 3, 6]
    assert refreshed(Adaptive(1.0), [0.5] * 9, late=True) == [0, 4, 8]
    assert refreshed(Adaptive(1.1), [0.5] * 9) == [0, 4, 8]
    assert refreshed(Adaptive(1.0), [0, 1, 0, 0.2, 0.2, 0.2, 0.5, 0, 0]) == [0, 2, 7]


def test_intervals_bound_it() -> None:
    assert refreshed(Adaptive(0.1, min_interval=4), [1.0] * 9) == [0, 4, 8]
    assert refreshed(Adaptive(100.0, max_interval=3), [1.0] * 9) == [0, 3, 6]
    assert refreshed(Adaptive(100.0), [1.0] * 9) == [0]
    assert refreshed(Adaptive(0.1, max_interval=1), [1.0] * 4) == [0, 1, 2, 3]


def test_the_sampler_weights_the_drifts() -> None:
    # Over their mean, to the power of 1/2: 2/1.5 and 1/1.5.
    weights = (4.0,) * 5 + (1.0,) * 5
    found = refreshed(Adaptive(2.6, power=0.5), [1.0] * 10, gains=weights)
    assert found == [0, 3, 7]
    assert refreshed(Adaptive(2.6, power=0), [1.0] * 10, gains=weights) == [0, 4, 8]
    # Without a sampler all steps count alike.
    assert refreshed(Adaptive(2.6), [1.0] * 10) == [0, 4, 8]


@pytest.mark.parametrize("drift", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refreshed_at_once(drift: float) -> None:
    assert refreshed(Adaptive(5.0), [0, 0.1, drift, 0.1, 0.1, 0.1]) == [0, 3]
    assert refreshed(Adaptive(5.0), [drift] * 6) == [0, 2, 4]


def test_two_calls_a_step_count_once_and_the_larger_one() -> None:
    planned: Any = Adaptive(1.0).plan(RunInfo(9))
    found = []
    for step in range(9):
        decisions = {planned.level(step) for _ in range(2)}
        assert len(decisions) == 1
        if decisions.pop():
            found.append(step)
        else:
            planned.observe(step, Told(0.5))
            planned.observe(step, Told(0.2))
    assert found == [0, 3, 6]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("forecast", ["reuse", "linear", "taylor"])
@pytest.mark.parametrize("probe", ["l1", "l2"])
def test_a_run_follows_what_enters_the_deep_region(forecast: str, probe: str) -> None:
    x, ts = picture(), timesteps(20)
    network = dcompile.cache_compile(
        plain(),
        schedule=Adaptive(0.6, probe=probe),
        forecast=forecast,
        backend="eager",
        verbose=False,
    )
    found = sampled(network, x, ts)
    stats = dcompile.handle(network).stats
    assert 1 < stats.refresh_steps < 20
    assert torch.equal(sampled(network, x, timesteps(20)), found)  # the same each time
    # The refresh steps, had they been given, give the same pictures.
    steps = refresh_steps(network, x)
    given = dcompile.cache_compile(
        plain(),
        schedule=dcompile.Steps(steps),
        forecast=forecast,
        backend="eager",
        verbose=False,
    )
    torch.testing.assert_close(sampled(given, x, timesteps(20)), found)


def refresh_steps(network: Plain, x: torch.Tensor) -> list[int]:
    found: list[int] = []
    dispatcher = seam.dispatcher_of(network)
    dispatcher.observer = lambda seen: found.append(seen.step)
    sampled(network, x, timesteps(20))
    dispatcher.observer = None
    return found


@pytest.mark.usefixtures("each_way")
def test_interleaved_runs_decide_for_themselves() -> None:
    def make() -> Plain:
        return dcompile.cache_compile(
            plain(), schedule=Adaptive(0.6), backend="eager", verbose=False
        )

    pictures = [picture(seed) * (1 + 3 * seed) for seed in range(3)]
    expected = [sampled(make(), x, timesteps(20)) for x in pictures]
    network = make()
    runs = [steps_of(network, x, timesteps(20)) for x in pictures]
    for latest in zip(*runs, strict=True):  # noqa: B007
        pass
    for found, wanted in zip(latest, expected, strict=True):
        assert torch.equal(found, wanted)


def test_it_reads_the_sampler() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    x, found = picture(), []
    for power in (0, 1):
        network = dcompile.cache_compile(
            plain(),
            schedule=Adaptive(0.6, power=power),
            sampler=scheduler,
            backend="eager",
            verbose=False,
        )
        dispatcher = seam.dispatcher_of(network)
        steps: list[int] = []
        dispatcher.observer = lambda seen, steps=steps: steps.append(seen.step)
        sampled(network, x, scheduler.timesteps)
        found.append(steps)
    assert found[0] != found[1]


def test_saved_and_loaded(tmp_path: Any) -> None:
    x = picture()
    network = dcompile.cache_compile(
        plain(), schedule=Adaptive(0.6), forecast="linear", backend="eager", verbose=False
    )
    expected = sampled(network, x, timesteps(20))
    folder = dcompile.handle(network).save(tmp_path / "saved")
    fresh = dcompile.load(plain(), folder, verbose=False)
    assert torch.equal(sampled(fresh, x, timesteps(20)), expected)
    assert dcompile.handle(fresh).stats.captures == 0
    sampled(dcompile.load(plain(), folder, schedule=Adaptive(0.3), verbose=False), x, timesteps(20))
    with pytest.raises(ScheduleError, match=r"saved for .* probe 'l1'; .* no probe: compile"):
        dcompile.load(plain(), folder, interval=3, verbose=False)


def test_the_full_graph_is_shared_between_probes_of_another_norm() -> None:
    network = plain()
    for probe in ("l1", "l2"):
        dcompile.cache_compile(
            network, schedule=Adaptive(0.6, probe=probe), backend="eager", verbose=False
        )
        sampled(network, picture(), timesteps(5))
    one, two = seam.programs_of(network)
    assert one.full is two.full


def test_compiled() -> None:
    def run(backend: str) -> torch.Tensor:
        network = dcompile.cache_compile(
            plain(), schedule=Adaptive(0.6), forecast="linear", backend=backend, verbose=False
        )
        return sampled(network, picture(), timesteps(20))

    torch.testing.assert_close(run("inductor"), run("eager"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (1e9, r"was never reached in a run of 20 steps: the weighted sums were \d"),
        (1e-9, "was reached at every opportunity in a run of 20 steps: the weighted sums were"),
    ],
)
@pytest.mark.filterwarnings("default:.*Adaptive")
def test_a_threshold_that_decides_nothing_warns_once(threshold: float, message: str) -> None:
    network = dcompile.cache_compile(
        plain(), schedule=Adaptive(threshold), backend="eager", verbose=False
    )
    with noticed(message):
        sampled(network, picture(), timesteps(20))
    with silent():
        sampled(network, picture(1), timesteps(20))


@pytest.mark.parametrize(
    ("schedule", "late", "warning"),
    [
        (Adaptive(1e-9), False, "at every opportunity"),
        (Adaptive(1e-9), True, "at every opportunity"),
        (Adaptive(1e9, max_interval=2), False, "was never reached"),
        (Adaptive(0.5, max_interval=2), False, "at every opportunity"),
        (Adaptive(3.5, max_interval=9), True, None),
    ],
)
def test_warnings_say_what_happened(schedule: Adaptive, late: bool, warning: str | None) -> None:
    warned: list[str] = []
    planned: Any = schedule.plan(RunInfo(50, warn=warned.append))
    for step in range(50):
        if not planned.level(step):
            planned.observe(step, Told(1.0, late))
    assert len(warned) == (warning is not None)
    assert warning is None or warning in warned[0]


def test_another_threshold_warns_again() -> None:
    network = plain()
    for _ in range(2):
        dcompile.cache_compile(network, schedule=Adaptive(1e9), backend="eager", verbose=False)
        with noticed("never reached"):
            sampled(network, picture(), timesteps(9))


def test_features_that_are_not_finite_warn_once() -> None:
    network = dcompile.cache_compile(
        plain(), schedule=Adaptive(0.6), backend="eager", verbose=False
    )
    with noticed("features are not finite"):
        sampled(network, picture() * float("nan"), timesteps(9))
    stats = dcompile.handle(network).stats
    assert stats.refresh_steps >= 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"threshold": "much"},
        {"threshold": 1.0, "min_interval": 0},
        {"threshold": 1.0, "min_interval": 3, "max_interval": 2},
        {"threshold": 1.0, "probe": "l3"},
        {"threshold": 1.0, "power": -1},
    ],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError):
        Adaptive(**arguments)


def test_unplanned_use_says_so() -> None:
    with pytest.raises(ScheduleError, match="for a whole run"):
        Adaptive(1.0).refresh(0, 9)


def test_as_json() -> None:
    schedule = Adaptive(0.5, 2, 8, "l2", 0.25)
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule
