"""Run the FX graph itself: the reference every other backend is held against."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from dcompile.compat.fx import source_of


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
        """The graph as Python source."""
        owner = run.__self__  # type: ignore[attr-defined]
        source = owner.source if isinstance(owner, _Restored) else source_of(owner)
        return {"graph": source.encode()}

    def restore(self, files: Mapping[str, bytes]) -> Callable[..., Any]:
        """The callable of what ``dump`` returned."""
        return _Restored(files["graph"].decode()).forward


class _Restored:
    """A graph of which there is only the source.

    Args:
        source: of a function ``forward(self, ...)`` that reads no attributes.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        names: dict[str, Any] = {}
        exec(compile(source, "<saved graph>", "exec"), names)  # what a saved program is
        self.forward: Callable[..., Any] = types.MethodType(names["forward"], self)
