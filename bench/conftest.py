"""Options and networks of the benchmark suites."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--width",
        default="full",
        choices=["full", "small"],
        help="full: Stable Diffusion 1.5's 860 M parameters at 512x512; small: a tenth, to try it.",
    )
