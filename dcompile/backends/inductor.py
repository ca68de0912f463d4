"""Inductor without Dynamo, so without Dynamo's guards on every call."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch.fx import GraphModule

from dcompile.backends.accuracy import computes_the_same
from dcompile.compat import inductor
from dcompile.errors import BackendError
from dcompile.notices import warn
from dcompile.passes import OutlineRegions

_REGIONS = "regions"


@dataclass(frozen=True)
class Inductor:
    """TorchInductor on a functional graph.

    Attributes:
        options: Inductor settings (``torch._inductor.config``), e.g. ``{"max_autotune": True}``;
            ``{"freezing": True}`` folds weights into the code, which is fastest on CPUs, takes
            their memory once more, and means compiling again when a weight has changed.
            One option is dcompile's own: ``{"regions": True}`` compiles what recurs in a graph,
            such as the blocks of a transformer, once.
    """

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = "inductor"
    needs_examples: bool = True
    prefers_channels_last: bool = True

    def __post_init__(self) -> None:
        known = inductor.known_options()
        names = self.options.keys() - {_REGIONS}
        unknown = [option for option in names if option.replace("-", "_") not in known]
        if unknown:
            raise BackendError(
                f"Inductor has no option {', '.join(map(repr, unknown))}; "
                "`torch._inductor.list_options()` lists them"
            )
        if self.compiles_regions and self.folds_weights:
            raise BackendError(
                "options: regions and freezing exclude each other: regions that differ in nothing "
                "but their weights are compiled once, and freezing folds the weights into the code"
            )

    @property
    def folds_weights(self) -> bool:
        return bool(self.options.get("freezing", False))

    @property
    def compiles_regions(self) -> bool:
        """Whether what recurs in a graph is compiled once."""
        return bool(self.options.get(_REGIONS, False))

    @property
    def records_cuda_graphs(self) -> bool:
        return bool(self.options.get("triton.cudagraphs", False))

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        patches = {
            option.replace("-", "_"): value
            for option, value in self.options.items()
            if option != _REGIONS
        }
        if self.folds_weights:
            return inductor.compile_with_weights(graph_module, inputs, patches)
        if self.compiles_regions:
            outlined = OutlineRegions()(graph_module)
            if outlined.modified:
                called = inductor.call_regions(outlined.graph_module)
                artifact = inductor.compile_standalone(called, inputs, patches)
                # Few people compile subgraphs: it is worth one run of either.
                if computes_the_same(graph_module, inductor.callable_of(artifact), inputs):
                    return _noted(artifact)
                warn(
                    "options={'regions': True}: Inductor's code for the regions of a graph of "
                    f"{len(graph_module.graph.nodes)} nodes computes something else than the "
                    "graph; it is compiled as a whole instead"
                )
        return _noted(inductor.compile_standalone(graph_module, inputs, patches))

    def dump(self, run: Callable[..., Any]) -> dict[str, bytes]:
        """What ``restore`` needs: Inductor's own artefact, and the C++ kernels it loads.

        Raises:
            RuntimeError: Inductor kept nothing of this graph that could be saved.
        """
        artifact = _artifacts.get(run)
        if artifact is None:
            raise RuntimeError("Inductor's caches are switched off, or cannot hold this graph")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph"
            artifact.save(path=str(file))
            kernels = inductor.kernels_loaded_by(file)
            return {"graph": file.read_bytes(), **kernels}

    def restore(self, files: Mapping[str, bytes]) -> Callable[..., Any]:
        """The callable of what ``dump`` returned, without compiling."""
        for name, content in files.items():
            if name != "graph":
                inductor.put_into_cache(name, content)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph"
            file.write_bytes(files["graph"])
            run = _noted(inductor.load_artifact(file))
        _artifacts[run] = _Restored(files["graph"])
        return run


class _Restored(NamedTuple):
    """An artefact that came from a file."""

    content: bytes

    def save(self, *, path: str) -> None:
        Path(path).write_bytes(self.content)


# Callables that can be saved, and what saves them.
_artifacts: weakref.WeakKeyDictionary[Callable[..., Any], Any] = weakref.WeakKeyDictionary()


def _noted(artifact: Any) -> Callable[..., Any]:
    """The artefact's callable; what can be saved of it is kept as long as the callable lives."""
    run = inductor.callable_of(artifact)
    saveable = inductor.saveable_part(artifact)
    if saveable is not None:
        _artifacts[run] = saveable
    return run
