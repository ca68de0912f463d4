"""Turn a captured network into a program: cut it, compile the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from dcompile.backends import Backend, Refittable
from dcompile.backends.sizes import REQUESTED
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.program import (
    CacheLayout,
    CompiledGraph,
    Convention,
    FoldedWeights,
    Program,
    ProgramSpec,
    cache_layouts,
    convention_of,
    graph_label,
    weights_of,
)
from dcompile.errors import BackendError, DepthError, NoCutError, ScheduleError
from dcompile.passes import (
    Cut,
    prologue_of,
    split_levels,
    with_drift,
    with_forecast,
    without_hoisted,
)
from dcompile.passes.base import is_floating
from dcompile.progress import Display

# A reuse step that takes more than this share of a refresh step's FLOPs is hardly worth it.
LITTLE_GAIN = 0.9


def choose_cut(network: CapturedNetwork, depth: int) -> Cut:
    """The cut at ``depth``.

    Raises:
        NoCutError: there is none at any depth.
        DepthError: there is none at this depth; lists those there are.
    """
    cuts = network.cuts
    if not cuts:
        sample = network.sample.removeprefix("kwargs_")
        raise NoCutError(
            "found nowhere to cut: no skip connection (a concatenation whose operands all depend "
            f"on the sample, {sample}, and that has compute behind one of them), and no residual "
            "stream of three blocks or more (sums of equal shape, each of which the next block "
            "adds to)"
        )
    if depth >= len(cuts):
        listed = "\n".join(
            f"  {cut.depth:2d}  {cut.module_path:40s} a reuse step saves {1 - cut.ratio:5.1%}"
            for cut in cuts
        )
        raise DepthError(f"depth {depth} is out of range; this network has\n{listed}")
    return cuts[depth]


def gains_little(network: CapturedNetwork) -> bool:
    """Whether a reuse step takes nearly as much compute as a full one, wherever it is cut."""
    return bool(network.cuts) and min(cut.ratio for cut in network.cuts) > LITTLE_GAIN


def graphs_of(
    network: CapturedNetwork, cuts: ProgramSpec, hoist: bool
) -> tuple[tuple[GraphModule, ...], tuple[CacheLayout, ...], tuple[Cut, ...]]:
    """Cut ``network``: its graphs, what each cut caches, and the cuts themselves.

    Args:
        hoist: have the graphs take ``network.hoisted`` as inputs, after the call's.

    Raises:
        NoCutError, DepthError: see ``choose_cut``.
        ScheduleError: what is to be probed cannot be.
    """
    chosen = tuple(choose_cut(network, depth) for depth in cuts.depths)
    probed = []
    if cuts.probe is not None:
        probed = [node for node in chosen[0].entering if is_floating(node.meta.get("val"))]
        if not probed:
            raise ScheduleError(
                "Adaptive: nothing of the sample enters the deep region as floating-point numbers, "
                "so there is no drift to follow"
            )
    graphs = list(split_levels(network.graph_module, chosen, probed))
    sizes = [len(cut.boundary) for cut in chosen]
    if hoist:
        graphs = [*map(without_hoisted, graphs, (*sizes, 0))]
    if cuts.probe is not None:
        graphs[0] = with_drift(graphs[0], len(probed), cuts.probe)
        sizes[0] += len(probed)
    for number, (size, history) in enumerate(zip(sizes, cuts.histories, strict=True)):
        if history > 1:
            graphs[number] = with_forecast(graphs[number], size, history)
    return tuple(graphs), cache_layouts(sizes, cuts.histories), chosen


def build(
    network: CapturedNetwork,
    cuts: ProgramSpec,
    backend: Backend,
    module: nn.Module,
    leaves: Sequence[Any],
    display: Display,
    earlier: Program | None = None,
) -> Program:
    """Cut ``network`` and compile all graphs for a call like ``leaves``.

    Args:
        earlier: a program that has the full graph, if one with other histories does.

    Raises:
        NoCutError, DepthError, ScheduleError: see ``graphs_of``.
        BackendError: the backend failed; the original error is its cause.
    """
    with display.stage("cutting"):
        hoist = hoists(network, backend)
        graphs, cached, chosen = graphs_of(network, cuts, hoist)
    weights = weights_of(module)
    prologue = earlier.prologue if earlier is not None else None
    if hoist:
        if prologue is None:
            prologue = compile_prologue(network, backend, weights, leaves, display)
        if backend.needs_examples:
            with torch.no_grad():
                leaves = [*leaves, *prologue.bind(weights)(leaves)]
    full = earlier.full if earlier is not None else None
    if full is None:
        full = compile_graph(graphs[-1], network, backend, weights, leaves, (), "full", display)
    made: tuple[Any, ...] = ()
    if backend.needs_examples:
        # A backend may lay its outputs out as it likes; the other graphs are compiled for that.
        with display.stage("running the full graph once"), torch.no_grad():
            made = tuple(full.bind(weights)(leaves))[network.out_spec.num_leaves :]
    compiled: list[CompiledGraph] = []
    for number, (graph_module, cut) in enumerate(zip(graphs, cached, strict=False)):
        examples: tuple[Any, ...] = ()
        if backend.needs_examples:
            boundary, made = made[: cut.size], made[cut.size :]
            examples = boundary * cut.history
            if cut.history > 1:
                tensor = next(value for value in boundary if isinstance(value, torch.Tensor))
                zeros = torch.zeros(cut.history, dtype=torch.float32, device=tensor.device)
                examples = (*examples, zeros)
        label = graph_label(number, len(cached))
        graph = compile_graph(
            graph_module, network, backend, weights, leaves, examples, label, display
        )
        compiled.append(graph)
    return Program(
        network.out_spec,
        (*compiled, full),
        cached,
        tuple(cut.ratio for cut in chosen),
        cuts.probe is not None,
        prologue,
    )


def hoists(network: CapturedNetwork, backend: Backend) -> bool:
    """Whether what is the same at every step is computed by a graph of its own.

    Not for a backend that folds weights into its code: it may fold more if it sees all.
    """
    return bool(network.hoisted) and not backend.folds_weights


def compile_prologue(
    network: CapturedNetwork,
    backend: Backend,
    weights: Mapping[str, torch.Tensor],
    leaves: Sequence[Any],
    display: Display,
) -> CompiledGraph:
    """Compile the graph of what is the same at every step; see ``compile_graph``."""
    graph_module = prologue_of(network.graph_module, network.hoisted)
    return compile_graph(graph_module, network, backend, weights, leaves, (), "prologue", display)


def rebound(
    program: Program,
    network: CapturedNetwork,
    cuts: ProgramSpec,
    module: nn.Module,
    leaves: Sequence[Any],
    display: Display,
) -> Program | None:
    """``program`` if it fits the module's weights and a call like ``leaves``, else one with the
    weights replaced, without compiling. None if only a ``build`` will do.

    Args:
        network, cuts: what ``program`` was built from.
    """
    for half in program.graphs:
        inputs = [leaves[i] for i in half.convention.inputs if i >= 0]
        if isinstance(half.run, Refittable) and not half.run.accepts(inputs):
            display.note("other sizes than the backend compiled for")
            return None
    if all(half.folded is None for half in program.graphs):
        return program
    weights = weights_of(module)
    if program.matches(weights):
        return program
    if not all(isinstance(half.run, Refittable) for half in program.graphs):
        display.note("weights changed that the backend had folded into its code")
        return None
    graphs, cached, _ = graphs_of(network, cuts, hoist=False)
    refitted: list[CompiledGraph] = []
    for number, (half, graph_module) in enumerate(zip(program.graphs, graphs, strict=True)):
        label = graph_label(number, len(cached))
        try:
            with display.stage(f"refitting the {label} graph"), torch.no_grad():
                half.run.refit(with_weights(graph_module, network, weights))  # type: ignore[attr-defined]
        except Exception as error:  # whatever it is, compiling again mends it
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            display.note(f"the {label} graph cannot be refitted: {first}")
            return None
        folded = FoldedWeights.of(convention_of(graph_module, network), weights)
        refitted.append(replace(half, folded=folded))
    # Another program, though the code is the same object: what was cached or recorded with the
    # old weights is not used again.
    return replace(program, graphs=tuple(refitted))


def compile_graph(
    graph_module: GraphModule,
    network: CapturedNetwork,
    backend: Backend,
    weights: Mapping[str, torch.Tensor],
    leaves: Sequence[Any],
    cached: tuple[Any, ...],
    label: str,
    display: Display,
) -> CompiledGraph:
    """Compile one graph that was made of ``network``'s.

    Args:
        weights: from ``weights_of`` the live module.
        leaves: an example call's.
        cached: examples of what comes after them.
        label: what messages call it.

    Raises:
        BackendError: the backend failed; the original error is its cause.
    """
    convention = convention_of(graph_module, network)
    _note_requested_ranges(graph_module, network)
    folded = None
    if backend.folds_weights:
        graph_module = with_weights(graph_module, network, weights)
        folded = FoldedWeights.of(convention, weights)
        convention = Convention((), convention.inputs)
    inputs: Sequence[Any] = ()
    if backend.needs_examples:
        tensors = convention.weight_tensors(weights)
        inputs = [*tensors, *(leaves[i] for i in convention.inputs), *cached]
    with display.stage(f"compiling the {label} graph ({backend.name})"), torch.no_grad():
        try:
            run = backend.compile(graph_module, inputs)
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
    return CompiledGraph(run, convention, folded)


def _note_requested_ranges(graph_module: GraphModule, network: CapturedNetwork) -> None:
    """Mark placeholders with the ranges of sizes that the user asked for."""
    ranges = network.guard.ranges if network.guard else ()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        leaf = network.inputs.get(str(node.target))
        requested = {axis: (low, high) for where, axis, low, high in ranges if where == leaf}
        if requested:
            node.meta[REQUESTED] = requested  # see Backend.compile


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
