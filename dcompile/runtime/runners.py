"""What runs a kind of call: found among what was compiled, or captured and compiled now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from dcompile.compiler.call import CallForms
from dcompile.compiler.capture_cache import TrainingModeError
from dcompile.compiler.capture_limits import MAX_IN_RUN
from dcompile.compiler.lazy import materialize
from dcompile.compiler.observed_capture import UndecidedError
from dcompile.compiler.program_cache import ProgramCache
from dcompile.compiler.reader import Call
from dcompile.compiler.roles import Roles
from dcompile.compiler.side_effects import undone
from dcompile.compiler.weight_identities import WeightIdentities
from dcompile.compiler.weight_layout import WeightLayout
from dcompile.errors import BackendError, CaptureError, DcompileError
from dcompile.progress import Display
from dcompile.runtime.binder import Refusal, Runner
from dcompile.runtime.run import Run
from dcompile.runtime.settings import Settings
from dcompile.runtime.state import State

# Of a result, between a number and a tensor of the same value, in units of the last place of its
# dtype: a tensor has fewer digits.
NUMBER_TOLERANCE = 64


class Runners:
    """Finds what runs a call, or why nothing does. Used once for each run and kind of call.

    Args:
        module: the network.
        forward: returns its own forward, as it is now.
        roles: names of the sample's and the timestep's parameter, where they were given.

    Attributes:
        forms: the forms of the network's calls.
        programs: everything captured and compiled so far.
        training_matters: the network is known to compute something else in training mode.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[[], Callable[..., Any]], roles: Roles
    ) -> None:
        self._module = module
        self._forward = forward
        self._raised: set[str] = set()
        self._compared: set[Any] = set()  # signatures with numbers that may as well be tensors
        self.training_matters = False
        self._token: object | None = None
        self._begin(roles)

    def _begin(self, roles: Roles) -> None:
        self.forms = CallForms(self._forward(), roles)
        self.programs = ProgramCache(self._module, self._forward, self.forms)

    def configure(self, settings: Settings) -> None:
        """Forget failures, and all programs if other arguments are asked for."""
        if settings.roles != self.forms.asked:
            self.layout.restore()
            self._begin(settings.roles)
        self.layout.configure(settings.channels_last, settings.backend)
        self.programs.forget_failures()
        self._raised = set()
        self.training_matters = False

    @property
    def layout(self) -> WeightLayout:
        """Of the network's weights."""
        return self.programs.captures.layout

    def bind(self, state: State, run: Run, call: Call) -> Runner | Refusal:
        """A program for this call with the module's weights, for the lanes of this run.

        Raises:
            DcompileError: there is none, and that is to be raised.
        """
        before = self.programs.captures.count
        try:
            allowed = MAX_IN_RUN - run.captures if run.step > 0 else None
            runner: Runner | Refusal = self.runner_for(state, call, allowed)
            run.captures += self.programs.captures.count - before
        except TrainingModeError as error:
            self.training_matters = True
            return Refusal(str(error), error.uncached_result)
        except DcompileError as error:
            form = call.form
            assert form is not None
            if call.numbers.keys() - {form.timestep} and isinstance(error, CaptureError):
                # Perhaps only because numbers were made tensors: from now on they are constants.
                state.reader.keep_constant(form)
                return Refusal(str(error), error.uncached_result)
            if isinstance(error, UndecidedError):  # the next call decides
                return Refusal(str(error), error.uncached_result)
            if self._is_raised(state.settings, error):
                raise
            run.programs[call.signature] = Refusal(str(error))
            return Refusal(str(error), getattr(error, "uncached_result", ()))
        run.programs[call.signature] = runner
        with self.programs.lock:  # a capture puts others in the parameters' places meanwhile
            token = self.programs.captures.token
            if token is None or token is not self._token:
                self._token = token
                self._weights = WeightIdentities(self._module)
            run.watch, run.weights = self.programs.captures.watch, self._weights
        return runner

    def runner_for(self, state: State, call: Call, allowed: int | None = None) -> Runner:
        """A program for this call with the module's weights: found, or captured and compiled.

        Args:
            allowed: how many captures, if it is for a run that has begun; None for any number.

        Raises:
            DcompileError: there is none.
        """
        form = call.form
        assert form is not None
        with self.programs.lock:
            display = Display(type(self._module).__name__, state.settings.verbose)
            self.programs.captures.limits.allowed = allowed
            try:
                standard = self.forms.standard(form, materialize(call.leaves))
                if state.settings.new_calls == "uncached":
                    self.programs.require_known(standard, state.settings.target, display)
                program = self.programs.program_for(
                    standard, state.settings.target, display, state.notices
                )
                if call.numbers and call.signature not in self._compared:
                    self._require_tensors_alike(call)
                    self._compared.add(call.signature)
                self._shrink(state)
            finally:
                state.counters.built(display)
            return state.binder.bind(program, standard, self.programs.captures.token)

    def _shrink(self, state: State) -> None:
        budget = state.settings.program_memory
        dropped = self.programs.shrink(budget)
        if dropped:
            state.binder.release(dropped)
            state.notices.warn(
                f"the programs of {type(self._module).__name__} take more than program_memory="
                f"{budget}: those least recently used are dropped, and compiled again when they "
                "are needed"
            )

    def clear(self) -> None:
        """Drop everything captured and compiled, but for what was loaded from a file."""
        self.programs.clear()
        self._compared.clear()

    def _require_tensors_alike(self, call: Call) -> None:
        """Refuse a network that computes something else from a number than from a tensor.

        Some make tensors of their own of a number, such as integers of a float.

        Raises:
            CaptureError: it does so, at this value or at a slightly larger one.
        """
        assert call.form is not None
        forward, leaves = self._forward(), materialize(call.leaves)
        for offset in (0.0, 0.37):  # a whole number hides that integers are made of it
            given, converted = list(leaves), list(leaves)
            for place, number in call.numbers.items():
                if offset and not isinstance(number, float):
                    continue
                given[place] = number + offset if offset else number
                converted[place] = leaves[place] + offset
            results = []
            for variant in (given, converted):
                args, kwargs = tree_unflatten(variant, call.form.spec)
                with torch.no_grad(), undone(args, kwargs, forward):
                    results.append(tree_leaves(forward(*args, **kwargs)))
            same = _equal if call.numbers.keys() - {call.form.timestep} else _alike
            if not all(map(same, *results)):
                names = ", ".join(call.form.names[place] for place in call.numbers)
                raise CaptureError(
                    f"{type(self._module).__name__} computes something else from a number as "
                    f"{names} than from a tensor of the same value: pass a tensor. It runs uncached"
                )

    def _is_raised(self, settings: Settings, error: DcompileError) -> bool:
        """Whether to raise it: a wrong setting is raised once, then the network runs uncached."""
        if settings.on_error == "raise":
            return True
        if isinstance(error, (CaptureError, BackendError)) or str(error) in self._raised:
            return False
        self._raised.add(str(error))
        return True


def _equal(one: Any, other: Any) -> bool:
    """Bit for bit: a number that is rounded to a tensor's dtype first is another one."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one is other or one == other)


def _alike(one: Any, other: Any) -> bool:
    """Equal but for rounding."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one is other or one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    difference = (one.double() - other.double()).norm()
    allowed = NUMBER_TOLERANCE * torch.finfo(one.dtype).eps
    return bool(difference <= allowed * other.double().norm())
