"""``explain()``: where a network can be cut, and what that saves."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import Node

from dcompile.compiler.build import LITTLE_GAIN
from dcompile.compiler.capture import CapturedNetwork
from dcompile.passes import SkipConnection
from dcompile.passes.cost import tensor_sizes

INTERVALS = (2, 3, 5, 10)


@dataclass(frozen=True)
class DepthReport:
    """One depth of one network.

    Attributes:
        depth: what to pass to ``cache_compile``.
        module_path: the submodule that reads the skip connection; of a residual stream, the first
            block that a reuse step skips.
        boundary_shapes: shapes of the cached tensors.
        cache_bytes: their size, for one call.
        ratio: r, FLOPs of a reuse step over FLOPs of a refresh step.
        speed_limits: N -> highest possible speed-up, N / (1 + (N - 1) r).
    """

    depth: int
    module_path: str
    boundary_shapes: tuple[tuple[int, ...], ...]
    cache_bytes: int
    ratio: float
    speed_limits: dict[int, float]


@dataclass(frozen=True)
class CompanionReport:
    """What a companion of the denoiser, such as a ControlNet, computes on a reuse step.

    Attributes:
        network: name of its class.
        results, of: number of results it computes, and of all its results.
        ratio: FLOPs of computing them over FLOPs of computing all.
    """

    network: str
    results: int
    of: int
    ratio: float


@dataclass(frozen=True)
class Explanation:
    """All depths of a network: printable, a rich table, and plain data (``as_dict()``).

    Attributes:
        network: name of the network's class.
        chosen: depths of the cuts in use, the outermost first.
        flops: FLOPs of one uncached call.
        depths: one report for each depth, outermost first.
        companions: one report for each companion that took part in a reuse step.
        stream: it is cut along its residual stream, and not at skip connections.
        schedule: which steps refresh, a line for each kind of run.
    """

    network: str
    chosen: tuple[int, ...]
    flops: int
    depths: tuple[DepthReport, ...]
    companions: tuple[CompanionReport, ...] = ()
    stream: bool = False
    schedule: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(
            title=f"{self.network}: {self.flops / 2e9:,.4g} GMACs per call",
            caption="\n".join(self._notes()),
        )
        table.add_column("depth", justify="right")
        table.add_column("cut at", overflow="fold")
        table.add_column("cached")
        table.add_column("KiB", justify="right")
        table.add_column("r", justify="right")
        for interval in INTERVALS:
            table.add_column(f"N={interval}", justify="right")
        for row in self.depths:
            shapes = ", ".join("×".join(map(str, shape)) for shape in row.boundary_shapes)
            table.add_row(
                f"{'▸' if row.depth in self.chosen else ''}{row.depth}",
                row.module_path,
                shapes,
                f"{row.cache_bytes / 1024:,.0f}",
                f"{row.ratio:.3f}",
                *(f"{limit:.2f}×" for limit in row.speed_limits.values()),
                style="bold" if row.depth in self.chosen else "",
            )
        return table

    def _notes(self) -> list[str]:
        notes = [
            *self.schedule,
            "r: FLOPs of a reuse step over a full one. Speed limit: N / (1 + (N - 1) r).",
        ]
        if self.stream:
            notes.append(
                "Cut along the residual stream: a reuse step skips this block and all after it, "
                "and adds what they added at the latest refresh."
            )
        if len(self.chosen) > 1:
            notes.append("▸: cuts in use. A step that refreshes one refreshes all outer ones, too.")
        notes += [
            f"On a reuse step {one.network} computes {one.results} of {one.of} results, in "
            f"{one.ratio:.3f} of its FLOPs."
            for one in self.companions
        ]
        if self.depths and min(row.ratio for row in self.depths) > LITTLE_GAIN:
            notes.append(
                "Nearly all compute is outside every cut: caching will not make this faster."
            )
        return notes

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue().rstrip()


def explain(
    network: CapturedNetwork,
    chosen: tuple[int, ...],
    name: str,
    companions: tuple[CompanionReport, ...] = (),
    schedule: tuple[str, ...] = (),
) -> Explanation:
    """Report on every cut of a captured network.

    Args:
        network: the captured network.
        chosen: depths of the cuts in use, the outermost first.
        name: of the network's class.
        companions: what companions compute on a reuse step.
        schedule: which steps refresh.
    """
    cuts = network.cuts
    rows = tuple(
        DepthReport(
            depth=cut.depth,
            module_path=cut.module_path,
            boundary_shapes=tuple(tensor_sizes(value) for value in _tensors(cut.boundary)),
            cache_bytes=cut.cache_bytes,
            ratio=cut.ratio,
            speed_limits={interval: cut.speed_limit(interval) for interval in INTERVALS},
        )
        for cut in cuts
    )
    return Explanation(
        network=name,
        chosen=chosen,
        flops=cuts[0].full.flops if cuts else 0,
        depths=rows,
        companions=companions,
        stream=bool(cuts) and not isinstance(cuts[0], SkipConnection),
        schedule=schedule,
    )


def _tensors(nodes: tuple[Node, ...]) -> list[torch.Tensor]:
    values = [node.meta.get("val") for node in nodes]
    return [value for value in values if isinstance(value, torch.Tensor)]
