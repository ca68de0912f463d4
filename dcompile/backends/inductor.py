"""Inductor without Dynamo, so without Dynamo's guards on every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from dcompile.errors import BackendError


@dataclass(frozen=True)
class Inductor:
    """TorchInductor on a functional graph.

    Attributes:
        options: Inductor settings (``torch._inductor.config``), e.g. ``{"max_autotune": True}``;
            ``{"freezing": True}`` folds weights into the code, which is fastest on CPUs, costs
            their memory again, and means compiling anew when a weight has changed.
    """

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = "inductor"
    needs_examples: bool = True

    def __post_init__(self) -> None:
        import torch._inductor.config as config

        unknown = [
            option for option in self.options if option.replace("-", "_") not in _known(config)
        ]
        if unknown:
            raise BackendError(
                f"Inductor has no option {', '.join(map(repr, unknown))}; "
                "`torch._inductor.list_options()` lists them"
            )

    @property
    def bakes_weights(self) -> bool:
        return bool(self.options.get("freezing", False))

    @property
    def records_cuda_graphs(self) -> bool:
        return bool(self.options.get("triton.cudagraphs", False))

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        patches = {option.replace("-", "_"): value for option, value in self.options.items()}
        if self.bakes_weights:
            # The standalone form lifts attributes to inputs and saves the artefact; frozen weights
            # are neither.
            from torch._inductor.compile_fx import compile_fx

            return cast(
                Callable[..., Any],
                compile_fx(graph_module, list(inputs), config_patches=patches),
            )
        fakes = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        fake_mode = _symbolic_mode(fakes)
        if fake_mode is None:
            artifact = torch._inductor.standalone_compile(
                graph_module,
                list(inputs),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": patches},
            )
        else:  # captured with dynamic sizes: keep their symbols, and what is known of them
            with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
                artifact = torch._inductor.standalone_compile(
                    graph_module,
                    fakes,
                    dynamic_shapes="from_tracing_context",
                    options={"config_patches": patches},
                )
        # CompiledArtifact.__call__ only passes its arguments on.
        return cast(Callable[..., Any], getattr(artifact, "_compiled_fn", artifact))


def _symbolic_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode whose symbols the sizes are, if any size is symbolic."""
    for value in values:
        if isinstance(value, FakeTensor) and any(
            isinstance(size, torch.SymInt) for size in value.shape
        ):
            return value.fake_mode
    return None


def _known(config: Any) -> frozenset[str]:
    return frozenset(config.get_config_copy())
