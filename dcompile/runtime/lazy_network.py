"""A network whose results another one reads: each is computed when it is read, and only then.

A ControlNet runs before the denoiser, which adds its results, the residuals, to its own features.
On a reuse step the denoiser reads the residuals outside of the cut and no others. So the ControlNet
returns lazy outputs (``LazyTensor``), and when the denoiser has decided which graph to run, it asks
for the residuals that graph reads: a graph that contains nothing else computes them. That is exact
with every schedule, and needs no knowledge of it: a refresh asks for all. Anything else that reads
a lazy output gets the true tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from dcompile.backends import Backend
from dcompile.compat.tensors import version_of
from dcompile.compiler.call import CallForm, CallForms
from dcompile.compiler.lazy import LazyTensor, PendingCall, materialize
from dcompile.compiler.program_memory import DEFAULT_BUDGET
from dcompile.compiler.signature import numbers_to_tensors, signature_of
from dcompile.errors import CaptureError, DcompileError
from dcompile.notices import warn
from dcompile.runtime.binder import Refusal
from dcompile.runtime.partial_programs import BoundPartialProgram, PartialPrograms
from dcompile.runtime.tracking import StepTracker
from dcompile.runtime.wrapper import ForwardWrapper


class LazyNetwork(ForwardWrapper):
    """Replaces the ``forward`` of a companion of the denoiser.

    Holds no weights: they are looked up in the live module. Where a network cannot be captured, or
    returns less than two tensors, its own forward runs, as if this were not there.

    Attributes:
        programs: what was captured and compiled of it.
        users: the denoisers' wrappers that read its results; it is removed with the last of them.
    """

    __slots__ = (
        "_constant_numbers",
        "_direct",
        "_enabled",
        "_forms",
        "_leaf",
        "_tracker",
        "_unsuited",
        "programs",
        "users",
    )

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        backend: Backend,
        verbose: bool,
        memory: int = DEFAULT_BUDGET,
        channels_last: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(module, original)
        self.users: weakref.WeakSet[ForwardWrapper] = weakref.WeakSet()
        self._forms = CallForms(original)
        self._direct = threading.local()  # set in a thread that calls the module's own forward
        # A list of networks is built in training mode, whatever they are in; .train() reaches all.
        self._leaf = next((m for m in module.modules() if not any(m.children())), module)
        self.programs = PartialPrograms(module, lambda: self.original)
        self.configure(backend, verbose, memory, channels_last)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def configure(
        self,
        backend: Backend,
        verbose: bool,
        memory: int = DEFAULT_BUDGET,
        channels_last: bool | Literal["auto"] = "auto",
    ) -> None:
        """Use another backend, and programs of ``memory`` bytes, from the next call on."""
        self.programs.configure(backend, verbose, memory, channels_last)
        self._begin()

    def _begin(self) -> None:
        self._tracker = StepTracker()
        # Whether numbers among the arguments are constants of the graph, and whether this network
        # cannot be served here at all.
        self._constant_numbers = self._unsuited = False
        self._enabled = True

    def follow_users(self) -> None:
        """Be enabled as long as one of the users is, and removed with the last."""
        self._enabled = any(user.enabled for user in self.users)
        if not self.users:
            self.uninstall()

    def uninstall(self) -> None:
        """Give the module its own forward back, and its weights their layout."""
        super().uninstall()
        self.programs.layout.restore()

    def state(self) -> tuple[Any, ...]:
        """What ``restore`` takes."""
        return self._enabled, self.programs.state()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Be configured as before, with what was compiled then."""
        enabled, programs = state
        self.programs.restore(programs)
        self._begin()
        self._enabled = enabled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._runs_directly():
            return self._call_original(args, kwargs)
        leaves, form = self._forms.flatten(args, kwargs)
        if form is None or not all(isinstance(leaves[n], torch.Tensor) for n in form.samples):
            return self._call_original(args, kwargs)
        leaves = materialize(leaves)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
        ):
            return self._call_original(args, kwargs)
        # A sampling loop may change its sample in place before the results are read.
        for place in form.samples:
            leaves[place] = leaves[place].clone(memory_format=torch.preserve_format)
        given = list(leaves)
        # Numbers may differ from step to step, such as an adapter's weight.
        others = [n for n, leaf in enumerate(leaves) if n != form.timestep and type(leaf) is float]
        numbers = numbers_to_tensors(
            leaves, form.timestep, () if self._constant_numbers else others
        )
        signature, conditioning = signature_of(form, leaves, numbers)
        run, _, step = self._tracker.enter(leaves[form.timestep], conditioning)
        bound = run.programs.get(signature)
        if bound is None:
            bound = self._bind(leaves, form, numbers.keys() - {form.timestep})
            if isinstance(bound, Refusal):  # in another way, or by its own forward
                return bound.result[0] if bound.result else self(*args, **kwargs)
            run.programs[signature] = bound
        pending = self._pending_call(bound, given, leaves, form, last=step + 1 == run.steps)
        results = bound.program.results
        outputs = [LazyTensor(like, pending, number) for number, like in enumerate(results)]
        return tree_unflatten(outputs, bound.program.network.out_spec)

    def _call_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # perhaps it is this network that is captured
            return self.original(*args, **kwargs)
        with self.programs.gate.call():
            return self.original(*args, **kwargs)

    def _runs_directly(self) -> bool:
        """Whether a call goes to the module's own forward."""
        return (
            not self._enabled
            or self._unsuited
            or (self._leaf.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or getattr(self._direct, "on", False)
        )

    def _pending_call(
        self,
        bound: BoundPartialProgram,
        given: list[Any],
        leaves: list[Any],
        form: CallForm,
        *,
        last: bool,
    ) -> PendingCall:
        """The call, to be computed when its results are read.

        Args:
            bound: the program that serves it.
            given: its leaves as they were given.
            leaves: the same, with numbers as tensors.
            form: which of them are what.
            last: it is at the last step of its run.
        """
        program, versions = bound.program, _versions(given)
        home = leaves[form.sample].device
        autocast = _autocast_of(home.type)

        def compute(numbers: tuple[int, ...]) -> Sequence[torch.Tensor]:
            if _versions(given) != versions:
                raise CaptureError(
                    f"an argument of {type(self.module).__name__} was changed in place after the "
                    "call and before its results were read, which are computed only then: change "
                    "a copy, or call dcompile.handle(pipe).disable()"
                )
            try:
                graph = self.programs.graph(bound, numbers, leaves, home)
            except DcompileError as error:
                self._give_up(str(error).splitlines()[0])
                graph = None
            if graph is None:
                own_args, own_kwargs = tree_unflatten(given, form.spec)
                return self._call_directly(own_args, own_kwargs, numbers)
            with torch.no_grad(), autocast():
                computed = graph(bound.leaves(leaves))
            if last:
                bound.hoisted = []
            return [
                _with_strides_of(program.results[number], value)
                for number, value in zip(numbers, computed, strict=True)
            ]

        return PendingCall(compute, len(program.results))

    def _bind(
        self, leaves: list[Any], form: CallForm, numbers: Collection[int]
    ) -> BoundPartialProgram | Refusal:
        """The program for such calls, or why they are to be served in another way.

        Args:
            leaves: of the call.
            form: which of them are what.
            numbers: positions of numbers that were converted to tensors.
        """
        try:
            bound = self.programs.bind(leaves, form)
        except DcompileError as error:
            reason = str(error).splitlines()[0]
            if numbers:
                self._constant_numbers = True
                return Refusal(reason)
            self._give_up(reason)
            return Refusal(reason, getattr(error, "uncached_result", ()))
        if len(bound.program.results) < 2:
            self._unsuited = True
            return Refusal("it returns a single tensor")
        return bound

    def _call_directly(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Results of the module's own forward, with whatever hooks are around it."""
        self._direct.on = True
        try:
            with torch.no_grad():
                results = tree_leaves(self.module(*args, **kwargs))
        finally:
            self._direct.on = False
        return [results[number] for number in numbers]

    def _give_up(self, reason: str) -> None:
        self._unsuited = True
        warn(f"{type(self.module).__name__} computes all its results at every step: {reason}")


def _versions(leaves: Sequence[Any]) -> list[int | None]:
    """What changes when a tensor among them is written to in place."""
    return [version_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _autocast_of(kind: str) -> Callable[[], Any]:
    """Makes context managers that set autocast as it is now, for this type of device."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)


def _with_strides_of(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value laid out as announced: compiled code relies on that."""
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(
        like.shape, like.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)
