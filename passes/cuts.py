"""All cuts of a network, of whichever kind."""

from __future__ import annotations

from typing import TypeAlias

from torch.fx import GraphModule, Node

from .residual import ResidualCut, find_residual_cuts
from .skips import SkipConnection, find_skip_connections

Cut: TypeAlias = SkipConnection | ResidualCut


def find_cuts(
    graph_module: GraphModule, sample: str | Node | None = None
) -> list[SkipConnection] | list[ResidualCut]:
    """The cuts at a network's skip connections or along its residual stream, the one that saves
    most first.

    1. Cuts of a network are of one kind: each has to leave out part of what the next outer one
       leaves out, and depths of skip connections have to stay DeepCache's branch numbers.
    2. If there are both kinds, the one that saves more FLOPs at depth 0 is taken: skip
       connections in U-Nets, HunyuanDiT and U-ViT, whose outermost cut spans the network, where
       the transformers inside of it, or chains of ResNet blocks, are streams of a few blocks.
    3. If both save the same, skip connections: a fresh cache is exact bit for bit.

    Args:
        graph_module, sample: see ``find_skip_connections``.

    Raises:
        PreconditionError: there is no placeholder of that name, or it is of another graph.
    """
    skips = find_skip_connections(graph_module, sample)
    residual = find_residual_cuts(graph_module, sample)
    if not residual or (skips and skips[0].ratio <= residual[0].ratio):
        return skips
    return residual
