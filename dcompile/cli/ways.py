"""The ways of running one network that ``dcompile bench`` compares, and how each is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dcompile.api import cache_compile, handle
from dcompile.cli.settings import BenchSettings
from dcompile.cli.subjects import Subject
from dcompile.errors import BackendError
from dcompile.runtime.counters import Stats

TORCH_COMPILE = "torch.compile"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        backend: dcompile's; None for the uncached network.
        interval: refresh interval; None for the uncached network.
        mode: of ``torch.compile`` around the uncached network; None without.
    """

    backend: str | None = None
    interval: int | None = None
    mode: str | None = None

    @property
    def label(self) -> str:
        """Its name in the table."""
        if self.backend is not None:
            return f"{self.backend} N={self.interval}"
        if self.mode is not None:
            return TORCH_COMPILE + ("" if self.mode == "default" else f":{self.mode}")
        return "uncached"


UNCACHED = Way()


def planned_ways(settings: BenchSettings) -> list[Way]:
    """The ways in the order in which they are measured.

    The uncached network first; each backend refreshing at every step, then at each interval; last
    torch.compile, whose CUDA graphs stay in memory.

    Raises:
        BackendError: a peer that is neither ``torch.compile`` nor one of its modes.
    """
    intervals = dict.fromkeys((1, *settings.intervals))
    cached = [Way(backend, n) for backend in dict.fromkeys(settings.backends) for n in intervals]
    peers = [Way(mode=_mode_of(peer)) for peer in dict.fromkeys(settings.peers)]
    return [UNCACHED, *cached, *peers]


def _mode_of(peer: str) -> str:
    name, _, mode = peer.partition(":")
    if name != TORCH_COMPILE or (mode or "default") not in MODES:
        raise BackendError(
            f"unknown peer {peer!r}: expected {TORCH_COMPILE}, or {TORCH_COMPILE}:MODE with a mode "
            f"of {', '.join(MODES)}"
        )
    return mode or "default"


class Installer:
    """Makes a subject run in one way after the other.

    Programs and what torch.compile made are kept from one time to the next; recorded CUDA graphs
    and cached features are not.

    Args:
        subject: what runs. dcompile is not installed on its network yet.
        depth: of the cut.
    """

    def __init__(self, subject: Subject, depth: int) -> None:
        self._subject = subject
        self._depth = depth
        # Shares all weights, and stays as it is when the network's own forward is replaced.
        self._plain = copy.copy(subject.network)
        self._compiled: dict[str, Callable[..., object]] = {}

    @contextmanager
    def installed(self, way: Way) -> Iterator[Callable[[], Stats] | None]:
        """Run in this way inside of the context; yields what reads dcompile's counters."""
        subject = self._subject
        if way.backend is None:
            subject.use(self._plain if way.mode is None else self._peer(way.mode))
            try:
                yield None
            finally:
                subject.use(subject.network)
            return
        cache_compile(
            subject.cacheable,
            interval=way.interval,
            depth=self._depth,
            backend=way.backend,
            on_error="raise",
            verbose=False,
        )
        found = handle(subject.network)
        try:
            yield lambda: found.stats
        finally:
            found.disable()  # frees what is cached and recorded

    def _peer(self, mode: str) -> Callable[..., object]:
        if mode not in self._compiled:
            self._compiled[mode] = torch.compile(copy.copy(self._plain), mode=mode)
        return self._compiled[mode]
