"""Other components of a pipeline, compiled: the VAE's decoder, text encoders.

Each is compiled by ``torch.compile``, in place, at its first call. The wrapper is there for what
``nn.Module.compile`` does not do: it lies beneath accelerate's hooks, which move weights before a
call; it goes back to the module's own forward when compiling fails; and it can be removed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from dcompile.backends import Backend, torch_compile_arguments
from dcompile.compat.dynamo import compiler_error
from dcompile.compat.hooks import (
    forward_slot,
    has_compiled_call,
    moves_parts,
    without_torch_compile,
)
from dcompile.errors import root_cause
from dcompile.notices import warn
from dcompile.progress import Display
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.wrapper import ForwardWrapper, wrapper_of

_installed: weakref.WeakSet[CompiledComponent] = weakref.WeakSet()  # each is owned by its module


class CompiledComponent(ForwardWrapper):
    """Replaces the ``forward`` of a module by one that ``torch.compile`` made.

    Attributes:
        users: wrappers of the denoisers of the same pipelines; it is removed with the last.
        backend: its kind decides how this is compiled.
    """

    __slots__ = ("_code", "_runs_compiled", "_verbose", "backend", "users")

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], backend: Backend, verbose: bool
    ) -> None:
        super().__init__(module, original)
        self.users: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
        self.backend: Backend | None = None
        self.configure(backend, verbose)

    def configure(self, backend: Backend, verbose: bool) -> None:
        """Compile with another backend, from the next call on; what fits is kept.

        What could not be compiled is tried again.
        """
        self._verbose = verbose
        self._runs_compiled = True
        if backend != self.backend:
            self.backend = backend
            self._code: Callable[..., Any] | None = None

    @property
    def enabled(self) -> bool:
        return self._runs_compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (copy := self.copy_that_is_called()) is not None:
            return type(copy).forward(copy, *args, **kwargs)
        # Under somebody else's torch.compile the module becomes part of their graph.
        if not self._runs_compiled or torch.is_grad_enabled() or is_compiling():
            return self.original(*args, **kwargs)
        name = type(self.module).__name__
        if moves_parts(self.module):
            self._give_up()
            warn(
                f"{name} runs uncompiled: hooks (sequential or group offloading, layerwise "
                "casting) change its weights one part after another"
            )
            return self.original(*args, **kwargs)
        is_first = self._code is None
        try:
            with Display(name, self._verbose).stage("compiling") if is_first else nullcontext():
                return self._compiled()(*args, **kwargs)
        except Exception as error:
            # If the call itself is wrong, this raises what it would have raised uncompiled.
            result = self.original(*args, **kwargs)
            self._give_up()
            cause = root_cause(compiler_error(error))
            warn(f"{name} runs uncompiled, for compiling it failed: {cause}")
            return result

    def _compiled(self) -> Callable[..., Any]:
        if self._code is None:
            assert self.backend is not None
            arguments = torch_compile_arguments(self.backend)
            self._code = torch.compile(self.original, dynamic=False, **(arguments or {}))
        return self._code

    def _give_up(self) -> None:
        self._runs_compiled = False
        self._code = None

    def uninstall(self) -> None:
        super().uninstall()
        _installed.discard(self)


def install_components(
    modules: Iterable[nn.Module], dispatcher: Dispatcher, backend: Backend, verbose: bool
) -> None:
    """Have these modules, and no others, run compiled in the pipeline of this denoiser.

    Those that somebody compiled already stay as they are, and with a backend that compiles nothing
    (eager) all do.
    """
    wanted = [] if torch_compile_arguments(backend) is None else list(modules)
    for component in components_of(dispatcher):
        if component.module not in wanted:
            _detach(component, dispatcher)
    for module in wanted:
        found = wrapper_of(module)
        if isinstance(found, CompiledComponent):
            found.configure(backend, verbose)
        elif (
            found is None
            and without_torch_compile(module) is module
            and not has_compiled_call(module)
        ):
            slot = forward_slot(module)
            found = CompiledComponent(module, getattr(module, slot), backend, verbose)
            found.install(slot)
        if isinstance(found, CompiledComponent):
            found.users.add(dispatcher)
            _installed.add(found)


def components_of(dispatcher: Dispatcher) -> list[CompiledComponent]:
    """What runs compiled in the pipeline of this denoiser."""
    return [component for component in _installed if dispatcher in component.users]


def detach_components(dispatcher: Dispatcher) -> None:
    """Remove what runs compiled for this denoiser, unless another one uses it, too."""
    for component in components_of(dispatcher):
        _detach(component, dispatcher)


def restore_components(components: Iterable[CompiledComponent], dispatcher: Dispatcher) -> None:
    """Have again what ``components_of`` returned earlier."""
    for component in components:
        if wrapper_of(component.module) is None:
            component.install(forward_slot(component.module))
        component.users.add(dispatcher)
        _installed.add(component)


def _detach(component: CompiledComponent, dispatcher: Dispatcher) -> None:
    component.users.discard(dispatcher)
    if not component.users:
        component.uninstall()
