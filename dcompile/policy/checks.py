"""Validation of schedule arguments, with one wording for all of them."""

from __future__ import annotations

import math
from typing import cast

from dcompile.errors import ScheduleError


def require_int(name: str, value: object, least: int = 1) -> None:
    """Raise a ScheduleError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name}: expected an int of at least {least}, got {value!r}")


def require_power(name: str, value: object, least: float, most: float) -> None:
    """Raise a ScheduleError unless ``value`` is a number from ``least`` to ``most``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= cast(float, value) <= most:
        raise ScheduleError(f"{name}: expected a power from {least} to {most}, got {value!r}")


def require_psnr(value: object) -> float:
    """The PSNR in dB as a float.

    Raises:
        ScheduleError: it is no finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ScheduleError(f"psnr: expected a number of dB above 0, got {value!r}")
    return float(value)


def require_speedup(value: object) -> float:
    """The speed-up as a float.

    Raises:
        ScheduleError: it is no finite number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
        raise ScheduleError(f"speedup: expected a number of at least 1, got {value!r}")
    return float(value)
