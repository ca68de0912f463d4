"""Turn a captured network into a program: cut it, compile both halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from dcompile.backends import Backend, Refittable
from dcompile.backends.sizes import TOLD
from dcompile.capture import CapturedNetwork
from dcompile.display import Display
from dcompile.errors import BackendError, DepthError, NoSkipConnectionError
from dcompile.program import (
    BakedWeights,
    CompiledGraph,
    Convention,
    Program,
    convention_of,
    weights_of,
)
from passes import SkipConnection, find_skip_connections, split_at, with_forecast


def choose_skip(network: CapturedNetwork, depth: int) -> SkipConnection:
    """The skip connection at ``depth``.

    Raises:
        NoSkipConnectionError: there is none at any depth.
        DepthError: there is none at this depth; lists those there are.
    """
    skips = find_skip_connections(network.graph_module, network.sample)
    if not skips:
        raise NoSkipConnectionError(
            "found no skip connection: no concatenation whose operands all depend on the sample "
            f"({network.sample}) and that has compute behind one of them. Diffusion transformers "
            "without long skips are served by diffusers' own caches (diffusers.hooks, e.g. "
            "apply_first_block_cache)"
        )
    if depth >= len(skips):
        listed = "\n".join(
            f"  {skip.depth:2d}  {skip.module_path:40s} a reuse step saves {1 - skip.ratio:5.1%}"
            for skip in skips
        )
        raise DepthError(f"depth {depth} is out of range; this network has\n{listed}")
    return skips[depth]


def build(
    network: CapturedNetwork,
    depth: int,
    backend: Backend,
    module: nn.Module,
    leaves: Sequence[Any],
    display: Display,
    history: int = 1,
    full: CompiledGraph | None = None,
) -> Program:
    """Cut ``network`` at ``depth`` and compile both graphs for a call like ``leaves``.

    Args:
        history: how many boundaries the shallow graph extrapolates from; 1 is plain reuse.
        full: the full graph, if a program of another history has it.

    Raises:
        NoSkipConnectionError, DepthError: see ``choose_skip``.
        BackendError: the backend failed; the original error is its cause.
    """
    with display.stage("cutting"):
        skip = choose_skip(network, depth)
        full_graph, shallow_graph = split_at(network.graph_module, skip)
    weights = weights_of(module)
    if history > 1:
        shallow_graph = with_forecast(shallow_graph, len(skip.boundary), history)
    if full is None:
        full = _compile(full_graph, network, backend, weights, leaves, (), "full", display)
    boundary: tuple[Any, ...] = ()
    if backend.needs_examples:
        # A backend may lay its outputs out as it likes; the shallow graph is compiled for that.
        with display.stage("running the full graph once"), torch.no_grad():
            boundary = tuple(full.bind(weights)(leaves))[network.out_spec.num_leaves :]
        if history > 1:
            tensor = next(value for value in boundary if isinstance(value, torch.Tensor))
            boundary = (
                *boundary * history,
                torch.zeros(history, dtype=torch.float32, device=tensor.device),
            )
    shallow = _compile(
        shallow_graph, network, backend, weights, leaves, boundary, "shallow", display
    )
    return Program(network.out_spec, full, shallow, history, skip.ratio)


def renewed(
    program: Program,
    network: CapturedNetwork,
    depth: int,
    module: nn.Module,
    leaves: Sequence[Any],
    display: Display,
) -> Program | None:
    """``program`` if it fits the module's weights and a call like ``leaves``, else one with the
    weights put in anew, without compiling. None if it takes a ``build``.

    Args:
        network, depth: what ``program`` was built from.
    """
    halves = (program.full, program.shallow)
    weights = weights_of(module)
    for half in halves:
        inputs = [leaves[i] for i in half.convention.inputs]
        if isinstance(half.run, Refittable) and not half.run.accepts(inputs):
            display.note("other sizes than the backend compiled for")
            return None
    if program.matches(weights):
        return program
    if not all(isinstance(half.run, Refittable) for half in halves):
        display.note("weights changed that the backend had folded into its code")
        return None
    skip = choose_skip(network, depth)
    full_graph, shallow_graph = split_at(network.graph_module, skip)
    if program.history > 1:
        shallow_graph = with_forecast(shallow_graph, len(skip.boundary), program.history)
    graphs = (full_graph, shallow_graph)
    refitted: list[CompiledGraph] = []
    for half, graph_module, label in zip(halves, graphs, ("full", "shallow"), strict=True):
        try:
            with display.stage(f"refitting the {label} graph"), torch.no_grad():
                half.run.refit(with_weights(graph_module, network, weights))  # type: ignore[attr-defined]
        except Exception as error:  # whatever it is, compiling anew puts it right
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            display.note(f"the {label} graph cannot be refitted: {first}")
            return None
        baked = BakedWeights.of(convention_of(graph_module, network), weights)
        refitted.append(replace(half, baked=baked))
    # Another program, though the code is the same object: what was cached or recorded with the
    # old weights is not used again.
    return replace(program, full=refitted[0], shallow=refitted[1])


def _compile(
    graph_module: GraphModule,
    network: CapturedNetwork,
    backend: Backend,
    weights: Mapping[str, torch.Tensor],
    leaves: Sequence[Any],
    boundary: tuple[Any, ...],
    label: str,
    display: Display,
) -> CompiledGraph:
    convention = convention_of(graph_module, network)
    _tell_sizes(graph_module, network)
    baked = None
    if backend.bakes_weights:
        graph_module = with_weights(graph_module, network, weights)
        baked = BakedWeights.of(convention, weights)
        convention = Convention((), convention.inputs)
    tensors = convention.weight_tensors(weights)
    inputs = [*tensors, *(leaves[i] for i in convention.inputs), *boundary]
    with display.stage(f"compiling the {label} graph ({backend.name})"), torch.no_grad():
        try:
            run = backend.compile(graph_module, inputs if backend.needs_examples else ())
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(
                f"backend {backend.name!r} failed on the {label} graph: "
                f"{type(error).__name__}: {first}\nThe network still runs, uncached; "
                "backend='eager' needs no compiler"
            ) from error
    if not callable(run):
        raise BackendError(
            f"backend {backend.name!r} returned {run!r} for the {label} graph, expected a callable"
        )
    return CompiledGraph(run, convention, baked)


def _tell_sizes(graph_module: GraphModule, network: CapturedNetwork) -> None:
    """Mark placeholders with the ranges of sizes that the user asked for."""
    ranges = network.guard.ranges if network.guard else ()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        leaf = network.inputs.get(str(node.target))
        told = {axis: (low, high) for where, axis, low, high in ranges if where == leaf}
        if told:
            node.meta[TOLD] = told  # see Backend.compile


def with_weights(
    graph_module: GraphModule, network: CapturedNetwork, weights: Mapping[str, torch.Tensor]
) -> GraphModule:
    """The graph with its weights as attributes instead of inputs. Copies no tensor."""
    root = nn.Module()
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        name = str(node.target)
        tensor = (
            weights[network.parameters[name]]
            if name in network.parameters
            else network.constants.get(name)
        )
        if node.op == "placeholder" and tensor is not None:
            if isinstance(tensor, nn.Parameter):
                root.register_parameter(name, tensor)
            else:
                root.register_buffer(name, tensor)
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    return GraphModule(root, graph)
