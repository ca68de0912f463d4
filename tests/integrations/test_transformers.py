"""Transformers without skip connections: captured, cut along their stream, and cached."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers_small import TRANSFORMERS, small_transformer

import dcompile
from dcompile.report.svg import draw_svg

STEPS = 7
# torch.export cannot follow the first two (tests/passes/test_transformers.py says why), and the
# attention of the third gathers the tokens that are not masked: sizes that depend on values.
NOT_CAPTURED = ("lumina2", "omnigen", "mochi")
# name -> its blocks, and which part of what a block returns is the stream, if not all
BLOCKS: dict[str, tuple[str, int | None]] = {
    "dit": ("transformer_blocks", None),
    "pixart": ("transformer_blocks", None),
    "wan": ("blocks", None),
    "ltx": ("transformer_blocks", None),
    "sana": ("transformer_blocks", None),
    "stable_audio": ("transformer_blocks", None),
    "sd3": ("transformer_blocks", 1),  # behind the text
}


@torch.no_grad()
def run(network: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The results of one run, whose steps differ in nothing but the timestep."""
    like = kwargs["timestep"]
    largest = 0.9 if like.is_floating_point() else 900
    found = []
    for t in torch.linspace(largest, largest / 9, STEPS).to(like.dtype):
        found.append(tree_leaves(network(**{**kwargs, "timestep": t.expand(like.shape)}))[0])
    return found


def compiled(network: nn.Module, **settings: Any) -> Any:
    settings = {"backend": "eager", "verbose": False, **settings}
    return dcompile.cache_compile(network, **settings)


@contextmanager
def skipping(network: nn.Module, name: str, interval: int) -> Iterator[None]:
    """By hooks of modules: all blocks but the first add what they added at the latest refresh."""
    attribute, part = BLOCKS[name]
    blocks = getattr(network, attribute)
    state: dict[str, Any] = {"step": -1}

    def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
        state["before"] = kwargs.get("hidden_states", args[0] if args else None)
        state["step"] += 1

    def leaving(_: nn.Module, args: Any, output: Any) -> Any:
        after = output if part is None else output[part]
        if state["step"] % interval == 0:
            state["added"] = after - state["before"]
            return output
        replaced = state["before"] + state["added"]
        if part is None:
            return replaced
        return tuple(replaced if i == part else item for i, item in enumerate(output))

    hooks = [
        blocks[1].register_forward_pre_hook(entering, with_kwargs=True),
        blocks[-1].register_forward_hook(leaving),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in NOT_CAPTURED])
