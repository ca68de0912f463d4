"""What recurs in a graph becomes calls of one submodule, which compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from dcompile.passes import OutlineRegions

WIDTH = 8


class Block(nn.Module):
    """A transformer's block, in short: 15 operators and more."""

    def __init__(self, width: int = WIDTH, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (
            to(h).view(*h.shape[:-1], 2, -1).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, v if twice else k, v).transpose(1, 2)
        return x + self.scale * F.gelu(self.out(h.reshape(x.shape)))


class Scaled(nn.Module):
    """Two operators, with a constant of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def graph_of(network: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """What torch.export captures."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return torch.export.export(network.eval(), inputs, strict=False, **settings)


def outlined(network: nn.Module, *inputs: Any) -> tuple[GraphModule, Counter[str]]:
    """After the pass, with how often each region is called; it computes the same, bit for bit."""
    exported = graph_of(network, *inputs)
    state = {**exported.state_dict, **exported.constants}
    signature = exported.graph_signature
    values = [state[name] for name in (*signature.parameters, *signature.buffers)]
    before = len(exported.graph.nodes)
    result = OutlineRegions()(exported.graph_module)
    assert len(exported.graph.nodes) == before  # the graph that was given stays as it is
    with torch.no_grad():
        expected = exported.graph_module(*values, *inputs)
        found = result.graph_module(*values, *inputs)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    calls = Counter(node.target for node in result.graph_module.graph.find_nodes(op="call_module"))
    assert result.modified is bool(calls)
    return result.graph_module, calls


def sample(width: int = WIDTH, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, width)


def test_blocks_become_calls_of_one() -> None:
    graph_module, calls = outlined(Blocks(*[Block() for _ in range(5)]), sample())
    assert calls == {"region_0": 5}
    body = graph_module.region_0
    (result,) = body.graph.output_node().args[0]  # one tensor comes out
    assert result.target is torch.ops.aten.add.Tensor
    assert not graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )


def test_two_kinds_of_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.ModuleList(Block() for _ in range(3))
            self.widen = nn.Linear(WIDTH, 2 * WIDTH)
            self.wide = nn.ModuleList(Block(2 * WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.narrow:
                x = block(x)
            x = self.widen(x)
            for block in self.wide:
                x = block(x)
            return x

    _, calls = outlined(Net(), sample())
    assert sorted(calls.values()) == [3, 4]


def test_blocks_with_others_between_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            kept = []
            for number, block in enumerate(self.blocks):
                x = block(x)
                kept.append(x)  # several users of what a region returns
                x = x.sin() if number else x.tanh()
            return x, *kept

    _, calls = outlined(Net(), sample())
    assert sum(calls.values()) == 3


@pytest.mark.parametrize(
    "network",
    [
        Blocks(*[Scaled(1.5 + number) for number in range(16)]),
        Blocks(Block()),
        Blocks(*[nn.Sequential(nn.SiLU(), nn.Tanh(), nn.GELU()) for _ in range(8)]),
    ],
    ids=["another constant", "one block", "nothing to multiply"],
)
def test_near_misses_are_kept(network: nn.Module) -> None:
    _, calls = outlined(network, sample())
    assert not calls


def test_another_wiring_is_another_region() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, block in enumerate(self.blocks):
                x = block(x, twice=number == 1)
            return x

    _, calls = outlined(Net(), sample())
    assert max(calls.values()) == 3


def test_results_that_share_memory_are_not_returned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            views = []
            for block in self.blocks:
                x = block(x)
                views += [x.view(-1), x.transpose(0, 1)]
            return x, *views

    graph_module, _ = outlined(Net(), sample())
    for node in graph_module.graph.find_nodes(op="call_module"):
        values = [*node.meta["val"], *(operand.meta["val"] for operand in node.args)]
        storages = [id(value.untyped_storage()) for value in values]
        own = storages[: len(node.meta["val"])]
        assert len(set(own)) == len(own)
        assert not set(own) & set(storages[len(own) :])


def test_open_sizes_are_left_alone() -> None:
    exported = graph_of(
        Blocks(*[Block() for _ in range(3)]),
        sample(batch=4),
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=8)}},
    )
    assert not OutlineRegions()(exported.graph_module).modified


def test_without_metadata_nothing_is_done() -> None:
    exported = graph_of(Blocks(*[Block() for _ in range(3)]), sample())
    for node in exported.graph.nodes:
        node.meta.pop("val", None)
    assert not OutlineRegions()(exported.graph_module).modified


def test_a_graph_that_writes_is_refused() -> None:
    exported = graph_of(Blocks(Block()), sample())
    graph = exported.graph_module.graph
    result = graph.output_node().args[0][0]
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.aten.add_.Tensor, (result, 1))
    with pytest.raises(RuntimeError, match="functional"):
        OutlineRegions()(exported.graph_module)


@pytest.mark.full
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "-"]), min_size=1, max_size=8))
def test_any_order_of_blocks(order: list[str]) -> None:
    """Computes the same (see ``outlined``); a second run finds nothing that the first has left."""
    kinds: dict[str, Callable[[], nn.Module]] = {
        "a": Block,
        "b": lambda: Block(scale=0.5),
        "c": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH)),
        "-": nn.Tanh,
    }
    graph_module, calls = outlined(Blocks(*[kinds[kind]() for kind in order]), sample())
    assert order.count("a") < 2 or calls
    assert not OutlineRegions()(graph_module).modified
