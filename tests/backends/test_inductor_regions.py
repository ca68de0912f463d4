"""``options={"regions": True}``: Inductor compiles what recurs once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, compiled, picture, sampled, timesteps
from torch import nn

import dcompile
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
