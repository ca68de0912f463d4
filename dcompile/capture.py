"""A module and an example call become a functional ATen graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_unflatten

from dcompile.errors import CaptureError
from passes import Canonicalize
from passes.base import is_mutating

_PACKAGES = (Path(torch.__file__).parent, Path(__file__).parent)


@dataclass(frozen=True, eq=False)
class CapturedNetwork:
    """A network's graph, without its weights.

    Attributes:
        graph_module: functional and canonical; parameters, buffers and constants are inputs.
        parameters: placeholder -> fully qualified name of the parameter or buffer.
        constants: placeholder -> tensor that is part of the code, not of the state.
        inputs: placeholder -> position of the input among the call's leaves.
        sample: the placeholder of the noisy sample.
        out_spec: the structure of what the network returns.
        in_spec: the structure of the call.
        guard: for a dynamic capture, whether other tensors fit what the code took for granted.
    """

    graph_module: GraphModule
    parameters: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]
    sample: str
    out_spec: TreeSpec
    in_spec: TreeSpec
    guard: Callable[[Sequence[Any]], bool] | None = None

    def accepts(self, spec: TreeSpec, leaves: Sequence[Any]) -> bool:
        """Whether this graph, captured with ``dynamic``, is right for another call."""
        if self.guard is None or spec != self.in_spec:
            return False
        return self.guard(leaves)


class _Network(nn.Module):
    """The module with its own forward, whatever stands in that attribute now."""

    def __init__(self, network: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.training = network.training  # not .train(): that would reach into the network
        self.__dict__["_call"] = forward

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Two named parameters: torch.export mixes up dynamic sizes of *args, **kwargs.
        return self.__dict__["_call"](*args, **kwargs)


_PREFIX = "network."


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
    sample_leaf: int,
    dynamic: bool = False,
) -> CapturedNetwork:
    """Capture one call of ``forward``, the original forward of ``module``.

    Args:
        leaves, spec: the call's ``(args, kwargs)``, flattened by ``torch.utils._pytree``.
        sample_leaf: which of the leaves is the noisy sample.
        dynamic: let sizes vary as far as the network's code allows (``Dim.AUTO``).

    Raises:
        CaptureError: ``torch.export`` cannot follow the code; names the line.
    """
    args, kwargs = tree_unflatten(list(leaves), spec)
    network = _Network(module, forward)
    shapes = _all_sizes_vary(leaves, spec) if dynamic else None
    try:
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(
                network, (args, kwargs), dynamic_shapes=shapes, strict=False
            )
            if not _is_functional(exported.graph_module):
                exported = exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(_capture_message(module, error)) from error
    return _from_exported(exported, spec, sample_leaf, dynamic)


def _all_sizes_vary(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    def sizes(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim():
            return dict.fromkeys(range(value.dim()), Dim.AUTO)
        return None

    return tree_unflatten([sizes(leaf) for leaf in leaves], spec)


def _is_functional(graph_module: GraphModule) -> bool:
    """No operator writes to its arguments, and no part is tucked away in a subgraph."""
    return not any(
        is_mutating(node) or isinstance(node.target, torch._ops.HigherOrderOperator)
        for node in graph_module.graph.nodes
    )


def _from_exported(
    exported: ExportedProgram, in_spec: TreeSpec, sample_leaf: int, dynamic: bool
) -> CapturedNetwork:
    for output in exported.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            what = (output.target or "an input").removeprefix(_PREFIX)
            raise CaptureError(
                f"the network writes to {what} when it is called; a reuse step would leave that "
                "out. Compute it without changing state, or call the network uncached"
            )
    parameters: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: dict[str, int] = {}
    for spec in exported.graph_signature.input_specs:
        name = str(getattr(spec.arg, "name", ""))
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            parameters[name] = spec.target.removeprefix(_PREFIX)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            constants[name] = exported.constants[spec.target]
        elif spec.kind is InputKind.USER_INPUT:
            inputs[name] = len(inputs)
        else:
            raise CaptureError(
                f"the network takes {spec.arg} as {spec.kind}, which has no graph form"
            )
    sample = next(name for name, leaf in inputs.items() if leaf == sample_leaf)
    _strip_prefix(exported.graph_module)
    guard = _size_guard(exported, inputs) if dynamic else None
    graph_module = Canonicalize()(exported.graph_module).graph_module
    return CapturedNetwork(
        graph_module=graph_module,
        parameters=parameters,
        constants=constants,
        inputs=inputs,
        sample=sample,
        out_spec=exported.call_spec.out_spec,
        in_spec=in_spec,
        guard=guard,
    )


def _strip_prefix(graph_module: GraphModule) -> None:
    """Name submodules as the user does, without the wrapper they were captured in."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix(_PREFIX.rstrip(".")).removeprefix("."), kind)
            for key, (path, kind) in stack.items()
        }


def _size_guard(
    exported: ExportedProgram, inputs: dict[str, int]
) -> Callable[[Sequence[Any]], bool] | None:
    """Whether other inputs fit the sizes, divisibilities and constants seen while capturing."""
    examples: dict[int, Any] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        if str(node.target) in inputs:
            examples[inputs[str(node.target)]] = node.meta.get("val")
    tensors = [leaf for leaf, value in examples.items() if isinstance(value, torch.Tensor)]
    symbols = [
        size for leaf in tensors for size in examples[leaf].shape if isinstance(size, torch.SymInt)
    ]
    if not symbols:
        return None
    shape_env = symbols[0].node.shape_env
    expression = shape_env.produce_guards_expression([examples[leaf] for leaf in tensors])

    def fits(leaves: Sequence[Any]) -> bool:
        for leaf, example in examples.items():
            given = leaves[leaf]
            if not isinstance(example, torch.Tensor):
                if type(given) is not type(example) or given != example:
                    return False
            elif (
                given.dtype != example.dtype
                or given.device != example.device
                or given.dim() != example.dim()
                or given.is_contiguous() != example.is_contiguous()
                or any(
                    isinstance(size, int) and size != actual  # a constant of the graph
                    for size, actual in zip(example.shape, given.shape, strict=True)
                )
            ):
                return False
        return expression is None or bool(
            shape_env.evaluate_guards_expression(expression, [leaves[leaf] for leaf in tensors])
        )

    return fits


def _capture_message(module: nn.Module, error: Exception) -> str:
    where = _user_line(error)
    return (
        f"{type(module).__name__} cannot be captured as a graph"
        + (f": {where}" if where else "")
        + f"\n  {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        + "\nThe network still runs, uncached. A graph needs code whose path does not depend on "
        "tensor values: replace `if tensor:` and `.item()` by torch.where or by a Python argument, "
        "and remove hooks that move weights around. `torch.export.export(module, args, kwargs, "
        "strict=False)` shows the same error by itself."
    )


def _user_line(error: Exception) -> str:
    """The innermost line of code that belongs neither to torch nor to dcompile."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(package) for package in _PACKAGES)
        and not frame.filename.startswith("<")
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
