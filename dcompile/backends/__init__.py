"""Backends: a functional graph and example inputs become a callable.

``eager`` is the reference: it runs the FX graph and equals the module bit for bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.fx import GraphModule

from dcompile.backends.eager import Eager
from dcompile.backends.inductor import Inductor
from dcompile.backends.tensorrt import TensorRT
from dcompile.backends.torch_registry import FromTorch, registered_names
from dcompile.compat.dynamo import lookup_backend
from dcompile.errors import BackendError

GraphCompiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class Backend(Protocol):
    """What the rest of dcompile needs of a backend.

    Attributes:
        name: for messages.
        folds_weights: weights are attributes of the graphs it gets instead of inputs, and it may
            fold them into its code. Such a program is compiled again when a weight has changed.
        needs_examples: it looks at example inputs when it compiles.
        records_cuda_graphs: it records CUDA graphs itself, so nobody else must.
        prefers_channels_last: on a GPU it copies weights of convolutions at every step, unless
            they lie channels-last.
    """

    @property
    def name(self) -> str: ...

    @property
    def folds_weights(self) -> bool: ...

    @property
    def needs_examples(self) -> bool: ...

    @property
    def records_cuda_graphs(self) -> bool: ...

    @property
    def prefers_channels_last(self) -> bool: ...

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph for inputs like these; call the result with such inputs.

        Where the user gave ranges of sizes, the placeholder's ``meta["requested_sizes"]`` has them:
        dimension -> (least, greatest).
        """
        ...


@runtime_checkable
class Refittable(Protocol):
    """What a backend that bakes weights may return from ``compile``: code that takes other weights.

    Any callable may be returned; one without these is compiled again when a weight has changed.
    """

    def __call__(self, *inputs: Any) -> Any: ...

    def accepts(self, inputs: Sequence[Any]) -> bool:
        """Whether it was compiled for the sizes of these inputs, which come before any boundary."""
        ...

    def refit(self, graph_module: GraphModule) -> None:
        """Take the weights of this graph, which is otherwise the one it was compiled from.

        May raise anything; then it is compiled again.
        """
        ...


def resolve(backend: str | GraphCompiler, options: Mapping[str, Any] | None) -> Backend:
    """The backend of a name, or around a callable ``(graph_module, inputs) -> callable``.

    Raises:
        BackendError: unknown name (the message lists the known ones), an option the backend does
            not have, or a backend that is not installed.
    """
    if options is not None and not isinstance(options, Mapping):
        raise BackendError(f"options: expected a dict of settings, got {options!r}")
    if backend == "inductor":
        return Inductor(dict(options or {}))
    if backend == "tensorrt":
        return TensorRT(dict(options or {}))
    if options:
        raise BackendError(
            f"options are settings of inductor or tensorrt, and {backend!r} takes none: got "
            f"{', '.join(options)}"
        )
    if backend == "eager":
        return Eager()
    if callable(backend):
        return FromTorch(getattr(backend, "__name__", type(backend).__name__), backend)
    known = registered_names()
    if isinstance(backend, str) and backend in known:
        return FromTorch(backend, lookup_backend(backend))
    names = list(dict.fromkeys(["eager", "inductor", "tensorrt", *known]))
    alike = difflib.get_close_matches(str(backend), names, n=1)
    listed = ", ".join(name for name in names if "TESTING_ONLY" not in name)
    raise BackendError(
        f"unknown backend {backend!r}; {f'did you mean {alike[0]!r}? ' if alike else ''}"
        f"known are {listed}, and any callable (graph_module, example_inputs) -> callable"
    )


# Options of Inductor that only denoisers are compiled with: dcompile's own, and folding weights
# into code, which would not follow a change of them.
_FOR_DENOISERS = ("regions", "freezing")


def torch_compile_arguments(backend: Backend) -> dict[str, Any] | None:
    """Arguments of ``torch.compile`` for what runs beside a denoiser; None to compile nothing.

    TensorRT builds engines of denoisers only: the rest is Inductor's.
    """
    match backend:
        case Eager():
            return None
        case Inductor(options=options):
            others = {name: v for name, v in options.items() if name not in _FOR_DENOISERS}
            return {"backend": "inductor", "options": others or None}
        case FromTorch(compiler=compiler):
            return {"backend": compiler}
    return {"backend": "inductor"}


__all__ = ["Backend", "GraphCompiler", "Refittable", "resolve", "torch_compile_arguments"]
