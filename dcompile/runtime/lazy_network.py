"""A network whose results another one reads: each is computed when it is read, and only then.

A ControlNet runs before the denoiser, which adds its results, the residuals, to its own features.
On a reuse step the denoiser reads the residuals outside of the cut and no others. So the ControlNet
returns promises (``LazyTensor``), and when the denoiser has decided what to run, it asks for the
residuals that takes: a graph that holds nothing else computes them. That is exact, whatever the
schedule, and needs no knowledge of it: a refresh asks for all. Anything else that reads a
promise gets the true tensor.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from dcompile.backends import Backend
from dcompile.compiler.build import compile_graph
from dcompile.compiler.capture import CapturedNetwork, capture
from dcompile.compiler.fingerprint import Structure, changed_by_running, difference, structure_of
from dcompile.compiler.lazy import LazyTensor, Pending, materialize
from dcompile.compiler.program import Bound, CompiledGraph, weights_of
from dcompile.compiler.signature import CallForm, CallForms, Signature, signature_of
from dcompile.errors import CaptureError, DcompileError
from dcompile.passes import total_cost, with_outputs
from dcompile.passes.base import is_random
from dcompile.progress import Display
from dcompile.report.explain import PartReport
from dcompile.runtime.tracking import StepTracker
from dcompile.runtime.wrapper import ForwardWrapper


@dataclass(eq=False)
class _Program:
    """What serves calls of one signature.

    Attributes:
        network: as captured.
        results: shape, strides, dtype and device of each result, as tensors without data.
        graphs: one for each selection of results that was asked for.
    """

    network: CapturedNetwork
    results: tuple[torch.Tensor, ...]
    graphs: dict[tuple[int, ...], CompiledGraph] = field(default_factory=dict)


@dataclass(eq=False)
class _Bound:
    """A program with the module's weights, for one run."""

    program: _Program
    weights: dict[str, torch.Tensor]
    graphs: dict[tuple[int, ...], Bound] = field(default_factory=dict)


