"""Programs with a module's weights, as CUDA graphs where those are wanted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn

from dcompile.compat.hooks import is_offloaded
from dcompile.compiler.call import StandardCall
from dcompile.compiler.program import BoundProgram, Program, weights_of
from dcompile.compiler.signature import Signature, signature_of
from dcompile.notices import Notices
from dcompile.runtime.cuda_graphs import RecordedProgram, Reordered
from dcompile.runtime.cuda_recorder import RECORDERS
from dcompile.runtime.settings import Settings

# Call signatures whose CUDA graphs are kept; each has buffers and a memory pool of its own.
MAX_RECORDED = 16


class Refusal(NamedTuple):
    """There is no program for a kind of call.

    Attributes:
        reason: for the user.
        result: what the network itself returned for the present call, in a tuple, if it was called.
    """

    reason: str
    result: tuple[Any, ...] = ()


Runner = BoundProgram | RecordedProgram | Reordered


class Binder:
    """Binds programs to the weights of one module, as they are when a run begins.

    Owns the recorded programs, and so the static buffers of their CUDA graphs.

    Args:
        module: the network.
        settings: what was asked for.
        notices: shows messages to the user.
    """

    def __init__(self, module: nn.Module, settings: Settings, notices: Notices) -> None:
        self._module = module
        self._settings = settings
        self._notices = notices
        self._recorded: dict[tuple[Program, Signature], RecordedProgram] = {}
        self._token: object | None = None
        self._bound: dict[tuple[Program, tuple[int, ...] | None], BoundProgram] = {}

    def bind(self, program: Program, call: StandardCall, token: object | None) -> Runner:
        """The program with the module's weights, for calls written like this one.

        Args:
            program: for such calls.
            call: the call.
            token: see ``CaptureCache.token``; what was bound with the same one is returned again.
        """
        if token is None or token is not self._token:
            self._token = token
            self._bound = {}
        device = call.leaves[call.form.sample].device
        if not self._wants_cuda_graphs(device):
            return self._with_weights(program, call.order)
        # Recorded once, however the call is written.
        bound = self._with_weights(program)
        key = (program, signature_of(call.form, call.leaves)[0])
        recorded = self._recorded.pop(key, None)
        if recorded is None or not recorded.still_fits(bound):
            recorded = RecordedProgram(bound, device)
        self._recorded[key] = recorded  # the latest last
        while len(self._recorded) > MAX_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        in_order = call.order == tuple(range(len(call.order)))
        if in_order:
            return recorded
        return Reordered(recorded, call.order, self._with_weights(program, call.order).prologue)

    def _with_weights(self, program: Program, order: tuple[int, ...] | None = None) -> BoundProgram:
        key = program, order
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = program.bind(weights_of(self._module), order)
        return bound

    def release(self, programs: Collection[Program] | None = None) -> None:
        """Drop recorded programs with their buffers: all, or those of these programs."""
        self._bound = {}
        for key in list(self._recorded):
            if programs is None or key[0] in programs:
                del self._recorded[key]

    def _wants_cuda_graphs(self, device: torch.device) -> bool:
        wanted = self._settings.cuda_graphs
        if wanted is False or self._settings.backend.records_cuda_graphs:
            return False
        if device.type not in RECORDERS:
            if wanted is True:
                self._notices.warn(f"cuda_graphs=True, but the sample is on {device}: not recorded")
            return False
        # Offloading moves the weights at every run, and each move would mean another recording.
        return wanted is True or not is_offloaded(self._module)
