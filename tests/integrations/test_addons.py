"""What users add to a pipeline, before and after it is compiled: as if it were not compiled."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from DeepCache import DeepCacheSDHelper
from diffusers import (
    LCMScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from heard import noticed
from peft import LoraConfig, get_peft_model_state_dict
from small_pipelines import DDIM, emoji_sd, run, stable_diffusion

import dcompile

Compatible = Callable[..., dict[str, Any]]
Change = Callable[[Any], Any]


def small(scheduler: Any = DDIM) -> Any:
    """A pipeline around an even smaller network: it is captured again for most of the changes."""
    pipe = stable_diffusion(scheduler=scheduler)
    torch.manual_seed(3)
    config = dict(pipe.unet.config) | {"layers_per_block": 1, "block_out_channels": (8, 16)}
    pipe.unet = UNet2DConditionModel.from_config(config).eval()
    return pipe


def cached(pipe: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


class Kept(dict[Any, Any]):
    """The package's cache. It would hand out what it keeps, which FreeU scales in place."""

    def __getitem__(self, key: Any) -> Any:
        return copy.deepcopy(super().__getitem__(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, copy.deepcopy(value))


@contextmanager
def deepcache(pipe: Any, interval: int = 3) -> Iterator[None]:
    """The paper's released code around a pipeline."""
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    helper.cached_output = Kept()
    try:
        yield
    finally:
        helper.disable()


def require_same_pictures(pipe: Any, plain: Any, **arguments: Any) -> torch.Tensor:
    """``pipe``, compiled at interval 3, draws what ``plain``, never compiled, draws; uncached."""
    with deepcache(plain):
        expected = run(plain, **arguments)
    assert torch.equal(run(pipe, **arguments), expected)
    stats = dcompile.handle(pipe).stats
    assert stats.reuse_steps > 0 == stats.uncached_calls
    cached(pipe, interval=1)
    picture = run(plain, **arguments)
    assert torch.equal(run(pipe, **arguments), picture)
    assert dcompile.handle(pipe).stats.uncached_calls == 0
    cached(pipe, interval=3)
    return picture


# What changes the network or what it is given ----------------------------------------------------


@cache
def lora(seed: int) -> Path:
    """A folder with a LoRA of the small pipeline's UNet, by its seed."""
    network = small().unet
    torch.manual_seed(seed)
    targets = ["to_q", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=1 + seed, target_modules=targets, init_lora_weights=False))
    folder = Path(mkdtemp())
    layers = get_peft_model_state_dict(network)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def load(seed: int, name: str, **more: Any) -> Change:
    return lambda pipe: pipe.load_lora_weights(lora(seed), adapter_name=name, **more)


def call(method: str, *args: Any, **kwargs: Any) -> Change:
    return lambda pipe: getattr(pipe, method)(*args, **kwargs)


def of_unet(method: str, *args: Any, **kwargs: Any) -> Change:
    return lambda pipe: getattr(pipe.unet, method)(*args, **kwargs)


