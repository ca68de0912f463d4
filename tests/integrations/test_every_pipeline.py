"""Every kind of pipeline: what it draws, cached and uncached, and which network is taken."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from every_pipeline import (
    CASES,
    Case,
    every_third,
    outermost,
    pipeline,
    stale_features,
    unet_xl,
    with_image_prompt,
)
from heard import noticed
from torch import Tensor

import dcompile


def cached(pipe: Any, interval: int) -> Any:
    return dcompile.cache_compile(pipe, interval=interval, backend="eager", verbose=False)


@pytest.mark.one_in(16)
@pytest.mark.parametrize("name", CASES)
def test_every_pipeline(name: str, compatible: Callable[..., dict[str, Any]]) -> None:
    case = CASES[name]
    row = compatible("pipeline", name, **({"note": case.note} if case.note else {}))
    pipe = case.pipeline()
    network = getattr(pipe, case.network)
    faster = network if case.several else pipe
    if case.several:
        with pytest.raises(dcompile.DcompileError, match="no single denoiser"):
            cached(pipe, interval=1)
    uncached = case.run(pipe)
    assert uncached.isfinite().all()

    cached(faster, interval=1)
    handle = dcompile.handle(faster)
    assert handle.module is network
    assert torch.equal(case.run(pipe), uncached)
    calls = case.steps * case.lanes
    assert (handle.stats.refresh_steps, handle.stats.reuse_steps) == (calls, 0)

    cached(faster, interval=3)
    found = case.run(pipe)
    assert torch.equal(found, uncached) == (len(case.refreshed) == case.steps)
    refreshes = len(case.refreshed) * case.lanes
    stats = handle.stats
    assert (stats.refresh_steps, stats.reuse_steps) == (refreshes, calls - refreshes)
    assert stats.uncached_calls == 0
    depths = handle.explain().depths
    cut = outermost(handle)
    row["depths"], row["ratio"] = len(depths), cut.ratio

    handle.remove()
    assert torch.equal(case.run(pipe), uncached)
    refreshed = [step in case.refreshed for step in range(case.steps)]
    with stale_features(network, cut, refreshed, case.lanes):
        assert torch.equal(found, case.run(pipe))
    if case.deepcache:
        assert torch.equal(found, by_deepcache(pipe, case.run))


def by_deepcache(pipe: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """The paper's released code."""
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    try:
        return run(pipe)
    finally:
        helper.disable()


@pytest.mark.parametrize("shared", [True, False], ids=["one_unet", "two_unets"])
def test_base_and_refiner(shared: bool, compatible: Callable[..., dict[str, Any]]) -> None:
    """The refiner goes on where the base stops: another run, with features of its own."""
    of_whom = "sharing a UNet" if shared else "each with its UNet"
    compatible("pipeline", f"StableDiffusionXLPipeline and its refiner, {of_whom}")
    base = CASES["StableDiffusionXLPipeline"].pipeline()
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    if not shared:
        refiner.unet = unet_xl().eval()
    both = [base] if shared else [base, refiner]

    def refined() -> Tensor:
        given: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent"}
        given["generator"] = torch.Generator().manual_seed(0)
        latents = base("a cat", denoising_end=0.6, **given).images
        return refiner("a cat", image=latents, denoising_start=0.6, **given).images

    uncached = refined()
    for pipe in both:
        cached(pipe, interval=1)
    assert torch.equal(refined(), uncached)
    for pipe in both:
        cached(pipe, interval=3)
    found = refined()
    assert not torch.equal(found, uncached)
    handles = [dcompile.handle(pipe) for pipe in both]
    assert sum(handle.stats.refresh_steps for handle in handles) == 2 + 2
    assert sum(handle.stats.reuse_steps for handle in handles) == 4 + 2
    cuts = [outermost(handle) for handle in handles]
    for handle in handles:
        handle.remove()
    assert torch.equal(refined(), uncached)
    intervals = [every_third(6, 4)] if shared else [every_third(6), every_third(4)]
    with ExitStack() as stale:
        for pipe, cut, refreshed in zip(both, cuts, intervals, strict=True):
            stale.enter_context(stale_features(pipe.unet, cut, refreshed))
        assert torch.equal(found, refined())


@pytest.mark.full
def test_an_image_prompt_is_added_later(compatible: Callable[..., dict[str, Any]]) -> None:
    compatible("add-on", "IP-Adapter, loaded after cache_compile")
    bare, case = CASES["StableDiffusionPipeline"], CASES["StableDiffusionPipeline, IP-Adapter"]
    pipe, plain = bare.pipeline(), case.pipeline()
    uncached = case.run(plain)
    cached(pipe, interval=3)
    before = bare.run(pipe)
    with_image_prompt(pipe)
    found = case.run(pipe)
    assert not torch.equal(found, before)
    assert torch.equal(found, by_deepcache(plain, case.run))
    cached(pipe, interval=1)
    assert torch.equal(case.run(pipe), uncached)


def test_attention_maps_that_a_pipeline_reads() -> None:
    """Self-attention guidance takes them from the network after each call: it runs uncached."""
    case = Case(lambda: pipeline(StableDiffusionSAGPipeline))
    pipe = case.pipeline()
    uncached = case.run(pipe)
    cached(pipe, interval=1)
    with noticed(r"every call changes .*\.processor\.attention_probs"):
        assert torch.equal(case.run(pipe), uncached)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layers", ["mid", "up"])
def test_perturbed_attention_is_no_skip_connection(layers: str) -> None:
    """It concatenates along the batch; depths stay those of the network without it."""
    plain = CASES["StableDiffusionPipeline"]
    perturbed = Case(lambda: pipeline(StableDiffusionPAGPipeline, pag_applied_layers=layers))
    cut_at = []
    for case in (plain, perturbed):
        pipe = case.pipeline()
        cached(pipe, interval=3)
        case.run(pipe)
        cut_at.append([depth.module_path for depth in dcompile.handle(pipe).explain().depths])
    assert cut_at[0] == cut_at[1]
