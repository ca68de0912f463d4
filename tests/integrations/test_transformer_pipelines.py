"""diffusers' pipelines around transformers: exact uncached, and as hooks on blocks make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_pipelines import PIPELINES, pipeline

import dcompile
from dcompile.runtime import callers, tracking
from dcompile.runtime.counters import Stats

STEPS = 7
REFRESHES = 3  # of seven steps, every third


@dataclass(frozen=True)
class Segment:
    """Blocks that are skipped: those of a list from ``first`` on.

    Attributes:
        blocks: the list's name.
        first: the first one that is skipped.
        part: which part of what a block returns is the stream, if not all.
        argument: of a block, the stream.
    """

    blocks: str
    first: int = 1
    part: int | None = None
    argument: str = "hidden_states"


@dataclass(frozen=True)
class Reference:
    """What ``depth=0`` skips, by hand.

    Attributes:
        segments: in order.
        calls: of the network at each step; two where guidance takes two.
    """

    segments: tuple[Segment, ...] = field(default=(Segment("transformer_blocks"),))
    calls: int = 1


PLAIN = Reference()
JOINT = Reference((Segment("transformer_blocks", part=1),))  # behind the text
FLUX = Reference(
    (
        Segment("transformer_blocks", part=1),
        Segment("single_transformer_blocks", first=0, part=1),
    )
)
REFERENCES: dict[str, Reference] = {
    "dit": PLAIN,
    "pixart_alpha": PLAIN,
    "pixart_sigma": PLAIN,
    "sd3": JOINT,
    "sd3_img2img": JOINT,
    "flux": FLUX,
    "flux_img2img": FLUX,
    "flux_inpaint": FLUX,
    "flux_kontext": FLUX,
    "flux_true_guidance": Reference(FLUX.segments, calls=2),
    "sana": PLAIN,
    "ltx": PLAIN,
    "wan": Reference((Segment("blocks"),), calls=2),
    "stable_audio": PLAIN,
    "flux2": Reference(
        (Segment("transformer_blocks", part=1), Segment("single_transformer_blocks", first=0))
    ),
    "chroma": Reference(
        (Segment("transformer_blocks", part=1), Segment("single_transformer_blocks", first=0)),
        calls=2,
    ),
    "aura_flow": Reference(
        (
            Segment("joint_transformer_blocks", part=1),
            Segment("single_transformer_blocks", first=0),
        )
    ),
    "qwen_image": Reference(JOINT.segments, calls=2),
    "hunyuan_video": Reference(
        (
            Segment("transformer_blocks", part=0),
            Segment("single_transformer_blocks", first=0, part=0),
        )
    ),
    "cogvideox": Reference((Segment("transformer_blocks", part=0),)),
    "cogview4": Reference((Segment("transformer_blocks", part=0),), calls=2),
    "allegro": PLAIN,
    "cosmos": Reference(calls=2),
    "kandinsky5": Reference(
        (Segment("visual_transformer_blocks", argument="visual_embed"),), calls=2
    ),
    "prx": Reference((Segment("blocks"),)),
    "z_image": Reference((Segment("layers", first=0, argument="x"),)),
}


@contextmanager
def skipping(network: nn.Module, reference: Reference, interval: int) -> Iterator[None]:
    """Blocks that are skipped add what they added at the latest refresh."""
    calls = -1
    kept: dict[tuple[int, int], Tensor] = {}
    entered: dict[int, Tensor] = {}

    def counting(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def entering(number: int, segment: Segment) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            bound = inspect.signature(block.forward).bind(*args, **kwargs)
            entered[number] = bound.arguments[segment.argument]

        return hook

    def leaving(number: int, segment: Segment) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            step, lane = divmod(calls, reference.calls)
            after = output if segment.part is None else output[segment.part]
            if step % interval == 0:
                kept[number, lane] = after - entered[number]
                return output
            replaced = entered[number] + kept[number, lane]
            if segment.part is None:
                return replaced
            return tuple(
                replaced if part == segment.part else item for part, item in enumerate(output)
            )

        return hook

    hooks = [network.register_forward_pre_hook(counting)]
    for number, segment in enumerate(reference.segments):
        blocks = getattr(network, segment.blocks)
        hooks += [
            blocks[segment.first].register_forward_pre_hook(
                entering(number, segment), with_kwargs=True
            ),
            blocks[-1].register_forward_hook(leaving(number, segment)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run(pipe: Any, kwargs: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kwargs = {"output_type": "latent", **kwargs, "generator": generator}
    torch.manual_seed(0)  # some encode a picture without the generator
    result: Tensor = pipe(num_inference_steps=STEPS, **kwargs)[0]
    return result


def compiled(module: Any, **settings: Any) -> Any:
    return dcompile.cache_compile(module, **{"backend": "eager", "verbose": False, **settings})


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name: str, compatible: Any) -> None:
    pipe, kwargs = pipeline(name)
    row = compatible("pipeline", type(pipe).__name__)
    expected = run(pipe, kwargs)
    reference = REFERENCES.get(name)
    if reference is not None:
        with skipping(pipe.transformer, reference, interval=3):
            skipped = run(pipe, kwargs)
    compiled(pipe, interval=1)
    assert torch.equal(run(pipe, kwargs), expected)
    assert dcompile.handle(pipe).stats.uncached_calls == 0
    compiled(pipe, interval=3)
    found = run(pipe, kwargs)
    stats = dcompile.handle(pipe).stats
    assert (stats.uncached_calls, stats.forced_steps) == (0, 0)
    assert stats.reuse_steps > stats.refresh_steps
    if reference is not None:
        torch.testing.assert_close(found, skipped, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, expected)
    row["depths"] = len(depths := dcompile.handle(pipe).explain().depths)
    row["ratio"] = depths[0].ratio


def test_two_denoisers_are_both_cached(tmp_path: Path) -> None:
    """Each goes over its own part of the timesteps."""
    pipe, kwargs = pipeline("wan22")
    expected = run(pipe, kwargs)
    compiled(pipe, interval=3)
    found = run(pipe, kwargs)
    handle = dcompile.handle(pipe)
    each = [dcompile.handle(pipe.transformer).stats, dcompile.handle(pipe.transformer_2).stats]
    assert all(one.reuse_steps and one.refresh_steps for one in each)
    assert all(one.uncached_calls == one.forced_steps == 0 for one in each)
    assert handle.stats == Stats.total(each)
    calls = handle.stats.refresh_steps + handle.stats.reuse_steps
    assert calls == 2 * STEPS
    assert "transformer_2: WanTransformer3DModel" in handle.report()
    handle.save(tmp_path)
    handle.disable()
    assert torch.equal(run(pipe, kwargs), expected)
    handle.enable()
    assert torch.equal(run(pipe, kwargs), found)
    handle.remove()
    assert torch.equal(run(pipe, kwargs), expected)
    with pytest.raises(dcompile.NotCompiledError):
        dcompile.handle(pipe)
    dcompile.load(pipe, tmp_path, verbose=False)
    assert torch.equal(run(pipe, kwargs), found)
    assert dcompile.handle(pipe).stats.captures == 0


def test_two_denoisers_are_tuned_one_at_a_time() -> None:
    pipe, kwargs = pipeline("wan22")
    with pytest.raises(dcompile.TuneError, match=r"several denoisers: transformer, transformer_2"):
        dcompile.tune(pipe, lambda: run(pipe, kwargs), speedup=1.5, verbose=False)


def test_no_timestep_is_read_once_a_loop_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX passes t / 1000, which is no view of its scheduler's timesteps."""
    pipe, kwargs = pipeline("flux")
    compiled(pipe, interval=3)
    run(pipe, kwargs)

    def read(timestep: Any) -> float:
        raise AssertionError(f"the value of {timestep} was read")

    monkeypatch.setattr(tracking, "_value", read)
    monkeypatch.setattr(callers, "_largest", read)
    run(pipe, kwargs)
    stats = dcompile.handle(pipe).stats
    assert (stats.runs, stats.refresh_steps, stats.forced_steps) == (2, 2 * REFRESHES, 0)
