"""Backends: a functional graph and example inputs become a callable.

``eager`` is the reference: it runs the FX graph and equals the module bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.fx import GraphModule

from dcompile.backends.eager import Eager
from dcompile.backends.inductor import Inductor
from dcompile.backends.torch_registry import FromTorch, registered_names
from dcompile.errors import BackendError

GraphCompiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class Backend(Protocol):
    """What the rest of dcompile needs of a backend.

    Attributes:
        name: for messages.
        bakes_weights: weights are attributes of the graphs it gets instead of inputs, and it may
            fold them into its code. Such a program is compiled again when a weight has changed.
        needs_examples: it looks at example inputs when it compiles.
        records_cuda_graphs: it records CUDA graphs itself, so nobody else must.
    """

    @property
    def name(self) -> str: ...

    @property
    def bakes_weights(self) -> bool: ...

    @property
    def needs_examples(self) -> bool: ...

    @property
    def records_cuda_graphs(self) -> bool: ...

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph for inputs like these; call the result with such inputs."""
        ...


def resolve(backend: str | GraphCompiler, options: Mapping[str, Any] | None) -> Backend:
    """The backend of a name, or around a callable ``(graph_module, inputs) -> callable``.

    Raises:
        BackendError: unknown name (the message lists the known ones), or options given to a
            backend that takes none.
    """
    if backend == "inductor":
        return Inductor(dict(options or {}))
    if options:
        raise BackendError(
            f"options are settings of Inductor, and backend {backend!r} takes none: got "
            f"{', '.join(options)}"
        )
    if backend == "eager":
        return Eager()
    if callable(backend):
        return FromTorch(getattr(backend, "__name__", type(backend).__name__), backend)
    known = registered_names()
    if isinstance(backend, str) and backend in known:
        from torch._dynamo.backends.registry import lookup_backend

        return FromTorch(backend, lookup_backend(backend))
    names = ", ".join(dict.fromkeys(["eager", "inductor", *known]))
    raise BackendError(
        f"unknown backend {backend!r}; known are {names}, and any callable "
        "(graph_module, example_inputs) -> callable"
    )


__all__ = ["Backend", "GraphCompiler", "resolve"]
