"""``options={"regions": True}``: Inductor compiles what recurs once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heard import noticed, silent
from plain import Plain, compiled, picture, sampled, timesteps
from torch import nn

import dcompile
from dcompile.backends.inductor import Inductor
from dcompile.compat import inductor
from dcompile.errors import BackendError

BLOCKS = 4


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 1))
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entered = x
        for layer in self.layers:
            x = layer(x)
        return entered + x


class Deep(Plain):
    """With blocks in its deep half that differ in nothing but their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, stride=2, padding=1), *[Residual(8) for _ in range(BLOCKS)]
        )


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().eval()


@pytest.fixture
def outlined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs with regions that went to Inductor."""
    graphs: list[Any] = []

    def noted(graph_module: Any) -> Any:
        graphs.append(len(graph_module.graph.find_nodes(op="call_module")))
        return call_regions(graph_module)

    call_regions = inductor.call_regions
    monkeypatch.setattr(inductor, "call_regions", noted)
    return graphs


def test_it_computes_the_same_and_can_be_saved(outlined: list[Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"backend": "inductor", "options": {"regions": True}}
    network = compiled(deep(), **settings)
    expected = sampled(compiled(deep()), picture(), timesteps())
    found = sampled(network, picture(), timesteps())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert outlined == [BLOCKS]  # the full graph; nothing recurs in the shallow one
    folder = dcompile.handle(network).save(tmp_path / "saved")
    again = dcompile.load(deep(), folder, verbose=False)
    assert torch.equal(sampled(again, picture(), timesteps()), found)
    assert dcompile.handle(again).stats.captures == 0


def test_it_excludes_freezing() -> None:
    with pytest.raises(BackendError, match="regions and freezing exclude each other"):
        compiled(backend="inductor", options={"regions": True, "freezing": True})


def test_it_is_off_by_default(outlined: list[Any]) -> None:
    sampled(compiled(deep(), backend="inductor"), picture(), timesteps())
    assert not outlined


class Modulated(nn.Module):
    """Its region returns a part of a larger buffer: the gate, which is used outside."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.scale = scale

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, factor, gate = self.modulation(F.silu(embedding)).chunk(3, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + factor) + shift
        joined = torch.cat([layer(h) for layer in self.layers], dim=1)
        return x + gate * (F.relu(joined)[:, : x.shape[1]] * self.scale)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated(16, 1 + number / 10) for number in range(4))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x, embedding)
        return (x,)


def exported_gated() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    example = (torch.randn(2, 5, 16), torch.randn(2, 1, 16))
    exported = torch.export.export(Gated().eval(), example)
    graph_module = exported.graph_module
    state = {**exported.state_dict, **exported.constants}
    names = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
    given = iter(example)
    inputs = [
        state[target] if (target := names[node.name]) is not None else next(given)
        for node in graph_module.graph.find_nodes(op="placeholder")
    ]
    return graph_module, inputs


def test_a_region_that_returns_a_part_of_a_buffer(outlined: list[Any]) -> None:
    """Its offset within the buffer was counted twice, and memory behind it was read."""
    graph_module, inputs = exported_gated()
    with torch.no_grad(), silent():
        run = Inductor({"regions": True}).compile(graph_module, inputs)
        torch.testing.assert_close(run(*inputs), graph_module(*inputs))
    assert outlined


def test_wrong_code_of_regions_is_not_run(
    monkeypatch: pytest.MonkeyPatch, outlined: list[Any]
) -> None:
    graph_module, inputs = exported_gated()
    monkeypatch.setattr(inductor, "_offsets_of_regions_counted_once", contextlib.nullcontext)
    config: Any = torch.compiler.config
    own_cache = config.patch(cache_key_tag="with offsets counted twice")
    with own_cache, torch.no_grad(), noticed("computes something else than the graph"):
        run = Inductor({"regions": True}).compile(graph_module, inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), graph_module(*inputs))
    assert outlined
