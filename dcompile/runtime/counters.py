"""Counts of what calls ran, since the last ``cache_compile``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from dcompile.progress import Display


@dataclass(frozen=True)
class Stats:
    """Counts since the last ``cache_compile``.

    Attributes:
        refresh_steps: calls that ran the full graph.
        partial_steps: calls that ran a graph in between, of several cuts.
        reuse_steps: calls that ran the shallow graph.
        forced_steps: calls that refreshed more than the schedule wanted, because a cache was
            missing or stale, or it was not certain whose it is.
        forced_reasons: how many of them for which reason.
        uncached_calls: calls that went to the module itself (training, gradients).
        uncached_reasons: how many of them for which reason.
        runs: sampling runs seen.
        captures: networks captured.
        last_capture: why the latest one was needed.
        compile_seconds: spent capturing and compiling.
        cache_bytes: bytes of cached tensors held now.
        flops_speedup: FLOPs of refreshing at each of these calls, over the FLOPs that they took.
    """

    refresh_steps: int
    partial_steps: int
    reuse_steps: int
    uncached_calls: int
    runs: int
    captures: int
    compile_seconds: float
    cache_bytes: int
    flops_speedup: float
    forced_steps: int = 0
    uncached_reasons: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    forced_reasons: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    last_capture: str = ""

    @classmethod
    def total(cls, parts: Sequence[Stats]) -> Stats:
        """The sums of several networks' counts; their full steps are taken to cost the same."""
        sums = {
            one.name: sum(getattr(part, one.name) for part in parts)
            for one in fields(cls)
            if one.name
            not in ("flops_speedup", "uncached_reasons", "forced_reasons", "last_capture")
        }
        cost = sum(part.calls / part.flops_speedup for part in parts)
        calls = sum(part.calls for part in parts)

        def reasons(name: str) -> Mapping[str, int]:
            counts: Counter[str] = Counter()
            for part in parts:
                counts.update(getattr(part, name))
            return MappingProxyType(dict(counts))

        return cls(
            **sums,
            flops_speedup=calls / cost if cost else 1.0,
            uncached_reasons=reasons("uncached_reasons"),
            forced_reasons=reasons("forced_reasons"),
            last_capture=next((part.last_capture for part in parts if part.last_capture), ""),
        )

    @property
    def calls(self) -> int:
        """All calls counted."""
        return self.refresh_steps + self.partial_steps + self.reuse_steps + self.uncached_calls


class Counters:
    """Counts calls. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refresh = self._partial = self._reuse = 0
        self._forced: Counter[str] = Counter()
        self._uncached: Counter[str] = Counter()
        self._cost = 0.0  # of all calls counted, in refresh steps
        self._captures = 0
        self._seconds = 0.0

    def reuse(self, cost: float) -> None:
        """A call ran the shallow graph; ``cost`` is its share of a refresh step's FLOPs."""
        with self._lock:
            self._reuse += 1
            self._cost += cost

    def refresh(self, cost: float, *, full: bool, forced: str | None) -> None:
        """A call refreshed all cuts (``full``) or some of them; why, if that was not planned."""
        with self._lock:
            self._refresh += full
            self._partial += not full
            if forced is not None:
                self._forced[forced] += 1
            self._cost += cost

    def uncached(self, reason: str) -> None:
        """A call went to the module itself."""
        with self._lock:
            self._uncached[reason] += 1
            self._cost += 1.0

    def built(self, display: Display) -> None:
        """Something was captured and compiled."""
        with self._lock:
            self._captures += display.completed["capturing"]
            self._seconds += sum(display.seconds.values())

    def stats(self, runs: int, cache_bytes: int, last_capture: str = "") -> Stats:
        """All counts, with those that others keep."""
        with self._lock:
            uncached = self._uncached.total()
            calls = self._refresh + self._partial + self._reuse + uncached
            return Stats(
                refresh_steps=self._refresh,
                partial_steps=self._partial,
                reuse_steps=self._reuse,
                uncached_calls=uncached,
                runs=runs,
                captures=self._captures,
                compile_seconds=self._seconds,
                cache_bytes=cache_bytes,
                flops_speedup=calls / self._cost if self._cost else 1.0,
                forced_steps=self._forced.total(),
                uncached_reasons=MappingProxyType(dict(self._uncached)),
                forced_reasons=MappingProxyType(dict(self._forced)),
                last_capture=last_capture,
            )
