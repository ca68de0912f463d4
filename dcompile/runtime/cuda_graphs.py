"""A compiled program recorded as CUDA graphs: a step is a few copies in, one launch, one copy out.

Our own recording, not Inductor's CUDA graph trees: those free what an earlier run returned, which
is just what a cache must keep. Who owns which buffer:

- **Inputs** live in static buffers of the ``RecordedProgram``, one set for each call signature.
  A refresh copies all of the call's tensors into them, a reuse step those that are not what the
  latest step has copied: mostly the sample and the timestep.
- **Boundaries** are outputs of the full graph at one address, and the smaller graphs read them
  there: nothing is copied between them. They hold the features of one run's lane, their
  owner. When another lane comes to use the buffers, the owner's features are first copied out to
  tensors of their own, and copied back in when it goes on. What a graph between the smallest and
  the full one (``MultiLevel``) recomputes is copied there.
- **Earlier boundaries**, which a forecast extrapolates from, are in buffers of their own and belong
  to the same owner: a refresh first moves each one place on.
- **Results** are copied out at every step: samplers keep earlier results.
- **Weights** are read where they were when recording. Their storages are held, so that a weight
  that moved (``.to()``) is never read from freed memory; the next run records again.

All graphs share one memory pool. That is safe because the full graph is recorded first, its
outputs stay alive, and no two run at the same time.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dcompile.compat import cuda as compat_cuda
from dcompile.compat.storages import storage_of
from dcompile.compat.tensors import version_of
from dcompile.compiler.lazy import materialize
from dcompile.compiler.program import Bound, BoundProgram, CacheLayout, Program, graph_label
from dcompile.notices import warn
from dcompile.runtime.cuda_recorder import RECORDERS, Recorder, Tensors


class HeldBoundary:
    """What a lane caches: the static boundary while the lane owns it, else a copy.

    Attributes:
        tensors: the features.
    """

    __slots__ = ("__weakref__", "_program", "tensors")

    def __init__(self, tensors: Tensors, program: RecordedProgram) -> None:
        self.tensors = tensors
        self._program = program

    @contextlib.contextmanager
    def steady(self) -> Iterator[Tensors]:
        """The features, which no other run overwrites or moves meanwhile."""
        with self._program.turn():
            yield self.tensors


class _Input:
    """A static input: where it is among the call's leaves, and the elements it has of its own."""

    __slots__ = ("_address", "_source", "_written", "buffer", "expanded", "leaf")

    def __init__(self, leaf: int, buffer: torch.Tensor, expanded: tuple[int, ...]) -> None:
        self.leaf = leaf
        self.buffer = buffer
        self.expanded = expanded
        self._source: Callable[[], torch.Tensor | None] = lambda: None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the buffer certainly has the tensor's values, which nobody has written since."""
        return (
            self._source() is tensor
            and self._written is not None
            and version_of(tensor) == self._written
            and tensor.data_ptr() == self._address
        )

    def note(self, tensor: torch.Tensor) -> None:
        """The tensor's values are copied into the buffer now."""
        self._source = weakref.ref(tensor)
        self._written = version_of(tensor)
        self._address = tensor.data_ptr()


class _LastStream:
    """The stream that used the buffers last: another uses them only after it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._number: int | None = None

    def follow(self) -> None:
        """The current stream will use the buffers now."""
        if self._device.type != "cuda":
            return
        number = compat_cuda.current_stream_number(self._device)
        if number == self._number:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._number = stream, number

    def keep(self, tensor: torch.Tensor) -> None:
        """Do not reuse the tensor's memory before the stream has read it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)


class _Graph(NamedTuple):
    recording: Any
    inputs: tuple[_Input, ...]
    outputs: Tensors
    coefficients: torch.Tensor | None


