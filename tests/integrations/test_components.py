"""``cache_compile(pipe, components="compile")``: what runs beside the denoiser is compiled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_pipelines import run, stable_diffusion, stable_diffusion_xl

import dcompile
from dcompile.errors import DcompileError


class Counting:
    """A backend of ``torch.compile`` that runs graphs as they are, and counts."""

    def __init__(self, fails: bool = False) -> None:
        self.graphs = 0
        self.fails = fails

    def __call__(self, graph_module: Any, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if self.fails:
            raise RuntimeError("no compiler here")
        return graph_module.forward  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def picture(pipe: Any, seed: int = 0) -> torch.Tensor:
    return run(pipe, seed, output_type="pt", num_inference_steps=4)


def cached(pipe: Any, backend: Any, **more: Any) -> Any:
    return dcompile.cache_compile(pipe, backend=backend, verbose=False, **more)


def own_forwards(pipe: Any) -> list[bool]:
    parts = [pipe.text_encoder, pipe.vae.decoder]
    return [not {"forward", "_old_forward"} & set(vars(part)) for part in parts]


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_results_are_those_without(make: Callable[[], Any]) -> None:
    pipe, backend = make(), Counting()
    expected = picture(cached(pipe, backend))
    before = backend.graphs
    names = set(pipe.vae.state_dict())
    cached(pipe, backend, components="compile")
    for seed in (0, 1, 0):
        found = picture(pipe, seed)
    assert torch.allclose(found, expected, atol=1e-5)
    encoders = sum(name.startswith("text_encoder") for name in pipe.components)
    assert backend.graphs >= before + encoders + 1
    assert set(pipe.vae.state_dict()) == names


def test_compiled_once_also_if_asked_for_twice() -> None:
    pipe, backend = stable_diffusion(), Counting()
    cached(pipe, backend, components="compile")
    picture(pipe)
    forwards = pipe.vae.decoder.forward, pipe.text_encoder.forward
    before = backend.graphs
    cached(pipe, backend, interval=2, components="compile")
    picture(pipe)
    assert (pipe.vae.decoder.forward, pipe.text_encoder.forward) == forwards
    assert backend.graphs == before


def test_remove_gives_forwards_back() -> None:
    pipe = cached(stable_diffusion(), Counting(), components="compile")
    assert own_forwards(pipe) == [False, False]
    dcompile.handle(pipe).remove()
    assert own_forwards(pipe) == [True, True]
    assert torch.equal(picture(pipe), picture(stable_diffusion()))


def test_the_latest_cache_compile_decides() -> None:
    pipe = cached(stable_diffusion(), Counting(), components="compile")
    cached(pipe, "eager")
    assert own_forwards(pipe) == [True, True]


def test_a_network_alone_leaves_the_pipeline_as_it_is() -> None:
    pipe = cached(stable_diffusion(), Counting(), components="compile")
    cached(pipe.unet, Counting())
    assert own_forwards(pipe) == [False, False]


def test_shared_parts_are_compiled_while_one_pipeline_wants_it() -> None:
    one, backend = stable_diffusion(), Counting()
    other = type(one)(**{**one.components, "unet": copy.deepcopy(one.unet)})
    for pipe in (one, other):
        cached(pipe, backend, components="compile")
    dcompile.handle(one).remove()
    assert own_forwards(one) == [False, False]
    dcompile.handle(other).remove()
    assert own_forwards(one) == [True, True]


def test_eager_compiles_nothing() -> None:
    pipe = cached(stable_diffusion(), "eager", components="compile")
    assert own_forwards(pipe) == [True, True]


def test_what_somebody_compiled_stays() -> None:
    pipe = stable_diffusion()
    pipe.vae.decoder.compile(backend="eager")
    cached(pipe, Counting(), components="compile")
    assert own_forwards(pipe) == [False, True]


def test_failure_is_one_warning_and_the_picture_is_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = stable_diffusion()
    with caplog.at_level(logging.WARNING, "dcompile"):
        cached(pipe, Counting(fails=True), components="compile")
        dcompile.handle(pipe).disable()  # the denoiser, which this backend cannot compile either
        for _ in range(2):
            found = picture(pipe)
    messages = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
    assert len(messages) == 2
    assert "CLIPTextModel runs uncompiled, for compiling it failed" in messages[0]
    assert "RuntimeError: no compiler here" in messages[0]
    assert "Decoder runs uncompiled" in messages[1]
    dcompile.handle(pipe).remove()
    assert torch.equal(found, picture(pipe))


def test_a_wrong_call_raises_as_it_would_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    pipe = cached(stable_diffusion(), Counting(), components="compile")
    with torch.no_grad(), pytest.raises(RuntimeError):
        pipe.vae.decoder(torch.ones(1, 3, 8, 8))
    assert not [r for r in caplog.records if "uncompiled" in r.getMessage()]


def test_gradients_go_through_the_decoder() -> None:
    pipe, backend = stable_diffusion(), Counting()
    cached(pipe, backend, components="compile")
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    pipe.vae.decode(latents).sample.sum().backward()
    assert latents.grad is not None
    assert backend.graphs == 0


def test_weights_may_change() -> None:
    pipe, backend = stable_diffusion(), Counting()
    cached(pipe, backend, components="compile")
    picture(pipe)
    with torch.no_grad():
        for weight in pipe.vae.decoder.parameters():
            weight.mul_(0.5)
    found = picture(pipe)
    dcompile.handle(pipe).remove()
    other = cached(pipe, Counting())
    assert torch.allclose(found, picture(other), atol=1e-5)


def test_hooks_on_the_whole_module_run_before() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, backend, calls = stable_diffusion(), Counting(), []

    class Noting(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(torch.compiler.is_compiling())
            return args, kwargs

    add_hook_to_module(pipe.text_encoder, Noting())
    cached(pipe, backend, components="compile")
    picture(pipe)
    assert calls
    assert not any(calls)
    dcompile.handle(pipe).remove()
    remove_hook_from_module(pipe.text_encoder)
    assert torch.equal(picture(pipe), picture(stable_diffusion()))


def test_hooks_on_parts_run_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    from accelerate import cpu_offload

    pipe, backend = stable_diffusion(), Counting()
    cached(pipe, backend, components="compile")
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "dcompile"), torch.no_grad():
        pipe.encode_prompt("a cat", torch.device("cpu"), 1, True)
    assert backend.graphs == 0
    (record,) = [r for r in caplog.records if "uncompiled" in r.getMessage()]
    assert "offloading" in record.getMessage()


def test_loaded_pipelines_too(tmp_path: Any) -> None:
    pipe = cached(stable_diffusion(), "eager")
    picture(pipe)
    dcompile.handle(pipe).save(tmp_path / "programs")
    fresh = dcompile.load(
        stable_diffusion(), tmp_path / "programs", components="compile", verbose=False
    )
    assert torch.equal(picture(fresh), picture(pipe))


def test_wrong_arguments() -> None:
    pipe = stable_diffusion()
    with pytest.raises(DcompileError, match='components: expected "compile" or False, got True'):
        cached(pipe, "eager", components=True)
    with pytest.raises(DcompileError, match="UNet2DConditionModel: pass the pipeline"):
        cached(pipe.unet, "eager", components="compile")


@pytest.mark.full
def test_with_inductor() -> None:
    pipe = stable_diffusion()
    expected = picture(cached(pipe, "inductor"))
    found = picture(cached(pipe, "inductor", components="compile"))
    assert not any(own_forwards(pipe))
    assert torch.allclose(found, expected, atol=1e-4)


def test_calibrating_leaves_them_as_they_were() -> None:
    pipe = cached(stable_diffusion(), Counting(), components="compile")
    before = pipe.vae.decoder.forward
    dcompile.profile(pipe, run=lambda: picture(pipe), verbose=False)
    assert pipe.vae.decoder.forward is before
    dcompile.handle(pipe).remove()
    assert own_forwards(pipe) == [True, True]
