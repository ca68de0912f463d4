"""Captures a network beside one real call of it, and finds what it does besides computing.

Side effects are refused by name; what tracing itself changes is undone (see ``side_effects``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from dcompile.compat.export import one_at_a_time
from dcompile.compat.hooks import global_hooks
from dcompile.compiler.call import StandardCall
from dcompile.compiler.call_counts import NUMBERS, Count
from dcompile.compiler.capture import CapturedNetwork, capture, refuse_hooks
from dcompile.compiler.clocks import ClockReadings
from dcompile.compiler.function_caches import FunctionCaches
from dcompile.compiler.hidden_effects import KeptTensors, place_of_error
from dcompile.compiler.random_states import RandomStates
from dcompile.compiler.side_effects import Change, Key, Snapshot, put, undone, value_at
from dcompile.compiler.sizes import DynamicSizes
from dcompile.compiler.verification import reason_to_refuse
from dcompile.errors import CaptureError

OTHER_THREADS = 2  # more looks at what seems to change at every call, if there are others


class SideEffectError(CaptureError):
    """The network does more than compute, so none of its calls can be cached."""


class UndecidedError(CaptureError):
    """The network has kept something: at its next call it shows whether it does so every time."""


class ObservedCapture:
    """One capture of one kind of call.

    Args:
        module: the network.
        forward: its own forward.
        call: an example.
        dynamic: the sizes that are left open.
        is_suspect: an earlier call has kept something where nobody can look.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        call: StandardCall,
        dynamic: DynamicSizes | None,
        is_suspect: bool = False,
    ) -> None:
        self._is_suspect = is_suspect
        self._name = type(module).__name__
        self._module = module
        self._forward = forward
        self._call = call
        self._dynamic = dynamic
        self._args, self._kwargs = tree_unflatten(list(call.leaves), call.form.spec)
        self._roots = [
            (call.leaves, "the arguments"),
            (forward, self._name),
            (module, self._name),
            (global_hooks(), "torch's hooks of all modules"),
        ]

    def captured(self) -> CapturedNetwork:
        """Call the network once for real, and capture it.

        Raises:
            CaptureError: it cannot be captured, or has side effects. The error has the result of
                the real call, so that nobody has to call it again.
        """
        with one_at_a_time:  # what is reached may be another network, which is being traced
            return self._captured()

    def _captured(self) -> CapturedNetwork:
        refuse_hooks(self._module)
        numbers, before = RandomStates(), Snapshot(self._roots)
        with ClockReadings() as clocks, KeptTensors() as kept:
            result = self._run()
        after = before.again()
        try:
            effects = before.changes(after)
            self._refuse_what_cannot_be_undone(effects)
            self._refuse_random_numbers(numbers)
            self._refuse_clocks(clocks)
            self._refuse_what_is_hidden(clocks, kept, (*after.tensors(), *tree_leaves(result)))
            network = self._traced(after)
            self._refuse_what_repeats(effects, after)
            self._refuse_another_result(network, result, before, numbers)
        except CaptureError as error:
            error.uncached_result = (result,)
            raise
        before.restore_generators()  # the graph will draw the same numbers
        numbers.restore()
        return network

    def _run(self) -> Any:
        return self._forward(*self._args, **self._kwargs)

    def _traced(self, after: Snapshot) -> CapturedNetwork:
        """The network; what tracing it has changed is undone."""
        form, leaves = self._call.form, self._call.leaves
        caches = FunctionCaches(after.caches)
        try:
            return capture(
                self._module,
                self._forward,
                leaves,
                form.spec,
                form.samples,
                self._dynamic,
                form.timestep,
            )
        finally:
            after.restore(after.changes(after.again()))
            caches.forget_new()

    def _refuse_what_cannot_be_undone(self, effects: Mapping[Key, Change]) -> None:
        """Tracing would do it again. Of weights and arguments torch.export says so."""
        weights = (*self._module.parameters(), *self._module.buffers())
        own = {id(tensor) for tensor in (*weights, *self._call.leaves)}
        for (identity, _), change in effects.items():
            if change.in_place and identity not in own:
                raise self._side_effect(change.where)

    def _refuse_random_numbers(self, before: RandomStates) -> None:
        """Python's and NumPy's would be constants of a graph."""
        if before.drawn_outside_of_torch() is None:
            return
        with undone(*(root for root, _ in self._roots)):  # or has another thread drawn them?
            again = RandomStates()
            self._run()
            drawn = again.drawn_outside_of_torch()
        if drawn is not None:
            raise SideEffectError(
                f"{self._name} draws {drawn}, which would be constants of a graph. It runs uncached"
            )

    def _refuse_clocks(self, clocks: ClockReadings) -> None:
        if not clocks.places:
            return
        # Or was it a finalizer that happened to run within the call?
        with undone(*(root for root, _ in self._roots)), ClockReadings() as again:
            self._run()
        for place in clocks.places:
            if place in again.places:
                raise SideEffectError(
                    f"{self._name} calls {place}: what its result takes from that would be a "
                    "constant of a graph. It runs uncached"
                )

    def _refuse_what_is_hidden(
        self, clocks: ClockReadings, kept: KeptTensors, known: Iterable[Any]
    ) -> None:
        """Nothing can undo it, so nobody calls the network again to see whether it repeats."""
        place = kept.alive(each for each in known if isinstance(each, torch.Tensor))
        if place is not None:
            does = f"keeps a tensor that it gets at {place}"
        elif clocks.files:
            does = f"opens a file at {next(iter(clocks.files))}"
        else:
            return
        if not self._is_suspect:
            raise UndecidedError(
                f"a call of {self._name} {does}; if the next one does not, it is captured. "
                "This one runs uncached"
            )
        raise SideEffectError(
            f"{self._name} does more than compute: every call {does}, and a reuse step would leave "
            "that out. It runs uncached"
        )

    def _refuse_what_repeats(self, effects: Mapping[Key, Change], after: Snapshot) -> None:
        """What changes at every call; not what is made at the first one and kept."""
        if not any(change.plain or not change.harmless for change in effects.values()):
            return
        again = self._changed_by_another_call(after)  # tracing may have skipped it
        repeated = _repeated(effects, again)
        for _ in range(OTHER_THREADS if threading.active_count() > 1 else 0):
            if repeated is None:
                break  # it was another thread
            again = self._changed_by_another_call(after)
            repeated = _repeated(effects, again)
        if repeated is not None:
            raise self._side_effect(repeated)
        self._refuse_counts(
            {key: change.where for key, change in again.items() if change.plain and key in effects},
            after,
        )

    def _changed_by_another_call(self, after: Snapshot) -> dict[Key, Change]:
        with undone(*(root for root, _ in self._roots)):
            self._run()
            return after.changes(after.again())

    def _refuse_counts(self, places: Mapping[Key, str], after: Snapshot) -> None:
        """What changes at each call and decides something: a graph's would stay as it was."""
        counts: dict[Key, Count] = {}
        readings: dict[Key, list[str]] = {key: [] for key in places}
        for key, where in places.items():
            value = value_at(after, key)
            if type(value) not in NUMBERS:
                raise self._count(where, "it is no number, so what reads it is not known")
            counts[key] = Count(value, readings[key])
        if not counts:
            return
        with undone(*(root for root, _ in self._roots)):
            put(after, counts)
            try:
                self._run()
                read = {key: [*code] for key, code in readings.items()}
            except Exception as error:  # such as of a function that wants a real number
                place = place_of_error(error)
                raise self._count(next(iter(places.values())), f"{place} reads it") from error
        for key, code in read.items():
            if code:
                raise self._count(places[key], f"{code[0]} reads it")

    def _count(self, where: str, reason: str) -> SideEffectError:
        return SideEffectError(
            f"each call of {self._name} changes {where}, and {reason}: what depends on how often "
            "the network was called would be a constant of a graph. It runs uncached"
        )

    def _refuse_another_result(
        self, network: CapturedNetwork, result: Any, before: Snapshot, numbers: RandomStates
    ) -> None:
        """What the network takes from elsewhere than its arguments is a constant of the graph."""

        def replayed() -> None:
            before.restore_generators()
            numbers.restore()

        def again() -> Any:
            replayed()
            with undone(*(root for root, _ in self._roots)):
                return self._run()

        replayed()
        reason = reason_to_refuse(network, self._module, self._call.leaves, result, again)
        if reason is not None:
            raise SideEffectError(reason)

    def _side_effect(self, where: str) -> SideEffectError:
        return SideEffectError(
            f"{self._name} does more than compute: every call changes {where}, and a reuse step "
            "would leave that out. It runs uncached"
        )


def _repeated(first: Mapping[Key, Change], second: Mapping[Key, Change]) -> str | None:
    """What both calls changed, other than counters; written tensors without a second look."""
    growing = {identity for (identity, _), change in second.items() if _grows(change)}
    for key, change in first.items():
        if change.in_place or (key in second and not (change.harmless or second[key].harmless)):
            return change.where
        if _grows(change) and key[0] in growing:  # a new key each time
            return change.where
    return None


def _grows(change: Change) -> bool:
    return change.added and not change.harmless


__all__ = ["ObservedCapture", "SideEffectError", "UndecidedError"]
