"""A module and an example call become a functional ATen graph."""

from __future__ import annotations

import functools
import operator
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.utils._pytree import TreeSpec, tree_unflatten

from dcompile.compat.export import (
    capturing_threads,
    class_of_input,
    conditions_of,
    considerate_trace,
    depends_on_values,
    forget_examples,
    functionalized,
    has_wrappers,
    is_higher_order,
    shape_env_of,
)
from dcompile.compat.hooks import casts_in_graph, offload_hooks, other_cache, stateful_hooks
from dcompile.compiler.guards import SizeGuard, TensorPattern, autocast_dtype
from dcompile.compiler.sizes import DynamicSizes
from dcompile.compiler.weight_classes import WeightAttributes, remark_on
from dcompile.errors import CaptureError
from dcompile.passes import Canonicalize, Cut, find_cuts, mark_step_invariant
from dcompile.passes.base import is_mutating


def capturing_in_this_thread() -> bool:
    """Whether it is this thread that torch compiles or exports in, as far as can be known."""
    return not capturing_threads or threading.get_ident() in capturing_threads


_PACKAGES = (Path(torch.__file__).parent, Path(__file__).parents[1])  # torch and dcompile


@dataclass(frozen=True, eq=False)
class CapturedNetwork:
    """A network's graph, without its weights.

    Attributes:
        graph_module: functional and canonical; parameters, buffers and constants are inputs.
        parameters: placeholder -> fully qualified name of the parameter or buffer.
        constants: placeholder -> tensor that is part of the code, not of the state.
        constant_names: placeholder -> the attribute it was found in, or a made-up name.
        inputs: placeholder -> position of the input among the call's leaves.
        samples: the placeholders of the noisy sample: one, unless it is a list of tensors.
        hoisted: values that are the same at every step, marked in the graph (see
            ``passes.hoist``); empty if the timestep is unknown.
        out_spec: the structure of what the network returns.
        in_spec: the structure of the call.
        guard: for a dynamic capture, the calls it is right for.
        current_guard: makes the guard as it is known now: compiling may specialize sizes.
    """

    graph_module: GraphModule
    parameters: dict[str, str]
    constants: dict[str, torch.Tensor]
    constant_names: dict[str, str]
    inputs: dict[str, int]
    samples: tuple[str, ...]
    out_spec: TreeSpec
    in_spec: TreeSpec
    hoisted: tuple[Node, ...] = ()
    guard: SizeGuard | None = None
    current_guard: Callable[[], SizeGuard] | None = None

    @property
    def sample(self) -> str:
        """The placeholder of the sample, or of the first tensor of it."""
        return self.samples[0]

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """Where it can be cut: by depth, so that the cut that saves most comes first."""
        return list[Cut](find_cuts(self.graph_module, self.samples))

    def refresh_guard(self) -> None:
        """Take in what a compiler has specialized since the capture."""
        if self.current_guard is not None:
            object.__setattr__(self, "guard", self.current_guard())

    def accepts(self, spec: TreeSpec, leaves: Sequence[Any]) -> bool:
        """Whether this graph, captured with ``dynamic``, is right for another call."""
        return self.guard is not None and spec == self.in_spec and self.guard.fits(leaves)