class RecordedProgram:
    """A program with one module's weights, as CUDA graphs, for calls of one signature.

    Stands where a ``BoundProgram`` stands. Recorded at first use; where that fails, for lack of
    memory or because something in the graph cannot be recorded, one warning names the cause, all
    that was taken is released, and calls run as if there were no CUDA graphs. ``unrecorded`` is the
    program without them.
    """

    def __init__(self, bound: BoundProgram, device: torch.device) -> None:
        self.program: Program = bound.program
        self.prologue = bound.prologue  # not recorded: it runs once
        self.unrecorded = bound
        self._device = device
        self._recorder: Recorder | None = None
        # One set of buffers: calls from several threads take turns while they launch.
        self._turn = threading.Lock()
        self._last_stream = _LastStream(device)
        self._failed = False
        self._static: dict[int, Any] = {}
        self._inputs: dict[int, _Input] = {}
        self._levels = len(bound.program.cached)
        self._graphs: dict[int, _Graph] = {}
        # Laid out as what a lane caches: the full graph's outputs, and the earlier ones' buffers.
        self._boundary: Tensors = ()
        self._owner: weakref.ref[HeldBoundary] | None = None
        weights = [weight for graph in bound.graphs for weight in graph.weights]
        self._storages = [storage_of(weight) for weight in weights]
        self._addresses = _addresses(bound, device)

    def still_fits(self, bound: BoundProgram) -> bool:
        """Whether another binding of the program has its weights at the recorded addresses."""
        if bound is self.unrecorded and not self._addresses.with_values:
            return True
        return bound.program is self.program and _addresses(bound, self._device) == self._addresses

    def refresh(
        self,
        leaves: Sequence[Any],
        previous: Any = (),
        level: int | None = None,
        coefficients: Any = None,
    ) -> tuple[Any, Any]:
        """Recompute boundaries: what the module returns, and what to cache.

        Args:
            leaves: the call's leaves.
            previous: what the same lane has cached, which the caller will drop; empty if there is
                nothing.
            level: how many cuts, the outermost first; None for all.
            coefficients: of the forecast of the next cut, if there is one.
        """
        if level is None:
            level = self._levels
        if level < self._levels and not isinstance(previous, HeldBoundary):
            return self.unrecorded.refresh(leaves, previous, level, coefficients)
        with self._turn:
            if not self._graphs and not self._failed:
                self._record(self._levels, leaves)
            if self._graphs:
                self._last_stream.follow()
                if level < self._levels:
                    self._take(previous)
                if level not in self._graphs:
                    self._record(level, leaves)
            if level in self._graphs:
                if self._owner is not None and self._owner() is not previous:
                    self._copy_out()
                if level == self._levels:
                    results = self._refresh_all(leaves, getattr(previous, "tensors", previous))
                else:
                    results = self._refresh_outer(leaves, level, coefficients)
                held = HeldBoundary(self._boundary, self)
                self._owner = weakref.ref(held)
                return self.unrecorded.packed(results), held
        kept = getattr(previous, "tensors", previous)
        return self.unrecorded.refresh(leaves, kept, level, coefficients)

    def reuse(
        self, leaves: Sequence[Any], cached: Any, coefficients: Any = None
    ) -> tuple[Any, Any]:
        """Run the smallest graph from what is cached: what the module returns, and the drift."""
        if not isinstance(cached, HeldBoundary):  # cached after recording had failed
            return self.unrecorded.reuse(leaves, cached, coefficients)
        with self._turn:
            if self._graphs:
                self._last_stream.follow()
                self._take(cached)
                if 0 not in self._graphs:
                    self._record(0, leaves)
            if 0 in self._graphs:
                values = self._run(self._graphs[0], leaves, coefficients)
                drift = values[-1] if self.program.probed else None
                return self.unrecorded.packed(values[: self.unrecorded.results]), drift
        return self.unrecorded.reuse(leaves, cached.tensors, coefficients)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else uses the buffers meanwhile."""
        with self._turn:
            self._last_stream.follow()
            yield

    def _refresh_all(self, leaves: Sequence[Any], previous: Tensors) -> Tensors:
        """The full graph writes to the boundaries itself."""
        if previous:
            for cut in self.program.cached:
                self._move_on(cut, previous)
        results = self._run(self._graphs[self._levels], leaves)[: self.unrecorded.results]
        if not previous:
            for cut in self.program.cached:
                latest = self._boundary[cut.latest]
                self._copy_in(self._boundary[cut.start + cut.size : cut.stop], latest * cut.history)
        return results

    def _refresh_outer(self, leaves: Sequence[Any], level: int, coefficients: Any) -> Tensors:
        """A graph in between returns the outer boundaries, and they are copied to their place."""
        graph = self._graphs[level]
        results = self._run(graph, leaves, coefficients)[: self.unrecorded.results]
        made = graph.outputs[self.unrecorded.results :]
        for cut in self.program.cached[:level]:
            self._move_on(cut, self._boundary)
            self._copy_in(self._boundary[cut.latest], made[: cut.size])
            made = made[cut.size :]
        return results

    def _move_on(self, cut: CacheLayout, previous: Tensors) -> None:
        """Each earlier boundary takes the place after its own."""
        for age in reversed(range(1, cut.history)):
            place = cut.start + age * cut.size
            self._copy_in(self._boundary[place : place + cut.size], previous[place - cut.size :])

    def _copy_in(self, buffers: Tensors, source: Tensors) -> None:
        for static, own in zip(buffers, source, strict=False):
            if isinstance(static, torch.Tensor):
                expanded = _expanded(static)
                _narrowed(static, expanded).copy_(_narrowed(own, expanded))
                self._last_stream.keep(own)

    def _run(self, graph: _Graph, leaves: Sequence[Any], coefficients: Any = None) -> Tensors:
        assert self._recorder is not None
        reuses = graph is self._graphs.get(0)
        given = materialize([leaves[item.leaf] for item in graph.inputs])
        # What writes to a tensor without being counted, such as a CUDA graph of the user's, is
        # expected between runs only; a run begins with a refresh.
        changed = [
            (item, value)
            for item, value in zip(graph.inputs, given, strict=True)
            if not (reuses and item.holds(value))
        ]
        buffers = [item.buffer for item, _ in changed]
        values = [_narrowed(value, item.expanded) for item, value in changed]
        if graph.coefficients is not None:
            buffers.append(graph.coefficients)
            values.append(coefficients)
        compat_cuda.copy_all(buffers, values)
        for item, value in changed:
            item.note(value)
        self._recorder.replay(graph.recording)
        if reuses:
            return tuple(map(_copy, graph.outputs))
        return tuple(map(_copy, graph.outputs[: self.unrecorded.results]))

    def _take(self, held: HeldBoundary) -> None:
        """Make ``held`` the owner of the static boundary."""
        if held.tensors is self._boundary:
            return
        self._copy_out()
        self._copy_in(self._boundary, held.tensors)
        held.tensors = self._boundary
        self._owner = weakref.ref(held)

    def _copy_out(self) -> None:
        """The owner, if its lane still lives, gets tensors of its own."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.tensors = tuple(map(_copy, self._boundary))
        self._owner = None

    def _record(self, level: int, leaves: Sequence[Any]) -> None:
        cached = self.program.cached
        try:
            # Buffers that any call may write to, whether or not it is in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                if level < self._levels:
                    self._graphs[level] = self._capture(level, self._boundary[cached[level].all])
                    return
                self._prepare(leaves)
                full = self._capture(level, ())
                made = full.outputs[self.unrecorded.results :]
                boundary: list[Any] = []
                for cut in cached:
                    latest, made = made[: cut.size], made[cut.size :]
                    boundary += [*latest, *map(_buffer_like, latest * (cut.history - 1))]
                self._boundary = tuple(boundary)
                self._graphs[level] = full
        except Exception as error:
            self._give_up(level, error)

    def _prepare(self, leaves: Sequence[Any]) -> None:
        """Make the static inputs, laid out as the call's own: compiled code relies on that."""
        self._recorder = RECORDERS[self._device.type](self._device)
        taken = sorted({i for graph in self.unrecorded.graphs for i in graph.inputs})
        for i, leaf in zip(taken, materialize([leaves[i] for i in taken]), strict=True):
            if not isinstance(leaf, torch.Tensor):
                self._static[i] = leaf
                continue
            if leaf.device != self._device:
                raise RuntimeError(
                    f"a tensor argument is on {leaf.device}, the sample on {self._device}, and a "
                    "recording reads from one device"
                )
            expanded = _expanded(leaf)
            part = _narrowed(leaf, expanded)
            buffer = torch.empty_strided(
                part.size(), part.stride(), dtype=leaf.dtype, device=leaf.device
            ).copy_(part)
            self._static[i] = buffer.expand(leaf.size())
            self._inputs[i] = _Input(i, buffer, expanded)

    def _capture(self, level: int, cached: Tensors) -> _Graph:
        assert self._recorder is not None
        graph = self.unrecorded.graphs[level]
        inputs = [self._static[i] for i in graph.inputs]
        coefficients = None
        if level < self._levels and self.program.cached[level].history > 1:
            history = self.program.cached[level].history
            coefficients = torch.zeros(history, dtype=torch.float32, device=self._device)
            cached = (*cached, coefficients)
        recording, outputs = self._recorder.capture(
            lambda reads: graph.run(*reads), (*graph.weights, *inputs, *cached)
        )
        read = tuple(self._inputs[i] for i in dict.fromkeys(graph.inputs) if i in self._inputs)
        return _Graph(recording, read, outputs, coefficients)

    def _give_up(self, level: int, error: Exception) -> None:
        first = (str(error).strip() or "no message").splitlines()[0]
        self._failed = True
        self._graphs, self._recorder = {}, None
        self._static, self._inputs, self._storages = {}, {}, []
        if level < self._levels:  # the owner's features stay good: it holds the tensors
            self._boundary, self._owner = (), None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        warn(
            f"the {graph_label(level, self._levels)} graph cannot be recorded as a CUDA "
            f"graph ({type(error).__name__}: {first}); it runs without. cuda_graphs=False says so "
            "beforehand"
        )


