"""Whole pipelines on a GPU: CUDA graphs change nothing, and caching is what it is on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import seam
import test_controlnet
import torch
from block_hooks import REFERENCES, run, skipping
from plain import Plain, picture, sampled, timesteps
from small_pipelines import PIPELINES as UNETS
from small_pipelines import run as run_unet
from transformer_pipelines import PIPELINES as TRANSFORMERS
from transformer_pipelines import pipeline

import dcompile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels at every call, and no TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


def on_the_gpu(pipe: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Move a pipeline, and what is given to a call of it."""
    pipe.to("cuda")
    return {name: _moved(value) for name, value in kwargs.items()}


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("cuda")
    if isinstance(value, list):
        return [_moved(one) for one in value]
    return value


def check_counts(pipe: Any) -> None:
    stats = dcompile.handle(pipe).stats
    assert (stats.uncached_calls, stats.forced_steps) == (0, 0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    if name == "stable_audio":
        pytest.importorskip("torchsde")
    pipe, kwargs = pipeline(name)
    kwargs = on_the_gpu(pipe, kwargs)
    expected = run(pipe, kwargs)
    reference = REFERENCES.get(name)
    if reference is not None:
        with skipping(pipe.transformer, reference, interval=3):
            skipped = run(pipe, kwargs)
    cached(pipe, interval=1)
    assert torch.equal(run(pipe, kwargs), expected)
    check_counts(pipe)
    cached(pipe, interval=3, cuda_graphs=False)
    unrecorded = run(pipe, kwargs)
    cached(pipe, interval=3)
    found = run(pipe, kwargs)
    check_counts(pipe)
    assert all(seam.is_recorded(one) for one in seam.recorded_of(pipe))
    assert torch.equal(found, unrecorded)
    assert torch.equal(run(pipe, kwargs), found)
    if reference is not None:
        torch.testing.assert_close(found, skipped, **CLOSE)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_unets(name: str, backend: str) -> None:
    pipe = UNETS[name]().to("cuda")
    expected = run_unet(pipe)
    cached(pipe, interval=1)
    assert torch.equal(run_unet(pipe), expected)
    cached(pipe, interval=3, cuda_graphs=False, channels_last=False)
    unrecorded = run_unet(pipe)
    cached(pipe, interval=3, backend=backend)
    found = run_unet(pipe)
    check_counts(pipe)
    assert all(seam.is_recorded(one) for one in seam.recorded_of(pipe))
    if backend == "eager":
        assert torch.equal(found, unrecorded)
    else:
        weight = pipe.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        torch.testing.assert_close(found, unrecorded, **CLOSE)


@pytest.mark.parametrize("build", ["single", "several", "of_sdxl"])
def test_controlnets(build: str) -> None:
    pipe = getattr(test_controlnet, build)().to("cuda")
    expected = test_controlnet.run(pipe)
    cached(pipe, interval=1)
    assert torch.equal(test_controlnet.run(pipe), expected)
    cached(pipe, interval=3, cuda_graphs=False)
    unrecorded = test_controlnet.run(pipe)
    cached(pipe, interval=3)
    assert torch.equal(test_controlnet.run(pipe), unrecorded)
    check_counts(pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_transformers_in_half_precision_through_inductor(name: str, dtype: torch.dtype) -> None:
    pipe, kwargs = pipeline(name)
    kwargs = on_the_gpu(pipe, kwargs)
    pipe.to(dtype=dtype)
    kwargs = {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in kwargs.items()
    }
    cached(pipe, interval=3, cuda_graphs=False)
    expected = run(pipe, kwargs)
    cached(pipe, interval=3, backend="inductor")
    found = run(pipe, kwargs)
    check_counts(pipe)
    assert found.dtype == expected.dtype
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < (0.01 if dtype == torch.float16 else 0.06)


def test_a_number_on_the_cpu_that_changes() -> None:
    """A launch takes it by value, and recording a launch records the value."""

    class Scaled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.tensor(2.0)  # no buffer: it stays on the CPU

        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            (result,) = super().forward(sample, timestep, condition)
            return (result * self.factor,)

    network = Scaled().eval().to("cuda")
    cached(network, interval=3)
    sample, steps = picture().to("cuda"), timesteps().to("cuda")
    first = sampled(network, sample, steps)
    with torch.no_grad():
        network.factor.fill_(3.0)
    found = sampled(network, sample, steps)
    cached(network, interval=3, cuda_graphs=False)
    assert torch.equal(found, sampled(network, sample, steps))
    assert not torch.equal(found, first)
