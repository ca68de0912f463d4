"""Schedules as pure functions of step and number of steps."""

import json
from typing import Any

import pytest

from dcompile import (
    Adaptive,
    GainWeighted,
    NonUniform,
    RunInfo,
    Schedule,
    ScheduleError,
    Steps,
    Uniform,
)
from dcompile.policy.codec import from_json, to_json
from dcompile.policy.placement import evenly
from dcompile.policy.schedule import as_schedule


def chosen(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.refresh(step, steps)]


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (10, [0])]
)
def test_uniform(interval: int, expected: list[int]) -> None:
    assert chosen(Uniform(interval), 7) == expected


@pytest.mark.parametrize("interval", [0, -1, 2.0, "3", True, None])
def test_uniform_refuses(interval: object) -> None:
    with pytest.raises(ScheduleError, match="interval: expected an int of at least 1, got"):
        Uniform(interval)  # type: ignore[arg-type]


def test_steps() -> None:
    assert chosen(Steps([0, 5, 9]), 12) == [0, 5, 9]
    assert Steps([0, 5]).refresh(5, None)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "begin with 0"),
        ([1, 2], "begin with 0"),
        ([0, 3, 2], "ascending"),
        ([0, 3, 3], "ascending"),
        ([0, 1.5], "expected ints"),
    ],
)
def test_steps_refuses(steps: list[int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Steps(steps)


def test_steps_beyond_the_run() -> None:
    with pytest.raises(ScheduleError, match=r"9 lies beyond this run of 8 steps \(0 to 7\)"):
        Steps([0, 9]).refresh(0, 8)


# The paper's released code gives these.
@pytest.mark.parametrize(
    ("steps", "count", "center", "power", "expected"),
    [
        (50, 10, 15, 1.4, "0 5 9 13 17 21 26 31 37 43"),
        (50, 17, 20, 1.4, "0 3 6 9 12 15 17 20 21 24 27 30 33 36 39 42 46"),
        (
            250,
            25,
            120,
            1.2,
            "0 12 22 33 44 54 64 74 83 93 102 111 120 128 137 146 155 165 175 185 195 206 216 227 "
            "238",
        ),
    ],
)
def test_power_equals_the_reference(
    steps: int, count: int, center: int, power: float, expected: str
) -> None:
    assert chosen(NonUniform(count, center, power), steps) == [
        int(step) for step in expected.split()
    ]


@pytest.mark.parametrize("power", ["x", None, float("inf"), float("nan"), 1e9, True])
def test_powers_are_numbers_within_bounds(power: Any) -> None:
    with pytest.raises(ScheduleError, match="expected a power from"):
        NonUniform(3, 1, power)
    with pytest.raises(ScheduleError, match="expected a power from"):
        Adaptive(1.0, power=power)
    if power is not None:
        with pytest.raises(ScheduleError, match="expected a power from"):
            GainWeighted(2, power=power)


@pytest.mark.parametrize("steps", [3, None])
def test_steps_are_a_list(steps: Any) -> None:
    with pytest.raises(ScheduleError, match="expected a list of ints"):
        Steps(steps)


def test_power_refuses() -> None:
    with pytest.raises(ScheduleError, match="power from 1 to 100"):
        NonUniform(10, 15, 0.5)
    with pytest.raises(ScheduleError, match="count"):
        NonUniform(0)
    with pytest.raises(ScheduleError, match="do not fit a run of 8 steps"):
        NonUniform(10, 15).refresh(0, 8)
    with pytest.raises(ScheduleError, match="the number of steps is not known"):
        NonUniform(10, 15).refresh(0, None)


def test_anything_with_refresh_is_a_schedule() -> None:
    class EveryOther:
        def refresh(self, step: int, steps: int | None) -> bool:
            return step % 2 == 0

    schedule = as_schedule(EveryOther())
    plan = schedule.plan(RunInfo(5, cuts=2))
    assert [plan.level(step) for step in range(5)] == [2, 0, 2, 0, 2]
    assert plan.refreshes() == 3
    assert as_schedule(Uniform(2)) == Uniform(2)


# By the sampler -----------------------------------------------------------------------------------


def planned(schedule: GainWeighted, steps: int, weights: list[float], **known: Any) -> list[int]:
    plan = schedule.plan(RunInfo(steps, gains=tuple(weights), **known))
    return [step for step in range(steps) if plan.level(step)]


def test_sigma_with_equal_weights_is_about_uniform() -> None:
    assert planned(GainWeighted(4), 12, [1.0] * 12) == [0, 3, 6, 9]


def test_even_steps_end_with_the_shorter_intervals() -> None:
    assert evenly(10, 3) == (0, 4, 7)
    assert evenly(9, 3) == (0, 3, 6)
    assert evenly(5, 5) == (0, 1, 2, 3, 4)
    assert planned(GainWeighted(3, power=0), 10, [3.0] * 5 + [1.0] * 5) == [0, 4, 7]
    assert planned(GainWeighted(3, power=1), 10, [1.0] * 10) == [0, 4, 7]


def test_sigma_refreshes_where_weights_are_large() -> None:
    weights = [9.0] * 5 + [1.0] * 15
    found = planned(GainWeighted(6, power=1), 20, weights)
    assert found[0] == 0
    assert found == [0, 1, 2, 3, 4, 10]  # 45 of 60 lie in the first five


@pytest.mark.parametrize("count", [1, 2, 7, 19, 20])
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0, 4.0])
def test_sigma_has_as_many_refreshes_as_asked(count: int, power: float) -> None:
    weights = [10.0 ** (-i / 3) for i in range(20)]
    found = planned(GainWeighted(count, power=power), 20, weights)
    assert len(found) == count
    assert found[0] == 0
    assert found == sorted(set(found))


