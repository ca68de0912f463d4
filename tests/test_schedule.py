"""Schedules as pure functions of step and number of steps."""

import pytest

from dcompile import Power, Schedule, ScheduleError, Steps, Uniform


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
    assert chosen(Power(count, center, power), steps) == [int(step) for step in expected.split()]


def test_power_refuses() -> None:
    with pytest.raises(ScheduleError, match="power >= 1"):
        Power(10, 15, 0.5)
    with pytest.raises(ScheduleError, match="count"):
        Power(0)
    with pytest.raises(ScheduleError, match="do not fit a run of 8 steps"):
        Power(10, 15).refresh(0, 8)
    with pytest.raises(ScheduleError, match="the number of steps is not known"):
        Power(10, 15).refresh(0, None)


def test_anything_with_refresh_is_a_schedule() -> None:
    class EveryOther:
        def refresh(self, step: int, steps: int | None) -> bool:
            return step % 2 == 0

    assert isinstance(EveryOther(), Schedule)
    assert isinstance(Uniform(2), Schedule)
