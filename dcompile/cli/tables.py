"""The tables that commands print."""

from __future__ import annotations

import math

from rich import box
from rich.markup import escape
from rich.table import Table

from dcompile.cli.demo import DemoResult, Run
from dcompile.policy.tuned import Tuned
from dcompile.report.plots import pareto_front
from dcompile.tuning.profile import Profile


def empty_table(
    *numbers: str, title: str | None = None, caption: str | None = None, name: str | None = None
) -> Table:
    """An empty table: a column of names if ``name`` is its heading, then columns of numbers."""
    table = Table(
        title=title,
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # nine columns fit a terminal of 80
        caption=caption,
    )
    if name is not None:
        table.add_column(name, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def profile_table(found: Profile) -> Table:
    """How much features change, one row for each depth."""
    table = empty_table(
        *("depth", "r", "mean change", "largest", "at step", "3 apart"),
        title=f"{found.network}: change of deep features in {found.steps} steps",
        caption="change: since the step before, relative L2.  3 apart: least cosine similarity.",
    )
    for depth in found.depths:
        largest = int(depth.change.argmax())
        apart = depth.similarity.diagonal(min(3, found.steps - 1)).min()
        table.add_row(
            str(depth.depth),
            f"{depth.ratio:.3f}",
            f"{depth.change[1:].mean():.1%}",
            f"{depth.change[largest]:.1%}",
            str(largest),
            f"{apart:.3f}",
        )
    return table


def tuned_table(tuned: Tuned) -> Table:
    """The Pareto front of the schedules that were tried, and DeepCache's."""
    table = empty_table(
        *("speed-up", "PSNR", "refreshes", "depth", "forecast"),
        title=f"{tuned.network[0]}, {tuned.steps} steps: the best of {len(tuned.trials)} tried",
        caption="speed-up: in FLOPs.  PSNR (dB): against the uncached pictures.\n"
        "Several depths: the number of refreshes of each, the outermost first.",
        name="",
    )
    chosen = (tuned.levels, tuned.forecast)
    deepcache = [trial for trial in tuned.trials if trial.interval is not None]
    kept = {trial.key: trial for trial in (*pareto_front(tuned.trials), *deepcache)}
    for key, trial in sorted(kept.items(), key=lambda item: (item[1].speedup, item[1].psnr)):
        deep = "" if trial.interval is None else f"DeepCache, N={trial.interval}"
        name = "chosen" if key == chosen else deep
        table.add_row(
            name,
            f"{trial.speedup:.2f}×",
            "∞" if math.isinf(trial.psnr) else f"{trial.psnr:.1f}",
            " + ".join(str(len(steps)) for _, steps in trial.levels),
            ", ".join(str(depth) for depth, _ in trial.levels),
            trial.forecast,
            style="bold" if key == chosen else None,
        )
    return table


def demo_table(result: DemoResult) -> Table:
    """Time and fidelity, one row for each method."""
    table = empty_table(
        *("seconds", "speed-up", "limit", "reached", "PSNR", "SSIM", "refresh", "reuse"),
        title=f"{escape(result.title)}\n[dim]{escape(result.subtitle)}[/dim]",
        caption=(
            "limit: N / (1 + (N - 1) r), of the network alone. seconds: whole pipeline.\n"
            "PSNR (dB) and SSIM: against the uncached pictures."
        ),
        name="method",
    )
    for run in result.runs:
        table.add_row(run.method, f"{run.seconds:.2f}", *_comparison(run))
    return table


def _comparison(run: Run) -> list[str]:
    if run.interval is None:
        return ["1.00×", *"––––––"]
    return [
        f"[bold]{run.speed_up:.2f}×[/bold]",
        f"{run.speed_limit:.2f}×",
        f"{run.speed_up / run.speed_limit:.0%}",
        "∞" if math.isinf(run.psnr) else f"{run.psnr:.1f}",
        "–" if math.isnan(run.ssim) else f"{run.ssim:.3f}",
        str(run.refresh_steps),
        str(run.reuse_steps),
    ]
