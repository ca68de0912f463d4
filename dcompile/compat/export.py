"""torch.export and symbolic sizes. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dcompile.compat.tensors import is_wrapper


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode that the symbolic sizes among these tensors belong to; None if none has any."""
    for value in values:
        if isinstance(value, FakeTensor) and any(
            isinstance(size, torch.SymInt) for size in value.shape
        ):
            return value.fake_mode
    return None


def expression_of(size: torch.SymInt) -> Any:
    """A symbolic size as a sympy expression."""
    return size.node.expr


def shape_env_of(size: Any) -> Any:
    """What knows the conditions that tracing put on a symbolic size: its ``ShapeEnv``."""
    return size.node.shape_env


def conditions_of(shape_env: Any, tensors: Sequence[torch.Tensor]) -> str | None:
    """All conditions on the sizes of ``tensors``, as Python over ``L['t0']``, ``L['t1']``, ..."""
    conditions: str | None = shape_env.produce_guards_expression(list(tensors))
    return conditions


def traced_size(shape_env: Any, symbol: Any) -> int:
    """What a symbol was when the network was traced."""
    return int(shape_env.backed_var_to_val[symbol])


def traced_sizes(shape_env: Any) -> dict[Any, Any]:
    """What all symbols were when the network was traced."""
    return dict(shape_env.backed_var_to_val)


def bounds_of(shape_env: Any, symbol: Any) -> tuple[Any, Any]:
    """The least and greatest value of a symbol, as far as tracing found out; sympy numbers."""
    bounds = shape_env.var_to_range[symbol]
    return bounds.lower, bounds.upper


def guards_of(shape_env: Any) -> list[Any]:
    """The conditions that tracing recorded, as sympy expressions."""
    return [shape_env.replace(guard.expr) for guard in shape_env.guards]


def forget_examples(exported: ExportedProgram) -> None:
    """Break a circle of references through C++ that the garbage collector does not see.

    From a shape environment to the traced input, to the tensor that this is a view of, such as all
    timesteps, to the fake mode, to the shape environment: each export left some 0.2 MB behind.
    """
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            value.fake_mode.shape_env.tracked_fakes = []


def has_wrappers(exported: ExportedProgram) -> bool:
    """Whether inputs are made of several tensors. ``functionalized`` makes inputs of those.

    Else the graph reads them by operators that take nothing but such tensors.
    """
    inputs = exported.graph.find_nodes(op="placeholder")
    return any(
        isinstance(x := node.meta.get("val"), torch.Tensor) and is_wrapper(x) for node in inputs
    )


def functionalized(exported: ExportedProgram) -> ExportedProgram:
    """The program without operators that write to their arguments.

    ``run_decompositions`` also turns ``reshape`` into ``view`` where that was possible while
    tracing. Kernels may return other strides than the trace assumed (NCSN++ with torch 2.14 fails
    on that), so each ``view`` becomes a ``reshape``: the same where a view is possible.
    """
    exported = exported.run_decompositions({})
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    exported.graph_module.recompile()
    return exported


def is_higher_order(target: Any) -> bool:
    """Whether a graph node calls a subgraph (autocast regions, ``cond``, ...)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


capturing_threads: set[int] = set()
"""Those that export something. ``torch.compiler.is_compiling()`` is true in all meanwhile."""

one_at_a_time = threading.RLock()
"""Held while anything is traced. Whoever looks at modules that another thread may be tracing holds
it, too: they have tensors without values in their parameters' places."""

_ABSENT = object()


class ConsiderateTrace:
    """Keeps torch.export from disturbing other threads while it traces; one trace at a time.

    It turns oneDNN, NNPACK and cuDNN off for the whole process, and others would compute with other
    kernels meanwhile: slower, and not the same to the last bit. The operators of a graph are ATen's
    either way. It follows calls and attributes of modules in all threads, and both sides lose their
    way. It prints the graph so far when it fails. All that is replaced for the time of a trace, in
    ``torch.export._trace`` and in the tracer's class; what is not there is left alone.
    """

    KERNELS = "_ignore_backend_decomps"
    FOLLOWS = ("call_module", "getattr")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        trace: Any = importlib.import_module("torch.export._trace")
        tracer: Any = getattr(proxy_tensor, "_ModuleStackTracer", None)
        replacements: list[tuple[Any, str, Any]] = [(trace, "print", _print_nothing)]
        if hasattr(trace, self.KERNELS):
            replacements.append((trace, self.KERNELS, nullcontext))
        for name, otherwise in zip(self.FOLLOWS, (_call, _value), strict=True):
            if hasattr(tracer, name):
                mine = _only_in(threading.get_ident(), getattr(tracer, name), otherwise)
                replacements.append((tracer, name, mine))
        with one_at_a_time:
            before = [
                (owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in replacements
            ]
            for owner, name, replacement in replacements:
                setattr(owner, name, replacement)
            try:
                yield
            finally:
                for owner, name, own in before:
                    if own is _ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, own)


def _only_in(thread: int, follow: Any, otherwise: Any) -> Any:
    """A method of a tracer that does something in one thread and nothing in the others."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            return follow(self, *args, **kwargs)
        return otherwise(*args, **kwargs)

    return method


def _call(module: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _value(name: str, value: Any, parameter_proxies: Any) -> Any:
    return value


def _print_nothing(*values: Any, **settings: Any) -> None:
    pass


considerate_trace = ConsiderateTrace()
"""A context manager around an export."""


def depends_on_values(value: Any) -> bool:
    """Whether the size of a traced tensor depends on the values of others, as after ``nonzero``."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def class_of_input(spec: InputSpec) -> str:
    """What an input is that is no tensor, such as ``torch.Generator``."""
    name: str = getattr(spec.arg, "class_fqn", str(spec.kind))
    return name.replace("torch._C.", "torch.")
