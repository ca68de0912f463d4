"""LoRA and IP-Adapter on transformers' pipelines: as if these were not compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_hooks import REFERENCES, run, skipping
from diffusers.loaders.ip_adapter import FluxIPAdapterMixin, SD3IPAdapterMixin
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformer_pipelines import PIPELINES, pipeline

import dcompile

WITH_LORA = ("sd3", "flux", "wan", "qwen_image", "ltx", "aura_flow", "sana", "hunyuan_video")


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


def require_same(pipe: Any, plain: Any, name: str, kwargs: dict[str, Any]) -> torch.Tensor:
    """``pipe``, compiled, makes what hooks on ``plain``'s blocks make; uncached, too."""
    with skipping(plain.transformer, REFERENCES[name], interval=3):
        expected = run(plain, kwargs)
    found = run(pipe, kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stats = dcompile.handle(pipe).stats
    assert stats.reuse_steps > 0 == stats.uncached_calls == stats.forced_steps
    cached(pipe, interval=1)
    assert torch.equal(run(pipe, kwargs), run(plain, kwargs))
    assert dcompile.handle(pipe).stats.uncached_calls == 0
    cached(pipe, interval=3)
    return found


def linear_layers(network: nn.Module) -> list[str]:
    """Paths of all projections in the blocks, whatever they are called there."""
    return [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in path and "norm" not in path
    ]


def lora_folder(pipe: Any, folder: Path, seed: int) -> Path:
    """A LoRA of the pipeline's transformer, as it is shared."""
    torch.manual_seed(seed)
    transformer = pipe.transformer
    transformer.add_adapter(
        LoraConfig(r=1 + seed, target_modules=linear_layers(transformer), init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(transformer)
    pipe.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in WITH_LORA if name in PIPELINES])
def test_loras(name: str, tmp_path: Path, compatible: Callable[..., dict[str, Any]]) -> None:
    """Loaded, weighted, switched off and on, fused and unloaded, each seen by the next run."""
    (pipe, kwargs), (plain, _) = pipeline(name), pipeline(name)
    compatible("add-on", f"LoRA on {type(pipe.transformer).__name__}")
    folders = [lora_folder(pipeline(name)[0], tmp_path / str(seed), seed) for seed in (1, 2)]
    cached(pipe)
    pictures = [require_same(pipe, plain, name, kwargs)]
    changes: list[Callable[[Any], Any]] = [
        lambda each: each.load_lora_weights(folders[0], adapter_name="a"),
        lambda each: each.load_lora_weights(folders[1], adapter_name="b"),
        lambda each: each.set_adapters(["a", "b"], [0.7, 0.2]),
        lambda each: each.disable_lora(),
        lambda each: each.enable_lora(),
        lambda each: each.unload_lora_weights(),
    ]
    for change in changes:
        for each in (pipe, plain):
            change(each)
        pictures.append(require_same(pipe, plain, name, kwargs))
    plainly, first, _, weighted, off, on, unloaded = pictures
    assert torch.equal(plainly, unloaded)
    assert torch.equal(weighted, on)
    assert not torch.equal(plainly, first)
    torch.testing.assert_close(off, plainly)


@pytest.mark.full
def test_fused_lora(tmp_path: Path) -> None:
    (pipe, kwargs), (plain, _) = pipeline("flux"), pipeline("flux")
    folder = lora_folder(pipeline("flux")[0], tmp_path, 1)
    cached(pipe)
    before = require_same(pipe, plain, "flux", kwargs)
    for each in (pipe, plain):
        each.load_lora_weights(folder)
        each.fuse_lora(lora_scale=0.6)
    assert not torch.equal(require_same(pipe, plain, "flux", kwargs), before)
    for each in (pipe, plain):
        each.unfuse_lora()
        each.unload_lora_weights()
    torch.testing.assert_close(require_same(pipe, plain, "flux", kwargs), before)


@pytest.mark.full
def test_the_scale_of_a_call(tmp_path: Path) -> None:
    (pipe, kwargs), (plain, _) = pipeline("flux"), pipeline("flux")
    folder = lora_folder(pipeline("flux")[0], tmp_path, 1)
    for each in (pipe, plain):
        each.load_lora_weights(folder)
    cached(pipe)
    for scale in (0.3, 0.9):
        require_same(pipe, plain, "flux", {**kwargs, "joint_attention_kwargs": {"scale": scale}})


# IP-Adapter ---------------------------------------------------------------------------------------

IMAGE = 12  # width of an image's embedding


def give_flux_adapter(pipe: Any) -> dict[str, Any]:
    """Weights in the format of XLabs' adapters. Returns the arguments of a call."""
    torch.manual_seed(3)
    transformer = pipe.transformer
    text, width = transformer.config.joint_attention_dim, transformer.inner_dim
    of_blocks = {
        f"{block}.to_{part}_ip.{kind}": torch.randn(shape)
        for block in range(len(transformer.transformer_blocks))
        for part in "kv"
        for kind, shape in (("weight", (width, text)), ("bias", (width,)))
    }
    projection = {
        "proj.weight": torch.randn(4 * text, IMAGE),
        "proj.bias": torch.randn(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    weights = [{"image_proj": projection, "ip_adapter": of_blocks}]
    transformer._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(1, 1, IMAGE, generator=generator) for _ in range(2)]
    return {
        "ip_adapter_image_embeds": images[:1],
        "negative_ip_adapter_image_embeds": images[1:],
    }


def give_sd3_adapter(pipe: Any) -> dict[str, Any]:
    """Weights in the format of InstantX's adapters. Returns the arguments of a call."""
    torch.manual_seed(3)
    transformer = pipe.transformer
    width, time = transformer.inner_dim, 16
    of_blocks: dict[str, torch.Tensor] = {}
    for block in range(len(transformer.transformer_blocks)):
        for part in "kv":
            of_blocks[f"{block}.to_{part}_ip.weight"] = torch.randn(width, width)
        head = transformer.config.attention_head_dim
        for part in ("q", "k", "ip_k"):
            of_blocks[f"{block}.norm_{part}.weight"] = torch.ones(head)
        of_blocks[f"{block}.norm_ip.linear.weight"] = torch.randn(2 * width, time) / 4
        of_blocks[f"{block}.norm_ip.linear.bias"] = torch.zeros(2 * width)
    projection = IPAdapterTimeImageProjection(
        embed_dim=IMAGE,
        output_dim=width,
        hidden_dim=time,
        heads=1,
        num_queries=3,
        depth=1,
        timestep_in_dim=16,
    )
    transformer.set_attn_processor(
        transformer._convert_ip_adapter_attn_to_diffusers(of_blocks, low_cpu_mem_usage=False)
    )
    transformer.image_proj = projection.eval()
    generator = torch.Generator().manual_seed(4)
    return {"ip_adapter_image_embeds": torch.randn(2, 5, IMAGE, generator=generator)}


@pytest.mark.full
@pytest.mark.parametrize(("name", "give"), [("flux", give_flux_adapter), ("sd3", give_sd3_adapter)])
def test_image_adapters(
    name: str, give: Callable[[Any], dict[str, Any]], compatible: Callable[..., dict[str, Any]]
) -> None:
    (pipe, kwargs), (plain, _) = pipeline(name), pipeline(name)
    assert isinstance(pipe, (FluxIPAdapterMixin, SD3IPAdapterMixin))
    compatible("add-on", f"IP-Adapter on {type(pipe.transformer).__name__}")
    cached(pipe)
    before = require_same(pipe, plain, name, kwargs)
    for each in (pipe, plain):
        kwargs = {**kwargs, **give(each)}
    pictures = [before, require_same(pipe, plain, name, kwargs)]
    for each in (pipe, plain):
        each.set_ip_adapter_scale(0.3)
    pictures.append(require_same(pipe, plain, name, kwargs))
    for number, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[number + 1 :])
