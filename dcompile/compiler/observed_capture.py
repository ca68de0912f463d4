"""Captures a network beside one real call of it, and finds what it does besides computing.

Side effects are refused by name; what tracing itself changes is undone (see ``side_effects``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils._pytree import tree_unflatten

from dcompile.compat.export import one_at_a_time
from dcompile.compat.hooks import global_hooks
from dcompile.compiler.call import StandardCall
from dcompile.compiler.capture import CapturedNetwork, capture, refuse_hooks
from dcompile.compiler.clocks import ClockReadings
from dcompile.compiler.function_caches import FunctionCaches
from dcompile.compiler.random_states import RandomStates
from dcompile.compiler.side_effects import Change, Key, Snapshot, undone
from dcompile.compiler.sizes import DynamicSizes
from dcompile.compiler.verification import reason_to_refuse
from dcompile.errors import CaptureError


class SideEffectError(CaptureError):
    """The network does more than compute, so none of its calls can be cached."""


class ObservedCapture:
    """One capture of one kind of call.

    Args:
        module: the network.
        forward: its own forward.
        call: an example.
        dynamic: the sizes that are left open.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        call: StandardCall,
        dynamic: DynamicSizes | None,
    ) -> None:
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
        with ClockReadings() as clocks:
            result = self._run()
        after = before.again()
        try:
            effects = before.changes(after)
            self._refuse_what_cannot_be_undone(effects)
            self._refuse_random_numbers(numbers)
            self._refuse_clocks(clocks)
            network, traced = self._traced(after)
            self._refuse_what_repeats(effects, traced, after)
            self._refuse_another_result(network, result, before, numbers)
        except CaptureError as error:
            error.uncached_result = (result,)
            raise
        before.restore_generators()  # the graph will draw the same numbers
        numbers.restore()
        return network

    def _run(self) -> Any:
        return self._forward(*self._args, **self._kwargs)

    def _traced(self, after: Snapshot) -> tuple[CapturedNetwork, dict[Key, Change]]:
        """The network, and what tracing it has changed, which is undone."""
        form, leaves = self._call.form, self._call.leaves
        caches = FunctionCaches(after.caches)
        try:
            network = capture(
                self._module,
                self._forward,
                leaves,
                form.spec,
                form.samples,
                self._dynamic,
                form.timestep,
            )
        finally:
            traced = after.changes(after.again())
            after.restore(traced)
            caches.forget_new()
        return network, traced

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

    def _refuse_what_repeats(
        self, effects: Mapping[Key, Change], traced: Mapping[Key, Change], after: Snapshot
    ) -> None:
        """What changes at every call; not what is made at the first one and kept."""
        repeated = _repeated(effects, traced)
        if repeated is None and not all(change.harmless for change in effects.values()):
            with undone(*(root for root, _ in self._roots)):  # tracing may have skipped it
                self._run()
                repeated = _repeated(effects, after.changes(after.again()))
        if repeated is not None:
            raise self._side_effect(repeated)

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
    for key, change in first.items():
        if change.in_place or (key in second and not (change.harmless or second[key].harmless)):
            return change.where
    return None


__all__ = ["ObservedCapture", "SideEffectError"]
