"""The page of the GPU suite: what bench/gpu.py measured, held against its bars, as Markdown.

python bench/gpu.py --page rewrites it from the JSON next to it; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shapes import GPU_SHAPES, TRANSFORMERS, UNETS

INTERVALS = (2, 3, 5)
NOT_YET = "not measured yet"

Results = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    Attributes:
        label: for tables.
        intervals: refresh intervals to measure, 1 where nothing is cached.
        uncached: the way that does the same without a cache: at interval 1.
        shapes: what it can run.
    """

    label: str
    intervals: tuple[int, ...]
    uncached: str = ""
    shapes: tuple[str, ...] = tuple(GPU_SHAPES)


WAYS = {
    "eager": Way("diffusers, eager", (1,)),
    "torch-compile": Way("torch.compile", (1,)),
    "torch-graphs": Way("torch.compile, CUDA graphs", (1,)),
    "torch-graphs-last": Way(
        "torch.compile, CUDA graphs, channels last", (1,), shapes=("sd15", "sdxl")
    ),
    "deepcache": Way("DeepCache package", INTERVALS, "eager", shapes=tuple(UNETS)),
    "cache-dit": Way("cache-dit", (3,), "eager", shapes=tuple(TRANSFORMERS)),
    "cache-dit-blocks": Way("cache-dit, blocks compiled", (3,), shapes=tuple(TRANSFORMERS)),
    "dcompile-eager": Way("dcompile, eager", (3,), "eager"),
    "dcompile-inductor": Way("dcompile, inductor", (1, 3), "dcompile-inductor"),
    "dcompile-graphs": Way("dcompile, inductor, CUDA graphs", (1, *INTERVALS), "dcompile-graphs"),
    "dcompile-regions": Way("dcompile, inductor by regions, CUDA graphs", (3,), "dcompile-graphs"),
    "dcompile-autotuned": Way(
        "dcompile, inductor, CUDA graphs, shallow graph max-autotune", (3,), "dcompile-graphs"
    ),
}


def ways_of(shape: str) -> dict[str, Way]:
    """Those that can run a shape."""
    return {name: way for name, way in WAYS.items() if shape in way.shapes}


def key(way: str, interval: int) -> str:
    """Where a shape's rows hold this way at this interval."""
    return f"{way}@{interval}"


@dataclass(frozen=True)
class ShapeResults:
    """What was measured of one shape; numbers are None where they are not known yet."""

    data: Mapping[str, Any]

    def row(self, way: str, interval: int = 1) -> Row | None:
        found: Row | None = self.data.get("rows", {}).get(key(way, interval))
        return found

    def value(self, way: str, interval: int, name: str) -> float | None:
        return (self.row(way, interval) or {}).get(name)

    def step_ms(self, way: str, interval: int = 1) -> float | None:
        return self.value(way, interval, "step_ms")

    def ratio(self) -> float | None:
        """r: FLOPs of a reuse step over those of a full one."""
        return self.data.get("ratio")

    def limit(self, interval: int) -> float | None:
        r = self.ratio()
        return None if r is None else interval / (1 + (interval - 1) * r)

    def speed_up(self, over: str, way: str, interval: int) -> float | None:
        return quotient(self.step_ms(over), self.step_ms(way, interval))

    def of_limit(self, way: str, interval: int) -> float | None:
        """Speed-up over the same way uncached, as a share of the speed limit."""
        uncached = WAYS[way].uncached
        if not uncached or interval == 1:
            return None
        return quotient(self.speed_up(uncached, way, interval), self.limit(interval))

    def reuse_of_flop_share(self, way: str, interval: int) -> float | None:
        """Time of a reuse step over r times a full step of the same way uncached."""
        if not WAYS[way].uncached:
            return None
        share = quotient(self.value(way, interval, "reuse_ms"), self.step_ms(WAYS[way].uncached))
        return quotient(share, self.ratio())

    def roofline(self, way: str, interval: int, tflops: float | None) -> float | None:
        """Share of the measured matrix rate that the network's own FLOPs reach."""
        limit, flops = self.limit(interval), self.data.get("flops")
        if limit is None or flops is None:
            return None
        reached = quotient(flops / limit / 1e9, self.step_ms(way, interval))  # TFLOP/s
        return quotient(reached, tflops)

    # What the bars are about.

    def over_package(self) -> float | None:
        """The least of all intervals that both were measured at, N=3 among them."""
        found = {
            n: quotient(self.step_ms("deepcache", n), self.step_ms("dcompile-graphs", n))
            for n in INTERVALS
        }
        if found[3] is None:
            return None
        return min(ratio for ratio in found.values() if ratio is not None)

    def over_blocks(self) -> float | None:
        """Over cache-dit with compiled blocks, at the same steps."""
        return quotient(self.step_ms("cache-dit-blocks", 3), self.step_ms("dcompile-graphs", 3))

    def compiling_by_regions(self) -> float | None:
        return quotient(
            self.value("dcompile-graphs", 3, "compile_seconds"),
            self.value("dcompile-regions", 3, "compile_seconds"),
        )

    def memory_over_uncached(self) -> float | None:
        return quotient(
            self.value("dcompile-graphs", 3, "peak_reserved_bytes"),
            self.value("torch-graphs", 1, "peak_reserved_bytes"),
        )


def quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


@dataclass(frozen=True)
class Bar:
    """What has to be reached.

    Attributes:
        what: in words.
        bound: the number.
        at_most: whether it is an upper bound; else a lower one.
        unit: printed behind numbers.
        measured: finds the number for a shape.
        shapes: those it is asked of.
    """

    what: str
    bound: float
    at_most: bool
    unit: str
    measured: Callable[[ShapeResults], float | None]
    shapes: tuple[str, ...] = tuple(GPU_SHAPES)

    def judged(self, shape: str, results: ShapeResults) -> str:
        if shape not in self.shapes:
            return "–"
        value = self.measured(results)
        if value is None:
            return NOT_YET
        reached = value <= self.bound if self.at_most else value >= self.bound
        return f"{value:.3g}{self.unit}, {'reached' if reached else '**missed**'}"


BARS = (
    Bar(
        "cached over uncached, inductor with CUDA graphs, N=3, as a share of N/(1+(N-1)r)",
        0.95,
        False,
        "",
        lambda s: s.of_limit("dcompile-graphs", 3),
    ),
    Bar(
        "inductor with CUDA graphs over diffusers eager, N=3",
        5,
        False,
        "x",
        lambda s: s.speed_up("eager", "dcompile-graphs", 3),
        shapes=("sd15",),
    ),
    Bar(
        "inductor with CUDA graphs over diffusers eager, N=3",
        4,
        False,
        "x",
        lambda s: s.speed_up("eager", "dcompile-graphs", 3),
        shapes=("sdxl",),
    ),
    Bar(
        "inductor with CUDA graphs over uncached torch.compile with CUDA graphs, N=3",
        2.4,
        False,
        "x",
        lambda s: s.speed_up("torch-graphs", "dcompile-graphs", 3),
        shapes=("sd15",),
    ),
    Bar(
        "inductor with CUDA graphs over uncached torch.compile with CUDA graphs, N=3",
        2.5,
        False,
        "x",
        lambda s: s.speed_up("torch-graphs", "dcompile-graphs", 3),
        shapes=("sdxl",),
    ),
    Bar(
        "inductor with CUDA graphs over the DeepCache package, the least of N=2, 3, 5",
        1.6,
        False,
        "x",
        ShapeResults.over_package,
        shapes=tuple(UNETS),
    ),
    Bar(
        "inductor with CUDA graphs over cache-dit with compiled blocks at the same steps, N=3",
        1.1,
        False,
        "x",
        ShapeResults.over_blocks,
        shapes=tuple(TRANSFORMERS),
    ),
    Bar(
        "compiling by regions: how many times faster",
        4,
        False,
        "x",
        ShapeResults.compiling_by_regions,
        shapes=("sdxl", *TRANSFORMERS),
    ),
    Bar(
        "host time of a reuse step with CUDA graphs, N=3",
        30,
        True,
        " us",
        lambda s: s.value("dcompile-graphs", 3, "host_us"),
    ),
    Bar(
        "peak memory with CUDA graphs, N=3, over uncached torch.compile with CUDA graphs",
        1.10,
        True,
        "x",
        ShapeResults.memory_over_uncached,
    ),
)


def page(results: Results) -> str:
    """The whole page; ``results`` may be empty."""
    shapes = {name: ShapeResults(results.get("shapes", {}).get(name, {})) for name in GPU_SHAPES}
    tflops = results.get("matrix_tflops")
    lines = ["# Compiled feature caching on a GPU", "", *heading(results), "", *bars_table(shapes)]
    for name, shape in GPU_SHAPES.items():
        lines += ["", f"## {shape.title}", "", *shape_table(name, shapes[name], tflops)]
    return "\n".join([*lines, "", *LEGEND, ""])


