"""torch.export and symbolic sizes. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols


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


_ABSENT = object()


class _ConsiderateTrace:
    """Keeps torch.export from disturbing others while it traces.

    It turns oneDNN, NNPACK and cuDNN off for the whole process, and other threads would compute
    with other kernels meanwhile: slower, and not the same to the last bit. The operators of a graph
    are ATen's either way. And it prints the graph so far when it fails. Both are replaced in
    ``torch.export._trace``; where it has no such names, nothing happens.
    """

    KERNELS = "_ignore_backend_decomps"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures = 0
        self._own: dict[str, Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        trace = getattr(sys.modules.get("torch.export._trace"), "__dict__", {})
        with self._lock:
            if not self._captures:
                self._own = {name: trace.get(name, _ABSENT) for name in (self.KERNELS, "print")}
                trace["print"] = _print_nothing
                if self.KERNELS in trace:
                    trace[self.KERNELS] = nullcontext
            self._captures += 1
        try:
            yield
        finally:
            with self._lock:
                self._captures -= 1
                if not self._captures:
                    for name, own in self._own.items():
                        if own is _ABSENT:
                            trace.pop(name, None)
                        else:
                            trace[name] = own


def _print_nothing(*values: Any, **settings: Any) -> None:
    pass


considerate_trace = _ConsiderateTrace()
"""A context manager: other threads' kernels stay as they are while this one traces, silently."""


def depends_on_values(value: Any) -> bool:
    """Whether the size of a traced tensor depends on the values of others, as after ``nonzero``."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def class_of_input(spec: InputSpec) -> str:
    """What an input is that is no tensor, such as ``torch.Generator``."""
    name: str = getattr(spec.arg, "class_fqn", str(spec.kind))
    return name.replace("torch._C.", "torch.")
