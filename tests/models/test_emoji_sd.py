"""The bundled emoji-sd: a stock Stable Diffusion, small enough to ship, that takes any prompt."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

import dcompile
from dcompile import models
from dcompile.cli.app import app
from dcompile.cli.demo import run_demo
from dcompile.cli.grid import GridLayout
from dcompile.cli.settings import DemoSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dcompile/models/emoji-sd"
MOST_BYTES = 24 * 1024**2
SIZE, TOKENS = 64, 32
CLOSE = 20.0  # dB
NO_KNOWN_WORD = "qwxz ☃ 你好 123 !!"


@pytest.fixture(scope="module")
def pipe() -> Any:
    """As any user of diffusers loads it: no precision, no class of ours."""
    pipe = StableDiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any, prompt: str = "red apple", seed: int = 0, guidance: float = 5.0, steps: int = 4
) -> torch.Tensor:
    """One picture in 0..1, shape (3, SIZE, SIZE)."""
    output = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return output.images[0]


@pytest.fixture(scope="module")
def compiled(pipe: Any) -> Any:
    """The same weights, captured once for all tests; each sets its interval."""
    unet = copy.deepcopy(pipe.unet)
    return StableDiffusionPipeline(
        **{**pipe.components, "unet": unet}, requires_safety_checker=False
    )


def cached(compiled: Any, interval: int) -> Any:
    compiled.set_progress_bar_config(disable=True)
    return dcompile.cache_compile(compiled, interval=interval, backend="eager", verbose=False)


# --- the folder -----------------------------------------------------------------------------------


def test_it_is_small() -> None:
    assert models.path("emoji-sd") == FOLDER
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= MOST_BYTES


def test_its_card_says_what_it_is() -> None:
    card = (FOLDER / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: apache-2.0" in header
    assert "pipeline_tag: text-to-image" in header
    for said in ("Noto Color Emoji", "SIL Open Font License", "bench/train_emoji_sd.py"):
        assert said in " ".join(card.split())
    for said in ("**Network**", "**Data**", "**Training**", "**Limits**", "held out"):
        assert said in card


def test_its_weights_are_half_precision_safetensors() -> None:
    weights = sorted(FOLDER.rglob("*.safetensors"))
    assert [file.parent.name for file in weights] == ["text_encoder", "unet", "vae"]
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert {file.suffix for file in FOLDER.rglob("*") if file.is_file()} == {
        *(".json", ".md", ".safetensors", ".txt")
    }


def test_older_transformers_find_the_text_encoder_s_weights() -> None:
    # Without the prefix they would leave it at random weights; newer ones save it without.
    file = FOLDER / "text_encoder/model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        assert all(key.startswith("text_model.") for key in tensors.keys())  # noqa: SIM118
    assert {file.name for file in (FOLDER / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}


def test_it_is_part_of_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {
        file
        for pattern in settings["package-data"]["dcompile"]
        for file in (ROOT / "dcompile").glob(pattern)
    }
    assert {file for file in FOLDER.rglob("*") if file.is_file()} <= packaged
    assert not any(file.name.startswith(".") for file in FOLDER.rglob("*"))  # setuptools skips them


# --- the networks ---------------------------------------------------------------------------------


def test_it_is_made_of_stock_classes(pipe: Any) -> None:
    assert {name: type(part) for name, part in pipe.components.items() if part is not None} == {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "unet": UNet2DConditionModel,
        "scheduler": DDIMScheduler,
    }
    assert pipe.safety_checker is None
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_its_parts_are_loaded_in_one_precision(pipe: Any) -> None:
    assert {part.dtype for part in (pipe.vae, pipe.text_encoder, pipe.unet)} == {torch.float32}


def test_its_unet_is_a_small_stable_diffusion_s(pipe: Any, compiled: Any) -> None:
    config = pipe.unet.config
    assert len(config.block_out_channels) >= 3
    assert config.layers_per_block == 2
    assert sum("CrossAttn" in block for block in config.down_block_types) >= 1
    assert sum("CrossAttn" in block for block in config.up_block_types) >= 1
    assert config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    assert (config.in_channels, config.out_channels, config.sample_size) == (4, 4, SIZE // 4)
    draw(cached(compiled, interval=3), steps=1)
    assert len(dcompile.handle(compiled).explain().depths) >= 9


# --- prompts --------------------------------------------------------------------------------------


def test_its_tokenizer_knows_every_byte(pipe: Any) -> None:
    vocabulary = pipe.tokenizer.get_vocab()
    for byte in ByteLevel.alphabet():
        assert byte in vocabulary
        assert byte + "</w>" in vocabulary
    assert len(vocabulary) <= pipe.text_encoder.config.vocab_size
    assert max(vocabulary.values()) < pipe.text_encoder.config.vocab_size
    assert pipe.tokenizer.model_max_length == TOKENS
    assert pipe.text_encoder.config.max_position_embeddings == TOKENS


@pytest.mark.parametrize("prompt", ["red apple", NO_KNOWN_WORD, "☃", "\x00\x7f", "🍎", "ß", "𐍈"])
def test_its_tokenizer_has_tokens_for_any_text(pipe: Any, prompt: str) -> None:
    first, *tokens, last = pipe.tokenizer(prompt).input_ids
    special = {pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id}
    assert (first, last) == (pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id)
    assert tokens
    assert not special & set(tokens)  # the unknown token is the last one, too


def test_its_tokenizer_has_learnt_from_captions(pipe: Any) -> None:
    text = " ".join(models.defaults("emoji-sd").prompts)
    assert len(pipe.tokenizer(text).input_ids) < len(text) / 2


@pytest.mark.parametrize("prompt", [NO_KNOWN_WORD, "", "a very long prompt of many words, " * 20])
def test_any_prompt_gives_a_picture(pipe: Any, prompt: str) -> None:
    picture = draw(pipe, prompt)
    assert picture.shape == (3, SIZE, SIZE)
    assert torch.isfinite(picture).all()
    assert float(picture.std()) > 0.01


def test_what_is_asked_for_matters(pipe: Any) -> None:
    picture = draw(pipe)
    assert torch.equal(picture, draw(pipe))
    assert not torch.allclose(picture, draw(pipe, prompt="blue heart"), atol=0.02)
    assert not torch.allclose(picture, draw(pipe, guidance=1.0), atol=0.02)
    assert not torch.allclose(picture, draw(pipe, seed=1), atol=0.02)


# --- cached ---------------------------------------------------------------------------------------


def test_interval_1_is_exact(pipe: Any, compiled: Any) -> None:
    found = draw(cached(compiled, interval=1), steps=9)
    assert torch.equal(found, draw(pipe, steps=9))
    assert dcompile.handle(compiled).stats.refresh_steps == 9


def test_cached_pictures_are_close_and_closer_the_shorter_the_interval(
    pipe: Any, compiled: Any
) -> None:
    expected = draw(pipe, steps=50)
    psnr = []
    for interval in (2, 3, 10):
        found = draw(cached(compiled, interval), steps=50)
        psnr.append(float(peak_signal_noise_ratio(found, expected, data_range=1.0)))
    assert psnr[0] > psnr[2]
    assert CLOSE <= psnr[1] < float("inf")


# --- the demo -------------------------------------------------------------------------------------


def demo(**settings: Any) -> dcompile.cli.demo.DemoResult:
    return run_demo(DemoSettings(**{"steps": 2, "intervals": (2,), "device": "cpu", **settings}))


@pytest.mark.full
def test_the_demo_draws_eight_things_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    result = CliRunner().invoke(
        app, ["demo", "--steps", "2", "--interval", "2", "--device", "cpu", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "emoji-sd: 8 pictures, 2 steps" in result.output
    with Image.open(out) as image:
        size = GridLayout.of(runs=2, count=8, height=SIZE, width=SIZE, labelled=True).size
        assert image.size == size


def test_the_demo_s_defaults_are_the_model_s(pipe: Any) -> None:
    result = demo(count=2)
    assert (
        result.prompts == models.defaults("emoji-sd").prompts[:2] == ("red apple", "grinning face")
    )
    assert models.defaults("sd") == models.defaults("emoji-sd")
    expected = draw(pipe, "grinning face", seed=1, guidance=5.0, steps=2)
    assert torch.allclose(result.runs[0].pictures[1], expected, atol=1e-3)
    pipeline_s_own = draw(pipe, "grinning face", seed=1, guidance=7.5, steps=2)
    assert not torch.allclose(result.runs[0].pictures[1], pipeline_s_own, atol=1e-3)