LEGEND = (
    "Times are medians of CUDA events over whole runs, after warming up; a mean step is the "
    "mean over a cycle of N steps. Of the limit: speed-up over the same way uncached (for the "
    "DeepCache package and dcompile eager: over diffusers eager) divided by N / (1 + (N - 1) r). "
    "Reuse over its FLOP share: time of a reuse step over r times the uncached step, 1 is ideal. "
    "Roofline: FLOPs of a mean step over its time, as a share of the measured matrix rate. Peak "
    "memory is what the allocator reserved, weights and CUDA graphs' pools included. Host: what a "
    "reuse call (an uncached one where nothing is cached) keeps the CPU for, while the GPU still "
    "works on what came before; in brackets how much of it CUDA calls take: copies of inputs, "
    "launching the graph, copies of results. Compiling: "
    "seconds of the first two calls, with empty caches, several networks at once; a dash where "
    "another row's are used. Eager ways are bound by the host, which launches kernel by kernel: "
    "where they exceed the limit, the uncached one waited for the host more than for the GPU.",
)


def heading(results: Results) -> list[str]:
    if not results:
        return [
            f"{NOT_YET[0].upper()}{NOT_YET[1:]}: `python bench/gpu.py` fills this page in on an "
            "NVIDIA GPU."
        ]
    card, versions = results["card"], results["versions"]
    about = [
        f"{card['name']}, {card['memory_gib']:.0f} GiB, driver {card['driver']}",
        f"CUDA {versions['cuda']}",
        f"torch {versions['torch']}",
        f"diffusers {versions['diffusers']}",
        f"{results['settings']['dtype']} unless a title says otherwise, random weights, depth 0",
        f"{results['date']}.",
    ]
    rate, tests = results.get("matrix_tflops"), results.get("tests")
    lines = [", ".join(about)]
    if results["settings"]["tiny"]:
        lines += ["", "**Tiny networks: a dry run, which says nothing about speed.**"]
    measured = NOT_YET if rate is None else f"{rate:.4g} TFLOP/s"
    lines += ["", f"Matrix rate, {results['settings']['matrix']}: {measured}. "]
    lines[-1] += f"GPU-marked tests: {NOT_YET if tests is None else tests['summary']}."
    for note in results.get("notes", ()):
        lines += ["", note]
    return lines


def bars_table(shapes: Mapping[str, ShapeResults]) -> list[str]:
    titles = [GPU_SHAPES[name].title.split(",")[0] for name in shapes]
    lines = [
        f"| what | bar | {' | '.join(titles)} |",
        f"| --- | --- |{' --- |' * len(titles)}",
    ]
    for bar in BARS:
        sign = "<=" if bar.at_most else ">="
        judged = [bar.judged(name, results) for name, results in shapes.items()]
        lines.append(f"| {bar.what} | {sign} {bar.bound:g}{bar.unit} | {' | '.join(judged)} |")
    return lines


COLUMNS = (
    "way",
    "N",
    "mean step, ms",
    "refresh",
    "reuse",
    "over eager",
    "over torch.compile, CUDA graphs",
    "of the limit",
    "reuse over its FLOP share",
    "roofline",
    "peak GiB",
    "host, us",
    "compiling, s",
)


def shape_table(title: str, shape: ShapeResults, tflops: float | None) -> list[str]:
    r, flops = shape.ratio(), shape.data.get("flops")
    if r is None or flops is None:
        facts = f"FLOPs and r: {NOT_YET}."
    else:
        limits = ", ".join(f"{shape.limit(n):.2f}x at N={n}" for n in INTERVALS)
        facts = f"{flops / 1e12:.4g} TFLOPs a step, r = {r:.4f}; the limit is {limits}."
    lines = [facts, "", f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for name, way in ways_of(title).items():
        for interval in way.intervals:
            cells = [way.label, str(interval), *way_cells(shape, name, interval, tflops)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def way_cells(shape: ShapeResults, way: str, interval: int, tflops: float | None) -> list[str]:
    row = shape.row(way, interval)
    if row is None or "failed" in row:
        reason = NOT_YET if row is None else f"failed: {row['failed']}".replace("|", "/")
        return [reason, *[""] * (len(COLUMNS) - 3)]
    memory = row.get("peak_reserved_bytes")
    return [
        number(row["step_ms"], "{:.3g}" if row["step_ms"] < 10 else "{:.1f}"),
        number(row.get("refresh_ms"), "{:.3g}"),
        number(row.get("reuse_ms"), "{:.3g}"),
        number(shape.speed_up("eager", way, interval), "{:.2f}x"),
        number(shape.speed_up("torch-graphs", way, interval), "{:.2f}x"),
        number(shape.of_limit(way, interval), "{:.1%}"),
        number(shape.reuse_of_flop_share(way, interval), "{:.2f}"),
        number(shape.roofline(way, interval, tflops), "{:.1%}"),
        number(None if memory is None else memory / 2**30, "{:.2f}"),
        host(row),
        number(row.get("compile_seconds"), "{:.1f}"),
    ]


def host(row: Row) -> str:
    parts = row.get("host_parts_us")
    return number(row.get("host_us"), "{:.0f}") + (
        f" ({', '.join(f'{part:.0f}' for part in parts)})" if parts else ""
    )


def number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
