"""Plots of measurements with matplotlib. The data they draw are protocols."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dcompile.errors import DcompileError

DPI = 110
COLUMNS = 5  # of heatmaps
BLUE, GREY, ORANGE = "#1d4ed8", "#64748b", "#ea580c"


class Point(Protocol):
    """A schedule that was tried, as ``policy.tuned.Trial`` has it."""

    @property
    def speedup(self) -> float: ...
    @property
    def psnr(self) -> float: ...
    @property
    def depth(self) -> int: ...
    @property
    def interval(self) -> int | None: ...
    @property
    def outer(self) -> Sequence[Any]: ...


class DepthCurves(Protocol):
    """Similarity (steps, steps) and change (steps,) of one depth's boundary."""

    @property
    def depth(self) -> int: ...
    @property
    def ratio(self) -> float: ...
    @property
    def similarity(self) -> np.ndarray[Any, Any]: ...
    @property
    def change(self) -> np.ndarray[Any, Any]: ...


P = TypeVar("P", bound=Point)


def require_matplotlib(file: str | os.PathLike[str] | None = None) -> None:
    """Check before the work, not after it, that matplotlib can write a file.

    Args:
        file: checked by its suffix; None checks only that matplotlib is installed.

    Raises:
        DcompileError: it is not installed, or does not write files of that kind.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DcompileError('plots need matplotlib: pip install "dcompile[plots]"') from error
    if file is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    kinds, kind = FigureCanvasBase.get_supported_filetypes(), Path(file).suffix[1:].lower()
    if kind not in kinds:
        raise DcompileError(
            f"cannot write {file}: expected a picture's name, such as {Path(file).stem}.png"
        )


def plot_trials(
    trials: Sequence[Point], chosen: tuple[float, float], title: str, file: str | os.PathLike[str]
) -> Path:
    """PSNR over speed-up of all schedules that were tried, with the Pareto front.

    Args:
        trials: the schedules; those with an ``interval`` are DeepCache's.
        chosen: speed-up and PSNR of the schedule to mark.
        title: title of the plot.
        file: where to write it, in the format of its suffix.

    Returns:
        The file's full path.

    Raises:
        DcompileError: matplotlib is not installed.
    """
    figure = _figure(8.0, 5.2)
    axis = figure.subplots()
    shown = [trial for trial in trials if math.isfinite(trial.psnr)]

    def xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [t.speedup for t in points], [t.psnr for t in points]

    deepcache = [t for t in shown if t.interval is not None]
    others = [t for t in shown if t.interval is None]
    several = [t for t in others if t.outer]
    if several:
        axis.scatter(
            *xy(several), marker="*", s=60, color=BLUE, alpha=0.45, label="tried, several cuts",
        )  # fmt: skip
    depths = sorted({t.depth for t in shown if not t.outer})
    for depth, marker in zip(depths, "os^DvPX" * len(depths), strict=False):
        axis.scatter(
            *xy([t for t in others if t.depth == depth and not t.outer]),
            marker=marker, s=26, color=BLUE, alpha=0.45, label=f"tried, depth {depth}",
        )  # fmt: skip
        mine = [t for t in deepcache if t.depth == depth]
        if mine:
            axis.scatter(
                *xy(mine), marker=marker, s=34, facecolors="none", edgecolors=GREY,
                label=f"DeepCache, depth {depth}",
            )  # fmt: skip
    for trial in deepcache:
        axis.annotate(
            f"N={trial.interval}", (trial.speedup, trial.psnr), color=GREY,
            fontsize=8, xytext=(5, -9), textcoords="offset points",
        )  # fmt: skip
    front = xy(pareto_front(shown))
    axis.step(*front, where="pre", color=BLUE, linewidth=1.2, label="Pareto front")
    if math.isfinite(chosen[1]):
        axis.scatter(
            *([value] for value in chosen), marker="o", s=150, facecolors="none",
            edgecolors=ORANGE, linewidths=2, label="chosen",
        )  # fmt: skip
    axis.set_title(title)
    axis.set_xlabel("speed-up in FLOPs")
    axis.set_ylabel("PSNR against uncached, dB")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _save(figure, file)


def pareto_front(trials: Sequence[P]) -> list[P]:
    """The Pareto front of speed-up and PSNR, the slowest first."""
    found: list[P] = []
    for trial in sorted(trials, key=lambda t: (-t.speedup, -t.psnr)):
        if not found or trial.psnr > found[-1].psnr:
            found.append(trial)
    return found[::-1]


def plot_profile(
    network: str,
    depths: Sequence[DepthCurves],
    gains: np.ndarray[Any, Any] | None,
    file: str | os.PathLike[str],
) -> Path:
    """A heatmap of similarity for each depth, and how much features change at each step.

    Args:
        network: name of the network's class.
        depths: one entry for each depth.
        gains: the sampler's error gain at each step, shape (steps,); None to omit it.
        file: where to write it, in the format of its suffix.

    Returns:
        The file's full path.

    Raises:
        DcompileError: matplotlib is not installed.
    """
    count, count_of_steps = len(depths), len(depths[0].change)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = _figure(max(3.1 * columns + 1.0, 7.2), 3.1 * rows + 3.0)
    maps, below = figure.subfigures(2, 1, height_ratios=[3.1 * rows, 2.9])
    axes = maps.subplots(rows, columns, squeeze=False).flatten()
    least = min(float(depth.similarity.min()) for depth in depths)
    for axis, depth in zip(axes, depths, strict=False):
        image = axis.imshow(depth.similarity, vmin=least, vmax=1.0, cmap="viridis", origin="lower")
        axis.set_title(f"depth {depth.depth} (r = {depth.ratio:.3f})", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=8)
    axes[0].set_ylabel("step", fontsize=8)
    for axis in axes[count:]:
        axis.axis("off")
    maps.colorbar(image, ax=list(axes), label="cosine similarity", fraction=0.03)
    maps.suptitle(f"{network}: deep features of one step against another's")
    axis = below.subplots()
    steps = range(1, count_of_steps)
    for depth in depths:
        axis.plot(steps, 100 * depth.change[1:], label=f"depth {depth.depth}", linewidth=1.3)
    axis.set_xlabel("step")
    axis.set_ylabel("change since the step before, %")
    axis.set_xlim(0, count_of_steps)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    if gains is not None:
        other = axis.twinx()
        share = gains / gains.sum()
        other.plot(range(count_of_steps), 100 * share, color=GREY, linestyle=":", linewidth=1.5)
        other.set_ylabel("sampler's error gain, % (dotted)", color=GREY)
        other.set_ylim(bottom=0)
    axis.legend(fontsize=8, ncols=5, loc="upper center")
    return _save(figure, file)


def _figure(width: float, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _save(figure: Any, file: str | os.PathLike[str]) -> Path:
    target = Path(file).expanduser().resolve()
    figure.savefig(target, dpi=DPI)
    return target
