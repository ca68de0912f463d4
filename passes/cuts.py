"""All cuts of a network, of whichever kind."""

from __future__ import annotations

from typing import TypeAlias

from torch.fx import GraphModule

from .dataflow import Sample
from .residual import ResidualCut, find_residual_cuts
from .skips import SkipConnection, find_skip_connections

Cut: TypeAlias = SkipConnection | ResidualCut


def find_cuts(
    graph_module: GraphModule, sample: Sample = None
) -> list[SkipConnection] | list[ResidualCut]:
    """The cuts at a network's skip connections or along its residual stream, the one that saves
    most first.

    1. Cuts of a network are of one kind: each has to leave out part of what the next outer one
       leaves out, and depths of skip connections have to stay DeepCache's branch numbers.
    2. Skip connections, unless a reuse step at depth 0 takes less than half of their FLOPs with a
       residual cut. A fresh cache of a skip connection is exact bit for bit, and one tensor spans
       the whole network. In U-Nets, HunyuanDiT and U-ViT the long skips tear the stream, and a
       residual cut that saves as much has to cache a difference for each of many short pieces.
    3. The joint attention of a transformer concatenates what depends on the sample, too. Such a
       skip connection saves next to nothing, and the stream is cut.

    Args:
        graph_module, sample: see ``find_skip_connections``.

    Raises:
        PreconditionError: there is no placeholder of that name, or it is of another graph.
    """
    skips = find_skip_connections(graph_module, sample)
    residual = find_residual_cuts(graph_module, sample)
    if not residual or (skips and residual[0].ratio > skips[0].ratio / 2):
        return skips
    return residual
