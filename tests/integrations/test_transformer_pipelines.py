"""diffusers' pipelines around transformers: exact uncached, and as hooks on blocks make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_hooks import REFERENCES, REFRESHES, STEPS, run, skipping
from transformer_pipelines import PIPELINES, pipeline

import dcompile
from dcompile.runtime import callers, tracking
from dcompile.runtime.counters import Stats


def compiled(module: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(module, **{"backend": "eager", "verbose": False, **settings})


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name: str, compatible: Any) -> None:
    pipe, kwargs = pipeline(name)
    row = compatible("pipeline", type(pipe).__name__)
    expected = run(pipe, kwargs)
    reference = REFERENCES.get(name)
    if reference is not None:
        with skipping(pipe.transformer, reference, interval=3):
            skipped = run(pipe, kwargs)
    compiled(pipe, interval=1)
    assert torch.equal(run(pipe, kwargs), expected)
    assert dcompile.handle(pipe).stats.uncached_calls == 0
    compiled(pipe, interval=3)
    found = run(pipe, kwargs)
    stats = dcompile.handle(pipe).stats
    assert (stats.uncached_calls, stats.forced_steps) == (0, 0)
    assert stats.reuse_steps > stats.refresh_steps
    if reference is not None:
        torch.testing.assert_close(found, skipped, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, expected)
    row["depths"] = len(depths := dcompile.handle(pipe).explain().depths)
    row["ratio"] = depths[0].ratio


@pytest.mark.full
def test_two_denoisers_are_both_cached(tmp_path: Path) -> None:
    """Each goes over its own part of the timesteps."""
    pipe, kwargs = pipeline("wan22")
    expected = run(pipe, kwargs)
    compiled(pipe, interval=3)
    found = run(pipe, kwargs)
    handle = dcompile.handle(pipe)
    each = [dcompile.handle(pipe.transformer).stats, dcompile.handle(pipe.transformer_2).stats]
    assert all(one.reuse_steps and one.refresh_steps for one in each)
    assert all(one.uncached_calls == one.forced_steps == 0 for one in each)
    assert handle.stats == Stats.total(each)
    calls = handle.stats.refresh_steps + handle.stats.reuse_steps
    assert calls == 2 * STEPS
    assert "transformer_2: WanTransformer3DModel" in handle.report()
    handle.save(tmp_path)
    handle.disable()
    assert torch.equal(run(pipe, kwargs), expected)
    handle.enable()
    assert torch.equal(run(pipe, kwargs), found)
    handle.remove()
    assert torch.equal(run(pipe, kwargs), expected)
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(pipe)
    dcompile.load(pipe, tmp_path, verbose=False)
    assert torch.equal(run(pipe, kwargs), found)
    assert dcompile.handle(pipe).stats.captures == 0


def test_two_denoisers_are_tuned_one_at_a_time() -> None:
    pipe, kwargs = pipeline("wan22")
    with pytest.raises(dcompile.TuneError, match=r"several denoisers: transformer, transformer_2"):
        dcompile.tune(pipe, lambda: run(pipe, kwargs), speedup=1.5, verbose=False)


def test_no_timestep_is_read_once_a_loop_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX passes t / 1000, which is no view of its scheduler's timesteps."""
    pipe, kwargs = pipeline("flux")
    compiled(pipe, interval=3)
    run(pipe, kwargs)

    def read(timestep: Any) -> float:
        raise AssertionError(f"the value of {timestep} was read")

    monkeypatch.setattr(tracking, "_value", read)
    monkeypatch.setattr(callers, "_largest", read)
    run(pipe, kwargs)
    stats = dcompile.handle(pipe).stats
    assert (stats.runs, stats.refresh_steps, stats.forced_steps) == (2, 2 * REFRESHES, 0)
