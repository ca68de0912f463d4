"""Whole pipeline runs: exact at interval 1, equal to DeepCache at any other, and nothing leaks."""

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import seam
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from heard import noticed, silent
from plain import plain
from simulated_graphs import SimulatedRecorder
from small_pipelines import DDIM, PIPELINES, run, stable_diffusion

import dcompile
from dcompile import GainWeighted
from dcompile.policy.placement import by_load
from dcompile.policy.sampler import error_gains
from dcompile.runtime.cuda_recorder import RECORDERS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEPTHS = 6  # two levels of three skip connections


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


@pytest.fixture(scope="module")
def plain_pipe() -> Any:
    """Never compiled; the reference runs in it."""
    return stable_diffusion()


@pytest.fixture(scope="module")
def compiled_pipe() -> Any:
    """Captured once for all tests; each sets what it needs."""
    return stable_diffusion()


@pytest.fixture
def pipes(plain_pipe: Any, compiled_pipe: Any) -> tuple[Any, Any]:
    for pipe in (plain_pipe, compiled_pipe):
        pipe.scheduler = DDIM.from_config(DDIM.config)
    return plain_pipe, cached(compiled_pipe, interval=3)


@contextmanager
def deepcache(pipe: Any, interval: int, branch: int = 0) -> Iterator[None]:
    """The paper's released code around a pipeline."""
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", PIPELINES)
def test_whole_pipelines(name: str) -> None:
    pipe = PIPELINES[name]()
    expected = run(pipe)
    assert cached(pipe, interval=1) is pipe
    assert torch.equal(run(pipe), expected)
    assert dcompile.handle(pipe).stats.reuse_steps == 0
    cached(pipe, interval=3)
    found = run(pipe)
    assert not torch.equal(found, expected)
    stats = dcompile.handle(pipe).stats
    steps = 6 if name == "img2img" else 9  # strength 0.7 of 9
    assert (stats.refresh_steps, stats.reuse_steps) == (steps // 3, steps - steps // 3)
    dcompile.handle(pipe).remove()
    assert torch.equal(run(pipe), expected)
    with deepcache(pipe, interval=3):
        assert torch.equal(found, run(pipe))


SINGLE = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
@pytest.mark.parametrize("scheduler", [*SINGLE, PNDMScheduler, HeunDiscreteScheduler])
def test_recorded_graphs_with_samplers_that_keep_earlier_results(
    pipes: Any, scheduler: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setitem(RECORDERS, "cpu", SimulatedRecorder)
    pipe = pipes[1]
    pipe.scheduler = scheduler.from_config(DDIM.config)
    try:
        pipe.to(device)
        cached(pipe, interval=3, cuda_graphs=False)
        expected = run(pipe)
        cached(pipe, interval=3)
        found = run(pipe)
        assert seam.recorded_of(pipe)
    finally:
        cached(pipe).to("cpu")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("branch", range(DEPTHS))
@pytest.mark.parametrize("interval", [2, 5])
def test_equals_deepcache_at_every_branch(pipes: Any, branch: int, interval: int) -> None:
    plain, pipe = pipes
    with deepcache(plain, interval, branch):
        expected = run(plain)
    cached(pipe, interval=interval, depth=branch)
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("scheduler", SINGLE)
def test_equals_deepcache_with_every_scheduler(pipes: Any, scheduler: Any) -> None:
    for pipe in pipes:
        pipe.scheduler = scheduler.from_config(DDIM.config)
    with deepcache(pipes[0], 3):
        expected = run(pipes[0])
    assert torch.equal(run(pipes[1]), expected)


@pytest.mark.parametrize(("scheduler", "calls"), [(HeunDiscreteScheduler, 17), (PNDMScheduler, 10)])
def test_repeated_timesteps_are_counted_not_looked_up(
    pipes: Any, scheduler: Any, calls: int
) -> None:
    plain, pipe = pipes
    for each in pipes:
        each.scheduler = scheduler.from_config(DDIM.config, skip_prk_steps=True)
    uncached = run(plain)
    timesteps = plain.scheduler.timesteps
    assert len(set(timesteps.tolist())) < len(timesteps) == calls
    with deepcache(plain, 2):
        looked_up = run(plain)
    cached(pipe, interval=2)
    counted = run(pipe)
    assert dcompile.handle(pipe).stats.refresh_steps == len(range(0, calls, 2))
    assert not torch.equal(counted, looked_up)
    cached(pipe, interval=1)
    assert torch.equal(run(pipe), uncached)


def test_another_strength_never_reuses_the_last_picture() -> None:
    pipe, reference = (stable_diffusion(StableDiffusionImg2ImgPipeline) for _ in range(2))
    cached(pipe, interval=3)
    for strength in (0.9, 0.4, 0.65):
        found = run(pipe, seed=5, strength=strength)
        with deepcache(reference, 3):  # enabled again for each strength, it is right
            assert torch.equal(found, run(reference, seed=5, strength=strength))
    # Left enabled, it keeps the first run's start, and the next one begins out of step.
    with deepcache(reference, 3):
        run(reference, seed=5, strength=0.9)
        shifted = run(reference, seed=5, strength=0.4)
    assert not torch.equal(shifted, run(pipe, seed=5, strength=0.4))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a dog"},
        {"height": 24, "width": 16},
        {"height": 16, "width": 40},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"num_inference_steps": 1},
        {"num_inference_steps": 2},
    ],
    ids=str,
)
def test_after_another_prompt_size_guidance_or_length(pipes: Any, change: dict[str, Any]) -> None:
    plain, pipe = pipes
    run(pipe, seed=8)
    found = run(pipe, **change)
    with deepcache(plain, 3):
        assert torch.equal(found, run(plain, **change))


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_exception_midway_leaves_nothing(pipes: Any, error: type[BaseException]) -> None:
    _, pipe = pipes
    expected = run(pipe)

    def fail(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise error
        return kwargs

    with pytest.raises(error):
        run(pipe, seed=9, callback_on_step_end=fail)
    assert torch.equal(run(pipe), expected)


def test_interrupt_midway_leaves_nothing(pipes: Any) -> None:
    _, pipe = pipes
    expected = run(pipe)

    def interrupt(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return kwargs

    run(pipe, seed=9, callback_on_step_end=interrupt)
    assert torch.equal(run(pipe), expected)


def test_guidance_off_midway(pipes: Any) -> None:
    def off(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 4:  # batch 2 becomes 1 before step 5, which is not a scheduled refresh
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    arguments = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    plain, pipe = pipes
    cached(pipe, interval=1)
    assert torch.equal(run(pipe, **arguments), run(plain, **arguments))
    cached(pipe, interval=3)
    run(pipe, **arguments)
    stats = dcompile.handle(pipe).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (4, 5)  # 0 3 6, and 5 for the new batch


def test_two_pipelines_share_one_network() -> None:
    one = cached(stable_diffusion(), interval=3)
    two = StableDiffusionImg2ImgPipeline(**one.components, requires_safety_checker=False)
    two.scheduler = DDIM.from_config(DDIM.config)
    two.set_progress_bar_config(disable=True)
    alone = [run(one, seed=1), run(two, seed=2)]
    again = [run(one, seed=1), run(two, seed=2)]
    assert all(map(torch.equal, alone, again))
    assert dcompile.handle(two).module is one.unet


@pytest.mark.parametrize("first", ["hook", "compile"])
def test_beneath_and_above_offload_hooks(first: str) -> None:
    pipe = stable_diffusion()
    expected = run(pipe)
    hook = CpuOffload(execution_device="cpu")
    if first == "hook":
        add_hook_to_module(pipe.unet, hook)
        cached(pipe, interval=3)
    else:
        cached(pipe, interval=3)
        add_hook_to_module(pipe.unet, hook)
    found = run(pipe)
    assert dcompile.handle(pipe).stats.reuse_steps == 6
    assert not torch.equal(found, expected)
    remove_hook_from_module(pipe.unet)
    assert torch.equal(run(pipe), found)
    add_hook_to_module(pipe.unet, hook)
    dcompile.handle(pipe).remove()
    assert torch.equal(run(pipe), expected)
    remove_hook_from_module(pipe.unet)
    assert torch.equal(run(pipe), expected)
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(pipe)


def test_weights_changed_between_runs_are_seen() -> None:
    pipe, plain = stable_diffusion(), stable_diffusion()
    cached(pipe, interval=1)
    assert torch.equal(run(pipe), run(plain))
    for network in (pipe.unet, plain.unet):
        with torch.no_grad():
            network.conv_in.weight.mul_(1.1)
    assert torch.equal(run(pipe), run(plain))
    state = {name: tensor * 0.9 for name, tensor in plain.unet.state_dict().items()}
    for network in (pipe.unet, plain.unet):
        network.load_state_dict(state)
        network.conv_out.bias = torch.nn.Parameter(torch.ones(4))
    assert torch.equal(run(pipe), run(plain))
    assert dcompile.handle(pipe).stats.captures == 1


@pytest.mark.full
def test_structure_changed_between_runs_is_captured_again() -> None:
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig

    pipe, plain = stable_diffusion(), stable_diffusion()
    cached(pipe, interval=1)
    first = run(pipe)

    def both(change: Any) -> None:
        for each in (pipe, plain):
            torch.manual_seed(7)
            change(each)

    def add_lora(pipe: Any) -> None:
        pipe.unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        pipe.unet.eval()

    for change in (
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.disable_freeu(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        add_lora,
        lambda pipe: pipe.unet.set_adapters("default", 0.3),
        lambda pipe: pipe.unet.fuse_lora(),
        lambda pipe: pipe.unet.unfuse_lora(),
    ):
        both(change)
        assert torch.equal(run(pipe), run(plain))
    assert not torch.equal(run(pipe), first)


def test_saving_and_reloading_a_compiled_pipeline(tmp_path: Any) -> None:
    pipe = stable_diffusion()
    expected = run(pipe)
    cached(pipe, interval=3)
    run(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again), expected)
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(again)


def test_a_torch_compiled_unet_inside_a_pipeline_is_unwrapped() -> None:
    pipe = stable_diffusion()
    network = pipe.unet
    expected = run(pipe)
    pipe.unet = torch.compile(network)
    cached(pipe, interval=1)
    assert pipe.unet is network
    assert torch.equal(run(pipe), expected)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    nothing = SimpleNamespace(components={"vae": torch.nn.Linear(1, 1)})
    with pytest.raises(dcompile.DcompileError, match="no single denoiser"):
        cached(nothing)


# By speed-up --------------------------------------------------------------------------------------


def picture_of(pipe: Any, steps: int = 12, **settings: Any) -> tuple[torch.Tensor, Any]:
    cached(pipe, **settings)
    return run(pipe, num_inference_steps=steps), dcompile.handle(pipe).stats


def test_a_speed_up_is_planned_by_the_pipeline_s_own_scheduler(pipes: tuple[Any, Any]) -> None:
    pipe = pipes[1]
    run(pipe)
    ratio = dcompile.handle(pipe).explain().depths[0].ratio
    for steps, forecast in ((12, "reuse"), (30, "linear")):  # few refreshes, and many
        found, stats = picture_of(pipe, steps, speedup=1.8, autotune=False)
        count = GainWeighted(speedup=1.8).refreshes(steps, ratio)
        assert (stats.refresh_steps, stats.refresh_steps + stats.reuse_steps) == (count, steps)
        same, _ = picture_of(pipe, steps, schedule=GainWeighted(count), forecast=forecast)
        assert torch.equal(found, same)
    weights = error_gains(pipe.scheduler)
    assert weights is not None
    chosen = dcompile.Steps(by_load([w**0.5 for w in weights], count))
    assert torch.equal(found, picture_of(pipe, steps, schedule=chosen, forecast=forecast)[0])
    assert not torch.equal(found, picture_of(pipe, steps, interval=3)[0])


def test_a_new_scheduler_is_seen(pipes: tuple[Any, Any]) -> None:
    pipe = pipes[1]
    cached(pipe, schedule=GainWeighted(4), forecast="auto")
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(DDIM.config)
    found = run(pipe, num_inference_steps=12)  # it adds noise: nothing is extrapolated
    expected, stats = picture_of(pipe, schedule=GainWeighted(4), forecast="reuse")
    assert torch.equal(found, expected)
    assert stats.refresh_steps == 4


def test_without_a_pipeline_the_scheduler_is_given(pipes: tuple[Any, Any]) -> None:
    pipe = pipes[1]
    expected, _ = picture_of(pipe, speedup=1.5, autotune=False)
    with pytest.raises(
        dcompile.ScheduleError, match="speedup and GainWeighted look at the sampler"
    ):
        cached(pipe.unet, speedup=1.5)
    with pytest.raises(dcompile.ScheduleError, match="expected a diffusers scheduler, got str"):
        cached(pipe.unet, speedup=1.5, sampler="ddim")
    cached(pipe.unet, speedup=1.5, sampler=pipe.scheduler, autotune=False)
    assert torch.equal(run(pipe, num_inference_steps=12), expected)


def test_a_pipeline_can_be_tuned(pipes: tuple[Any, Any]) -> None:
    pipe = pipes[1]
    settings: dict[str, Any] = {"trials": 3, "depths": (0, 3), "verbose": False}
    tuned = dcompile.tune(pipe, lambda: run(pipe, num_inference_steps=8), speedup=1.4, **settings)
    _, stats = picture_of(pipe, 8, schedule=tuned)
    assert stats.refresh_steps == len(tuned.refresh_steps)


def sharing(pipe: Any, scheduler: Any) -> Any:
    """A pipeline around the same network, with a scheduler of its own.

    And with its own tokenizer: those of transformers mix up prompts of several threads.
    """
    other = stable_diffusion()
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.unet, other.scheduler = pipe.unet, scheduler
    return other


SAMPLERS = [DPMSolverMultistepScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_run_is_planned_by_its_own_sampler(pipes: tuple[Any, Any], kind: Any) -> None:
    pipe = pipes[1]
    other = sharing(pipe, kind.from_config(DDIM.config))
    cached(other, speedup=1.5, autotune=False)
    expected, wanted = run(other, num_inference_steps=30), dcompile.handle(other).stats
    cached(pipe, speedup=1.5, autotune=False)
    with silent():
        run(pipe, num_inference_steps=12)
        before = dcompile.handle(pipe).stats
        assert torch.equal(run(other, num_inference_steps=30), expected)
    after = dcompile.handle(pipe).stats
    assert after.refresh_steps - before.refresh_steps == wanted.refresh_steps


def test_pipelines_of_several_threads_are_planned_by_their_own_samplers(
    pipes: tuple[Any, Any],
) -> None:
    pipe = pipes[1]
    others = [sharing(pipe, kind.from_config(DDIM.config)) for kind in SAMPLERS]
    expected = []
    for number, other in enumerate(others):
        cached(other, speedup=1.5, autotune=False)
        expected.append(run(other, seed=number, num_inference_steps=24))
    cached(pipe, speedup=1.5, autotune=False)
    run(pipe, num_inference_steps=4)
    with ThreadPoolExecutor(len(others)) as pool:
        found = pool.map(
            lambda given: run(given[1], seed=given[0], num_inference_steps=24), enumerate(others)
        )
        assert all(map(torch.equal, found, expected))


@torch.no_grad()
@pytest.mark.parametrize("part", [slice(None), slice(None, None, 2)])
def test_copied_timesteps_are_looked_up_in_the_sampler_s_noise_schedule(part: slice) -> None:
    scheduler = DDIM.from_config(DDIM.config)
    scheduler.set_timesteps(24)
    timesteps = scheduler.timesteps[part].clone()
    scheduler.set_timesteps(5)
    network = cached(plain(), schedule=GainWeighted(4, power=0.5), sampler=scheduler)
    alone = DDIM.from_config(DDIM.config)
    alone.timesteps = timesteps
    weights = error_gains(alone)
    assert weights is not None
    steps = dcompile.Steps(by_load([w**0.5 for w in weights], 4))
    expected = cached(plain(), schedule=steps)
    x = y = torch.randn(2, 3, 8, 8)
    with silent():
        for timestep in timesteps:
            x = x - 0.1 * network(x, timestep)[0]
    for timestep in timesteps.clone():
        y = y - 0.1 * expected(y, timestep)[0]
    assert torch.equal(x, y)


@torch.no_grad()
def test_a_run_whose_sampler_cannot_be_found_is_planned_evenly() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    network = cached(plain(), schedule=GainWeighted(4), forecast="auto", sampler=scheduler)
    x = torch.randn(2, 3, 8, 8)
    with noticed("timesteps are not those of the FlowMatchEulerDiscreteScheduler"):
        for timestep in torch.linspace(1000, 1, 12):
            x = x - 0.1 * network(x, timestep)[0]
    assert dcompile.handle(network).stats.refresh_steps == 4


def test_looking_for_a_sampler_keeps_nothing_alive() -> None:
    scheduler = DDIM.from_config(DDIM.config)
    scheduler.set_timesteps(12)

    def loop() -> bool:
        large = torch.ones(1000)
        reference = weakref.ref(large)
        with torch.no_grad():
            network(torch.ones(2, 3, 8, 8), other.timesteps[0])
        del large
        return reference() is None

    network = cached(plain(), schedule=GainWeighted(4), sampler=scheduler)
    other = DDIM.from_config(DDIM.config)
    other.set_timesteps(12)
    assert loop()


@torch.no_grad()
def test_a_run_identified_by_values_may_start_late() -> None:
    """Timesteps as numbers: where the run begins among the sampler's is found by value."""
    network, scheduler = plain(), DDIM.from_config(DDIM.config)
    scheduler.set_timesteps(20)
    late = scheduler.timesteps.tolist()[12:]
    weights = error_gains(scheduler)
    assert weights is not None
    refreshed = by_load([w**0.5 for w in weights[12:]], 3)
    expected = dcompile.cache_compile(
        plain(), schedule=dcompile.Steps(refreshed), backend="eager", verbose=False
    )
    cached(network, schedule=GainWeighted(3), sampler=scheduler)
    x = y = torch.randn(2, 3, 8, 8)
    for timestep in late:
        x = x - 0.1 * network(x, timestep)[0]
        y = y - 0.1 * expected(y, timestep)[0]
    counts = [dcompile.handle(n).stats.refresh_steps for n in (network, expected)]
    assert counts[0] == counts[1]
    assert torch.equal(x, y)


def test_the_sampler_outlives_its_pipeline() -> None:
    pipe = cached(stable_diffusion(), schedule=GainWeighted(4), forecast="auto")
    successor = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    successor.set_progress_bar_config(disable=True)
    handle = dcompile.handle(pipe)
    del pipe
    gc.collect()
    run(successor, num_inference_steps=12, strength=1.0)
    assert handle.stats.refresh_steps == 4
