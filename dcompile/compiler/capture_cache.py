"""The networks captured of one module, by its structure and the call's signature.

Used for a denoiser (``ProgramCache``) and for its companions (``runtime.lazy_network``) alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dcompile.compat.sources import forgotten_later
from dcompile.compiler.call import StandardCall
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.capture_gate import CaptureGate
from dcompile.compiler.capture_limits import CaptureLimits
from dcompile.compiler.fingerprint import changed_by_running, difference
from dcompile.compiler.observed_capture import ObservedCapture, SideEffectError, UndecidedError
from dcompile.compiler.signature import (
    Signature,
    signature_of,
    what_differs,
)
from dcompile.compiler.sizes import DynamicSizes
from dcompile.compiler.structure import Structure, structure_of
from dcompile.compiler.watch import Watch
from dcompile.compiler.weight_layout import WeightLayout
from dcompile.errors import CaptureError
from dcompile.passes.base import is_random
from dcompile.progress import Display

# Structures that are remembered although nothing could be captured of them, or no longer is.
MAX_UNUSED_STRUCTURES = 8
IN_TRAINING_MODE = "the network is in training mode (call .eval())"


class TrainingModeError(CaptureError):
    """The network is in training mode, and what it computes depends on that."""


class CaptureCache:
    """Captures one module, once for each structure, call signature and range of sizes.

    Not thread-safe: its owner holds a lock.

    Args:
        module: the network.
        forward: returns its own forward, as it is now.

    Attributes:
        module: the network.
        written: entries of its structure that its own forward pass writes, such as counters; they
            are left out when structures are compared (see ``fingerprint.changed_by_running``).
        last_reason: why the latest capture was needed.
        limits: on captures of one thing after another.
        count: of captures.
        gate: calls of the module's own forward pass it; see ``CaptureGate``.
        layout: of the module's weights.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], Callable[..., Any]]) -> None:
        self.module = module
        self.layout = WeightLayout(module)
        self.written: frozenset[str] = frozenset()
        self.last_reason = self._change = ""
        self.gate = CaptureGate()
        self.limits = CaptureLimits(type(module).__name__)
        self.count = 0
        self._forward = forward
        self._structures: dict[int, Structure] = {}  # the latest last
        self._needed: set[int] = set()  # numbers of structures that others refer to
        self._watch: Watch | None = None
        self._number = -1  # of the structure that was there last
        self._networks: dict[tuple[int, Signature, DynamicSizes | None], CapturedNetwork] = {}
        # What cannot be captured is not tried again: by structure, and by structure and call.
        self._refused: dict[int, CaptureError] = {}
        self._failed: dict[tuple[int, Signature, DynamicSizes | None], CaptureError] = {}
        self._suspects: set[int] = set()  # a call has kept something where nobody can look

    def structure(self) -> Structure:
        """The module's structure as it is now."""
        return structure_of(self.module, self.written)

    @property
    def token(self) -> object | None:
        """The same object for as long as ``structure_number`` finds the same objects; or None.

        What was derived from the module and its weights with the same token holds still.
        """
        watch = self._watch
        return watch if watch is not None and watch.possible and watch.weights_possible else None

    @property
    def watch(self) -> Watch | None:
        """Tells whether the module is what it was at the latest ``structure_number``."""
        return self._watch

    def structure_number(self, display: Display) -> int:
        """The number of the module's present structure; a new one if it was not seen before."""
        if self._watch is not None and self._watch.unchanged():
            return self._number
        self.layout.apply()
        self._watch, watch = None, Watch(self.module)
        now = structure_of(self.module, self.written, watch)
        number = self.known_structure(now)
        if number is None:
            if self._number in self._structures:
                changed = difference(self._structures[self._number], now)
                display.note(f"the module changed ({changed}): new capture")
                self._change = changed
            number = max(self._structures, default=-1) + 1
            self._structures[number] = now
            self._forget_structures()
        self._watch = watch
        self._number = number
        return number

    def keep_structure(self, number: int) -> None:
        """Never forget a structure."""
        self._needed.add(number)

    def _forget_structures(self) -> None:
        """Only the latest that nothing was captured of: each hook that comes and goes is one."""
        needed = self._needed | {number for number, *_ in self._networks}
        unused = [number for number in self._structures if number not in needed]
        for number in unused[:-MAX_UNUSED_STRUCTURES]:
            del self._structures[number]
            self._refused.pop(number, None)
            self._failed = {key: why for key, why in self._failed.items() if key[0] != number}

    def known_structure(self, structure: Structure) -> int | None:
        """The number of a structure that was seen before; None if it was not."""
        return next((i for i, seen in self._structures.items() if seen == structure), None)

    def captured(
        self, call: StandardCall, dynamic: DynamicSizes | None, display: Display
    ) -> CapturedNetwork:
        """The network for calls like this one: captured before, or captured now.

        Raises:
            TrainingModeError: the module is in training mode, and that makes a difference.
            CaptureError: it cannot be captured.
        """
        form, leaves = call.form, call.leaves
        signature = signature_of(form, leaves)[0]
        if dynamic is not None and form.takes_list:
            display.note("the sample is a list of tensors: captured for these sizes alone")
            dynamic = None
        elif dynamic is not None and not dynamic.covers(leaves[form.sample]):
            display.note("sizes outside of the dynamic ranges: captured for these sizes alone")
            dynamic = None
        number = self.structure_number(display)
        key = (number, signature, dynamic)
        network = self._networks.get(key)
        if (
            network is not None
            and network.guard is not None
            and not network.accepts(form.spec, leaves)
        ):
            network = None  # a compiler has specialized sizes since
        if network is None and dynamic is not None:
            network = self._of_other_sizes(number, dynamic, call)
        if network is None:
            known = self._refused.get(number) or self._failed.get(key)
            if known is not None:
                raise type(known)(str(known)) from known
            self.limits.require_few_values(key, self._networks)
            self.limits.require_few_changes(number, self._networks, self._change)
            self._note_reason(key)
            try:
                network = self._capture(number, call, dynamic, display)
                self.structure_number(display)  # watched from here on
                self._suspects.discard(number)
            except TrainingModeError:
                raise
            except UndecidedError:
                self._suspects.add(number)
                raise
            except SideEffectError as error:
                self._refused[number] = _without_result(error)
                raise
            except CaptureError as error:
                self._failed[key] = _without_result(error)
                raise
        self._networks.pop(key, None)
        self._networks[key] = network  # the latest last
        return network

    def _note_reason(self, key: tuple[int, Signature, DynamicSizes | None]) -> None:
        number, signature, _ = key
        others = [known for structure, known, _ in self._networks if structure == number]
        if self._change and not others:
            self.last_reason = f"the module changed: {self._change}"
        elif others:
            self.last_reason = f"another kind of call: {what_differs(others[-1], signature)}"
        elif not self._networks:
            self.last_reason = "the first call"

    def networks(self) -> list[CapturedNetwork]:
        """All networks captured so far, the latest last."""
        return list(dict.fromkeys(self._networks.values()))

    def drop(self, network: CapturedNetwork) -> None:
        """Forget a network: calls like those it is for capture another one."""
        self._networks = {key: one for key, one in self._networks.items() if one is not network}

    def clear(self) -> None:
        """Forget all networks."""
        self._networks.clear()

    def current_networks(self, dynamic: DynamicSizes | None) -> list[CapturedNetwork]:
        """Those captured with these sizes that fit the module as it is now."""
        now = self.structure()
        return [
            network
            for (number, _, sizes), network in list(self._networks.items())
            if sizes == dynamic and self._structures[number] == now
        ]

    def signatures(self) -> list[tuple[int, Signature, CapturedNetwork]]:
        """Number of the structure, call signature and network of all that was captured."""
        return [
            (number, signature, network)
            for (number, signature, _), network in self._networks.items()
        ]

    def forget_failures(self) -> None:
        """Try again what could not be captured."""
        self._refused.clear()
        self._failed.clear()
        self.limits.forget()
        self._suspects.clear()

    def refresh_guard(self, network: CapturedNetwork) -> None:
        """After a compile: forget calls that were given ``network`` before its guard got tighter.

        Lowering may specialize sizes that the capture had left open.
        """
        before = network.guard
        network.refresh_guard()
        if network.guard != before:
            for key in [key for key, other in self._networks.items() if other is network][:-1]:
                del self._networks[key]

    def _of_other_sizes(
        self, number: int, dynamic: DynamicSizes, call: StandardCall
    ) -> CapturedNetwork | None:
        """A network captured for other sizes that is right for this call."""
        for (known, _, sizes), network in self._networks.items():
            alike = known == number and sizes == dynamic
            if alike and network.accepts(call.form.spec, call.leaves):
                return network
        return None

    def _capture(
        self, number: int, call: StandardCall, dynamic: DynamicSizes | None, display: Display
    ) -> CapturedNetwork:
        self.count += 1
        with display.stage("capturing"):
            try:
                with self.gate.capture(), forgotten_later():
                    network = ObservedCapture(
                        self.module, self._forward(), call, dynamic, number in self._suspects
                    ).captured()
                # Pipelines that build a network out of another's parts leave it in training mode.
                if self.module.training and any(map(is_random, network.graph_module.graph.nodes)):
                    raise TrainingModeError(IN_TRAINING_MODE)
            except CaptureError as error:
                known = (TrainingModeError, UndecidedError)
                if not self.module.training or isinstance(error, known):
                    raise
                in_training = TrainingModeError(IN_TRAINING_MODE)
                in_training.uncached_result = error.uncached_result
                raise in_training from error
            finally:
                self._watch = None
                written = changed_by_running(self._structures[number], self.structure())
                if written:  # by the forward pass itself: the structure has not changed
                    self.written |= written
                    self._structures[number] = self.structure()
        return network


def _without_result(error: CaptureError) -> CaptureError:
    """The same refusal, to be kept: without tensors, and without the frames that hold some."""
    return type(error)(str(error))