def test_sigma_of_a_run_that_starts_late() -> None:
    weights = [100.0, 100.0, *[1.0] * 6]
    assert planned(GainWeighted(2), 6, weights) == [0, 3]


def test_the_sampler_says_which_power() -> None:
    weights = [16.0] * 4 + [1.0] * 16
    for power in (0.0, 0.5, 1.0):
        expected = planned(GainWeighted(8, power=power), 20, weights)
        assert planned(GainWeighted(8), 20, weights, power=power) == expected
    assert planned(GainWeighted(8, power=1), 20, weights) != planned(
        GainWeighted(8, power=0), 20, weights
    )


@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.3])
@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0, 2.5])
def test_a_speed_up_is_at_least_what_was_asked(ratio: float, speedup: float) -> None:
    count = GainWeighted(speedup=speedup).refreshes(50, ratio)
    spent = count + (50 - count) * ratio
    assert 50 / spent >= speedup - 1e-9
    one_more = spent + (1 - ratio)
    assert 50 / one_more < speedup or count == 50


def test_a_speed_up_beyond_reach() -> None:
    with pytest.raises(ScheduleError, match=r"12 is beyond this network .* so the limit is 4\.55"):
        GainWeighted(speedup=12).refreshes(50, 0.22)
    assert GainWeighted(speedup=2.5).refreshes(2, 0.08) == 1  # a run too short for it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either count or speedup"),
        ({"count": 3, "speedup": 2.0}, "give either count or speedup"),
        ({"count": 0}, "count: expected an int"),
        ({"speedup": 0.5}, "speedup: expected a number of at least 1, got 0.5"),
        ({"speedup": float("nan")}, "speedup: expected a number"),
        ({"speedup": "2"}, "speedup: expected a number"),
        ({"count": 3, "power": -1}, "power from 0 to 4"),
    ],
)
def test_sigma_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        GainWeighted(**arguments)


def test_sigma_needs_a_sampler_and_enough_steps() -> None:
    with pytest.raises(ScheduleError, match=r"pass the pipeline to cache_compile"):
        GainWeighted(3).plan(RunInfo(9))
    with pytest.raises(ScheduleError, match="12 refreshes in a run of 9 steps"):
        planned(GainWeighted(12), 9, [1.0] * 9)


def test_sigma_of_a_run_of_unknown_length() -> None:
    plan = GainWeighted(2).plan(RunInfo(None, gains=(1.0,) * 6))
    assert [step for step in range(9) if plan.level(step)] == [0, 3, 6, 7, 8]


def test_sigma_in_json() -> None:
    schedule = GainWeighted(speedup=2.5, power=0.25)
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule
