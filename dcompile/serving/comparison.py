"""An uncached picture and a cached one: how they differ, and what the page says about it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dcompile.serving.pictures import PARTIAL, REFRESH, REUSE, UNCACHED, psnr
from dcompile.serving.worker import Made

SHOWN_SIDE = 512  # pixels: smaller pictures are shown larger
LARGEST_GAIN = 32
_CLOSE = 0.95  # of the speed-up asked for
# What a step ran -> its letter in the strip, and what it means.
KINDS = {
    REFRESH: ("F", "refresh: the full network ran, and its features were kept"),
    PARTIAL: ("P", "partial: some of the kept features were computed again"),
    REUSE: ("R", "reuse: only the outer layers ran, on kept features"),
    UNCACHED: ("U", "uncached: the full network ran, and nothing was kept"),
}

_Pixels = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Comparison:
    """Two pictures of the same seed.

    Attributes:
        uncached, cached: what was made.
        aim: FLOPs speed-up that was asked for; None if none was.
    """

    uncached: Made
    cached: Made
    aim: float | None = None

    def images(self) -> tuple[Image.Image, Image.Image]:
        """Both, decoded."""
        return decoded(self.uncached.content), decoded(self.cached.content)

    def speedups(self) -> tuple[float, float]:
        """Measured, of the denoiser and in all."""
        before, after = self.uncached.trace, self.cached.trace
        return (
            _ratio(before["seconds"]["denoise"], after["seconds"]["denoise"]),
            _ratio(total(before), total(after)),
        )


def decoded(content: bytes) -> Image.Image:
    """A picture from a file's content."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def total(trace: dict[str, Any]) -> float:
    """Seconds of a whole run, without the wait for its turn."""
    return float(sum(trace["seconds"].values()))


def difference(first: Image.Image, second: Image.Image) -> tuple[Image.Image, int]:
    """The absolute difference, brightened so that it can be seen, and how many times.

    The gain is the largest power of two, up to 32, that leaves 99 % of the values as they are,
    and not cut off at white.

    Raises:
        ValueError: they are not of one size.
    """
    values = np.abs(_difference(first, second))
    high = float(np.percentile(values, 99)) or float(values.max())
    gain = 1
    while high and gain < LARGEST_GAIN and 2 * gain * high <= 255:
        gain *= 2
    return Image.fromarray(np.minimum(values * gain, 255).astype(np.uint8)), gain


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """A small picture with every pixel as a square of several, so that it does not blur."""
    factor = side // max(image.size)
    if factor < 2:
        return image
    width, height = image.size
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _difference(first: Image.Image, second: Image.Image) -> _Pixels:
    if first.size != second.size:
        raise ValueError(f"expected pictures of one size, got {first.size} and {second.size}")
    one, other = (np.asarray(image.convert("RGB"), np.int16) for image in (first, second))
    return one - other


def _ratio(before: float, after: float) -> float:
    return before / after if after > 0 else math.inf


# HTML ---------------------------------------------------------------------------------------------


