"""Run the FX graph itself: the reference every other backend is held against."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule


@dataclass(frozen=True)
class Eager:
    """No compiler: the graph's generated Python code."""

    name: str = "eager"
    folds_weights: bool = False
    needs_examples: bool = False
    records_cuda_graphs: bool = False
    prefers_channels_last: bool = False

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # The generated forward, without nn.Module.__call__ around it.
        forward: Callable[..., Any] = graph_module.forward
        return forward

    def dump(self, run: Callable[..., Any]) -> dict[str, bytes]:
        """The graph as Python code, which is how FX pickles it."""
        graph_module = run.__self__  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        torch.save(GraphModule({}, graph_module.graph), buffer)
        return {"graph": buffer.getvalue()}

    def restore(self, files: Mapping[str, bytes]) -> Callable[..., Any]:
        """The callable of what ``dump`` returned."""
        graph_module = torch.load(io.BytesIO(files["graph"]), weights_only=False)
        forward: Callable[..., Any] = graph_module.forward
        return forward
