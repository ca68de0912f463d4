"""How much memory captured and compiled code takes: an estimate, to keep it within a budget."""

from __future__ import annotations

from collections.abc import Iterable

from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.program import CompiledGraph

DEFAULT_BUDGET = 2 * 2**30
# A node of a captured graph with its metadata, and its share of a compiled one. Measured: 75 MB for
# the 4,948 nodes of an SDXL-shaped network.
NODE_BYTES = 16 * 1024


def bytes_of_networks(networks: Iterable[CapturedNetwork]) -> int:
    """Of captured graphs, with the tensors that are constants of their code."""
    return sum(
        NODE_BYTES * len(network.graph_module.graph.nodes)
        + sum(constant.nbytes for constant in network.constants.values())
        for network in networks
    )


def bytes_of_graphs(graphs: Iterable[CompiledGraph]) -> int:
    """Of compiled graphs: weights that a backend has copied into its code."""
    return sum(graph.folded.nbytes for graph in graphs if graph.folded is not None)
