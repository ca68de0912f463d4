"""Schedules as JSON, for saved programs and exports: an explicit registry of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dcompile.errors import ScheduleError
from dcompile.policy.adaptive import Adaptive
from dcompile.policy.fixed import NonUniform, Steps, Uniform
from dcompile.policy.gain_weighted import GainWeighted
from dcompile.policy.multi_level import MultiLevel
from dcompile.policy.schedule import Schedule
from dcompile.policy.self_tuned import SelfTuned
from dcompile.policy.tuned import Tuned

_CLASSES: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (Uniform, Steps, NonUniform, GainWeighted, Adaptive, MultiLevel, Tuned, SelfTuned)
}
# How to build one from its fields, where that takes more than the constructor.
_BUILDERS: dict[str, Callable[..., Schedule]] = {
    **_CLASSES,
    "Tuned": Tuned.of_fields,
    "SelfTuned": SelfTuned.of_fields,
}


def to_json(schedule: Schedule) -> dict[str, Any] | None:
    """The schedule's class and fields; None if it is not one of the registry's."""
    name = type(schedule).__name__
    if _CLASSES.get(name) is not type(schedule):
        return None
    if isinstance(schedule, SelfTuned):
        return {"kind": name, **schedule.as_json()}
    return {"kind": name, **asdict(schedule)}  # type: ignore[call-overload]


def from_json(entry: Mapping[str, Any]) -> Schedule:
    """The schedule that ``to_json`` described.

    Raises:
        ScheduleError: unknown kind, or fields that its class refuses.
    """
    fields = dict(entry)
    kind = fields.pop("kind", None)
    if kind not in _BUILDERS:
        raise ScheduleError(f"unknown schedule {kind!r}; known are {', '.join(_BUILDERS)}")
    try:
        return _BUILDERS[kind](**fields)
    except TypeError as error:
        raise ScheduleError(f"{kind}: {error}") from error
