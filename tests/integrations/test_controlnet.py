"""ControlNets: at every step only the residuals that the denoiser reads are computed, exactly."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import seam
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
)
from heard import noticed, silent
from simulated_graphs import SimulatedRecorder
from small_pipelines import (
    DDIM,
    image,
    stable_diffusion,
    text_encoder,
    tokenizer,
    unet,
    vae,
)
from torch import nn

import dcompile
from dcompile import Adaptive, MultiLevel
from dcompile.compiler.lazy import LazyTensor, PendingCall, materialize
from dcompile.runtime.cuda_recorder import RECORDERS
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.partial_programs import PartialPrograms

RESIDUALS = 7  # two levels of three, and the deepest


def controlnet(seed: int = 5, xl: bool = False) -> ControlNetModel:
    """One that does something: a new one's last convolutions are zero."""
    torch.manual_seed(seed)
    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
            "use_linear_projection": True,
        }
    network = ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=2,
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(16, 16),
        **more,
    )
    last = (
        *network.controlnet_down_blocks,
        network.controlnet_mid_block,
        network.controlnet_cond_embedding.conv_out,
    )
    for parameter in (p for module in last for p in module.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def single() -> Any:
    return StableDiffusionControlNetPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        controlnet=controlnet(),
        scheduler=DDIM.from_config(DDIM.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def several() -> Any:
    pipe = single()
    pipe.register_modules(controlnet=MultiControlNetModel([controlnet(1), controlnet(2)]))
    return pipe


def of_sdxl() -> Any:
    return StableDiffusionXLControlNetPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(xl=True),
        controlnet=controlnet(xl=True),
        scheduler=DDIM.from_config(DDIM.config),
    )


def run(pipe: Any, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    many = isinstance(pipe.controlnet, MultiControlNetModel)
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "image": [image(3), image(4)] if many else image(3),
        "controlnet_conditioning_scale": [0.7, 0.4] if many else 0.7,
        "num_inference_steps": 9,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    images: torch.Tensor = pipe(**(arguments | more)).images
    return images


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


def companion_of(pipe: Any) -> LazyNetwork:
    return seam.companions_of(pipe)[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many residuals were asked for, one number for each time."""
    found: list[int] = []
    graph_of = PartialPrograms.graph

    def graph(self: PartialPrograms, bound: Any, numbers: tuple[int, ...], *rest: Any) -> Any:
        found.append(len(numbers))
        return graph_of(self, bound, numbers, *rest)

    monkeypatch.setattr(PartialPrograms, "graph", graph)
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("build", [single, several, of_sdxl])
def test_a_reuse_step_computes_what_it_reads(
    build: Callable[[], Any], asked: list[int], compatible: Callable[..., dict[str, Any]]
) -> None:
    pipe = build()
    name = type(pipe).__name__ + (", several ControlNets" if build is several else "")
    row = compatible("pipeline", name)
    expected = run(pipe)
    cached(pipe, interval=1)
    assert torch.equal(run(pipe), expected)
    assert asked == [RESIDUALS] * 9
    asked.clear()
    cached(pipe, interval=3)
    found = run(pipe)
    assert asked == [RESIDUALS, 1, 1] * 3
    explained = dcompile.handle(pipe).explain()
    row["ratio"] = explained.depths[0].ratio
    (part,) = explained.companions
    assert part.network == type(pipe.controlnet).__name__
    assert (part.results, part.of) == (1, RESIDUALS)
    assert part.ratio < 0.5
    assert f"{part.network} computes 1 of {RESIDUALS}" in " ".join(str(explained).split())
    dcompile.handle(pipe).remove()
    assert torch.equal(run(pipe), expected)
    cached(pipe.unet, interval=3)  # with the ControlNet's own forward
    assert not pipe.controlnet.__dict__.get("forward")
    assert torch.equal(run(pipe), found)
    assert not torch.equal(found, expected)


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    """One of which only the denoiser is cached, which was right before, and one with both."""
    return single(), single()


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    "change",
    [
        {"guess_mode": True},
        {"control_guidance_end": 0.5},
        {"controlnet_conditioning_scale": 0.3},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
    ],
    ids=str,
)
def test_however_it_is_used(pipes: tuple[Any, Any], change: dict[str, Any]) -> None:
    reference, pipe = pipes
    cached(reference.unet, interval=3)
    cached(pipe, interval=3)
    assert torch.equal(run(pipe, **change), run(reference, **change))


def test_another_scale_is_no_new_capture(pipes: tuple[Any, Any]) -> None:
    pipe = cached(pipes[1], interval=3)
    run(pipe)
    known = len(seam.partial_programs_of(companion_of(pipe)))
    for scale in (0.1, 0.2, 0.9):
        run(pipe, controlnet_conditioning_scale=scale)
    assert len(seam.partial_programs_of(companion_of(pipe))) == known


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (MultiLevel([(0, 2), (3, 4)]), [7, 1, 4, 1, 7, 1, 4, 1, 7]),
        (Adaptive(1e-9, max_interval=4), None),
    ],
    ids=["multi_level", "adaptive"],
)
def test_any_schedule(
    pipes: tuple[Any, Any], asked: list[int], schedule: Any, expected: list[int] | None
) -> None:
    reference, pipe = pipes
    for each in (reference.unet, pipe):
        cached(each, schedule=schedule, sampler=pipe.scheduler)
    found = run(pipe)
    assert torch.equal(found, run(reference))
    stats = dcompile.handle(pipe).stats
    assert len(asked) == 9
    assert asked.count(RESIDUALS) == stats.refresh_steps
    assert expected in (None, asked)


def test_recorded_graphs(pipes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", SimulatedRecorder)
    reference, pipe = pipes
    cached(reference.unet, interval=3, cuda_graphs=False)
    cached(pipe, interval=3)
    assert torch.equal(run(pipe), run(reference))
    assert seam.recorded_of(pipe)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled(pipes: tuple[Any, Any], backend: str) -> None:
    reference, pipe = pipes
    cached(reference.unet, interval=3, cuda_graphs=False)
    cached(pipe, interval=3, backend=backend)
    assert torch.allclose(run(pipe), run(reference), atol=1e-3)


def test_changed_weights_and_structure_are_seen(pipes: tuple[Any, Any]) -> None:
    reference, pipe = pipes
    cached(reference.unet, interval=3)
    cached(pipe, interval=3)
    for each in pipes:
        with torch.no_grad():
            each.controlnet.controlnet_down_blocks[0].weight.mul_(1.5)
    assert torch.equal(run(pipe), run(reference))
    for each in pipes:
        each.controlnet.conv_in = nn.Sequential(each.controlnet.conv_in, nn.SiLU()).eval()
    assert torch.equal(run(pipe), run(reference))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("first", ["hook", "compile"])
def test_beneath_and_above_offload_hooks(first: str, asked: list[int]) -> None:
    pipe = single()
    if first == "hook":
        add_hook_to_module(pipe.controlnet, CpuOffload(execution_device="cpu"))
    cached(pipe, interval=3)
    if first == "compile":
        add_hook_to_module(pipe.controlnet, CpuOffload(execution_device="cpu"))
    found = run(pipe)
    assert asked == [RESIDUALS, 1, 1] * 3
    remove_hook_from_module(pipe.controlnet)
    dcompile.handle(pipe).remove()
    cached(pipe.unet, interval=3)
    assert torch.equal(run(pipe), found)


@pytest.mark.full
def test_a_copied_or_disabled_one_computes_everything(asked: list[int]) -> None:
    pipe = single()
    expected = run(pipe)
    cached(pipe, interval=1)
    run(pipe)
    copied = copy.deepcopy(pipe.controlnet)
    assert "forward" not in copied.__dict__ or not isinstance(copied.forward, LazyNetwork)
    asked.clear()
    dcompile.handle(pipe).disable()
    assert torch.equal(run(pipe), expected)
    assert not asked
    dcompile.handle(pipe).enable()
    assert torch.equal(run(pipe), expected)
    assert len(asked) == 9


def test_by_itself_it_returns_what_it_did() -> None:
    pipe = single()
    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "controlnet_cond": image(),
    }
    with torch.no_grad():
        expected = pipe.controlnet(**call)
        cached(pipe, interval=3)
        found = pipe.controlnet(**call)
    for one, two in zip(
        (*found.down_block_res_samples, found.mid_block_res_sample),
        (*expected.down_block_res_samples, expected.mid_block_res_sample),
        strict=True,
    ):
        assert isinstance(one, LazyTensor)
        assert (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
        assert torch.equal(one, two)
        assert torch.equal(one * 2, two * 2)
        assert repr(one) == repr(two)
    training = pipe.controlnet.train()(**call)
    assert not isinstance(training.mid_block_res_sample, LazyTensor)
    assert training.mid_block_res_sample.requires_grad


def promised() -> tuple[Any, list[torch.Tensor], dict[str, Any]]:
    """A compiled pipeline, what its ControlNet really computes of a call, and the call."""
    pipe = single()
    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "controlnet_cond": image(),
        "return_dict": False,
    }
    with torch.no_grad():
        down, middle = pipe.controlnet(**call)
    return cached(pipe, interval=3), [*down, middle], call


READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda t: t.numpy(),
    "asarray": np.asarray,
    "from_dlpack": torch.from_dlpack,
    "numpy.from_dlpack": np.from_dlpack,
    "tolist": lambda t: t.tolist(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu").float().contiguous(),
    "share_memory_": lambda t: t.share_memory_(),
    "detach": lambda t: t.detach(),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_a_promise_reads_the_true_tensor(reader: str) -> None:
    pipe, expected, call = promised()
    with torch.no_grad():
        down, _ = pipe.controlnet(**call)
        found = READERS[reader](down[1])
        assert not isinstance(found, LazyTensor)
        assert torch.equal(torch.as_tensor(found), expected[1])
        assert down[1].data_ptr() == down[1].data_ptr() != 0


def test_a_sample_changed_in_place_before_a_promise_is_read() -> None:
    pipe, expected, call = promised()
    with torch.no_grad():
        down, middle = pipe.controlnet(**call)
        call["sample"].div_(1.1)
        assert all(map(torch.equal, [*down, middle], expected))


def test_other_arguments_changed_in_place_are_an_error() -> None:
    pipe, _, call = promised()
    with torch.no_grad():
        down, _ = pipe.controlnet(**call)
        call["encoder_hidden_states"].mul_(2)
        with pytest.raises(dcompile.CaptureError, match="changed in place after the call"):
            down[0] + 1
        assert torch.isfinite(pipe.controlnet(**call)[1]).all()


def test_a_controlnet_of_two_pipelines_stays_with_the_other() -> None:
    one, two = single(), single()
    two.register_modules(controlnet=one.controlnet)
    cached(one, interval=3)
    cached(two, interval=3)
    expected = run(two)
    with silent():
        dcompile.handle(one).remove()
        assert isinstance(two.controlnet.forward, LazyNetwork)
        assert torch.equal(run(two), expected)
        dcompile.handle(two).remove()
    assert "forward" not in two.controlnet.__dict__


def test_every_controlnet_is_given_back() -> None:
    pipe = single()
    first = pipe.controlnet
    cached(pipe, interval=3)
    pipe.register_modules(controlnet=controlnet(9))
    cached(pipe, interval=3)
    plain = StableDiffusionPipeline(**{**stable_diffusion().components, "unet": pipe.unet})
    cached(plain, interval=2)  # the same network, and no ControlNet
    dcompile.handle(plain).remove()
    for network in (pipe.unet, first, pipe.controlnet):
        assert "forward" not in network.__dict__


@pytest.mark.one_in(8)
@pytest.mark.parametrize("state", ["fresh", "network only", "disabled", "compiled"])
def test_tuning_leaves_a_controlnet_as_it_was(state: str) -> None:
    pipe = single()
    if state == "network only":
        cached(pipe.unet, interval=3)
    elif state != "fresh":
        cached(pipe, interval=3, backend="eager" if state == "disabled" else "inductor")
    if state == "disabled":
        dcompile.handle(pipe).disable()
    before = pipe.controlnet.__dict__.get("forward")
    seen = before.state() if isinstance(before, LazyNetwork) else None
    dcompile.tune(
        pipe, lambda: run(pipe), speedup=1.3, trials=1, depths=(0,), verbose=False, samples=1
    )
    assert pipe.controlnet.__dict__.get("forward") is before
    if seen is not None:
        assert before.state() == seen


def test_a_wrong_call_raises_the_network_s_own_error() -> None:
    pipe = cached(single(), interval=3)
    with pytest.raises((TypeError, RuntimeError, ValueError)), torch.no_grad():
        pipe.controlnet(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 5, 9), controlnet_cond=image())
    run(pipe)
    assert companion_of(pipe).programs.costs()


class Unfollowable(nn.Module):
    """Decides by its values: torch.export cannot follow it."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (sample, -sample) if float(sample.sum()) > 0 else (-sample, sample)


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    pipe = cached(single(), interval=3)
    pipe.register_modules(controlnet=Unfollowable().eval())
    cached(pipe, interval=3)
    sample = torch.ones(1, 3)
    with noticed("Unfollowable computes all its results"), torch.no_grad():
        found = pipe.controlnet(sample, torch.tensor(1))
    assert torch.equal(found[0], sample)


def test_results_are_computed_together_and_once() -> None:
    asked: list[tuple[int, ...]] = []

    def compute(numbers: tuple[int, ...]) -> list[torch.Tensor]:
        asked.append(numbers)
        return [torch.full((2,), float(number)) for number in numbers]

    pending = PendingCall(compute, 4)
    promised = [LazyTensor(torch.empty(2), pending, number) for number in range(4)]
    two, other, zero = materialize([promised[2], "other", promised[0]])
    assert (two[0], other, zero[0]) == (2.0, "other", 0.0)
    assert asked == [(0, 2)]
    assert torch.equal(torch.stack(promised)[:, 0], torch.arange(4.0))
    assert asked == [(0, 2), (1, 3)]