def load_inversion(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # shared between the small pipelines
    vector = torch.randn(16, generator=torch.Generator().manual_seed(5))
    pipe.load_textual_inversion({"<new>": vector}, token="<new>")


class Addon(NamedTuple):
    """Changes, one after the other, and arguments of the pipeline."""

    changes: Sequence[Change]
    arguments: Mapping[str, Any] = MappingProxyType({})


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
ADDONS = {
    "LoRA: load_lora_weights, unload_lora_weights": Addon(
        [load(1, "a"), call("unload_lora_weights")]
    ),
    "LoRA: several adapters, set_adapters with weights, delete_adapters": Addon(
        [
            load(1, "a"),
            load(2, "b"),
            call("set_adapters", ["a", "b"], [0.7, 0.2]),
            call("set_adapters", "b", {"unet": {"down": 0.9, "mid": 1.0, "up": 0.3}}),
            call("delete_adapters", "a"),
        ]
    ),
    "LoRA: disable_lora, enable_lora": Addon(
        [load(1, "a"), call("disable_lora"), call("enable_lora")]
    ),
    "LoRA: fuse_lora, unfuse_lora": Addon(
        [load(1, "a"), call("fuse_lora", lora_scale=0.6), call("unfuse_lora")]
    ),
    "LoRA: hot-swapping": Addon(
        [
            call("enable_lora_hotswap", target_rank=4),
            load(1, "a"),
            load(2, "a", hotswap=True),
            load(3, "a", hotswap=True),
        ]
    ),
    'LoRA: cross_attention_kwargs={"scale": ...}': Addon(
        [load(1, "a"), load(2, "b")], {"cross_attention_kwargs": {"scale": 0.3}}
    ),
    "Textual inversion": Addon([load_inversion], {"prompt": "a <new> cat"}),
    "FreeU": Addon([call("enable_freeu", **FREEU), call("disable_freeu")]),
    "Attention processors": Addon(
        [
            of_unet("set_attn_processor", AttnProcessor()),
            of_unet("set_attn_processor", AttnProcessor2_0()),
            of_unet("set_default_attn_processor"),
        ]
    ),
    "Attention slicing": Addon(
        [call("enable_attention_slicing", 4), call("disable_attention_slicing")]
    ),
    "fuse_qkv_projections": Addon([call("fuse_qkv_projections"), call("unfuse_qkv_projections")]),
    "channels_last": Addon([of_unet("to", memory_format=torch.channels_last)]),
    "pipe.to(dtype)": Addon(
        [call("to", torch.bfloat16), call("to", torch.float64), call("to", torch.float32)]
    ),
}


@pytest.mark.one_in(20)
@pytest.mark.parametrize("compiled_after", [0, 1, None], ids=["after", "between", "before"])
@pytest.mark.parametrize("name", ADDONS)
def test_addons(name: str, compiled_after: int | None, compatible: Compatible) -> None:
    """Each change is applied before the network is compiled, after, or some before."""
    compatible("add-on", name)
    changes, arguments = ADDONS[name]
    pipe, plain = small(), small()
    count = len(changes) if compiled_after is None else compiled_after

    def apply(change: Change) -> None:
        for each in (pipe, plain):
            torch.manual_seed(7)
            change(each)

    for change in changes[:count]:
        apply(change)
    cached(pipe, interval=3)
    require_same_pictures(pipe, plain, **arguments)
    for change in changes[count:]:
        apply(change)
        require_same_pictures(pipe, plain, **arguments)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["LoRA", "FreeU", "Textual inversion"])
def test_addons_are_seen(name: str) -> None:
    """The changes change the picture, so these tests can fail."""
    changes, arguments = next(addon for key, addon in ADDONS.items() if key.startswith(name))
    pipe = cached(small())
    before = run(pipe, **arguments)
    changes[0](pipe)
    assert not torch.equal(run(pipe, **arguments), before)


@pytest.mark.full
def test_loras_that_come_and_go_are_captured_once() -> None:
    pipe = cached(small())
    load(1, "a")(pipe)
    load(2, "b")(pipe)
    for _ in range(2):
        for chosen in ("a", "b"):
            pipe.set_adapters(chosen)
            run(pipe)
    assert dcompile.handle(pipe).stats.captures == 2


# What a run is given ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any]:
    """A compiled and a plain pipeline, captured once."""
    return cached(small()), small()


