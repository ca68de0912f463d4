"""Graph passes behind dcompile: pure ``torch.fx``, usable alone.

Nothing here knows of diffusers, devices, schedules or backends. A pass takes a functional
ATen ``GraphModule`` as ``torch.export`` makes it and returns another.

    skips = find_skip_connections(graph_module, sample="sample")
    full, shallow = split_at(graph_module, skips[0])
"""

from passes.base import GraphPass, PassError, PostconditionError, PreconditionError
from passes.canonicalize import Canonicalize
from passes.cost import Cost, node_cost, total_cost
from passes.forecast import with_forecast
from passes.probe import with_drift
from passes.skips import SkipConnection, find_skip_connections
from passes.split import SplitGraphs, split_at, split_levels, with_outputs

__all__ = [
    "Canonicalize",
    "Cost",
    "GraphPass",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "SkipConnection",
    "SplitGraphs",
    "find_skip_connections",
    "node_cost",
    "split_at",
    "split_levels",
    "total_cost",
    "with_drift",
    "with_forecast",
    "with_outputs",
]
