"""The samplers that a pipeline may use."""

from __future__ import annotations

from typing import Any

import torch


def samplers_of(pipeline: Any) -> dict[str, Any]:
    """Classes of schedulers that take this pipeline's configuration, by name."""
    own = type(pipeline.scheduler)
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
