"""What a user's own schedule or forecast may get wrong: said in a sentence, with its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain import compiled, picture, plain, sampled, timesteps

import dcompile
from dcompile import Plan, RunInfo, Schedule, ScheduleError, Uniform


class Answering:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __repr__(self) -> str:
        return "Answering()"

    def refresh(self, step: int, steps: int | None) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, "maybe", 7, [], np.zeros(3), torch.zeros(3)])
def test_refresh_that_answers_neither_yes_nor_no(answer: Any) -> None:
    network = compiled(schedule=Answering(answer))
    with pytest.raises(
        ScheduleError, match=r"Answering\(\): refresh\(0, 7\) returned .*expected True"
    ):
        sampled(network, picture(), timesteps())


@pytest.mark.parametrize("answer", [True, 1, np.bool_(True), torch.tensor(True)])
def test_refresh_that_says_yes(answer: Any) -> None:
    network = compiled(schedule=Answering(answer))
    sampled(network, picture(), timesteps())
    assert dcompile.handle(network).stats.refresh_steps == 7


class Levels(Plan):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def level(self, step: int) -> Any:
        return self.answer if step else 1


class Planning(Schedule):
    def __init__(self, plan: Any, **more: Any) -> None:
        self._plan, self._more = plan, more

    def __repr__(self) -> str:
        return "Planning()"

    def plan(self, run: RunInfo) -> Any:
        return self._plan

    depths: Any = property(lambda self: self._more.get("depths"))
    probe: Any = property(lambda self: self._more.get("probe"))
    forecasts: Any = property(lambda self: self._more.get("forecasts"))


@pytest.mark.parametrize("answer", [7, -1, None, 0.5, "all"])
def test_a_level_that_is_none(answer: Any) -> None:
    network = compiled(schedule=Planning(Levels(answer)))
    with pytest.raises(
        ScheduleError, match=r"Planning\(\): level\(1\) of its plan returned .* 0 to 1"
    ):
        sampled(network, picture(), timesteps())


@pytest.mark.parametrize("plan", [None, 3, [1, 0, 0]])
def test_a_plan_that_is_none(plan: Any) -> None:
    network = compiled(schedule=Planning(plan))
    with pytest.raises(
        ScheduleError, match=r"Planning\(\): plan\(run\) returned .*expected a Plan"
    ):
        sampled(network, picture(), timesteps())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"probe": "linf"}, 'probe is \'linf\', expected "l1", "l2" or None'),
        ({"depths": (2, 1)}, r"depths are \(2, 1\), expected ascending ones"),
        ({"depths": ()}, r"depths are \(\), expected ascending ones"),
        ({"forecasts": ("reuse", "linear")}, "2 forecasts for 1 depth, expected one for each"),
        ({"depths": (0, 1), "forecasts": ("reuse",)}, "1 forecasts for 2 depths"),
    ],
)
def test_declarations_that_contradict_each_other(more: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        compiled(schedule=Planning(Levels(0), **more))


def test_a_class_instead_of_an_object() -> None:
    with pytest.raises(
        ScheduleError, match=r"got the class Uniform: call it, as in Uniform\(...\)"
    ):
        compiled(schedule=Uniform)


class Forecasting:
    history = 2

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def coefficients(self, step: int, refreshed: Any) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [(float("nan"),), (1.0, float("inf"))])
def test_coefficients_that_are_not_finite(answer: Any) -> None:
    network = compiled(forecast=Forecasting(answer), interval=2)
    with pytest.raises(ScheduleError, match="as coefficients: not all are finite"):
        sampled(network, picture(), timesteps())


def test_a_forecast_of_other_parameters() -> None:
    class Short:
        history = 2

        def coefficients(self, step: int) -> Any:
            return (1.0,)

    with pytest.raises(ScheduleError, match=r"must have coefficients\(step, refreshed\)"):
        compiled(forecast=Short())
    with pytest.raises(ScheduleError, match="'auto' or an object with history"):
        compiled(forecast="lineer")


def test_other_arguments() -> None:
    with pytest.raises(
        dcompile.BackendError, match=r"options: expected a dict of settings, got \[1\]"
    ):
        dcompile.cache_compile(plain(), options=[1])  # type: ignore[arg-type]
    with pytest.raises(dcompile.BackendError, match="did you mean 'inductor'"):
        dcompile.cache_compile(plain(), backend="inductr")
    for thing in (None, "unet", 3):
        with pytest.raises(
            dcompile.NotCompiledError, match="expected a network or a pipeline, got"
        ):
            dcompile.handle(thing)
