"""bench/replicas.py: the simulation agrees with what queueing theory says."""

from __future__ import annotations

import pytest
from replicas import Autoscaler, Fleet, Service, simulate


def test_one_replica_waits_as_theory_says() -> None:
    fleet = Fleet(1, Service(0, 1, 0, 1))
    found = simulate(fleet, 0.5, 40_000)
    assert found["utilisation"] == pytest.approx(0.5, abs=0.02)
    # M/D/1: half of the requests find it idle.
    assert found["p50"] == pytest.approx(1.0, abs=0.05)
    assert 2.0 < found["p95"] < 3.0


def test_kinds_split_batches() -> None:
    service = Service(0, 1, 0, 1, marginal=0.5)

    def batch(kinds: int) -> float:
        fleet = Fleet(2, service, (1, 2, 4), 0.1, (1 / kinds,) * kinds)
        return simulate(fleet, 2.2, 2000)["batch"]

    assert batch(1) > batch(8) > 1


def test_a_full_queue_refuses() -> None:
    fleet = Fleet(1, Service(0, 1, 0, 1), queue=3)
    found = simulate(fleet, 2.0, 2000)
    assert found["refused"] == pytest.approx(0.5, abs=0.05)
    assert found["p95"] <= 3.0


def test_the_autoscaler_follows_the_load() -> None:
    rule = Autoscaler(least=1, most=10, target=1.0, start=5.0, down=20.0)
    fleet = Fleet(1, Service(0, 1, 0, 1), queue=20, autoscaler=rule)
    plan = [(0.0, 0.5), (100.0, 4.0), (400.0, 0.1)]
    found = simulate(fleet, plan, 700.0)
    assert 4 <= found["most_replicas"] <= 10
    assert found["gpu_seconds"] < 10 * 700 / (50 + 1200 + 30)  # not all of them all the time


def test_the_same_seed_is_the_same_simulation() -> None:
    fleet = Fleet(3, Service(0.1, 0.1, 0.1, 5), (1, 2), 0.05, (0.5, 0.5))
    first, second = (simulate(fleet, 3.0, 300, seed=4) for _ in range(2))
    assert first == second