def edit(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    given["latents"] = given["latents"] * (1.05 if step == 4 else 0.99)
    return given


RUNS: dict[str, list[dict[str, Any]]] = {
    "guidance_scale": [{"guidance_scale": scale} for scale in (7.5, 2.0, 1.0, 7.5)],
    "guidance_rescale": [{"guidance_rescale": 0.7}, {}],
    "Callbacks that edit latents": [{"callback_on_step_end": edit}, {}],
    "Lists of prompts": [{"prompt": ["a", "b", "c"]}, {"prompt": ["d"]}, {"prompt": ["a", "b"]}],
    "negative_prompt": [{"negative_prompt": "dog"}, {}],
    "num_images_per_prompt": [{"prompt": ["a", "b"], "num_images_per_prompt": 2}, {}],
    "eta": [{"eta": 0.4}, {}],
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", RUNS)
def test_runs(shared: tuple[Any, Any], name: str, compatible: Compatible) -> None:
    compatible("add-on", name)
    pipe, plain = shared
    for arguments in RUNS[name]:
        require_same_pictures(pipe, plain, **arguments)


def test_guidance_that_stops_midway(shared: tuple[Any, Any], compatible: Compatible) -> None:
    compatible("add-on", "Guidance that stops midway")

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 4:  # batch 2 becomes 1 before step 5
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    tensors = ["latents", "prompt_embeds"]
    arguments = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": tensors}
    pipe, plain = shared
    found = run(pipe, **arguments)
    cached(pipe, schedule=dcompile.Steps([0, 3, 5, 6]))
    assert torch.equal(run(pipe, **arguments), found)
    cached(pipe, interval=1)
    assert torch.equal(run(pipe, **arguments), run(plain, **arguments))
    cached(pipe, interval=3)
    require_same_pictures(pipe, plain)


def test_interrupt(shared: tuple[Any, Any], compatible: Compatible) -> None:
    compatible("add-on", "Interrupted runs")

    def interrupt(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return given

    pipe, plain = shared
    require_same_pictures(pipe, plain, callback_on_step_end=interrupt)
    require_same_pictures(pipe, plain)


@torch.no_grad()
def test_unbatched_guidance(shared: tuple[Any, Any], compatible: Compatible) -> None:
    """Two calls a step, one for each prompt: each is cached as if it had a network of its own."""
    compatible("add-on", "Unbatched guidance")
    pipe, plain = shared
    prompts = [pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ("a cat", "")]

    def draw(networks: Sequence[Any]) -> torch.Tensor:
        pipe.scheduler.set_timesteps(9)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps:
            with_prompt, without = (
                network(x, t, prompt).sample
                for network, prompt in zip(networks, prompts, strict=True)
            )
            noise = without + 4.0 * (with_prompt - without)
            x = pipe.scheduler.step(noise, t, x).prev_sample
        return x

    expected = draw([cached(small().unet), cached(small().unet)])
    assert torch.equal(draw([pipe.unet] * 2), expected)
    cached(pipe, interval=1)
    assert torch.equal(draw([pipe.unet] * 2), draw([plain.unet] * 2))
    cached(pipe, interval=3)


def test_bfloat16_autocast(shared: tuple[Any, Any], compatible: Compatible) -> None:
    compatible("add-on", "torch.autocast")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            autocast = require_same_pictures(*shared)
        assert not torch.equal(require_same_pictures(*shared), autocast)


@pytest.mark.full
def test_the_bundled_model(compatible: Compatible) -> None:
    compatible("add-on", "FreeU, a trained network")
    pipe, plain = cached(emoji_sd()), emoji_sd()
    for change in (call("enable_freeu", **FREEU), call("disable_freeu")):
        for each in (pipe, plain):
            change(each)
        require_same_pictures(pipe, plain, prompt="red apple")


def pag() -> Any:
    return StableDiffusionPAGPipeline(
        **small().components, requires_safety_checker=False, pag_applied_layers="mid"
    )


@pytest.mark.full
def test_perturbed_attention_guidance(compatible: Compatible) -> None:
    """PAG changes the attention processors at the start of a run, and back at its end."""
    compatible("add-on", "PAG")
    pipe, plain = cached(pag()), pag()
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    for scale in (3.0, 0.0, 3.0):
        require_same_pictures(pipe, plain, pag_scale=scale)
    assert not torch.equal(run(pipe, pag_scale=3.0), run(pipe, pag_scale=0.0))
    assert dcompile.handle(pipe).stats.captures == 0  # since cache_compile: all are kept


@pytest.mark.parametrize("settings", [{"interval": 3}, {"speedup": 1.5}], ids=str)
def test_few_steps(settings: dict[str, Any], compatible: Compatible) -> None:
    compatible("add-on", "LCM: 1, 2, 4 and 8 steps")

    def lcm() -> Any:
        pipe = small(LCMScheduler())
        torch.manual_seed(3)
        config = dict(pipe.unet.config) | {"time_cond_proj_dim": 8}
        pipe.unet = UNet2DConditionModel.from_config(config).eval()
        return pipe

    pipe, plain = cached(lcm(), **settings), lcm()
    for steps in (8, 1, 2, 4):
        arguments = {"num_inference_steps": steps}
        cached(pipe, **settings)
        found = run(pipe, **arguments)
        stats = dcompile.handle(pipe).stats
        assert stats.refresh_steps + stats.reuse_steps == steps
        if steps == 1:
            assert (stats.reuse_steps, stats.flops_speedup) == (0, 1.0)
        if "interval" in settings:
            with deepcache(plain):
                assert torch.equal(found, run(plain, **arguments))
        cached(pipe, interval=1)
        assert torch.equal(run(pipe, **arguments), run(plain, **arguments))


# Where weights are kept ---------------------------------------------------------------------------


def grouped(kind: str, pipe: Any) -> None:
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )


OFFLOADS: dict[str, Change] = {
    "Sequential offload: cpu_offload": lambda pipe: cpu_offload(pipe.unet, torch.device("cpu")),
    "Group offload, by leaf": partial(grouped, "leaf_level"),
    "Group offload, by block": partial(grouped, "block_level"),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_by_layer(name: str, order: str, compatible: Compatible) -> None:
    """Hooks in the network move its weights as it runs, which no graph can: one clear warning."""
    compatible("add-on", name, note="a clear warning, and runs uncached")
    pipe, plain = small(), small()
    if order == "after":
        run(cached(pipe))
    OFFLOADS[name](pipe)
    if order == "before":
        cached(pipe)
    with noticed(r"(hooks that move|moves the) weights"):
        assert torch.equal(run(pipe), run(plain))


@pytest.mark.full
def test_after_cpu_offload_is_taken_off() -> None:
    pipe, plain = cached(small()), small()
    cpu_offload(pipe.unet, torch.device("cpu"))
    with noticed("cannot be captured"):
        run(pipe)
    remove_hook_from_submodules(pipe.unet)
    cached(pipe, interval=3)
    require_same_pictures(pipe, plain)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("order", ["before", "after"])
def test_model_cpu_offload(order: str, compatible: Compatible) -> None:
    compatible("add-on", "enable_model_cpu_offload")
    pipe, plain = small(), small()
    if order == "after":
        run(cached(pipe))
    for each in (pipe, plain):
        each.enable_model_cpu_offload(device="cpu")
    cached(pipe, interval=1)
    assert torch.equal(run(pipe), run(plain))
    cached(pipe, interval=3)
    found = run(pipe)  # hooks of "cpu:0" copy each timestep: the loop's own identifies the step
    pipe.remove_all_hooks()
    cached(pipe, interval=3)
    assert torch.equal(run(pipe), found)
    pipe.unet = small().unet
    assert torch.equal(run(cached(pipe, interval=3)), found)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("order", ["before", "after"])
def test_layerwise_casting(order: str, compatible: Compatible) -> None:
    """Weights are kept in 8 bits; hooks of each layer convert them as it runs."""
    compatible("add-on", "enable_layerwise_casting")
    pipe, plain = small(), small()
    if order == "after":
        run(cached(pipe))
    for each in (pipe, plain):
        each.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    if order == "before":
        cached(pipe)
    with deepcache(plain):
        expected = run(plain)
    assert torch.equal(run(pipe), expected)
    cached(pipe, interval=1)
    assert torch.equal(run(pipe), run(plain))
    assert pipe.unet.conv_out.weight.dtype == plain.unet.conv_out.weight.dtype


# Copies -------------------------------------------------------------------------------------------


def reloaded(pipe: Any) -> Any:
    folder = mkdtemp()
    pipe.save_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def with_network(pipe: Any, network: Any) -> Any:
    parts = {**pipe.components, "unet": network}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


COPIES: dict[str, Change] = {
    "save_pretrained, from_pretrained": reloaded,
    "copy.deepcopy(pipe)": copy.deepcopy,
    "copy.deepcopy(unet)": lambda pipe: with_network(pipe, copy.deepcopy(pipe.unet)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_uncached_and_the_original_goes_on(name: str, compatible: Compatible) -> None:
    compatible("add-on", name)
    pipe, plain = cached(small()), small()
    expected = run(pipe)
    other = COPIES[name](pipe)
    other.set_progress_bar_config(disable=True)
    assert other.unet is not pipe.unet
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(other)
    assert torch.equal(run(other), run(plain))
    with torch.no_grad():
        for each in (other.unet, plain.unet):  # the copy has weights of its own
            each.conv_out.weight.mul_(1.5)
    assert torch.equal(run(other), run(plain))
    assert torch.equal(run(pipe), expected)
    require_same_pictures(cached(other), plain)
    assert torch.equal(run(pipe), expected)
    dcompile.handle(pipe).remove()
    assert torch.equal(run(pipe), run(small()))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("write", [pickle.dump, lambda network, file: torch.save(network, file)])
def test_a_compiled_network_is_not_pickled(write: Callable[..., None]) -> None:
    """Half of it would be; the error says what to do, and the original goes on."""
    pipe = cached(small())
    expected = run(pipe)
    with pytest.raises(TypeError, match=r"cannot be pickled: .*handle\(module\).remove\(\) first"):
        write(pipe.unet, io.BytesIO())
    assert torch.equal(run(pipe), expected)
    dcompile.handle(pipe).remove()
    file = io.BytesIO()
    write(pipe.unet, file)
    file.seek(0)
    again = torch.load(file, weights_only=False) if write is not pickle.dump else pickle.load(file)
    assert torch.equal(run(with_network(pipe, again)), run(pipe))
    assert torch.equal(run(cached(pipe)), expected)
