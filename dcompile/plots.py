"""Pictures of what was measured, through matplotlib."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcompile.errors import DcompileError

if TYPE_CHECKING:
    from dcompile.profiling import Profile
    from dcompile.tuning import Trial, Tuned

DPI = 110
COLUMNS = 5  # of heatmaps
BLUE, GREY, ORANGE = "#1d4ed8", "#64748b", "#ea580c"


def require_matplotlib(file: str | os.PathLike[str] | None = None) -> None:
    """Complain before the work rather than after it.

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


def plot_tuned(tuned: Tuned, file: str | os.PathLike[str]) -> Path:
    """All that was tried, PSNR over speed-up; see ``Tuned.plot``."""
    figure = _figure(8.0, 5.2)
    axis = figure.subplots()
    shown = [trial for trial in tuned.trials if math.isfinite(trial.psnr)]

    def place(trials: list[Trial]) -> tuple[list[float], list[float]]:
        return [t.speedup for t in trials], [t.psnr for t in trials]

    deepcache = [t for t in shown if t.interval is not None]
    others = [t for t in shown if t.interval is None]
    several = [t for t in others if t.outer]
    if several:
        axis.scatter(
            *place(several), marker="*", s=60, color=BLUE, alpha=0.45, label="tried, several cuts",
        )  # fmt: skip
    depths = sorted({t.depth for t in shown if not t.outer})
    for depth, marker in zip(depths, "os^DvPX" * len(depths), strict=False):
        axis.scatter(
            *place([t for t in others if t.depth == depth and not t.outer]),
            marker=marker, s=26, color=BLUE, alpha=0.45, label=f"tried, depth {depth}",
        )  # fmt: skip
        mine = [t for t in deepcache if t.depth == depth]
        if mine:
            axis.scatter(
                *place(mine), marker=marker, s=34, facecolors="none", edgecolors=GREY,
                label=f"DeepCache, depth {depth}",
            )  # fmt: skip
    for trial in deepcache:
        axis.annotate(
            f"N={trial.interval}", (trial.speedup, trial.psnr), color=GREY,
            fontsize=8, xytext=(5, -9), textcoords="offset points",
        )  # fmt: skip
    axis.step(*place(front(shown)), where="pre", color=BLUE, linewidth=1.2, label="Pareto front")
    if math.isfinite(tuned.psnr):
        axis.scatter(
            [tuned.speedup], [tuned.psnr], marker="o", s=150, facecolors="none",
            edgecolors=ORANGE, linewidths=2, label="chosen",
        )  # fmt: skip
    axis.set_title(f"{tuned.network[0]}, {tuned.steps} steps: {len(tuned.trials)} schedules tried")
    axis.set_xlabel("speed-up in FLOPs")
    axis.set_ylabel("PSNR against uncached, dB")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _save(figure, file)


def front(trials: list[Trial]) -> list[Trial]:
    """Those that no other beats in both speed-up and PSNR, the slowest first."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.speedup, -t.psnr)):
        if not found or trial.psnr > found[-1].psnr:
            found.append(trial)
    return found[::-1]


def plot_profile(profile: Profile, file: str | os.PathLike[str]) -> Path:
    """A heatmap for each depth, and how much features change; see ``Profile.plot``."""
    count = len(profile.depths)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = _figure(max(3.1 * columns + 1.0, 7.2), 3.1 * rows + 3.0)
    maps, below = figure.subfigures(2, 1, height_ratios=[3.1 * rows, 2.9])
    axes = maps.subplots(rows, columns, squeeze=False).flatten()
    least = min(float(depth.similarity.min()) for depth in profile.depths)
    for axis, depth in zip(axes, profile.depths, strict=False):
        image = axis.imshow(depth.similarity, vmin=least, vmax=1.0, cmap="viridis", origin="lower")
        axis.set_title(f"depth {depth.depth} (r = {depth.ratio:.3f})", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=8)
    axes[0].set_ylabel("step", fontsize=8)
    for axis in axes[count:]:
        axis.axis("off")
    maps.colorbar(image, ax=list(axes), label="cosine similarity", fraction=0.03)
    maps.suptitle(f"{profile.network}: deep features of one step against another's")
    axis = below.subplots()
    steps = range(1, profile.steps)
    for depth in profile.depths:
        axis.plot(steps, 100 * depth.change[1:], label=f"depth {depth.depth}", linewidth=1.3)
    axis.set_xlabel("step")
    axis.set_ylabel("change since the step before, %")
    axis.set_xlim(0, profile.steps)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    if profile.weights is not None:
        other = axis.twinx()
        share = profile.weights / profile.weights.sum()
        other.plot(range(profile.steps), 100 * share, color=GREY, linestyle=":", linewidth=1.5)
        other.set_ylabel("sampler's weight of an error, % (dotted)", color=GREY)
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
