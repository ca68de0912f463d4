"""The samplers that a pipeline may use."""

from __future__ import annotations

from typing import Any

import torch

from dcompile.errors import JobError, first_line
from dcompile.models.loading import is_unconditional

_USUAL_STEPS = 20


class Samplers:
    """The samplers that one pipeline may use.

    Args:
        pipeline: of diffusers.

    Attributes:
        names: of their classes, sorted.
    """

    def __init__(self, pipeline: Any) -> None:
        self._own = pipeline.scheduler
        self._classes = samplers_of(pipeline)
        self._possible: set[tuple[str, int]] = set()
        self.names = sorted(self._classes)

    def make(self, name: str) -> Any:
        """A fresh sampler with the pipeline's configuration; its own if the name is empty."""
        return (self._classes[name] if name else type(self._own)).from_config(self._own.config)

    def require(self, name: str, steps: int) -> None:
        """Refuse what no sampler here can do, such as three steps of PNDM's.

        Raises:
            JobError: names the field.
        """
        if name and name not in self._classes:
            raise JobError("sampler", f"expected one of {', '.join(self.names)}")
        if (name, steps) in self._possible:
            return
        reason = self._why_not(name, steps)
        # One that fails with 20 steps, too, needs arguments that only the pipeline knows.
        if reason is not None and self._why_not(name, _USUAL_STEPS) is None:
            sampler = name or type(self._own).__name__
            raise JobError("steps", f"{sampler} cannot do {steps}: {reason}")
        self._possible.add((name, steps))

    def _why_not(self, name: str, steps: int) -> str | None:
        try:
            self.make(name).set_timesteps(steps)
        except Exception as error:  # each sampler has its own
            return first_line(error)
        return None


def samplers_of(pipeline: Any) -> dict[str, Any]:
    """Classes of schedulers that take this pipeline's configuration, by name."""
    own = type(pipeline.scheduler)
    if is_unconditional(pipeline):  # these give a sampler arguments that no other one takes
        return {own.__name__: own}
    classes = {own, *getattr(pipeline.scheduler, "compatibles", ())}
    return {one.__name__: one for one in classes}


def samplers_for_programs(pipeline: Any) -> list[str]:
    """Samplers whose calls need programs of their own: one for each dtype of timesteps.

    The pipeline's own is the first, as an empty name.
    """
    own = pipeline.scheduler
    found = {_timesteps_of(own, type(own))[0]: ""}
    rows = [(*_timesteps_of(own, sampler), name) for name, sampler in samplers_of(pipeline).items()]
    for dtype, _, name in sorted(rows, key=lambda row: row[1:]):  # with few calls a step first
        if dtype in (torch.int64, torch.float32):  # one or two samplers have others
            found.setdefault(dtype, name)
    return list(found.values())


def _timesteps_of(own: Any, sampler: Any) -> tuple[torch.dtype | None, int]:
    """Dtype and number of a short run's timesteps; no dtype for one that cannot be used here."""
    try:
        made = sampler.from_config(own.config)
        made.set_timesteps(4)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None, 0
    return made.timesteps.dtype, len(made.timesteps)