def test_every_transformer(name: str) -> None:
    network, kwargs = small_transformer(name)
    if not isinstance(kwargs.get("timestep"), Tensor):
        pytest.skip("is called with a number, or with a timestep of another name")
    expected = run(network, kwargs)
    compiled(network, interval=1)
    assert all(map(torch.equal, run(network, kwargs), expected))
    compiled(network, interval=3)
    found = run(network, kwargs)
    stats = dcompile.handle(network).stats
    assert (stats.uncached_calls, stats.captures) == (0, 0)
    assert (stats.refresh_steps, stats.reuse_steps) == (3, 4)
    assert torch.equal(found[0], expected[0])
    assert dcompile.handle(network).explain().depths[0].ratio < 0.75


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_as_hooks_on_its_blocks(name: str) -> None:
    network, kwargs = small_transformer(name)
    with skipping(network, name, interval=3):
        expected = run(network, kwargs)
    uncached = run(network, kwargs)
    compiled(network, interval=3)
    found = run(network, kwargs)
    assert dcompile.handle(network).stats.refresh_steps == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[1], uncached[1])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(
    "settings",
    [
        {"interval": 3, "forecast": "linear"},
        {"schedule": dcompile.Adaptive(0.05)},
        {"schedule": dcompile.MultiLevel([(0, 2), (1, 4)])},
        {"interval": 3, "depth": 1},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_everything_else_follows(name: str, settings: dict[str, Any]) -> None:
    network, kwargs = small_transformer(name)
    expected = run(network, kwargs)
    compiled(network, **settings)
    found = run(network, kwargs)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == 0
    assert stats.reuse_steps > 0
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    assert all(bool(torch.isfinite(one).all()) for one in found)


@pytest.mark.parametrize(("name", "backend"), [("flux", "eager"), ("dit", "inductor")])
def test_saved_programs(name: str, backend: str, tmp_path: Path) -> None:
    network, kwargs = small_transformer(name)
    compiled(network, interval=3, backend=backend)
    expected = run(network, kwargs)
    if backend == "inductor":
        eager = compiled(small_transformer(name)[0], interval=3)
        torch.testing.assert_close(expected, run(eager, kwargs), rtol=1e-3, atol=1e-4)
    dcompile.handle(network).save(tmp_path / "programs")
    other, _ = small_transformer(name)
    loaded = dcompile.load(other, tmp_path / "programs", verbose=False)
    assert all(map(torch.equal, run(loaded, kwargs), expected))
    assert dcompile.handle(loaded).stats.captures == 0


def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, kwargs = small_transformer("dit")
    expected = run(network, kwargs)
    compiled(network, interval=3)
    run(network, kwargs)
    folder = dcompile.handle(network).export_onnx(tmp_path / "dit")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["cut_at"] == "transformer_blocks.1"
    given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    given["timestep"] = torch.tensor([900, 900])

    def outputs(graph: str, more: dict[str, Any]) -> dict[str, Any]:
        session = runtime.InferenceSession(folder / f"{graph}.onnx")
        feed = {i["name"]: more[i["name"]] for i in manifest[graph]["inputs"]}
        names = [value["name"] for value in manifest[graph]["outputs"]]
        return dict(zip(names, session.run(names, feed), strict=True))

    arrays = {name: value.numpy() for name, value in given.items()}
    full = outputs("full", arrays)
    (edge,) = manifest["boundary"]
    shallow = outputs("shallow", {**arrays, edge["input"]: full[edge["output"]]})
    result = manifest["results"][0]
    for found in (full[result], shallow[result]):
        torch.testing.assert_close(torch.from_numpy(found), expected[0], rtol=0, atol=1e-4)


def test_explained_and_drawn() -> None:
    network, kwargs = small_transformer("flux")
    compiled(network, interval=3)
    run(network, kwargs)
    explanation = dcompile.handle(network).explain()
    assert explanation.stream
    assert "residual stream" in str(explanation)
    assert explanation.depths[0].module_path == "transformer_blocks.1"
    drawing = draw_svg(explanation)
    ET.fromstring(drawing)
    assert "before transformer_blocks.1" in drawing
    assert drawing.count('class="store"') == 2  # the other one is in the key


def test_another_cache_is_refused_by_name() -> None:
    network, kwargs = small_transformer("flux")
    expected = run(network, kwargs)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    compiled(network, interval=3)
    with network.cache_context("cond"):
        run(network, kwargs)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    assert "disable_cache()" in next(iter(stats.uncached_reasons))
    network.disable_cache()
    found = run(network, kwargs)
    assert dcompile.handle(network).stats.reuse_steps > 0
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("library", ["cache-dit or ParaAttention", "TeaCache"])
def test_a_cache_of_another_library_is_refused_by_name(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, kwargs = small_transformer("dit")
    if library == "TeaCache":
        monkeypatch.setattr(type(network), "enable_teacache", True, raising=False)
    else:
        network._is_cached = True  # what cache_dit.enable_cache leaves on it
        own = network.forward
        network.forward = lambda *args, **kwargs: own(*args, **kwargs)
    compiled(network, interval=3)
    run(network, kwargs)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    assert f"the cache of {library} is on it" in next(iter(stats.uncached_reasons))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [name for name in NOT_CAPTURED if name in TRANSFORMERS])
def test_what_cannot_be_captured_runs_uncached(name: str) -> None:
    network, kwargs = small_transformer(name)
    expected = run(network, kwargs)
    compiled(network, interval=3)
    assert all(map(torch.equal, run(network, kwargs), expected))
    assert dcompile.handle(network).stats.uncached_calls == STEPS


class Mixer(nn.Module):
    """No stream: each layer replaces what the one before has made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            sample = torch.tanh(layer(sample + timestep))
        return sample


def test_a_network_without_a_stream() -> None:
    with pytest.raises(dcompile.NoCutError, match="no residual stream of three blocks"):
        compiled(Mixer().eval())(torch.randn(2, 8), torch.linspace(1, 0, 3)[0])
