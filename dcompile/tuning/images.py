"""What runs return, and how far it is from the result of an uncached run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dcompile.errors import TuneError

# PSNR in dB that an exact result counts as in a mean with others.
IDENTICAL = 100.0


def pictures_of(output: Any) -> torch.Tensor:
    """The output of a run as one flat float32 tensor on the CPU.

    Args:
        output: tensors, arrays, PIL images, or containers of them such as a pipeline's output.

    Raises:
        TuneError: it contains none of these, or values that are not finite.
    """
    output = getattr(output, "images", getattr(output, "frames", output))
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf.detach().float().cpu().flatten())
        elif isinstance(leaf, np.ndarray):
            found.append(torch.from_numpy(np.ascontiguousarray(leaf)).float().flatten())
        elif hasattr(leaf, "getbands") and hasattr(leaf, "tobytes"):  # a PIL image
            found.append(torch.from_numpy(np.asarray(leaf).astype("float32") / 255).flatten())
    if not found:
        raise TuneError(
            f"run returned {type(output).__name__}: expected tensors, arrays or pictures to compare"
        )
    pictures = torch.cat(found)
    if not bool(torch.isfinite(pictures).all()):
        raise TuneError("run returned values that are not finite: nothing can be compared")
    return pictures


def psnr_between(found: torch.Tensor, expected: torch.Tensor) -> float:
    """PSNR in dB, relative to the range of ``expected``; infinite if they are equal.

    Raises:
        TuneError: their shapes differ.
    """
    if found.shape != expected.shape:
        raise TuneError(
            f"run returned {found.numel()} values where it had returned {expected.numel()} before"
        )
    error = float((found - expected).square().mean())
    span = float(expected.max() - expected.min()) or 1.0
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def squared_error(psnr: float) -> float:
    """A PSNR in dB as mean squared error, relative to a range of 1."""
    error: float = 10 ** (-min(psnr, IDENTICAL) / 10)
    return error
