"""The tables of ``dcompile bench``: each fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dcompile.cli.bench_result import MEASURED, NETWORK, BenchResult, BenchRow
from dcompile.cli.demo import counted, one_line
from dcompile.cli.tables import empty_table

KIBIBYTE, MEBIBYTE = 2**10, 2**20
LEAST_SHOWN = 0.5  # seconds of compiling; less may be noise


def bench_tables(result: BenchResult) -> Group:
    """Times in one table, pictures and memory in another; what columns mean, and what to notice."""
    return Group(
        *(Text(line, style=style) for line, style in _heading(result)),
        _speed_table(result),
        _cost_table(result),
        *(Text(line, style="dim") for line in _legend(result)),
        *(Text(line, style=style) for line, style in _remarks(result)),
    )


def _heading(result: BenchResult) -> Iterator[tuple[str, str]]:
    settings, device = result.settings, result.device
    noun = "sample" if result.kind == NETWORK else "picture"
    title = f"{result.model}: {counted(settings.pictures, noun)}"
    title += f", {counted(settings.steps, 'step')}"
    if len(set(result.prompts)) == 1:
        title += f', "{one_line(result.prompts[0])}"'
    yield title, "bold"
    threads = f", {counted(device['threads'], 'thread')}" if "threads" in device else ""
    yield f"{device['name']}{threads}, {result.dtype}, torch {result.versions['torch']}", "dim"
    runs = counted(max(row.runs for row in result.rows), "run")
    yield (
        f"{result.sampler}, same seeds, cut at depth {settings.depth} (r = {result.ratio:.3f}), "
        f"{runs} of each way",
        "dim",
    )


def _speed_table(result: BenchResult) -> Table:
    columns = ("steps/s", "step\nms", "refresh\nms", "reuse\nms", "vs un-\ncached", "vs\nN=1")
    table = empty_table(*columns, "limit", "of\nlimit", name="way")
    for row in result.rows:
        status = row.status.replace(" ", "\n")  # for a narrow column
        table.add_row(
            row.way,
            _digits(row.steps_per_second) if row.status == MEASURED else status,
            _digits(row.step_ms),
            _digits(row.refresh_ms),
            _digits(row.reuse_ms),
            _number(row.over_uncached, "[bold]{:.2f}×[/bold]"),
            _number(row.over_backend, "{:.2f}×"),
            _number(row.speed_limit if row.interval != 1 else None, "{:.2f}×"),
            _number(row.of_limit, "{:.0%}"),
        )
    return table


def _cost_table(result: BenchResult) -> Table:
    draws, on_cuda = result.kind != NETWORK, _on_cuda(result)
    columns = (
        *(("PSNR\ndB", "SSIM") if draws else ()),
        *(("peak\nMiB", "vs un-\ncached") if on_cuda else ()),
        *("cached\nKiB", "compile\ns", "refresh\nsteps", "reuse\nsteps"),
    )
    table = empty_table(*columns, name="way")
    for row in result.rows:
        if row.status != MEASURED:
            continue
        psnr = "∞" if row.identical else _number(row.psnr, "{:.1f}")
        pictures = (psnr, _number(row.ssim, "{:.3f}"))
        peak = None if row.peak_reserved_bytes is None else row.peak_reserved_bytes / MEBIBYTE
        peaks = (_number(peak, "{:,.0f}"), _number(row.memory_over_uncached, "{:.2f}×"))
        cached = None if row.cached_bytes is None else row.cached_bytes / KIBIBYTE
        table.add_row(
            row.way,
            *(pictures if draws else ()),
            *(peaks if on_cuda else ()),
            _number(cached, "{:,.0f}"),
            _compile_seconds(row),
            _number(row.refresh_steps, "{}"),
            _number(row.reuse_steps, "{}"),
        )
    return table


def _legend(result: BenchResult) -> Iterator[str]:
    yield "step: network, guidance and sampler, mean of a run. refresh, reuse: medians."
    yield "vs N=1: over the same backend, refreshing at every step."
    yield "limit: N / (1 + (N - 1) r), with r in FLOPs. of limit: vs N=1, as a share of it."
    if result.kind != NETWORK:
        yield "PSNR, SSIM: against the uncached pictures of the same seeds; ∞: identical."
    if _on_cuda(result):
        yield "peak: reserved on the device, with weights and pools of CUDA graphs."
    yield "cached: features kept between steps. steps: calls in all timed runs."
    yield (
        f"compile: at the first run; –: under {LEAST_SHOWN} s. "
        f"Capturing took {result.capture_seconds:.1f} s, for all rows."
    )


def _remarks(result: BenchResult) -> Iterator[tuple[str, str]]:
    for text in result.remarks:
        yield f"note: {text}", ""
    ways: dict[str, list[str]] = {}
    for row in result.rows:
        reason = () if row.reason is None else (f"{row.status}: {row.reason}",)
        for text in (*reason, *row.notices):
            ways.setdefault(text, []).append(row.way)
    for text, names in ways.items():  # what several rows have in common is said once
        yield f"{', '.join(names)}: {text}", "yellow"


def _on_cuda(result: BenchResult) -> bool:
    return bool(result.device["type"] == "cuda")


def _compile_seconds(row: BenchRow) -> str:
    seconds = row.compile_seconds
    return "–" if seconds is None or seconds < LEAST_SHOWN else f"{seconds:.1f}"


def _digits(value: float | None) -> str:
    """At least three digits."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
