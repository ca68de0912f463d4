"""Graph passes behind dcompile: pure ``torch.fx``, usable alone.

Nothing here knows of diffusers, devices, schedules or backends. A pass takes a functional
ATen ``GraphModule`` as ``torch.export`` makes it and returns another.

    skips = find_skip_connections(graph_module, sample="sample")
    full, shallow = split_at(graph_module, skips[0])
"""

from .base import GraphPass, PassError, PostconditionError, PreconditionError
from .canonicalize import Canonicalize
from .cost import Cost, node_cost, total_cost
from .cuts import Cut, find_cuts
from .forecast import with_forecast
from .hoist import find_step_invariant, mark_step_invariant, prologue_of, without_hoisted
from .probe import with_drift
from .regions import OutlineRegions
from .residual import ResidualCut, SkippedSegment, find_residual_cuts
from .skips import SkipConnection, find_skip_connections
from .split import SplitGraphs, split_at, split_levels, with_outputs

__all__ = [
    "Canonicalize",
    "Cost",
    "Cut",
    "GraphPass",
    "OutlineRegions",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "ResidualCut",
    "SkipConnection",
    "SkippedSegment",
    "SplitGraphs",
    "find_cuts",
    "find_residual_cuts",
    "find_skip_connections",
    "find_step_invariant",
    "mark_step_invariant",
    "node_cost",
    "prologue_of",
    "split_at",
    "split_levels",
    "total_cost",
    "with_drift",
    "with_forecast",
    "with_outputs",
    "without_hoisted",
]