class LazyNetwork(ForwardWrapper):
    """Stands in for the ``forward`` of a network beside the denoiser.

    Holds no weights: they are looked up in the live module. Where a network cannot be captured, or
    returns less than two tensors, its own forward runs, as if this were not there.

    Attributes:
        users: the denoisers' stand-ins that read its results; it goes with the last of them.
    """

    __slots__ = (
        "_at_once",
        "_backend",
        "_building",
        "_constant_numbers",
        "_forms",
        "_leaf",
        "_programs",
        "_structure",
        "_tracker",
        "_unsuited",
        "_verbose",
        "_written",
        "users",
    )

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], backend: Backend, verbose: bool
    ) -> None:
        super().__init__(module, original)
        self.users: weakref.WeakSet[ForwardWrapper] = weakref.WeakSet()
        self._forms = CallForms(original)
        self._building = threading.RLock()  # capture and compile; never held on a warm call
        self._at_once = threading.local()  # set in a thread that calls the module's own forward
        # A list of networks is made in training mode, whatever they are in; .train() reaches all.
        self._leaf = next((m for m in module.modules() if not any(m.children())), module)
        self._structure: Structure | None = None
        self._written: frozenset[str] = frozenset()
        self.configure(backend, verbose)

    def configure(self, backend: Backend, verbose: bool) -> None:
        """Use another backend from the next call on."""
        if getattr(self, "_backend", None) != backend:
            self._programs: dict[Signature, _Program] = {}
        self._backend, self._verbose = backend, verbose
        self._tracker = StepTracker()
        self._constant_numbers = self._unsuited = False
        self.enabled = True

    def follow_users(self) -> None:
        """Be as they are: switched on as long as one of them is, and gone with the last."""
        self.enabled = any(user.enabled for user in self.users)
        if not self.users:
            self.uninstall()

    def state(self) -> tuple[Any, ...]:
        """What ``restore`` takes."""
        return self._backend, self._verbose, self.enabled, self._programs

    def restore(self, state: tuple[Any, ...]) -> None:
        """Be configured as before, with what was compiled then."""
        backend, verbose, enabled, programs = state
        self.configure(backend, verbose)
        self.enabled, self._programs = enabled, programs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            not self.enabled
            or self._unsuited
            or (self._leaf.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or getattr(self._at_once, "on", False)
        ):
            return self.original(*args, **kwargs)
        leaves, form = self._forms.flatten(args, kwargs)
        if form is None or not isinstance(leaves[form.sample], torch.Tensor):
            return self.original(*args, **kwargs)
        leaves = materialize(leaves)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
        ):
            return self.original(*args, **kwargs)
        # A sampling loop may change its sample in place before the results are read.
        leaves[form.sample] = leaves[form.sample].clone(memory_format=torch.preserve_format)
        given, versions = list(leaves), _versions(leaves)
        if not self._constant_numbers:  # a scale may be another at every step
            leaves = [
                torch.tensor(leaf, dtype=torch.float64) if type(leaf) is float else leaf
                for leaf in leaves
            ]
        if not isinstance(leaves[form.timestep], torch.Tensor):
            leaves[form.timestep] = torch.tensor(leaves[form.timestep])
        signature, conditioning = signature_of(form, leaves)
        run, _, _ = self._tracker.enter(leaves[form.timestep], conditioning)
        bound = run.programs.get(signature)
        if bound is None:
            bound = self._bind(signature, leaves, form)
            if bound is None:
                return self(*args, **kwargs)
            run.programs[signature] = bound
        program = bound.program
        autocast = _autocast_of(leaves[form.sample].device.type)

        def compute(numbers: tuple[int, ...]) -> Sequence[torch.Tensor]:
            if _versions(given) != versions:
                raise CaptureError(
                    f"an argument of {type(self.module).__name__} was changed in place after the "
                    "call and before its results were read, which are computed only then: change "
                    "a copy, or call dcompile.handle(pipe).disable()"
                )
            try:
                graph = self._graph(bound, numbers, leaves, leaves[form.sample].device)
            except DcompileError as error:
                self._give_up(str(error).splitlines()[0])
                graph = None
            if graph is None:
                own_args, own_kwargs = tree_unflatten(given, form.spec)
                return self._called(own_args, own_kwargs, numbers)
            with torch.no_grad(), autocast():
                made = graph(leaves)
            return [
                _laid_out(value, program.results[number])
                for number, value in zip(numbers, made, strict=True)
            ]

        pending = Pending(compute, len(program.results))
        promised = [LazyTensor(like, pending, i) for i, like in enumerate(program.results)]
        return tree_unflatten(promised, program.network.out_spec)

    def parts(self) -> list[PartReport]:
        """What was asked for so far in the latest kind of call, the least costly first."""
        program = next(reversed(list(self._programs.values())), None)
        if program is None:
            return []
        whole = total_cost(program.network.graph_module.graph.nodes).flops
        name, found = type(self.module).__name__, []
        for numbers in list(program.graphs):
            graph = with_outputs(program.network.graph_module, numbers).graph
            ratio = total_cost(graph.nodes).flops / whole if whole else 1.0
            found.append(PartReport(name, len(numbers), len(program.results), ratio))
        return sorted(found, key=lambda part: part.ratio)

    def _bind(self, signature: Signature, leaves: list[Any], form: CallForm) -> _Bound | None:
        """The program for such calls; None if they are to be served in another way."""
        display = Display(type(self.module).__name__, self._verbose)
        with self._building:
            structure = structure_of(self.module, self._written)
            if structure != self._structure:
                if self._structure is not None and self._programs:
                    changed = difference(self._structure, structure)
                    display.note(f"the module changed ({changed}): new capture")
                self._programs.clear()
                self._structure = structure
            weights = weights_of(self.module)
            program = self._programs.get(signature)
            if program is None:
                try:
                    program = self._captured(leaves, form, display)
                except DcompileError as error:
                    args, kwargs = tree_unflatten(leaves, form.spec)
                    with torch.no_grad():  # what the network itself refuses raises its own error
                        self.original(*args, **kwargs)
                    if not self._constant_numbers and any(_is_number(leaf) for leaf in leaves):
                        self._constant_numbers = True
                        return None
                    self._give_up(str(error).splitlines()[0])
                    return None
                if len(program.results) < 2:
                    self._unsuited = True
                    return None
                self._programs[signature] = program
            for numbers, graph in list(program.graphs.items()):
                if graph.folded is not None and not graph.folded.match(weights):
                    del program.graphs[numbers]
        return _Bound(program, weights)

    def _captured(self, leaves: list[Any], form: CallForm, display: Display) -> _Program:
        assert self._structure is not None
        with display.stage("capturing"):
            network = capture(self.module, self.original, leaves, form.spec, form.sample)
        written = changed_by_running(self._structure, structure_of(self.module, self._written))
        if written:  # by the network's own forward: no sign of a changed structure
            self._written |= written
            self._structure = structure_of(self.module, self._written)
        outputs = network.graph_module.graph.output_node().args[0]
        results = [getattr(node, "meta", {}).get("val") for node in outputs]  # type: ignore[union-attr]
        if any(map(is_random, network.graph_module.graph.nodes)):
            raise CaptureError("it draws random numbers (in training mode? call .eval())")
        tensors = tuple(value for value in results if isinstance(value, torch.Tensor))
        if len(tensors) < len(results):
            raise CaptureError("it returns something that is no tensor")
        return _Program(network, tensors)

    def _graph(
        self, bound: _Bound, numbers: tuple[int, ...], leaves: list[Any], home: torch.device
    ) -> Bound | None:
        """What computes these results; None where weights are elsewhere (offloaded since)."""
        graph = bound.graphs.get(numbers)
        if graph is None:
            if any(weight.device != home for weight in bound.weights.values()):
                return None
            with self._building:
                compiled = bound.program.graphs.get(numbers)
                if compiled is None:
                    network = bound.program.network
                    compiled = bound.program.graphs[numbers] = compile_graph(
                        with_outputs(network.graph_module, numbers),
                        network,
                        self._backend,
                        bound.weights,
                        leaves,
                        (),
                        f"{len(numbers)}-of-{len(bound.program.results)}-results",
                        Display(type(self.module).__name__, self._verbose),
                    )
            graph = bound.graphs[numbers] = compiled.bind(bound.weights)
        return graph if all(weight.device == home for weight in graph.weights) else None

    def _called(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Results of the module's own forward, with whatever hooks are around it."""
        self._at_once.on = True
        try:
            with torch.no_grad():
                results = torch.utils._pytree.tree_leaves(self.module(*args, **kwargs))
        finally:
            self._at_once.on = False
        return [results[number] for number in numbers]

    def _give_up(self, reason: str) -> None:
        self._unsuited = True
        warnings.warn(
            f"dcompile: {type(self.module).__name__} computes all its results at every step: "
            f"{reason}",
            stacklevel=5,
        )


def _versions(leaves: Sequence[Any]) -> list[int]:
    """What changes when a tensor among them is written to."""
    return [
        leaf._version
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    ]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float64 and leaf.dim() == 0


def _autocast_of(kind: str) -> Callable[[], Any]:
    """Makes the state of autocast as it is now."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """With the strides that were promised: compiled code relies on them."""
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(
        like.shape, like.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)
