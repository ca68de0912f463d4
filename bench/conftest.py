"""Options and networks of the benchmark suites."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import shapes
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--width",
        default="full",
        choices=["full", "small"],
        help="full: Stable Diffusion 1.5's 860 M parameters at 512x512; small: a tenth, to try it.",
    )


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.pop("node", None)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> shapes.Subject:
    return shapes.sd15(small=request.config.getoption("--width") == "small")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    with torch.no_grad():
        yield
