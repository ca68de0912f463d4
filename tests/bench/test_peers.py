"""bench/residual.py, on pipelines small enough for CI."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import residual
from transformer_pipelines import pipeline


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "SHAPES", {"small": lambda: pipeline("pixart_alpha")})


def without_latents(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "latents"}


def test_a_page_of_a_small_network() -> None:
    ways = ["diffusers", "dcompile, eager"]
    if find_spec("cache_dit") is not None:
        ways.append("cache-dit")
    rows = {way: residual.measured("small", way, rounds=1) for way in ways}
    ours = rows["dcompile, eager"]
    assert (ours["graph_breaks"], ours["recompiles"]) == (0, 0)
    assert ours["value_reads"] == rows["diffusers"]["value_reads"]  # the scheduler's own
    assert residual.relative(ours["latents"], rows["diffusers"]["latents"]) > 1e-5
    if "cache-dit" in rows:
        assert residual.relative(ours["latents"], rows["cache-dit"]["latents"]) < 1e-5
    found = {
        "threads": 1,
        "processor": "some",
        "torch": "2",
        "diffusers": "0",
        "cache-dit": "1",
        "rounds": 1,
        "shapes": {"small": {way: without_latents(row) for way, row in rows.items()}},
    }
    found["shapes"]["small"]["another"] = {"note": "did not run"}
    page = residual.page(found)
    assert "of it.\n" in page
    assert "| another | did not run |" in page
    assert page.count("\n| dcompile, eager |") == 1


def test_a_threshold_that_refreshes_at_these_steps_or_none() -> None:
    pipe, call = pipeline("flux")
    found = residual.threshold_of(pipe, call)
    assert found is None or found in residual.THRESHOLDS
    assert not pipe.transformer.is_cache_enabled
