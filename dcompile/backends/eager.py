"""Run the FX graph itself: the reference every other backend is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule


@dataclass(frozen=True)
class Eager:
    """No compiler: the graph's generated Python code."""

    name: str = "eager"
    bakes_weights: bool = False
    needs_examples: bool = False
    records_cuda_graphs: bool = False

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # The generated forward, without nn.Module.__call__ around it.
        forward: Callable[..., Any] = graph_module.forward
        return forward
