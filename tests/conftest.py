"""For all tests: fixed seeds, few threads, no hub, and libraries that keep quiet."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Read when huggingface_hub, diffusers and transformers are imported, by the tests that need them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DCOMPILE_CACHE_DIR"] = ""  # what one test finds is not another one's
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

torch.set_num_threads(1)  # the networks are small: several threads would mostly wait for each other
pytest.register_assert_rewrite("networks")


@pytest.fixture(params=["plain", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test as it is, with graphs recorded on the CPU, and on a GPU with CUDA graphs."""
    import plain
    from simulated_graphs import SimulatedRecorder

    from dcompile.runtime.cuda_recorder import RECORDERS

    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        monkeypatch.setattr(plain, "DEVICE", torch.device("cuda"))
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        torch.set_default_device("cuda")
    elif request.param == "simulated":
        monkeypatch.setitem(RECORDERS, "cpu", SimulatedRecorder)
    yield request.param
    torch.set_default_device(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility", metavar="FILE", help="write rows for bench/compatibility.py to FILE"
    )


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    counts: dict[object, int] = {}
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            counts[test] = counts.get(test, -1) + 1
            if counts[test] % marker.args[0]:
                item.add_marker("full")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector, which captures keep busy, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--compatibility", None)
    if file is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers report
        config.pluginmanager.register(Compatibility(Path(file)))


class Compatibility:
    """Collects what tests found to work; see the fixture ``compatible``."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            found = [row for name, row in report.user_properties if name == "compatible"]
            self.rows += [{**row, "works": report.passed} for row in found]

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.rows, indent=2) + "\n")


@pytest.fixture
def compatible(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Put what a test is about into docs/compatibility.md, where it works if the test passes.

    ``row = compatible(kind, name)`` with kind "network", "pipeline", "add-on" or "scheduler", and
    the name a user knows it by; ``row`` takes ``depths`` (how many), ``ratio`` (r at depth 0) and
    ``note`` as far as the test knows them.
    """

    def add(kind: str, name: str, **more: Any) -> dict[str, Any]:
        row = {"kind": kind, "name": name, **more}
        request.node.user_properties.append(("compatible", row))
        return row

    return add


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
