"""What self-tuning is asked for."""

from __future__ import annotations

from typing import NamedTuple


class Aim(NamedTuple):
    """The cheapest schedule at a quality, or the closest one at a cost.

    Attributes:
        speedup: FLOPs of an uncached run over FLOPs of a cached one; 1 where ``psnr`` is given.
        psnr: PSNR of the final sample against the uncached one, in dB, as predicted.
    """

    speedup: float = 1.0
    psnr: float | None = None

    def __str__(self) -> str:
        return f"speedup={self.speedup:g}" if self.psnr is None else f"psnr={self.psnr:g}"


__all__ = ["Aim"]
