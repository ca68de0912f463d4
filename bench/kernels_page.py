"""The page of bench/count_kernels.py: what it counted, held against its bars, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shapes import UNETS
from tables import verdict

NOT_YET = "not counted yet"
GRAPHS = ("shallow", "full")
LAYOUTS = {False: "contiguous", True: "channels-last"}

Row = Mapping[str, Any]


def key(shape: str, graph: str, channels_last: bool) -> str:
    """What the counts of one graph are kept under."""
    return f"{shape}, {graph} graph, {LAYOUTS[channels_last]} weights"


@dataclass(frozen=True)
class Bar:
    """What has to be reached with channels-last weights.

    Attributes:
        what: in words.
        graphs: shape and graph; the largest of their numbers counts.
        bound: at most that.
        unit: printed behind numbers.
        number: finds it in the counts of a graph.
    """

    what: str
    graphs: tuple[tuple[str, str], ...]
    bound: int
    unit: str
    number: Callable[[Row], int]

    def line(self, rows: Mapping[str, Row]) -> str:
        found = [rows.get(key(shape, graph, True)) for shape, graph in self.graphs]
        counted = [self.number(row) for row in found if row is not None]
        judged = f"{NOT_YET} |"
        if len(counted) == len(found):
            judged = f"{max(counted):,} {self.unit} | {verdict(max(counted) <= self.bound)}"
        return f"| {self.what} | <= {self.bound} {self.unit} | {judged} |"


def launches_and_calls(row: Row) -> int:
    return int(row["launches"] + sum(row["library"].values()))


BARS = (
    Bar(
        "weights transposed in any of the graphs, the most",
        tuple((shape, graph) for shape in UNETS for graph in GRAPHS),
        0,
        "bytes",
        lambda row: int(row["transposed_bytes"]),
    ),
    Bar("SD 1.5, shallow graph", (("sd15", "shallow"),), 38, "launches", launches_and_calls),
    Bar("SD 1.5, full graph", (("sd15", "full"),), 600, "launches", launches_and_calls),
)


def page(results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        results: content of the JSON file.
    """
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    made, rows = results["made_with"], results["rows"]
    yield "# Kernels of a step"
    yield ""
    yield (
        f"Counted by `bench/count_kernels.py`, without a GPU, in the code that Inductor generates "
        f"for dcompile's two graphs. An {made['card']} is pretended; nothing is run, and no number "
        f"here is a time. torch {made['torch']}, triton {made['triton']}, diffusers "
        f"{made['diffusers']}, {made['dtype']}, depth 0{', tiny networks' if made['tiny'] else ''}."
    )
    yield ""
    yield "With channels-last weights:"
    yield ""
    yield "| what | bar | counted | |"
    yield "| --- | --- | --- | --- |"
    for bar in BARS:
        yield bar.line(rows)
    for name, shape in UNETS.items():
        yield ""
        yield f"## {shape.title}"
        yield ""
        yield from _table(name, rows)
    yield ""
    yield (
        "Launches of a bar are Triton launches and library calls together. A library call (cuBLAS, "
        "cuDNN, flash attention) counts once; it may launch several kernels. Weights transposed: "
        "weights of convolutions that the graph copies to channels-last at every step, and the "
        "bytes that this reads and writes. Contiguous weights are as a network is loaded; "
        "channels-last ones are those of 2D convolutions after "
        "`weight.contiguous(memory_format=torch.channels_last)`. What differs from a real card: "
        "attention is flash attention, where PyTorch would choose among several; no kernel is "
        "autotuned, no matrix product padded, and SVD's constants are not folded."
    )


def _table(name: str, rows: Mapping[str, Row]) -> Iterator[str]:
    yield (
        "| graph | weights | Triton launches | of distinct kernels | library calls | together "
        "| library calls by kind | weights transposed | MB |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
    for graph in GRAPHS:
        for channels_last, layout in LAYOUTS.items():
            row = rows.get(key(name, graph, channels_last))
            cells = NOT_YET + " |" * 6 if row is None else _cells(row)
            yield f"| {graph} | {layout} | {cells} |"


def _cells(row: Row) -> str:
    library = ", ".join(f"{count} {kind.strip('_')}" for kind, count in row["library"].items())
    return (
        f"{row['launches']} | {row['kernels']} | {sum(row['library'].values())} | "
        f"{launches_and_calls(row)} | {library} | {row['transposes']} | "
        f"{row['transposed_bytes'] / 1e6:,.0f}"
    )
