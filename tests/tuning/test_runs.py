"""Tuning without a function: the pipeline's own calls."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DModel
from small_pipelines import DDIM, emoji_sd, stable_diffusion
from transformer_pipelines import pipeline

import dcompile
from dcompile.tuning.runs import PROMPTS, runs_of

STEPS = {"num_inference_steps": 5}
QUICK: dict[str, Any] = {"samples": 1, "trials": 1, "verbose": False}


class Recording:
    """A pipeline that keeps what it is called with."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        prompt: Any = None,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        self.calls.append(
            {"prompt": prompt, "seed": generator.initial_seed(), "output_type": output_type}
        )
        return torch.zeros(2)


def test_each_sample_has_a_prompt_and_a_seed_of_its_own() -> None:
    pipe = Recording()
    for _ in range(2):
        for run in runs_of(pipe, None, 3):
            run()
    assert pipe.calls[:3] == pipe.calls[3:]
    assert [call["prompt"] for call in pipe.calls[:3]] == list(PROMPTS[:3])
    assert [call["seed"] for call in pipe.calls[:3]] == [0, 1, 2]
    assert {call["output_type"] for call in pipe.calls} == {"pt"}


def test_arguments_are_those_of_the_call() -> None:
    pipe = Recording()
    for run in runs_of(pipe, None, 3, {"prompt": ["a", "b"], "output_type": "latent"}):
        run()
    assert [call["prompt"] for call in pipe.calls] == ["a", "b", "a"]
    assert {call["output_type"] for call in pipe.calls} == {"latent"}
    runs_of(pipe, None, 1, {"prompt": "a single one"})[0]()
    assert pipe.calls[-1]["prompt"] == "a single one"


def test_text_to_image() -> None:
    pipe = emoji_sd()
    tuned = dcompile.tune(pipe, speedup=1.5, arguments={**STEPS, "guidance_scale": 3.0}, **QUICK)
    assert (tuned.steps, len(tuned.trials)) == (5, 1)
    assert tuned.speedup >= 1.5
    assert "progress_bar" not in vars(pipe)
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(pipe)
    dcompile.cache_compile(pipe, schedule=tuned, backend="eager", verbose=False)


def unconditional() -> Any:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = DDIMPipeline(network.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_unconditional_pipeline() -> None:
    arguments = {**STEPS, "output_type": "np"}
    tuned = dcompile.tune(unconditional(), speedup=1.3, arguments=arguments, **QUICK)
    assert tuned.steps == 5
    profile = dcompile.profile(unconditional(), arguments=arguments, verbose=False)
    assert profile.steps == 5
    adaptive = dcompile.calibrate(
        unconditional(), arguments=arguments, speedup=1.1, samples=1, trials=2
    )
    assert adaptive.threshold > 0


def test_a_class_conditional_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipeline("dit")
    labels: list[Any] = []
    own = type(pipe).__call__

    def call(self: Any, class_labels: Any, *args: Any, **kwargs: Any) -> Any:
        labels.append(class_labels)
        return own(self, class_labels, *args, **kwargs)

    call.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", call)
    for run in runs_of(pipe, None, 2, {**STEPS, "output_type": "np"}):
        run()
    count = pipe.transformer.config.num_embeds_ada_norm
    assert labels == [[0], [count // 2]]


def test_a_pipeline_that_needs_more() -> None:
    small = stable_diffusion(scheduler=DDIM)
    pipe = StableDiffusionImg2ImgPipeline(**small.components, requires_safety_checker=False)
    with pytest.raises(dcompile.TuneError, match=r"Img2ImgPipeline cannot be called with"):
        dcompile.tune(pipe, speedup=1.5, **QUICK)
    assert "progress_bar" not in vars(pipe)


def test_refusals() -> None:
    network = unconditional().unet
    with pytest.raises(dcompile.TuneError, match=r"UNet2DModel is no pipeline.*give run="):
        dcompile.tune(network, speedup=1.5, **QUICK)
    with pytest.raises(dcompile.TuneError, match="DDIMPipeline takes no prompt"):
        dcompile.tune(unconditional(), speedup=1.5, arguments={"prompt": "a"}, **QUICK)
    with pytest.raises(dcompile.TuneError, match="run= makes its own"):
        dcompile.tune(unconditional(), lambda: None, speedup=1.5, arguments={}, **QUICK)
