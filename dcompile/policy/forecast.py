"""Forecasts: the deep features that a reuse step feeds in instead of computing them.

A forecast is a linear combination of earlier boundaries. It is any object with an attribute
``history``, the number of boundaries it uses, and a method ``coefficients(step, refreshed)``, which
returns their coefficients, in the order of the steps ``refreshed``, latest first. While fewer than
``history`` steps were refreshed, ``refreshed`` is shorter, and so may be the result.

Features are extrapolated over the step index; over log-SNR it was worse in a prototype.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from dcompile.errors import ScheduleError


@runtime_checkable
class Forecast(Protocol):
    """Turns past boundaries into the one that a reuse step feeds in."""

    @property
    def history(self) -> int:
        """Number of boundaries it uses; 1 for the latest only."""
        ...

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        """Coefficients at ``step`` of the boundaries of the steps ``refreshed``, latest first."""
        ...


@dataclass(frozen=True)
class Reuse:
    """The latest boundary, unchanged, as in DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858)."""

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
        coefficients = []
        for one in points:
            coefficient = 1.0
            for other in points:
                if other != one:
                    coefficient *= (step - other) / (one - other)
            coefficients.append(coefficient)
        return coefficients


@dataclass(frozen=True)
class Taylor:
    """A Taylor series whose derivatives are finite differences of the latest boundaries.

    With k steps since the latest refresh: b + k b' + k^2 b''/2 + ... (TaylorSeer, Liu et al.,
    2025, arXiv 2503.06923). With order 1 it is linear. With higher orders it extrapolates curvature
    less than ``Lagrange`` does, because its differences are those of earlier intervals.
    """

    order: int = 2

    @property
    def history(self) -> int:
        return self.order + 1

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        points = list(refreshed[: self.history])
        count = len(points)
        # Finite differences, each as coefficients of the boundaries.
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
            total = [a + scale * b for a, b in zip(total, rows[0], strict=True)]
        return total


@dataclass(frozen=True)
class Damped:
    """Another forecast, damped by how well it would have predicted the features so far.

    A network that corrects the errors of a forecast makes features oscillate. Extrapolation
    amplifies that, and the result can be far worse than with plain reuse. So at each refresh the
    forecast is compared with the true boundary. The damping factor, between 0 and 1, scales the
    forecast's change of the latest boundary until the next refresh. It is the least-squares
    solution over all features of the call, separately for each cut, and over all refreshes so far,
    each with ``MEMORY`` times the weight of the next. On a GPU it is used one refresh later, so
    that the host does not wait for the device.
    """

    MEMORY: ClassVar[float] = 0.5
    """Weight of a refresh in the least squares, relative to the next one."""

    forecast: Forecast = Lagrange(1)

    @property
    def history(self) -> int:
        return self.forecast.history

    def coefficients(self, step: int, refreshed: Sequence[int]) -> Sequence[float]:
        return self.forecast.coefficients(step, refreshed)

    @staticmethod
    def apply(coefficients: Sequence[float], damping: float) -> tuple[float, ...]:
        """The coefficients after damping: 0 gives plain reuse, 1 the forecast itself."""
        first, *others = coefficients
        return (1.0 + damping * (first - 1.0), *(damping * other for other in others))


_NAMED: dict[str, Forecast] = {
    "reuse": Reuse(),
    "linear": Lagrange(1),
    "damped": Damped(Lagrange(1)),
    "quadratic": Lagrange(2),
    "taylor": Taylor(2),
}


def resolve_forecast(forecast: Any) -> Forecast:
    """The forecast of that name, or the object itself if it is a forecast.

    Raises:
        ScheduleError: it is neither a known name nor an object with ``history`` and
            ``coefficients``.
    """
    if isinstance(forecast, str) and forecast in _NAMED:
        return _NAMED[forecast]
    history = getattr(forecast, "history", None)
    if (
        callable(getattr(forecast, "coefficients", None))
        and isinstance(history, int)
        and not isinstance(history, bool)
        and history >= 1
        and not isinstance(forecast, type)
    ):
        try:
            inspect.signature(forecast.coefficients).bind(0, (0,))
        except TypeError as error:
            raise ScheduleError(
                f"forecast: {forecast!r} must have coefficients(step, refreshed); {error}"
            ) from error
        return cast(Forecast, forecast)
    names = ", ".join(map(repr, [*_NAMED, "auto"]))
    raise ScheduleError(
        f"forecast: expected {names} or an object with history and coefficients(step, refreshed), "
        f"got {forecast!r}"
    )


def name_of(forecast: Forecast | str) -> str | None:
    """The name that ``resolve_forecast`` takes; None if it has none."""
    if isinstance(forecast, str):
        return forecast
    return next((name for name, known in _NAMED.items() if known == forecast), None)


def coefficients_of(forecast: Forecast, step: int, refreshed: Sequence[int]) -> tuple[float, ...]:
    """The forecast's coefficients, padded with zeros to ``history`` of them.

    Raises:
        ScheduleError: it returned none, more than there are boundaries, or no finite numbers.
    """
    answer: Any = forecast.coefficients(step, refreshed)
    try:
        given = tuple(map(float, answer))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{forecast!r} gave {answer!r} as coefficients: {error}") from error
    if not all(map(math.isfinite, given)):
        raise ScheduleError(f"{forecast!r} gave {given!r} as coefficients: not all are finite")
    if not 0 < len(given) <= min(forecast.history, len(refreshed)):
        raise ScheduleError(
            f"{forecast!r} gave {len(given)} coefficients for {len(refreshed)} refreshed steps and "
            f"history={forecast.history}"
        )
    return given + (0.0,) * (forecast.history - len(given))