class _Network(nn.Module):
    """The module with its own forward, whatever that attribute is now."""

    def __init__(self, network: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        if getattr(forward, "__self__", None) is network:
            # torch.export follows calls of the modules it is given, in whatever thread. Others
            # may call the network meanwhile; this one is called here only.
            network = _twin_of(network)
            forward = types.MethodType(forward.__func__, network)  # type: ignore[attr-defined]
        self.network = network
        self.training = network.training  # not .train(): that would reach into the network
        self.__dict__["_call"] = forward
        self.__dict__["_attributes"] = WeightAttributes(network)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Two named parameters: torch.export mixes up dynamic sizes of *args, **kwargs.
        self.__dict__["_attributes"].give()
        return self.__dict__["_call"](*args, **kwargs)


def _twin_of(module: nn.Module) -> nn.Module:
    """Another object with the same submodules, parameters and attributes."""
    twin = object.__new__(type(module))
    twin.__dict__ = {
        name: dict(value) if name in ("_modules", "_parameters", "_buffers") else value
        for name, value in module.__dict__.items()
    }
    return twin


def _take_over_writes(module: nn.Module, twin: Any, before: Mapping[str, Any]) -> None:
    """What the network's forward wrote to itself, such as a counter, it wrote to the twin.

    Args:
        before: the module's attributes before that.
    """
    for name, value in twin.__dict__.items():
        if name not in ("_modules", "_parameters", "_buffers") and (
            name not in before or value is not before[name]
        ):
            module.__dict__[name] = value


_PREFIX = "network."


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
    sample_leaves: tuple[int, ...],
    dynamic: DynamicSizes | None = None,
    timestep_leaf: int | None = None,
) -> CapturedNetwork:
    """Capture one call of ``forward``, the original forward of ``module``.

    What its code does besides computing happens here, too, with tensors that have no values: see
    ``side_effects``, and ``CaptureCache``, which undoes it.

    Args:
        leaves, spec: the call's ``(args, kwargs)``, flattened by ``torch.utils._pytree``.
        sample_leaves: which of the leaves are the noisy sample.
        dynamic: let these sizes vary as far as the network's code allows (``Dim.AUTO``). If the
            conditions on them are not understood, the sizes are fixed.
        timestep_leaf: which is the timestep; without it, nothing is hoisted.

    Raises:
        CaptureError: ``torch.export`` cannot follow the code; names the line.
    """
    refuse_hooks(module)
    # One tensor given twice would be one input.
    distinct = [
        leaf.clone() if isinstance(leaf, torch.Tensor) and _is_among(leaf, leaves[:i]) else leaf
        for i, leaf in enumerate(leaves)
    ]
    args, kwargs = tree_unflatten(distinct, spec)
    before = dict(module.__dict__)
    sample = sample_leaves[0]  # dynamic sizes are those of a sample that is one tensor
    network = _Network(module, forward)
    # Ranges let backends tune for them. Code that treats a size within the range specially makes
    # torch.export refuse the range; then it finds the widest one by itself.
    hints = [dynamic.of_call(leaves, spec, sample, b) for b in (True, False)] if dynamic else [None]
    capturing_threads.add(threading.get_ident())
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            casts_in_graph(module),
            considerate_trace(),
        ):
            exported = _exported(network, (args, kwargs), hints)
            if not _is_functional(exported.graph_module) or has_wrappers(exported):
                exported = functionalized(exported)
    except Exception as error:
        raise CaptureError(_capture_message(module, error)) from error
    finally:
        capturing_threads.discard(threading.get_ident())
        _take_over_writes(module, network.network, before)
    ranges = dynamic.ranges(sample, leaves[sample].dim()) if dynamic else None
    _require_known_sizes(exported, module)
    captured = _from_exported(exported, spec, sample_leaves, timestep_leaf, ranges)
    forget_examples(exported)
    if captured.guard is not None and not captured.guard.understood:
        # Conditions on sizes that nothing here can check: capture these sizes alone.
        return capture(module, forward, leaves, spec, sample_leaves, None, timestep_leaf)
    return captured


def refuse_hooks(module: nn.Module) -> None:
    """Refuse hooks that move the weights of one part after another, and other caches.

    Before any of them is disturbed.

    Raises:
        CaptureError: diffusers' group offload is on, or one of its caches.
    """
    other = other_cache(module)
    if other is not None:
        raise CaptureError(
            f"{type(module).__name__} cannot be captured: the cache of {other[0]} is on it, and "
            "decides in Python what runs. It runs uncached. Remove the other cache "
            f"({other[1]}), and call cache_compile again"
        )
    for path, name in stateful_hooks(module):
        raise CaptureError(
            f"{type(module).__name__} cannot be captured: a hook ({name}) on {path or 'it'} keeps "
            "values from one call to the next, as the caches of diffusers do. It runs uncached. "
            "Remove the other cache first: disable_cache() of the network"
        )
    for path, name in offload_hooks(module):
        raise CaptureError(
            f"{type(module).__name__} cannot be captured: a hook ({name}) on {path or 'it'} moves "
            "the weights of one part after another, and a graph reads all of them. It runs "
            "uncached. enable_model_cpu_offload() moves the network as a whole, and is fine"
        )


def _is_among(leaf: Any, others: Sequence[Any]) -> bool:
    return any(leaf is other for other in others)


