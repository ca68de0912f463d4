"""What a user calls: ``cache_compile`` to make a network faster, ``handle`` to see and steer it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from dcompile.backends import GraphCompiler, resolve
from dcompile.dispatch import Dispatcher, Settings, Stats
from dcompile.errors import BackendError, DcompileError, DepthError, NotCompiledError, ScheduleError
from dcompile.report import Explanation, explain
from dcompile.schedule import Schedule, Uniform

M = TypeVar("M")

_SLOTS = ("forward", "_old_forward")  # where a module's forward may be: accelerate moves it


def cache_compile(
    module: M,
    *,
    interval: int | None = None,
    schedule: Schedule | None = None,
    depth: int = 0,
    backend: str | GraphCompiler = "inductor",
    dynamic: bool = False,
    cuda_graphs: bool | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> M:
    """Make a skip-connection diffusion network reuse its deep features across sampling steps.

    The network is changed in place: its ``forward`` is replaced, everything else stays, and
    ``handle(module).remove()`` undoes it. It is captured and compiled at the first call, once for
    each call signature (shapes, dtypes, devices, constants). Calling ``cache_compile`` again
    replaces the settings and keeps the compiled programs that still fit.

    Only inference is cached: in training mode, or if an input requires grad, the network runs as
    if it had not been compiled. Outputs carry no gradient.

    Args:
        module: the network, called as ``(sample, timestep, ...)``: a diffusers UNet or any module
            whose graph has skip connections. Or a whole pipeline: its denoiser is taken. Of a
            ``torch.compile``\\ d module the original is taken, compiled and returned.
        interval: refresh every ``interval``-th step, as DeepCache does; 3 if neither this nor
            ``schedule`` is given.
        schedule: decides which steps refresh; see ``dcompile.schedule``.
        depth: the skip connection to cut at: 0, the outermost, is fastest; deeper is closer to
            the uncached result. Equals DeepCache's ``cache_branch_id``.
        backend: "inductor", "eager" (exact), any name of ``torch.compiler.list_backends()``, or a
            callable ``(graph_module, example_inputs) -> callable``.
        dynamic: capture once for many sizes instead of once for each.
        cuda_graphs: record both graphs as CUDA graphs, which takes the launch overhead off a step;
            "auto" does so on CUDA devices. Costs one set of input buffers for each call
            signature.
        options: Inductor settings, such as ``{"max_autotune": True}`` or, on CPUs,
            ``{"freezing": True}``.
        verbose: show on standard error what is captured and compiled.

    Returns:
        The same object; of a ``torch.compile``\\ d module, the module inside.

    Raises:
        ScheduleError: a bad interval or schedule, or both given.
        DepthError: ``depth`` is negative or no int. Beyond the deepest: at the first call.
        BackendError: unknown backend or option; CUDA graphs asked for without a CUDA device.
        DcompileError: a pipeline without a recognisable denoiser.
        TimestepError: the network's forward takes no timestep.
    """
    settings = Settings(
        schedule=_chosen_schedule(interval, schedule),
        depth=_checked_depth(depth),
        backend=resolve(backend, options),
        dynamic=dynamic,
        verbose=verbose,
        cuda_graphs=_checked_cuda_graphs(cuda_graphs),
    )
    if _is_pipeline(module):
        name = _denoiser_name(module)
        network = _without_torch_compile(getattr(module, name))
        if network is not getattr(module, name):
            setattr(module, name, network)
        _install(network, settings)
        return module
    if not isinstance(module, nn.Module):
        raise DcompileError(
            "cache_compile takes a torch.nn.Module or a diffusers pipeline, got "
            f"{type(module).__name__}"
        )
    network = _without_torch_compile(module)
    _install(network, settings)
    return cast(M, network)


class Handle:
    """Steers one compiled module; ``handle(module)`` makes it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @property
    def module(self) -> nn.Module:
        return self._dispatcher.module

    @property
    def enabled(self) -> bool:
        return self._dispatcher.enabled

    @property
    def stats(self) -> Stats:
        """Counts since the last ``cache_compile``."""
        return self._dispatcher.stats()

    def enable(self) -> None:
        """Cache again, after ``disable`` or after a failed compile."""
        self._dispatcher.enabled = True

    def disable(self) -> None:
        """Run uncached, as before ``cache_compile``, and drop what is cached."""
        self._dispatcher.enabled = False
        self._dispatcher.release()

    def reset(self) -> None:
        """Drop what is cached: the next step of every running generation refreshes."""
        self._dispatcher.reset()

    def remove(self) -> None:
        """Give the module its own forward back. Afterwards it is no longer a compiled one."""
        dispatcher, module = self._dispatcher, self.module
        self.disable()
        for slot in _SLOTS:
            if module.__dict__.get(slot) is dispatcher:
                if slot in dispatcher.replaced:
                    module.__dict__[slot] = dispatcher.replaced[slot]
                elif slot == "forward":
                    del module.__dict__[slot]
                else:
                    module.__dict__[slot] = dispatcher.original
                if dispatcher.compiled_call is not None:
                    module._compiled_call_impl = dispatcher.compiled_call
                return
        warnings.warn(
            f"{type(module).__name__}.forward was replaced by something else since cache_compile; "
            "dcompile is switched off beneath it",
            stacklevel=2,
        )

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What can be cut where, and what it saves: a table, and a dict (``as_dict()``).

        Args:
            args, kwargs: an example call of the network; only shapes matter. Without one, the
                network as it was called first.

        Raises:
            NotCompiledError: no example, and the network was not called yet.
            CaptureError: the network cannot be captured.
        """
        dispatcher = self._dispatcher
        networks = dispatcher.networks()
        if args or kwargs:
            network = dispatcher.network_for(args, kwargs)
        elif networks:
            network = networks[0]
        else:
            raise NotCompiledError(
                "nothing is captured yet: call the network or its pipeline once, or give an "
                "example call: handle(unet).explain(sample, timestep, ...)"
            )
        return explain(network, dispatcher.settings.depth, type(self.module).__name__)


def handle(module: Any) -> Handle:
    """The handle of a module, or of a pipeline's denoiser, that ``cache_compile`` was called on.

    Raises:
        NotCompiledError: it was not.
    """
    network = getattr(module, _denoiser_name(module)) if _is_pipeline(module) else module
    dispatcher = _dispatcher_of(getattr(network, "_orig_mod", network))
    if dispatcher is None:
        raise NotCompiledError(
            f"this {type(network).__name__} is not compiled: call dcompile.cache_compile first"
        )
    return Handle(dispatcher)


def _install(network: nn.Module, settings: Settings) -> None:
    dispatcher = _dispatcher_of(network)
    if dispatcher is not None:
        dispatcher.configure(settings)
        return
    # Beneath accelerate's hooks, which move weights to the device before they call this.
    slot = "_old_forward" if "_old_forward" in network.__dict__ else "forward"
    dispatcher = Dispatcher(network, getattr(network, slot), settings)
    if slot in network.__dict__:
        dispatcher.replaced[slot] = network.__dict__[slot]
    if network._compiled_call_impl is not None:  # nn.Module.compile() calls around our forward
        dispatcher.compiled_call = network._compiled_call_impl
        network._compiled_call_impl = None
    network.__dict__[slot] = dispatcher


def _dispatcher_of(network: Any) -> Dispatcher | None:
    for slot in _SLOTS:
        found = getattr(network, "__dict__", {}).get(slot)
        if isinstance(found, Dispatcher):
            return found
    return None


def _without_torch_compile(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def _chosen_schedule(interval: int | None, schedule: Schedule | None) -> Schedule:
    if interval is not None and schedule is not None:
        raise ScheduleError(
            f"give either interval (got {interval!r}) or schedule (got {schedule!r}), not both"
        )
    if schedule is None:
        return Uniform(3 if interval is None else interval)
    if not callable(getattr(schedule, "refresh", None)):
        raise ScheduleError(
            f"schedule: expected an object with refresh(step, steps) -> bool, got {schedule!r}"
        )
    try:
        inspect.signature(schedule.refresh).bind(0, None)
    except TypeError as error:
        raise ScheduleError(
            f"schedule: {schedule!r} must have refresh(step, steps) -> bool; {error}"
        ) from error
    return schedule


def _checked_depth(depth: int) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise DepthError(f"depth: expected an int of at least 0, got {depth!r}")
    return depth


def _checked_cuda_graphs(wanted: bool | Literal["auto"]) -> bool | Literal["auto"]:
    if wanted not in (True, False, "auto"):
        raise BackendError(f'cuda_graphs: expected "auto", True or False, got {wanted!r}')
    if wanted is True and not torch.cuda.is_available():
        raise BackendError(
            'cuda_graphs=True, and there is no CUDA device here; "auto" uses CUDA graphs where '
            "there is one"
        )
    return wanted


def _is_pipeline(module: Any) -> bool:
    return not isinstance(module, nn.Module) and isinstance(
        getattr(module, "components", None), dict
    )


def _denoiser_name(pipeline: Any) -> str:
    """The component that is called with a timestep. Usual names settle it if there are several."""
    timed: list[str] = [
        name
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and _takes_timestep(_without_torch_compile(component))
    ]
    preferred: tuple[str, ...] = ("unet", "transformer", *(timed if len(timed) == 1 else ()))
    for name in preferred:
        if name in timed:
            return name
    raise DcompileError(
        f"{type(pipeline).__name__} has no single denoiser: components called with a timestep are "
        f"{', '.join(timed) or 'none'}. Pass the network itself: cache_compile(pipe.<name>)"
    )


def _takes_timestep(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return any("time" in name.lower() for name in names[1:])
