"""What runs a kind of call: found among what was compiled, or captured and compiled now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dcompile.compiler.call import CallForms
from dcompile.compiler.capture_cache import TrainingModeError
from dcompile.compiler.fingerprint import ToggleSnapshot
from dcompile.compiler.lazy import materialize
from dcompile.compiler.program_cache import ProgramCache
from dcompile.compiler.reader import Call
from dcompile.compiler.roles import Roles
from dcompile.errors import BackendError, CaptureError, DcompileError
from dcompile.progress import Display
from dcompile.runtime.binder import Refusal, Runner
from dcompile.runtime.settings import Settings
from dcompile.runtime.state import State
from dcompile.runtime.tracking import Run


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
        self.training_matters = False
        self._begin(roles)

    def _begin(self, roles: Roles) -> None:
        self.forms = CallForms(self._forward(), roles)
        self.programs = ProgramCache(self._module, self._forward, self.forms)

    def configure(self, settings: Settings) -> None:
        """Forget failures, and all programs if other arguments are asked for."""
        if settings.roles != self.forms.asked:
            self._begin(settings.roles)
        self.programs.forget_failures()
        self._raised = set()
        self.training_matters = False

    def bind(self, state: State, run: Run, call: Call) -> Runner | Refusal:
        """A program for this call with the module's weights, for the lanes of this run.

        Raises:
            DcompileError: there is none, and that is to be raised.
        """
        run.toggles = ToggleSnapshot(self._module)
        try:
            runner: Runner | Refusal = self.runner_for(state, call)
        except TrainingModeError as error:
            self.training_matters = True
            return Refusal(str(error), error.uncached_result)
        except DcompileError as error:
            if self._is_raised(state.settings, error):
                raise
            run.programs[call.signature] = Refusal(str(error))
            return Refusal(str(error), getattr(error, "uncached_result", ()))
        run.programs[call.signature] = runner
        return runner

    def runner_for(self, state: State, call: Call) -> Runner:
        """A program for this call with the module's weights: found, or captured and compiled.

        Raises:
            DcompileError: there is none.
        """
        form = call.form
        assert form is not None
        with self.programs.lock:
            display = Display(type(self._module).__name__, state.settings.verbose)
            try:
                standard = self.forms.standard(form, materialize(call.leaves))
                program = self.programs.program_for(
                    standard, state.settings.target, display, state.notices
                )
            finally:
                state.counters.built(display)
            return state.binder.bind(program, standard)

    def _is_raised(self, settings: Settings, error: DcompileError) -> bool:
        """Whether to raise it: a wrong setting is raised once, then the network runs uncached."""
        if settings.on_error == "raise":
            return True
        if isinstance(error, (CaptureError, BackendError)) or str(error) in self._raised:
            return False
        self._raised.add(str(error))
        return True