class Reordered:
    """A program for calls that are written in another way."""

    def __init__(
        self,
        recorded: RecordedProgram | BoundProgram,
        order: tuple[int, ...],
        prologue: Bound | None,
    ) -> None:
        self.program = recorded.program
        self.prologue = prologue
        self._recorded = recorded
        # What is hoisted follows the leaves of a call, however that is written.
        hoisted = max(
            (-i for graph in self.program.graphs for i in graph.convention.inputs), default=0
        )
        self._order = (*order, *range(-hoisted, 0))
        self._own_order = order

    @property
    def unrecorded(self) -> Reordered | None:
        """The program without CUDA graphs; None if it has none."""
        if isinstance(self._recorded, RecordedProgram):
            return Reordered(self._recorded.unrecorded, self._own_order, self.prologue)
        return None

    def refresh(
        self,
        leaves: Sequence[Any],
        previous: Any = (),
        level: int | None = None,
        coefficients: Any = None,
    ) -> tuple[Any, Any]:
        in_order = [leaves[i] for i in self._order]
        return self._recorded.refresh(in_order, previous, level, coefficients)

    def reuse(
        self, leaves: Sequence[Any], cached: Any, coefficients: Any = None
    ) -> tuple[Any, Any]:
        return self._recorded.reuse([leaves[i] for i in self._order], cached, coefficients)