def _exported(network: nn.Module, call: tuple[Any, ...], hints: list[Any]) -> ExportedProgram:
    """Export with the first of ``hints`` about dynamic sizes, or with the next if it fails."""
    for shapes in hints[:-1]:
        try:
            return torch.export.export(network, call, dynamic_shapes=shapes, strict=False)
        except ValueError:
            continue
    return torch.export.export(network, call, dynamic_shapes=hints[-1], strict=False)


def _is_functional(graph_module: GraphModule) -> bool:
    """No operator writes to its arguments, and no part is tucked away in a subgraph."""
    return not any(
        is_mutating(node) or is_higher_order(node.target) for node in graph_module.graph.nodes
    )


def _from_exported(
    exported: ExportedProgram,
    in_spec: TreeSpec,
    sample_leaves: tuple[int, ...],
    timestep_leaf: int | None,
    ranges: tuple[tuple[int, int, int, int], ...] | None,
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
    constant_names: dict[str, str] = {}
    inputs: dict[str, int] = {}
    for spec in exported.graph_signature.input_specs:
        name = str(getattr(spec.arg, "name", ""))
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            parameters[name] = spec.target.removeprefix(_PREFIX)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            constants[name] = exported.constants[spec.target]
            constant_names[name] = spec.target.removeprefix(_PREFIX)
        elif spec.kind is InputKind.USER_INPUT:
            inputs[name] = len(inputs)
        else:
            raise CaptureError(
                f"the network computes with an object ({class_of_input(spec)}), which cannot be "
                "part of a graph: compute with it outside, and pass the network tensors. It runs "
                "uncached"
            )
    samples = tuple(name for name, leaf in inputs.items() if leaf in sample_leaves)
    _strip_prefix(exported.graph_module)
    guard = _size_guard(exported, inputs, ranges) if ranges is not None else None
    graph_module = Canonicalize()(exported.graph_module).graph_module
    hoisted: tuple[Node, ...] = ()
    if timestep_leaf is not None:
        present = {str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")}
        steps = [name for name, leaf in inputs.items() if leaf in (*sample_leaves, timestep_leaf)]
        hoisted = mark_step_invariant(graph_module, present.intersection(steps))
    return CapturedNetwork(
        graph_module=graph_module,
        parameters=parameters,
        constants=constants,
        constant_names=constant_names,
        inputs=inputs,
        samples=samples,
        out_spec=exported.call_spec.out_spec,
        in_spec=in_spec,
        hoisted=hoisted,
        guard=guard() if guard is not None else None,
        current_guard=guard,
    )


def _require_known_sizes(exported: ExportedProgram, module: nn.Module) -> None:
    for node in exported.graph.nodes:
        if depends_on_values(node.meta.get("val")):
            lines = (node.stack_trace or "").strip().splitlines()
            where = f" ({lines[-1].strip()})" if lines else ""
            source = node.args[0] if node.target is operator.getitem else node
            raise CaptureError(
                f"the size of what {source.target} returns{where} depends on the values of "
                f"tensors, and in a graph it may depend on sizes only{remark_on(module)}. The "
                "network runs uncached"
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
    exported: ExportedProgram,
    inputs: dict[str, int],
    ranges: tuple[tuple[int, int, int, int], ...],
) -> Callable[[], SizeGuard] | None:
    """Makes the guard of a dynamic capture, with the conditions on sizes known when it is called.

    None if nothing can vary. Keeps shapes alive and no tensors of the example call.
    """
    examples: dict[int, Any] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        if str(node.target) in inputs:
            examples[inputs[str(node.target)]] = node.meta.get("val")
    tensors = [value for value in examples.values() if isinstance(value, torch.Tensor)]
    symbols = [
        size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)
    ]
    if not symbols:
        return None
    shape_env = shape_env_of(symbols[0])
    autocast = autocast_dtype(tensors)

    def guard() -> SizeGuard:
        leaves = tuple(
            (leaf, TensorPattern.of(value) if isinstance(value, torch.Tensor) else value)
            for leaf, value in examples.items()
        )
        return SizeGuard(leaves, conditions_of(shape_env, tensors), ranges, autocast)

    return guard


def _capture_message(module: nn.Module, error: Exception) -> str:
    where = _user_line(error)
    return (
        f"{type(module).__name__} cannot be captured as a graph{remark_on(module)}"
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
