"""bench/residual.py, on pipelines small enough for CI."""

from __future__ import annotations

from typing import Any

import pytest
import residual
from transformer_pipelines import pipeline

import dcompile


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "SHAPES", {"small": lambda: pipeline("pixart_alpha")})


def without_latents(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "latents"}


def test_a_page_of_a_small_network() -> None:
    ways = ["diffusers", "dcompile, eager"]
    rows = {way: residual.measured("small", way, rounds=1) for way in ways}
    ours = rows["dcompile, eager"]
    assert (ours["graph_breaks"], ours["recompiles"]) == (0, 0)
    assert ours["value_reads"] == rows["diffusers"]["value_reads"]  # the scheduler's own
    assert residual.relative(ours["latents"], rows["diffusers"]["latents"]) > 1e-5
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


@pytest.mark.parametrize("name", ["pixart_alpha", "sd3", "flux", "wan"])
def test_the_results_are_cache_dits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cache_dit")
    monkeypatch.setattr(residual, "SHAPES", {"small": lambda: pipeline(name)})
    ours, theirs = (
        residual.measured("small", way, rounds=1)["latents"]
        for way in ("dcompile, eager", "cache-dit")
    )
    assert residual.relative(ours, theirs) < 1e-5


def test_its_cache_is_refused_by_name_until_it_is_removed() -> None:
    cache_dit = pytest.importorskip("cache_dit")
    pipe, call = pipeline("pixart_alpha")
    residual.cache_dit_masked(pipe, residual.MASK)
    residual.ours(pipe)
    residual.run(pipe, call)
    (reason,) = dcompile.handle(pipe).stats.uncached_reasons
    assert "the cache of cache-dit or ParaAttention is on it" in reason
    cache_dit.disable_cache(pipe)
    residual.ours(pipe)
    residual.run(pipe, call)
    stats = dcompile.handle(pipe).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.uncached_calls) == (3, 6, 0)


def test_a_threshold_that_refreshes_at_these_steps_or_none() -> None:
    pipe, call = pipeline("flux")
    found = residual.threshold_of(pipe, call)
    assert found is None or found in residual.THRESHOLDS
    assert not pipe.transformer.is_cache_enabled
