"""What is counted, and how Prometheus gets to see it.

Each process that generates keeps a tally. A snapshot of it travels with every picture to the
process that answers requests, where a collector adds up the latest snapshot of each process, those
that are gone included: a counter never falls when a replica dies.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dcompile.runtime.counters import Stats
from dcompile.serving.pictures import Trace

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120)
_PHASES = ("waited", "encode", "denoise", "decode")
# Shapes come from what is asked for, and each label's value is kept for ever.
_SHAPE = re.compile(r"\(\d+(, \d+)*,?\)")
_MOST_REASONS = 50


@dataclass(frozen=True)
class Snapshot:
    """The counts of one process since its start.

    Attributes:
        process: its name.
        model: what it generates with.
        pictures, batches, failed, cancelled: how many; failed and cancelled are pictures.
        steps: what steps ran -> how many.
        forced: refreshes that the schedule did not ask for.
        uncached: why calls ran uncached -> how many.
        flops_spent, flops_asked: in full steps: what ran, and what would have run uncached.
        captures: networks captured.
        cache_bytes: of cached tensors now.
    """

    process: str
    model: str
    pictures: int
    batches: int
    failed: int
    cancelled: int
    steps: dict[str, int]
    forced: int
    uncached: dict[str, int]
    flops_spent: float
    flops_asked: float
    captures: int
    cache_bytes: int

    @property
    def age(self) -> int:
        """Larger for each later one of the same process, as long as anything happens there."""
        return self.batches + self.failed + self.cancelled


class Tally:
    """Counts what one process generates. Safe to use from several threads."""

    def __init__(self, process: str, model: str) -> None:
        self._process, self._model = process, model
        self._lock = threading.Lock()
        self._pictures = self._batches = self._failed = self._cancelled = 0
        self._forced = self._captures = 0
        self._spent = self._asked = 0.0
        self._steps: Counter[str] = Counter()
        self._uncached: Counter[str] = Counter()

    def ran(self, trace: Trace, pictures: int) -> None:
        """A batch was generated."""
        with self._lock:
            self._batches += 1
            self._pictures += pictures
            self._steps.update(trace.levels)
            self._forced += trace.forced
            for reason, count in trace.uncached_reasons.items():
                short = _SHAPE.sub("(...)", reason)
                is_new = short not in self._uncached and len(self._uncached) >= _MOST_REASONS
                self._uncached["others" if is_new else short] += count
            self._captures += trace.programs
            self._asked += len(trace.levels)
            self._spent += len(trace.levels) / trace.flops_speedup

    def failed(self, pictures: int) -> None:
        """A batch failed."""
        with self._lock:
            self._failed += pictures

    def cancelled(self) -> None:
        """Nobody waited for a picture any more."""
        with self._lock:
            self._cancelled += 1

    def snapshot(self, stats: Stats) -> Snapshot:
        """The counts so far; ``stats`` says what is cached now."""
        with self._lock:
            return Snapshot(
                process=self._process,
                model=self._model,
                pictures=self._pictures,
                batches=self._batches,
                failed=self._failed,
                cancelled=self._cancelled,
                steps=dict(self._steps),
                forced=self._forced,
                uncached=dict(self._uncached),
                flops_spent=self._spent,
                flops_asked=self._asked,
                captures=self._captures,
                cache_bytes=stats.cache_bytes,
            )


class Metrics:
    """What ``GET /metrics`` shows, in a process that answers requests."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._requests = PrometheusCounter(
            "dcompile_requests",
            "Requests answered, by status code",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "dcompile_phase_seconds",
            "Seconds of a picture: waiting for its batch, encoding the prompt, denoising, decoding",
            ["phase"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._total = Histogram(
            "dcompile_request_seconds",
            "Seconds from a request to its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._pending = Gauge(
            "dcompile_pending_pictures",
            "Pictures that wait or are being made",
            registry=self._registry,
        )
        self._retries = PrometheusCounter(
            "dcompile_retries",
            "Pictures begun again because the process that made them was lost",
            registry=self._registry,
        )
        self._registry.register(self)  # it has collect()

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._total.labels(endpoint).observe(seconds)

    def made(self, trace: dict[str, Any], snapshot: Snapshot) -> None:
        """A picture came back."""
        for phase in _PHASES:
            took = trace["waited"] if phase == "waited" else trace["seconds"][phase]
            self._seconds.labels(phase).observe(max(0.0, took))
        self.seen(snapshot)

    def seen(self, snapshot: Snapshot) -> None:
        """The counts of a process came back; the latest ones stay."""
        key = (snapshot.model, snapshot.process)
        known = self._snapshots.get(key)
        if known is None or snapshot.age >= known.age:
            self._snapshots[key] = snapshot

    def retried(self) -> None:
        """A picture was begun again."""
        self._retries.inc()

    def pending(self, count: int) -> None:
        """So many pictures wait or are being made."""
        self._pending.set(count)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """The sums over all processes; called by the registry."""
        found = list(self._snapshots.values())
        totals = {
            "pictures": "Pictures generated",
            "batches": "Runs of the pipeline",
            "failed": "Pictures that failed",
            "cancelled": "Pictures that nobody waited for any more",
            "forced": "Refreshes that the schedule did not ask for",
            "captures": "Networks captured and compiled during traffic",
            "flops_spent": "Denoiser FLOPs spent, in full steps",
            "flops_asked": "Denoiser FLOPs without caching, in full steps",
        }
        for name, text in totals.items():
            family = CounterMetricFamily(f"dcompile_{name}", text, labels=["model"])
            for model in sorted({one.model for one in found}):
                own = [getattr(one, name) for one in found if one.model == model]
                family.add_metric([model], sum(own))
            yield family
        for name, label, text in (
            ("steps", "ran", "Steps, by what they ran: refresh, partial, reuse or uncached"),
            ("uncached", "reason", "Calls that ran uncached, by reason"),
        ):
            family = CounterMetricFamily(f"dcompile_{name}", text, labels=["model", label])
            sums: Counter[tuple[str, str]] = Counter()
            for one in found:
                for key, count in getattr(one, name).items():
                    sums[one.model, key] += count
            for labels, count in sorted(sums.items()):
                family.add_metric(list(labels), count)
            yield family
        held = GaugeMetricFamily(
            "dcompile_cache_bytes", "Bytes of cached tensors now", labels=["model", "process"]
        )
        for one in found:
            held.add_metric([one.model, one.process], one.cache_bytes)
        yield held
