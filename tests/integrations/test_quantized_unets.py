"""diffusers' U-Nets with quantized weights, fused projections and half precision.

What quantizes is optional: torchao, optimum-quanto, bitsandbytes and gguf are no dependencies of
the tests, and these are skipped where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import dcompile

STEPS = 7
Make = Callable[[Path, torch.dtype], Any]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(3)
    return builders.unet(
        block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4, layers_per_block=1
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("unet")
    unet().save_pretrained(where)
    return where


def loaded(folder: Path, dtype: torch.dtype, config: Any = None) -> Any:
    more = {} if config is None else {"quantization_config": config}
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, **more).eval()


def sampled(network: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, builders.TOKENS, builders.TEXT, generator=generator).to(dtype)
    with torch.no_grad():
        for t in torch.linspace(999, 0, STEPS).round().long():
            x = x - 0.2 * network(x, t, text).sample
    return x


def compiled(network: Any, interval: int = 1, **settings: Any) -> Any:
    return dcompile.cache_compile(
        network, interval=interval, backend="eager", verbose=False, **settings
    )


def require_exact(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """Captured, and at interval 1 the same bit for bit; reused at interval 3."""
    expected = sampled(make(), dtype)
    network = compiled(make())
    for _ in range(2):
        assert torch.equal(sampled(network, dtype), expected)
    stats = dcompile.handle(network).stats
    assert (stats.captures, stats.uncached_calls) == (1, 0)
    reused = sampled(compiled(network, interval=3), dtype)
    assert dcompile.handle(network).stats.flops_speedup > 1.5
    assert 0 < (reused - expected).float().abs().max() < 0.2
    return compiled(network)


def require_refused(make: Callable[[], Any], dtype: torch.dtype, message: str) -> None:
    """Uncached, for a reason that is given, and right."""
    expected = sampled(make(), dtype)
    network = compiled(make())
    for _ in range(2):
        assert torch.equal(sampled(network, dtype), expected)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == 2 * STEPS
    (reason,) = stats.uncached_reasons
    assert message in reason


def with_lora(network: Any) -> Any:
    lora = pytest.importorskip("peft").LoraConfig(
        r=4, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    torch.manual_seed(5)
    network.add_adapter(lora)
    return network


# Everywhere


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_and_fused_projections(folder: Path, dtype: torch.dtype, fused: bool) -> None:
    def make() -> Any:
        network = loaded(folder, dtype)
        if fused:
            network.fuse_qkv_projections()
        return network

    require_exact(make, dtype)


@pytest.mark.full
def test_fused_and_cast_between_runs(folder: Path) -> None:
    def fused() -> Any:
        network = loaded(folder, torch.float32)
        network.fuse_qkv_projections()
        return network

    network = compiled(loaded(folder, torch.float32))
    sampled(network)
    network.fuse_qkv_projections()
    assert torch.equal(sampled(network), sampled(fused()))
    network.to(torch.bfloat16)
    half = sampled(fused().to(torch.bfloat16), torch.bfloat16)
    assert torch.equal(sampled(network, torch.bfloat16), half)
    network.unfuse_qkv_projections()
    half = sampled(loaded(folder, torch.bfloat16), torch.bfloat16)
    assert torch.equal(sampled(network, torch.bfloat16), half)
    stats = dcompile.handle(network).stats
    assert (stats.captures, stats.uncached_calls) == (4, 0)


# torchao, quanto


def torchao_config(name: str) -> Make:
    def make(folder: Path, dtype: torch.dtype) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        from diffusers import TorchAoConfig

        return loaded(folder, dtype, TorchAoConfig(getattr(quantization, name)()))

    return make


def quanto(weights: str) -> Make:
    def make(folder: Path, dtype: torch.dtype) -> Any:
        pytest.importorskip("optimum.quanto")
        from diffusers import QuantoConfig

        return loaded(folder, dtype, QuantoConfig(weights_dtype=weights))

    return make


def gguf(kind: str) -> Make:
    def make(folder: Path, dtype: torch.dtype) -> Any:
        library = pytest.importorskip("gguf")
        from diffusers import GGUFQuantizationConfig

        file = folder / f"{kind}.gguf"
        if not file.exists():
            writer = library.GGUFWriter(file, "unet")
            raw = getattr(library.GGMLQuantizationType, kind)
            for name, tensor in unet().state_dict().items():
                values = tensor.numpy()
                # Rows of blocks of 32 numbers.
                if values.ndim == 2 and values.shape[1] % 32 == 0:
                    writer.add_tensor(name, library.quants.quantize(values, raw), raw_dtype=raw)
                else:
                    writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return UNet2DConditionModel.from_single_file(
            str(file),
            config=str(folder),
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
        )

    return make


CONFIGS = {
    "torchao int8 weights": torchao_config("Int8WeightOnlyConfig"),
    "torchao int8 activations": torchao_config("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weights": torchao_config("Float8WeightOnlyConfig"),
    "quanto int8": quanto("int8"),
    "quanto float8": quanto("float8"),
    "gguf Q8_0": gguf("Q8_0"),
    "gguf Q4_0": gguf("Q4_0"),
    "gguf BF16": gguf("BF16"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_quantized_by_diffusers(folder: Path, make: Make, dtype: torch.dtype) -> None:
    require_exact(lambda: make(folder, dtype), dtype)


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_changed(folder: Path, make: Make, tmp_path: Path) -> None:
    network = compiled(make(folder, torch.float32))
    expected = sampled(network)
    dcompile.handle(network).save(tmp_path / "saved")
    other = dcompile.load(make(folder, torch.float32), tmp_path / "saved", verbose=False)
    assert torch.equal(sampled(other), expected)
    assert dcompile.handle(other).stats.captures == 0

    with_lora(network)
    found = sampled(network)
    assert torch.equal(found, sampled(with_lora(make(folder, torch.float32))))
    assert not torch.equal(found, expected)
    network.delete_adapters("default")
    assert torch.equal(sampled(network), expected)

    changed = make(folder, torch.float32)
    with torch.no_grad():
        for part in changed.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(1.1)
    other.load_state_dict(changed.state_dict())
    assert torch.equal(sampled(other), sampled(changed))
    for each in (network, other):
        assert dcompile.handle(each).stats.uncached_calls == 0
    assert dcompile.handle(other).stats.captures == 0


@pytest.mark.full
def test_quanto_int4(folder: Path) -> None:
    """In bfloat16 some layers get a kernel that asks for the class of its input."""
    make = quanto("int4")
    require_exact(lambda: make(folder, torch.float32))
    require_refused(lambda: make(folder, torch.bfloat16), torch.bfloat16, "TinyGemmWeightQBits")


# bitsandbytes: diffusers asks for a GPU, its layers do not


def bitsandbytes(folder: Path, four: dict[str, Any] | None, threshold: float = 0.0) -> Any:
    library = pytest.importorskip("bitsandbytes").nn

    def quantized(layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features
        weight = layer.weight.data
        if four is None:
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
            new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            new = library.Linear4bit(*sizes, compute_dtype=torch.float32, **four)
            new.weight = library.Params4bit(weight, requires_grad=False, module=new, **four)
        new.bias = layer.bias
        return new.to("cpu").eval()

    network = loaded(folder, torch.float32)
    for part in [*network.modules()]:
        for name, child in [*part.named_children()]:
            if type(child) is nn.Linear:
                setattr(part, name, quantized(child))
    return network


FOUR = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
}


@pytest.mark.parametrize("settings", [*FOUR.values(), None], ids=[*FOUR, "int8"])
def test_bitsandbytes(folder: Path, settings: Any, tmp_path: Path) -> None:
    network = require_exact(lambda: bitsandbytes(folder, settings))
    changed = with_lora(bitsandbytes(folder, settings))
    assert torch.equal(sampled(with_lora(network)), sampled(changed))
    with pytest.raises(dcompile.ArtifactError, match="has no name of its own"):
        dcompile.handle(network).save(tmp_path / "saved")


def test_other_scales_of_bitsandbytes(folder: Path) -> None:
    def scaled(network: Any) -> Any:
        network.mid_block.attentions[0].proj_in.weight.data.mul_(2)
        network.time_embedding.linear_1.weight.quant_state.absmax.mul_(2)
        return network

    settings = FOUR["nf4"]
    network = compiled(bitsandbytes(folder, settings))
    before = sampled(network)
    found = sampled(scaled(network))
    assert not torch.equal(found, before)
    assert torch.equal(found, sampled(scaled(bitsandbytes(folder, settings))))
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_outliers_of_bitsandbytes(folder: Path) -> None:
    require_refused(
        lambda: bitsandbytes(folder, None, threshold=6.0), torch.float32, "llm_int8_threshold=0.0"
    )
