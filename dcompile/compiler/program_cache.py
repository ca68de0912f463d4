"""The programs of one network: found, loaded from a file, or captured and compiled now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dcompile.backends import Backend
from dcompile.compat.sources import forgotten_later
from dcompile.compiler.build import build, gains_little, rebound
from dcompile.compiler.call import CallForms, StandardCall
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.capture_cache import CaptureCache
from dcompile.compiler.fingerprint import tensors_in_containers
from dcompile.compiler.program import Constant, Program, ProgramSpec
from dcompile.compiler.program_memory import bytes_of_graphs, bytes_of_networks
from dcompile.compiler.saved import SavedProgram
from dcompile.compiler.signature import portable_signature, signature_of
from dcompile.compiler.sizes import DynamicSizes
from dcompile.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    DcompileError,
    NotCompiledError,
)
from dcompile.notices import Notices
from dcompile.progress import Display


@dataclass(frozen=True)
class Target:
    """What programs are built for.

    Attributes:
        spec: where the network is cut, and what its graphs compute in addition.
        backend: compiles the graphs.
        dynamic: which sizes one capture leaves open; None for fixed sizes.
    """

    spec: ProgramSpec
    backend: Backend
    dynamic: DynamicSizes | None


class ProgramCache:
    """Everything captured and compiled for one network. Holds no weights.

    Attributes:
        lock: held while anything is captured or compiled; never needed for a warm call.
        captures: the captured networks.
        forms: of the network's forward.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[[], Callable[..., Any]], forms: CallForms
    ) -> None:
        self.lock = threading.RLock()
        self.captures = CaptureCache(module, forward)
        self.forms = forms
        self._module = module
        self._programs: dict[tuple[CapturedNetwork, ProgramSpec, Backend], Program] = {}
        # Loaded programs, with the number of the structure they are for.
        self._loaded: list[tuple[int, ProgramSpec, Backend, SavedProgram]] = []
        # What could not be built is not tried again.
        self._failed: dict[tuple[CapturedNetwork, ProgramSpec, Backend], DcompileError] = {}
        # Dynamic captures that a backend could not compile.
        self._fixed_sizes: set[tuple[CapturedNetwork, Backend]] = set()

    def program_for(
        self, call: StandardCall, target: Target, display: Display, notices: Notices
    ) -> Program:
        """The program for calls like this one.

        Raises:
            CaptureError: the network cannot be captured.
            BackendError, DepthError, NoCutError, ScheduleError: see ``build.build``.
        """
        loaded = self._loaded_program(call, target, display)
        if loaded is not None:
            return loaded
        network = self.captures.captured(call, target.dynamic, display)
        if network.guard is None:
            return self._compiled(network, call.leaves, target, display, notices)
        if (network, target.backend) not in self._fixed_sizes:
            try:
                return self._compiled(network, call.leaves, target, display, notices)
            except BackendError as error:
                self._fixed_sizes.add((network, target.backend))
                cause = str(error).splitlines()[0]
                notices.warn(f"{cause}; compiled for each size separately instead of dynamic=")
        network = self.captures.captured(call, None, display)
        return self._compiled(network, call.leaves, target, display, notices)

    def require_known(self, call: StandardCall, target: Target, display: Display) -> None:
        """Refuse a call that would have to be compiled.

        Raises:
            CaptureError: no program that was loaded serves it.
        """
        if self._loaded_program(call, target, display) is None:
            shape = tuple(call.leaves[call.form.sample].shape)
            raise CaptureError(
                f"no saved program serves a call with a sample of shape {shape}, and "
                'new_calls="uncached" compiles none'
            )

    def adopt(
        self, programs: Iterable[SavedProgram], written: Iterable[str], target: Target
    ) -> None:
        """Use loaded programs; they were checked against the module as it is now.

        Args:
            programs: from a file.
            written: see ``CaptureCache.written``.
            target: what they were built for.
        """
        with self.lock:
            self.captures.written |= frozenset(written)
            number = self.captures.structure_number(Display("", verbose=False))
            self.captures.keep_structure(number)
            self._loaded += [(number, target.spec, target.backend, saved) for saved in programs]

    def signatures(self) -> list[str]:
        """The call signatures that have a program, loaded or compiled; see portable_signature."""
        with self.lock:
            compiled = {network for network, *_ in self._programs}
            found = [call for *_, saved in self._loaded for call in saved.calls]
            for _, signature, network in self.captures.signatures():
                call = portable_signature(signature)
                if network in compiled and call is not None:
                    found.append(call)
            return list(dict.fromkeys(found))

    def programs_to_save(self, target: Target) -> tuple[SavedProgram, ...]:
        """All programs built for ``target`` and the module as it is now.

        Raises:
            ArtifactError: a call or a program cannot be written to a file.
            NotCompiledError: there is none.
        """
        with self.lock:
            number = self.captures.known_structure(self.captures.structure())
            where = (number, target.spec, target.backend)
            found = {
                saved.program: saved for *place, saved in self._loaded if tuple(place) == where
            }
            for known, signature, network in self.captures.signatures():
                program = self._programs.get((network, target.spec, target.backend))
                if known != number or program is None:
                    continue
                call = portable_signature(signature)
                if call is None:
                    raise ArtifactError(
                        "a call of this network has arguments that cannot be written to a file"
                    )
                calls = found[program].calls if program in found else ()
                found[program] = SavedProgram(
                    (*calls, call), network.in_spec, network.guard, program
                )
            if not found:
                raise NotCompiledError(
                    "nothing is compiled yet for the network as it is now: call it or its pipeline "
                    "once, or handle(unet).warmup(...)"
                )
            self._refuse_unnamed_state(found)
            return tuple(found.values())

    def _loaded_program(
        self, call: StandardCall, target: Target, display: Display
    ) -> Program | None:
        if not self._loaded:
            return None
        where = (self.captures.structure_number(display), target.spec, target.backend)
        signature = portable_signature(signature_of(call.form, call.leaves)[0])
        for *place, saved in self._loaded:
            if tuple(place) == where and saved.serves(signature, call.form.spec, call.leaves):
                return saved.program
        return None

    def _compiled(
        self,
        network: CapturedNetwork,
        leaves: Sequence[Any],
        target: Target,
        display: Display,
        notices: Notices,
    ) -> Program:
        key = (network, target.spec, target.backend)
        program = self._programs.get(key)
        if program is not None:
            program = rebound(program, network, target.spec, self._module, leaves, display)
        if program is None:
            program = self._built(key, leaves, display)
            self.captures.refresh_guard(network)
            if gains_little(network):
                notices.warn(
                    "a reuse step takes nearly as much compute as a full one, at every depth: "
                    "caching will not make this network faster"
                )
        self._programs.pop(key, None)
        self._programs[key] = program  # the latest last
        return program

    def _built(
        self,
        key: tuple[CapturedNetwork, ProgramSpec, Backend],
        leaves: Sequence[Any],
        display: Display,
    ) -> Program:
        network, spec, backend = key
        known = self._failed.get(key)
        if known is not None:
            raise type(known)(str(known))
        earlier = self._with_full_graph(network, spec, backend)
        try:
            with forgotten_later():
                return build(network, spec, backend, self._module, leaves, display, earlier)
        except DcompileError as error:
            self._failed[key] = type(error)(str(error))
            raise
        except Exception as error:  # such as no memory for the first run of the full graph
            first = (str(error).strip() or "no message").splitlines()[0]
            failure = BackendError(
                f"compiling for a call like this failed: {type(error).__name__}: {first}"
            )
            self._failed[key] = BackendError(str(failure))
            raise failure from error

    def forget_failures(self) -> None:
        """Try again what could not be captured or compiled."""
        with self.lock:
            self._failed.clear()
            self.captures.forget_failures()

    def shrink(self, budget: int) -> list[Program]:
        """Drop what was least recently used until the rest takes ``budget`` bytes or less.

        The latest program stays in any case, and those loaded from a file.

        Returns:
            The programs dropped. Runs that are under way keep theirs to the end.
        """
        with self.lock:
            dropped = []
            while len(self._programs) > 1 and self._nbytes() > budget:
                key = next(iter(self._programs))
                dropped.append(self._programs.pop(key))
                if key[0] not in {network for network, *_ in self._programs}:
                    self.captures.drop(key[0])
            known = set(self.captures.networks())
            self._failed = {key: why for key, why in self._failed.items() if key[0] in known}
            self._fixed_sizes = {pair for pair in self._fixed_sizes if pair[0] in known}
            return dropped

    def clear(self) -> None:
        """Drop all programs, but for those loaded from a file."""
        with self.lock:
            self._programs.clear()
            self._fixed_sizes.clear()
            self.captures.clear()
            self.forget_failures()

    def _nbytes(self) -> int:
        networks = bytes_of_networks(self.captures.networks())
        return networks + sum(bytes_of_graphs(one.all_graphs) for one in self._programs.values())

    def _with_full_graph(
        self, network: CapturedNetwork, wanted: ProgramSpec, backend: Backend
    ) -> Program | None:
        """A program with forecasts of other lengths, which has the full graph compiled."""

        def outputs(spec: ProgramSpec) -> tuple[tuple[int, ...], bool]:
            return spec.depths, spec.probe is not None

        for (other, spec, compiler), program in self._programs.items():
            alike = outputs(spec) == outputs(wanted) and program.full.folded is None
            if other is network and compiler == backend and alike:
                return program
        return None

    def _refuse_unnamed_state(self, programs: Iterable[Program]) -> None:
        """A loaded program looks up weights by name; for all else it would use saved values."""
        loose = tensors_in_containers(self._module)
        for program in programs:
            for weight in (w for graph in program.all_graphs for w in graph.convention.weights):
                where = isinstance(weight, Constant) and loose.get(weight.value.data_ptr())
                if where:
                    raise ArtifactError(
                        f"the network reads {where}, a tensor that has no name of its own, so a "
                        "saved program could not look it up: make it a parameter, buffer or "
                        "attribute of a submodule (modules in a list: use nn.ModuleList)"
                    )
