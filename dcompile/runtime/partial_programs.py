"""Programs of a companion network: for any selection of its results, one graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from dcompile.backends import Backend
from dcompile.compiler.build import compile_graph, compile_prologue, hoists
from dcompile.compiler.call import CallForm, StandardCall
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.capture_cache import CaptureCache
from dcompile.compiler.program import Bound, CompiledGraph, weights_of
from dcompile.compiler.program_memory import DEFAULT_BUDGET, bytes_of_graphs, bytes_of_networks
from dcompile.errors import CaptureError
from dcompile.passes import total_cost, with_outputs, without_hoisted
from dcompile.passes.base import is_random
from dcompile.progress import Display
from dcompile.runtime.hoisting import Hoisted

# Calls of a step whose hoisted values are kept: both halves of guidance, say.
MAX_HOISTED = 4


class PartCost(NamedTuple):
    """What computing some of a network's results takes.

    Attributes:
        network: name of its class.
        results: how many results are computed.
        total: how many it has.
        ratio: FLOPs of computing them over FLOPs of computing all.
    """

    network: str
    results: int
    total: int
    ratio: float


@dataclass(eq=False)
class PartialProgram:
    """What serves calls of one signature.

    Attributes:
        network: as captured.
        results: shape, strides, dtype and device of each result, as tensors without data.
        graphs: one for each selection of results that was asked for.
        prologue: computes what is the same at every step; None if it is not compiled yet.
    """

    network: CapturedNetwork
    results: tuple[torch.Tensor, ...]
    graphs: dict[tuple[int, ...], CompiledGraph] = field(default_factory=dict)
    prologue: CompiledGraph | None = None


@dataclass(eq=False)
class BoundPartialProgram:
    """A program with the module's weights, for one run.

    Attributes:
        hoisted: what the prologue computed for the run's latest calls; freed at its last step.
    """

    program: PartialProgram
    weights: dict[str, torch.Tensor]
    graphs: dict[tuple[int, ...], Bound] = field(default_factory=dict)
    prologue: Bound | None = None
    hoisted: list[Hoisted] = field(default_factory=list)

    def leaves(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """A call's leaves as the graphs read them."""
        compiled = self.program.prologue
        if compiled is None:
            return leaves
        if self.prologue is None:
            self.prologue = compiled.bind(self.weights)
        prologue = self.prologue
        known = [h for h in self.hoisted if h.holds(prologue, leaves, thoroughly=True)]
        if not known:
            known = [Hoisted(prologue, leaves)]
            self.hoisted = [*self.hoisted, *known][-MAX_HOISTED:]
        return [*leaves, *known[0].tensors]


