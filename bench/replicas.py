"""Replicas behind one queue, simulated: batches by kind, an autoscaler, a limit on the queue.

A model, not Ray: the queue is shared, so that a free replica always takes what has waited longest,
where Serve picks one of two replicas for each request. Serve's latencies are somewhat longer.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Service:
    """How long a batch takes on one replica.

    Attributes:
        encode, step, decode: seconds for one picture; ``step`` is the mean one of a run.
        steps: of a run.
        marginal: what each further picture of a batch costs, as a share of the first: 1 if batching
            saves nothing, 0 if further pictures are free.
    """

    encode: float
    step: float
    decode: float
    steps: int
    marginal: float = 1.0

    def seconds(self, batch: int = 1) -> float:
        alone = self.encode + self.steps * self.step + self.decode
        return alone * (1 + (batch - 1) * self.marginal)


@dataclass(frozen=True)
class Autoscaler:
    """Ray Serve's rule: the mean number of requests in the system over the target, per replica.

    Attributes:
        least, most: replicas.
        target: ``target_ongoing_requests``.
        start: seconds until a new replica can work.
        look_back: seconds that the number of requests is averaged over.
        up, down: seconds that another number must have been wanted.
    """

    least: int
    most: int
    target: float
    start: float
    look_back: float = 30.0
    up: float = 10.0
    down: float = 300.0


@dataclass(frozen=True)
class Fleet:
    """What is simulated.

    Attributes:
        replicas: at the start.
        service: of each.
        batches: sizes that there are programs for; with 1.
        window: seconds that a picture waits for others of its kind while fewer than the largest
            batch are there.
        kinds: shares of the kinds of requests; only those of one kind share a batch.
        queue: pictures that may wait or be in work; more are refused.
        autoscaler: None for a fixed number of replicas.
    """

    replicas: int
    service: Service
    batches: tuple[int, ...] = (1,)
    window: float = 0.0
    kinds: tuple[float, ...] = (1.0,)
    queue: int | None = None
    autoscaler: Autoscaler | None = None


class _Simulation:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now = 0.0
        self.events: list[tuple[float, int, str, Any]] = []
        self.number = itertools.count()
        self.waiting: dict[int, deque[float]] = {kind: deque() for kind in range(len(fleet.kinds))}
        self.replicas = self.idle = self.wanted = fleet.replicas
        self.ongoing = 0
        self.busy_seconds = self.replica_seconds = 0.0
        self.latencies: list[float] = []
        self.arrived: list[float] = []
        self.sizes: Counter[int] = Counter()
        self.refused = 0
        self.most_replicas = fleet.replicas
        look_back = fleet.autoscaler.look_back if fleet.autoscaler else 0
        self.history: deque[int] = deque(maxlen=max(1, round(look_back)))
        self.above = self.below = 0

    def add(self, at: float, what: str, data: Any = None) -> None:
        heapq.heappush(self.events, (at, next(self.number), what, data))

    def run(self, arrivals: np.ndarray, kinds: np.ndarray) -> None:
        source = zip(arrivals.tolist(), kinds.tolist(), strict=True)
        self.add(*self._arrival(source))
        if self.fleet.autoscaler is not None:
            self.add(0.0, "look")
        while self.events:
            at, _, what, data = heapq.heappop(self.events)
            self.replica_seconds += (at - self.now) * self.replicas
            self.now = at
            if what == "arrival":
                self._arrive(data)
                following = self._arrival(source)
                if following[2] is not None:
                    self.add(*following)
            elif what == "done":
                self._finish(data)
            elif what == "started":
                self.replicas += 1
                self.idle += 1
                self.most_replicas = max(self.most_replicas, self.replicas)
            elif what == "look" and (self.ongoing or at <= arrivals[-1]):
                self._look()
                self.add(at + 1.0, "look")
            self._begin_batches()

    def _arrival(self, source: Any) -> tuple[float, str, Any]:
        at, kind = next(source, (math.inf, None))
        return at, "arrival", kind

    def _arrive(self, kind: int) -> None:
        if self.fleet.queue is not None and self.ongoing >= self.fleet.queue:
            self.refused += 1
            return
        self.ongoing += 1
        self.waiting[kind].append(self.now)
        if self.fleet.window:
            self.add(self.now + self.fleet.window, "window")

    def _finish(self, came: list[float]) -> None:
        self.ongoing -= len(came)
        self.latencies += [self.now - one for one in came]
        self.arrived += came
        self.idle += 1
        self._retire()

    def _begin_batches(self) -> None:
        most = max(self.fleet.batches)
        while self.idle > 0:
            ready = [
                (queue[0], kind)
                for kind, queue in self.waiting.items()
                if queue
                # Rounding: the event of a window's end comes at this very time.
                and (len(queue) >= most or self.now >= queue[0] + self.fleet.window - 1e-9)
            ]
            if not ready:
                return
            queue = self.waiting[min(ready)[1]]
            size = max(one for one in {1, *self.fleet.batches} if one <= len(queue))
            seconds = self.fleet.service.seconds(size)
            self.idle -= 1
            self.busy_seconds += seconds
            self.sizes[size] += 1
            self.add(self.now + seconds, "done", [queue.popleft() for _ in range(size)])

    def _look(self) -> None:
        """Once a second: start or end replicas, if that was wanted for long enough."""
        rule = self.fleet.autoscaler
        assert rule is not None
        self.history.append(self.ongoing)
        mean = sum(self.history) / len(self.history)
        desired = min(max(math.ceil(mean / rule.target), rule.least), rule.most)
        self.above = self.above + 1 if desired > self.wanted else 0
        self.below = self.below + 1 if desired < self.wanted else 0
        if self.above > rule.up:
            for _ in range(desired - self.wanted):
                self.add(self.now + rule.start, "started")
        if self.above > rule.up or self.below > rule.down:
            self.wanted = desired
            self.above = self.below = 0
        self._retire()

    def _retire(self) -> None:
        while self.idle > 0 and self.replicas > self.wanted:
            self.idle -= 1
            self.replicas -= 1


def simulate(
    fleet: Fleet, rate: float | list[tuple[float, float]], seconds: float, seed: int = 0
) -> dict[str, float]:
    """Simulate a fleet.

    Args:
        fleet: see there.
        rate: pictures a second, arriving independently (Poisson); or (from which second, rate).
        seconds: how long requests arrive. The first tenth is not measured, where the rate is one
            number: the queue is empty then.
        seed: of the arrivals.

    Returns:
        ``throughput`` (pictures a second), ``p50``, ``p95`` (seconds from arrival to result),
        ``utilisation``, ``batch`` (its mean size), ``refused`` (a share), ``gpu_seconds`` (of
        replicas, for each picture), ``most_replicas``.
    """
    random = np.random.default_rng(seed)
    steady = not isinstance(rate, list)
    plan = [(0.0, rate)] if not isinstance(rate, list) else rate
    ends = [start for start, _ in plan[1:]] + [seconds]
    pieces = []
    for (start, one), end in zip(plan, ends, strict=True):
        pieces.append(np.sort(random.uniform(start, end, random.poisson(one * (end - start)))))
    arrivals = np.concatenate(pieces)
    kinds = random.choice(len(fleet.kinds), size=len(arrivals), p=fleet.kinds)
    run = _Simulation(fleet)
    run.run(arrivals, kinds)
    came, latencies = np.array(run.arrived), np.array(run.latencies)
    if steady:
        latencies = latencies[came >= seconds / 10]
    pictures = len(run.latencies)
    return {
        "throughput": pictures / run.now,
        "p50": float(np.quantile(latencies, 0.5)),
        "p95": float(np.quantile(latencies, 0.95)),
        "utilisation": run.busy_seconds / run.replica_seconds,
        "batch": pictures / sum(run.sizes.values()),
        "refused": run.refused / len(arrivals),
        "gpu_seconds": run.replica_seconds / pictures,
        "most_replicas": run.most_replicas,
    }
