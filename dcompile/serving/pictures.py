"""What an engine returns, and how it goes on its way."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL.Image import Image

REFRESH, PARTIAL, REUSE, UNCACHED = "refresh", "partial", "reuse", "uncached"
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
LARGEST_SIDES = {"jpeg": 65500, "webp": 16383}  # pixels; no limit of PNG's is ever reached


@dataclass(frozen=True)
class Trace:
    """How a run went.

    Attributes:
        levels: what each step ran: "refresh", "partial", "reuse" or "uncached".
        forced: refreshes that the schedule did not ask for.
        flops_speedup: FLOPs of an uncached run over those of this one.
        seconds: phase -> time: "encode" (up to the first step), "denoise", "decode".
        batch: pictures in the run.
        uncached_reasons: why calls ran uncached, and how many.
        programs: how many programs were captured and compiled meanwhile.
        compile_seconds: how long that took.
    """

    levels: tuple[str, ...]
    forced: int
    flops_speedup: float
    seconds: dict[str, float]
    batch: int
    uncached_reasons: dict[str, int] = field(default_factory=dict)
    programs: int = 0
    compile_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": list(self.levels),
            "forced": self.forced,
            "flops_speedup": round(self.flops_speedup, 3),
            "seconds": {phase: round(took, 4) for phase, took in self.seconds.items()},
            "batch": self.batch,
            "uncached_reasons": self.uncached_reasons,
            "compile_seconds": round(self.compile_seconds, 4),
        }


@dataclass(frozen=True)
class Picture:
    """A picture and how it came about.

    Attributes:
        image: RGB.
        seed: of its noise.
        trace: of the run that made it.
        notes: what the person who asked should know, such as a truncated prompt.
    """

    image: Image
    seed: int
    trace: Trace
    notes: tuple[str, ...] = ()


def encoded(image: Image, form: str = "png", quality: int = 90) -> bytes:
    """A picture as a file's content.

    Args:
        image: RGB.
        form: one of ``FORMATS``; PNG and WebP are written without loss at quality 100.
        quality: 1 to 100, of JPEG and WebP.
    """
    buffer = io.BytesIO()
    if form == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif form == "webp":
        image.save(buffer, "WEBP", quality=quality, lossless=quality == 100)
    else:
        image.convert("RGB").save(buffer, FORMATS[form], quality=quality)
    return buffer.getvalue()


def as_base64(content: bytes) -> str:
    """Bytes as JSON can carry them."""
    return base64.b64encode(content).decode("ascii")


def psnr(found: Image, expected: Image) -> float:
    """PSNR in dB, of 8 bits a channel; infinite if they are equal.

    Raises:
        ValueError: they have different sizes.
    """
    if found.size != expected.size:
        raise ValueError(f"expected a picture of size {expected.size}, got {found.size}")
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (found, expected))
    error = float(np.square(one - other).mean())
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def digest(image: Image) -> str:
    """SHA-256 of size and pixels."""
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()