def summary(comparison: Comparison) -> str:
    """The numbers of both runs, as HTML."""
    denoiser, whole = comparison.speedups()
    before, after = comparison.uncached.trace, comparison.cached.trace
    noise = psnr(*comparison.images())
    close = "identical" if math.isinf(noise) else f"{noise:.1f} dB"
    cards = (
        ("speedup", f"{whole:.2f}×", "faster, whole picture"),
        ("psnr", close, "PSNR, higher is closer"),
        ("flops", f"{after['flops_speedup']:.2f}×", "less computing in the denoiser (FLOPs)"),
    )
    tiles = "".join(
        f'<div class="dc-tile" data-name="{name}"><b>{value}</b><span>{text}</span></div>'
        for name, value, text in cards
    )
    rows = (
        ("Denoiser", before["seconds"]["denoise"], after["seconds"]["denoise"], denoiser),
        ("Whole picture", total(before), total(after), whole),
    )
    lines = "".join(
        f'<tr><th scope="row" class="dc-name">{name}</th>'
        f"<td>{seconds(one)}</td><td>{seconds(other)}</td><td>{ratio:.2f}×</td></tr>"
        for name, one, other, ratio in rows
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Uncached", "Cached", "Speed-up"))
    table = f'<table class="dc-times"><tr><td></td>{heads}</tr>{lines}</table>'
    return f'<div class="dc-tiles">{tiles}</div>{table}{_remarks(comparison)}'


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _remarks(comparison: Comparison) -> str:
    """What to know about the numbers."""
    trace = comparison.cached.trace
    found = [*dict.fromkeys((*comparison.uncached.notes, *comparison.cached.notes))]
    if compiling := trace.get("compile_seconds", 0):
        found.append(
            f"The cached time includes {seconds(compiling)} of compiling. "
            "Compare again for the time without it."
        )
    reached = trace["flops_speedup"]
    if comparison.aim is not None and reached < _CLOSE * comparison.aim:
        found.append(
            f"{comparison.aim:g}× less computing was asked for, {reached:.2f}× is what this model "
            "reaches with these steps."
        )
    if trace["forced"]:
        found.append(f"{trace['forced']} full steps were not in the schedule.")
    found += [
        f"{count} calls of the cached run ran uncached: {why}."
        for why, count in trace["uncached_reasons"].items()
    ]
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<ul class="dc-remarks">{items}</ul>' if items else ""


def strips(comparison: Comparison) -> str:
    """What each step of both runs ran, with a legend, as HTML."""
    before, after = comparison.uncached.trace["steps"], comparison.cached.trace["steps"]
    found = [kind for kind in KINDS if kind in {*before, *after}]
    legend = "".join(
        f'<li><span class="dc-cell dc-{kind}" aria-hidden="true">{KINDS[kind][0]}</span> '
        f"{KINDS[kind][1]}</li>"
        for kind in found
    )
    return (
        f"{strip('Uncached', before)}{strip('Cached', after)}"
        f'<ul class="dc-legend" aria-label="What the letters mean">{legend}</ul>'
    )


def strip(title: str, steps: Sequence[str]) -> str:
    """What each step of a run ran, as a list in HTML, each cell with a letter and a text.

    Args:
        title: for people; any text.
        steps: see ``Trace.levels``; unknown ones are shown as "?".
    """
    cells = "".join(_cell(number, kind) for number, kind in enumerate(steps, 1))
    name = escape(title)
    return (
        f'<h4 class="dc-run">{name} run, {escape(counted(steps))}</h4>'
        f'<ol class="dc-strip" role="list" aria-label="{name}, step by step">{cells}</ol>'
    )


def _cell(number: int, kind: str) -> str:
    letter, known = (KINDS[kind][0], kind) if kind in KINDS else ("?", "unknown")
    text = f"Step {number}: {escape(kind)}"
    return (
        f'<li class="dc-cell dc-{known}" title="{text}"><span aria-hidden="true">{letter}</span>'
        f'<span class="dc-hidden">{text}</span></li>'
    )


def counted(steps: Sequence[str]) -> str:
    """Such as "20 steps: 7 refresh, 13 reuse"."""
    kinds = [*dict.fromkeys(steps)]
    parts = ", ".join(f"{list(steps).count(kind)} {kind}" for kind in kinds)
    noun = "step" if len(steps) == 1 else "steps"
    return f"{len(steps)} {noun}: {parts}" if kinds else "no steps"


def refusal(text: str) -> str:
    """Why there is no picture, as HTML that is read aloud."""
    return f'<p class="dc-refusal" role="alert">{escape(text)}</p>'


def progress(title: str, done: int, steps: int) -> str:
    """How far a run is, as HTML; ``done`` of 0 means that it has not begun."""
    name = escape(title)
    state = f"step {done} of {steps}" if done else "waiting for its turn, or compiling"
    value = f'value="{done}" ' if done else ""
    return (
        f'<p class="dc-progress"><span>{name}: {state}</span>'
        f'<progress {value}max="{steps}" aria-label="{name}"></progress></p>'
    )