def _buffer_like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _expanded(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions along which all elements are one."""
    return tuple(d for d, stride in enumerate(tensor.stride()) if stride == 0)


def _narrowed(tensor: torch.Tensor, expanded: tuple[int, ...]) -> torch.Tensor:
    """The elements of an expanded tensor, each once."""
    for dimension in expanded:
        tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _version(weight: torch.Tensor) -> Any:
    version = version_of(weight)
    return object() if version is None else version  # unknown: like no other


class _Addresses(NamedTuple):
    """Where weights are, and how they lie there.

    Attributes:
        found: for each weight.
        with_values: some are on a CPU. Launches take single numbers of a CPU along, and recorded
            launches go on taking those of their recording: the weight's version counts, too.
    """

    found: tuple[Any, ...]
    with_values: bool


def _addresses(bound: BoundProgram, device: torch.device) -> _Addresses:
    weights = [weight for graph in bound.graphs for weight in graph.weights]
    found = tuple(
        (
            weight.data_ptr(),
            weight.shape,
            weight.stride(),
            weight.dtype,
            None if weight.device == device else _version(weight),
        )
        for weight in weights
    )
    return _Addresses(found, any(weight.device != device for weight in weights))


__all__ = ["HeldBoundary", "RecordedProgram", "Reordered"]