class PartialPrograms:
    """Captures a network and compiles the parts of it that are asked for.

    Args:
        module: the network.
        forward: returns its own forward, as it is now.

    Attributes:
        gate: calls of that forward pass it.
        layout: of the network's weights.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], Callable[..., Any]]) -> None:
        self._module = module
        self._captures = CaptureCache(module, forward)
        self.gate = self._captures.gate
        self.layout = self._captures.layout
        self._lock = threading.RLock()  # capture and compile; never held on a warm call
        self._backend: Backend | None = None
        self._verbose = True
        self._memory = DEFAULT_BUDGET
        self._programs: dict[CapturedNetwork, PartialProgram] = {}

    def configure(
        self,
        backend: Backend,
        verbose: bool,
        memory: int = DEFAULT_BUDGET,
        channels_last: bool | Literal["auto"] = "auto",
    ) -> None:
        """Use another backend, and at most ``memory`` bytes, from the next call on."""
        self.layout.configure(channels_last, backend)
        if self._backend != backend:
            self._programs = {}
        self._backend, self._verbose, self._memory = backend, verbose, memory

    def clear(self) -> None:
        """Drop everything captured and compiled."""
        with self._lock:
            self._programs = {}
            self._captures.clear()

    def state(self) -> tuple[Any, ...]:
        """What ``restore`` takes."""
        return self._backend, self._verbose, self._programs

    def restore(self, state: tuple[Any, ...]) -> None:
        """Have what was compiled before."""
        self._backend, self._verbose, self._programs = state

    def bind(self, leaves: list[Any], form: CallForm) -> BoundPartialProgram:
        """The program for such calls, with the module's weights.

        Raises:
            CaptureError: there is none.
        """
        with self._lock:
            program = self._program(leaves, form)
            weights = weights_of(self._module)
            for numbers, graph in list(program.graphs.items()):
                if graph.folded is not None and not graph.folded.match(weights):
                    del program.graphs[numbers]
            return BoundPartialProgram(program, weights)

    def _program(self, leaves: list[Any], form: CallForm) -> PartialProgram:
        call = StandardCall(form, leaves, tuple(range(len(leaves))))
        network = self._captures.captured(call, None, self._display())
        program = self._programs.get(network)
        if program is None:
            if any(map(is_random, network.graph_module.graph.nodes)):
                raise CaptureError("it draws random numbers (in training mode? call .eval())")
            outputs: Any = network.graph_module.graph.output_node().args[0]
            results = [getattr(node, "meta", {}).get("val") for node in outputs]
            tensors = tuple(value for value in results if isinstance(value, torch.Tensor))
            if len(tensors) < len(results):
                raise CaptureError("it returns something that is no tensor")
            program = PartialProgram(network, tensors)
        self._programs.pop(network, None)
        self._programs[network] = program  # the latest last
        self._shrink()
        return program

    def _shrink(self) -> None:
        """Drop what was least recently used until the rest fits in the memory allowed."""
        while len(self._programs) > 1 and self._nbytes() > self._memory:
            network = next(iter(self._programs))
            del self._programs[network]
            self._captures.drop(network)

    def _nbytes(self) -> int:
        graphs = [graph for one in self._programs.values() for graph in one.graphs.values()]
        graphs += [one.prologue for one in self._programs.values() if one.prologue is not None]
        return bytes_of_networks(self._programs) + bytes_of_graphs(graphs)

    def graph(
        self,
        bound: BoundPartialProgram,
        numbers: tuple[int, ...],
        leaves: list[Any],
        home: torch.device,
    ) -> Bound | None:
        """What computes these results; None where weights are elsewhere (offloaded since)."""
        graph = bound.graphs.get(numbers)
        if graph is None:
            if any(weight.device != home for weight in bound.weights.values()):
                return None
            with self._lock:
                compiled = bound.program.graphs.get(numbers)
                if compiled is None:
                    compiled = self._compile(bound, numbers, leaves)
            graph = bound.graphs[numbers] = compiled.bind(bound.weights)
        return graph if all(weight.device == home for weight in graph.weights) else None

    def _compile(
        self, bound: BoundPartialProgram, numbers: tuple[int, ...], leaves: list[Any]
    ) -> CompiledGraph:
        program, network = bound.program, bound.program.network
        assert self._backend is not None
        graph_module, given = with_outputs(network.graph_module, numbers), leaves
        if hoists(network, self._backend):
            without_hoisted(graph_module)
            if program.prologue is None:
                program.prologue = compile_prologue(
                    network, self._backend, bound.weights, leaves, self._display()
                )
            given = [*bound.leaves(leaves)]
        compiled = program.graphs[numbers] = compile_graph(
            graph_module,
            network,
            self._backend,
            bound.weights,
            given,
            (),
            f"{len(numbers)}-of-{len(program.results)}-results",
            self._display(),
        )
        return compiled

    def costs(self) -> list[PartCost]:
        """What was asked for so far in the latest kind of call, the least costly first."""
        program = next(reversed(list(self._programs.values())), None)
        if program is None:
            return []
        graph_module = program.network.graph_module
        whole = total_cost(graph_module.graph.nodes).flops
        name, found = type(self._module).__name__, []
        for numbers in list(program.graphs):
            part = total_cost(with_outputs(graph_module, numbers).graph.nodes).flops
            ratio = part / whole if whole else 1.0
            found.append(PartCost(name, len(numbers), len(program.results), ratio))
        return sorted(found, key=lambda cost: cost.ratio)

    def _display(self) -> Display:
        return Display(type(self._module).__name__, self._verbose)
