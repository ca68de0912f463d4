"""Any backend ``torch.compile`` knows, and any callable of its form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule


def registered_names() -> list[str]:
    """Names ``torch.compile(backend=...)`` accepts, debugging ones included."""
    names: list[str] = torch.compiler.list_backends(exclude_tags=())
    return sorted(names)


@dataclass(frozen=True)
class FromTorch:
    """A graph compiler ``(graph_module, example_inputs) -> callable``, as torch.compile takes."""

    name: str
    compiler: Callable[[GraphModule, list[Any]], Callable[..., Any]]
    folds_weights: bool = False
    needs_examples: bool = True
    prefers_channels_last: bool = False

    @property
    def records_cuda_graphs(self) -> bool:
        return self.name.startswith("cudagraphs")

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self.compiler(graph_module, list(inputs))
