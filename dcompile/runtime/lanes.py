"""Lanes: what one of the calls of a step has cached, and the arithmetic of its forecasts.

Unbatched guidance calls the network twice a step, and the two calls must not share a cache. Lanes
are distinguished by their conditioning: tensors a pipeline holds for the whole run, such as prompt
embeddings, and by their call signature.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dcompile.compat.storages import storage_of, weak_storage
from dcompile.compiler.program import CacheLayout, Program
from dcompile.policy.forecast import Damped, Forecast, coefficients_of
from dcompile.runtime.cuda_graphs import HeldBoundary
from dcompile.runtime.damping import Damping
from dcompile.runtime.hoisting import Hoisted, followed_by_hoisted
from dcompile.runtime.memory import available_bytes
from dcompile.runtime.readback import Readback


@dataclass(eq=False)
class Anchor:
    """One conditioning tensor, held weakly: its storage, with the offset in it.

    A storage that was freed meanwhile proves nothing, unless it was held from one step to the next:
    then its run is over.
    """

    __slots__ = ("offset", "storage")

    storage: weakref.ref[Any]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Anchor:
        """Hold on to this tensor weakly."""
        return Anchor(weak_storage(tensor), int(tensor.storage_offset()))

    @property
    def alive(self) -> bool:
        """Whether the storage still exists."""
        return self.storage() is not None


@dataclass(eq=False)
class Lane:
    """One of several calls at the same timestep, and what it cached.

    Attributes:
        anchors: the conditioning.
        steady: whether a later step came with the same conditioning.
        signature: of the calls; None before the first refresh.
        program: what made the cached values; None before the first refresh.
        bound: the program with the module's weights as they were when this lane began: what a
            pipeline swaps between two calls of a step stays with each.
        cached: as ``Program.cached`` lays it out, or a ``HeldBoundary``. The lane owns it: it is
            freed with the lane.
        refreshed: for each cut the steps that made what is cached, the latest first.
        damping: for each cut, of its damped forecast.
        finite: whether what is cached is finite, if that number is still on its way from a device.
        hoisted: what the program's prologue computed; owned and freed as what is cached.
    """

    anchors: tuple[Anchor, ...]
    steady: bool = False
    signature: Any = None
    program: Program | None = None
    bound: Any = None
    cached: Any = ()
    refreshed: tuple[tuple[int, ...], ...] = ()
    damping: tuple[Damping, ...] = ()
    finite: Readback | None = None
    hoisted: Hoisted | None = None

    # Whose call is it?

    def contradicts(self, conditioning: Sequence[torch.Tensor], signature: Any = None) -> bool:
        """Whether a call with this conditioning and signature is certainly not this lane's."""
        if (
            signature is not self.signature
            and None not in (signature, self.signature)
            and signature != self.signature
        ):
            return True
        if len(conditioning) != len(self.anchors):
            return True
        for anchor, tensor in zip(self.anchors, conditioning, strict=True):
            storage = anchor.storage()
            if storage is None:
                if self.steady:
                    return True
            elif storage is not storage_of(tensor) or anchor.offset != tensor.storage_offset():
                return True
        return False

    def note_steady(self) -> None:
        """A later step came with the same conditioning, as far as it still exists."""
        if not self.steady and self.anchors:
            self.steady = all(anchor.alive for anchor in self.anchors)

    def is_more_than_there_is_room_for(self) -> bool:
        """Whether memory would get short if one more lane cached as much as this one."""
        held = self.tensors()
        taken = sum(tensor.nbytes for tensor in held)
        return taken > 0 and available_bytes(held[0].device) < 2 * taken

    def tensors(self) -> list[torch.Tensor]:
        """All that it keeps."""
        values = tree_leaves(getattr(self.cached, "tensors", self.cached))
        hoisted = () if self.hoisted is None else self.hoisted.tensors
        return [value for value in (*values, *hoisted) if isinstance(value, torch.Tensor)]

    # What does it take?

    def leaves(self, bound: Any, leaves: Sequence[Any], *, refreshes: bool) -> Sequence[Any]:
        """A call's leaves, with what is the same at every step after them if its program wants it.

        Args:
            bound: the program, with the module's weights.
            leaves: of the call.
            refreshes: a refresh step has the time to look at the weights, too.
        """
        if bound.prologue is None:
            return leaves
        given, self.hoisted = followed_by_hoisted(
            leaves, bound.prologue, self.hoisted, thoroughly=refreshes
        )
        return given

    def required_level(self, wanted: int, due: Sequence[int]) -> int:
        """The level to run: the one wanted, raised by what is missing or stale.

        Args:
            wanted: the plan's level.
            due: for each cut the latest step at which it was due in this run, now included.
        """
        if not self.cached:
            return len(due)
        for cut in range(len(due) - 1, wanted - 1, -1):
            if self.refreshed[cut][0] < due[cut]:
                return cut + 1
        return wanted

    def coefficients(
        self, forecast: Forecast, cut: int, history: int, step: int, device: torch.device
    ) -> torch.Tensor:
        """The forecast's coefficients at a step, shape (history,), float32, on ``device``.

        Args:
            forecast: of the cut.
            cut: its number.
            history: how many boundaries its graph takes; more than the forecast's are multiplied
                by 0.
            step: of the call.
            device: where the graph runs.
        """
        given = coefficients_of(forecast, step, self.refreshed[cut])
        if isinstance(forecast, Damped):
            given = forecast.apply(given, self.damping[cut].factor)
        return on_device(given + (0.0,) * (history - len(given)), device)

    # What a refresh leaves behind

    def refresh(
        self,
        run: Callable[[], tuple[Any, Any]],
        forecasts: Sequence[Forecast],
        layouts: Sequence[CacheLayout],
        level: int,
        step: int,
    ) -> Any:
        """Run a graph that computes the boundaries of the ``level`` outermost cuts.

        Args:
            run: returns the network's result, and what to cache.
            forecasts, layouts: one for each cut of the program.
            level: at least 1.
            step: of the call.

        Returns:
            The network's result.
        """
        earlier = self.refreshed
        if not self.cached:
            earlier = ((),) * len(layouts)
            self.damping = tuple(Damping() for _ in layouts)
        pending = [
            damping.residuals_of(forecast, self._reading(), layout, step, steps)
            for damping, forecast, layout, steps in zip(
                self.damping[:level], forecasts, layouts, earlier, strict=False
            )
        ]
        result, self.cached = run()
        for damping, layout, residuals in zip(self.damping, layouts, pending, strict=False):
            if residuals:
                damping.update(self._reading(), layout, residuals)
        self.refreshed = tuple(
            (step, *steps[: layout.history - 1]) if cut < level else steps
            for cut, (layout, steps) in enumerate(zip(layouts, earlier, strict=True))
        )
        return result

    def check_finite(self, layouts: Sequence[CacheLayout], level: int) -> bool:
        """Drop what is cached if it is not finite: nothing is extrapolated from that.

        On a CPU. From another device the answer comes with the next refresh, and until then the
        shallow graph itself passes on the latest features where a forecast is not finite.

        Returns:
            Whether it was finite, as far as that is known.
        """
        with self._reading() as cached:
            finite = [
                torch.isfinite(value).all()
                for layout in layouts[:level]
                for value in cached[layout.latest]
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
        if not finite:
            return True
        answer = Readback(functools.reduce(torch.logical_and, finite))
        known, self.finite = (self.finite, answer) if answer.late else (answer, None)
        if known is not None and not float(known):
            self.release()
            return False
        return True

    def release(self) -> None:
        """Free what is cached: the next call refreshes."""
        self.cached = ()
        self.hoisted = None

    def _reading(self) -> AbstractContextManager[tuple[Any, ...]]:
        """The cached values, to be read: recorded graphs share their buffers between lanes."""
        held = self.cached
        return held.steady() if isinstance(held, HeldBoundary) else nullcontext(held)


@functools.lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A small float32 tensor that is copied to its device once, however often it is used.

    The copy is from pinned memory: one from pageable memory would wait for all that is launched.
    """
    with torch.inference_mode(False):
        pinned = device.type == "cuda"
        made = torch.tensor(values, dtype=torch.float32, device="cpu", pin_memory=pinned)
        return made.to(device, non_blocking=True)
