"""Counts of what calls ran, since the last ``cache_compile``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        calls = [
            one.refresh_steps + one.partial_steps + one.reuse_steps + one.uncached_calls
            for one in parts
        ]
        cost = sum(count / one.flops_speedup for count, one in zip(calls, parts, strict=True))

        def reasons(name: str) -> Mapping[str, int]:
            counts: Counter[str] = Counter()
            for one in parts:
                counts.update(getattr(one, name))
            return MappingProxyType(dict(counts))

        return cls(
            refresh_steps=sum(one.refresh_steps for one in parts),
            partial_steps=sum(one.partial_steps for one in parts),
            reuse_steps=sum(one.reuse_steps for one in parts),
            uncached_calls=sum(one.uncached_calls for one in parts),
            runs=sum(one.runs for one in parts),
            captures=sum(one.captures for one in parts),
            compile_seconds=sum(one.compile_seconds for one in parts),
            cache_bytes=sum(one.cache_bytes for one in parts),
            flops_speedup=sum(calls) / cost if cost else 1.0,
            forced_steps=sum(one.forced_steps for one in parts),
            uncached_reasons=reasons("uncached_reasons"),
            forced_reasons=reasons("forced_reasons"),
            last_capture=next((one.last_capture for one in parts if one.last_capture), ""),
        )


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
