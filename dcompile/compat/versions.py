"""Which torch this is, for the few places where releases differ."""

from __future__ import annotations

from typing import Any

import torch


def torch_version() -> tuple[int, int]:
    """Major and minor version, such as (2, 13)."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def refit_without_weight_map() -> dict[str, Any]:
    """Arguments that keep ``torch_tensorrt``'s refits from a map of weights by their values.

    Up to 2.12 that map is used by default, and is wrong where several weights are alike; 2.13 has
    neither the map nor the argument.
    """
    return {"use_weight_map_cache": False} if torch_version() < (2, 13) else {}
