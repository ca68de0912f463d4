"""Forecasts: what a reuse step feeds in for the deep features it does not compute.

A forecast is any object with an attribute ``history``, the number of earlier boundaries it uses,
and a method ``coefficients(step, refreshed) -> floats``: what the boundaries of the steps
``refreshed``, latest first, are multiplied with before they are added up. Where fewer than
``history`` steps were refreshed yet, ``refreshed`` is shorter, and so may be the answer.

Features are extrapolated over the step index; over log-SNR it was worse in a prototype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from dcompile.errors import ScheduleError


@runtime_checkable
class Forecast(Protocol):
    """Turns past boundaries into the one that a reuse step feeds in."""

    @property
    def history(self) -> int:
        """How many boundaries it uses: 1 is the latest only."""
        ...

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        """Factors for the boundaries of the steps ``refreshed`` (latest first) at ``step``."""
        ...


@dataclass(frozen=True)
class Reuse:
    """The latest boundary as it is: DeepCache's."""

    history: int = 1

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        return (1.0,)


@dataclass(frozen=True)
class Lagrange:
    """The polynomial through the latest ``order`` + 1 boundaries: 1 is linear, 2 quadratic."""

    order: int = 1

    @property
    def history(self) -> int:
        return self.order + 1

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        points = refreshed[: self.history]
        factors = []
        for one in points:
            factor = 1.0
            for other in points:
                if other != one:
                    factor *= (step - other) / (one - other)
            factors.append(factor)
        return factors


@dataclass(frozen=True)
class Taylor:
    """A Taylor series whose derivatives are finite differences of the latest boundaries.

    With k steps since the latest refresh: b + k b' + k^2 b''/2 + ... (TaylorSeer, Liu et al.,
    2025, arXiv 2503.06923). Of order 1 it is linear; beyond, it trusts curvature less than
    ``Lagrange`` does, because differences are taken over the past.
    """

    order: int = 2

    @property
    def history(self) -> int:
        return self.order + 1

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        points = list(refreshed[: self.history])
        count = len(points)
        # Rows of differences, each as factors of the boundaries.
        rows = [[float(i == j) for j in range(count)] for i in range(count)]
        total = list(rows[0])
        scale = 1.0
        for order in range(1, count):
            rows = [
                [
                    (newer - older) / (points[i] - points[i + 1])
                    for newer, older in zip(rows[i], rows[i + 1], strict=True)
                ]
                for i in range(len(rows) - 1)
            ]
            scale *= (step - points[0]) / order
            total = [value + scale * factor for value, factor in zip(total, rows[0], strict=True)]
        return total


@dataclass(frozen=True)
class Damped:
    """Another forecast, trusted as far as it would have been right so far.

    A network that corrects what a forecast got wrong makes features swing: extrapolated, they swing
    further, and the result can be far worse than that of plain reuse. So each refresh looks back:
    of what the forecast would have added to the features before, the share that comes closest to
    the new ones, between 0 and 1, is what is added until the next refresh. That share is found by
    least squares over all features of the call, separately for each cut, and over all refreshes so
    far, each counting half as much as the one after it. On a GPU it is used one refresh later, so
    that nothing waits for it.
    """

    MEMORY: ClassVar[float] = 0.5

    forecast: Forecast = Lagrange(1)

    @property
    def history(self) -> int:
        return self.forecast.history

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        return self.forecast.coefficients(step, refreshed)

    @staticmethod
    def apply(coefficients: Sequence[float], damping: float) -> tuple[float, ...]:
        """The coefficients, with that share of what they add to the latest boundary."""
        first, *others = coefficients
        return (1.0 + damping * (first - 1.0), *(damping * factor for factor in others))


_NAMED: dict[str, Forecast] = {
    "reuse": Reuse(),
    "linear": Lagrange(1),
    "damped": Damped(Lagrange(1)),
    "quadratic": Lagrange(2),
    "taylor": Taylor(2),
}


def resolve_forecast(forecast: Any) -> Forecast:
    """From what ``cache_compile`` takes.

    Raises:
        ScheduleError: no known name, and no object with ``history`` and ``coefficients``.
    """
    if isinstance(forecast, str) and forecast in _NAMED:
        return _NAMED[forecast]
    history = getattr(forecast, "history", None)
    if (
        callable(getattr(forecast, "coefficients", None))
        and isinstance(history, int)
        and not isinstance(history, bool)
        and history >= 1
    ):
        return cast(Forecast, forecast)
    raise ScheduleError(
        f"forecast: expected {', '.join(map(repr, _NAMED))} or an object with history and "
        f"coefficients(step, refreshed), got {forecast!r}"
    )


def name_of(forecast: Forecast | str) -> str | None:
    """Its name, as ``cache_compile`` takes it; None if it has none."""
    if isinstance(forecast, str):
        return forecast
    return next((name for name, known in _NAMED.items() if known == forecast), None)


def coefficients_of(forecast: Forecast, step: int, refreshed: Sequence[int]) -> tuple[float, ...]:
    """The forecast's coefficients, one for each of ``history`` boundaries.

    Raises:
        ScheduleError: it gave none, more than there are boundaries, or no numbers.
    """
    answer: Any = forecast.coefficients(step, refreshed)
    try:
        given = tuple(map(float, answer))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{forecast!r} gave {answer!r} as coefficients: {error}") from error
    if not 0 < len(given) <= min(forecast.history, len(refreshed)):
        raise ScheduleError(
            f"{forecast!r} gave {len(given)} coefficients for {len(refreshed)} refreshed steps and "
            f"history={forecast.history}"
        )
    return given + (0.0,) * (forecast.history - len(given))
