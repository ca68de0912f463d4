"""What is the same at every step: found, computed by a graph of its own, and left out of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from dcompile.passes import (
    PreconditionError,
    find_skip_connections,
    find_step_invariant,
    mark_step_invariant,
    prologue_of,
    split_at,
    total_cost,
    without_hoisted,
)
from dcompile.passes.base import require_functional
from dcompile.passes.hoist import HOISTED

VARYING = ("sample", "timestep")


class Attention(nn.Module):
    """Keys and values come from the text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.size = nn.Linear(2, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, size: torch.Tensor
    ) -> torch.Tensor:
        heads = (2, 4)
        embedding = F.silu(self.size(size)) + timestep
        query = self.query(sample + embedding[:, None]).unflatten(-1, heads).transpose(1, 2)
        key = self.key(text).unflatten(-1, heads).transpose(1, 2)
        value = self.value(text).unflatten(-1, heads).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, key, value)
        return sample + found.transpose(1, 2).flatten(2)


def exported(network: nn.Module, *arguments: Any) -> GraphModule:
    with torch.no_grad():
        program = torch.export.export(network.eval(), arguments, strict=False)
    require_functional(program.graph_module)
    return program.graph_module


def attention() -> tuple[Attention, GraphModule, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    network = Attention()
    call = (torch.randn(2, 5, 8), torch.tensor(0.5), torch.randn(2, 3, 8), torch.randn(2, 2))
    return network, exported(network, *call), call


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def arguments_of(graph_module: GraphModule, network: nn.Module, call: Any) -> list[Any]:
    """What the placeholders stand for, by their names."""
    known = dict(zip(("sample", "timestep", "text", "size"), call, strict=False))
    for name, tensor in network.named_parameters():
        known["p_" + name.replace(".", "_")] = tensor
    found = graph_module.graph.find_nodes(op="placeholder")
    return [known[str(node.target)] for node in found if str(node.target) in known]


@torch.no_grad()
def test_text_and_sizes_are_computed_once() -> None:
    network, graph_module, call = attention()
    values = mark_step_invariant(graph_module, VARYING)
    assert [str(value.target) for value in values] == [
        "aten.silu.default",
        "aten.linear.default",
        "aten.linear.default",
    ]
    prologue = prologue_of(graph_module, values)
    assert not {"sample", "timestep"} & {
        str(node.target) for node in prologue.graph.find_nodes(op="placeholder")
    }
    expected = graph_module(*arguments_of(graph_module, network, call))
    hoisted = prologue(*arguments_of(prologue, network, call))
    before = total_cost(graph_module.graph.nodes).flops
    rest = without_hoisted(graph_module)
    assert total_cost(rest.graph.nodes).flops < before
    placeholders = rest.graph.find_nodes(op="placeholder")
    assert [node.meta.get(HOISTED) for node in placeholders[-3:]] == [-3, -2, -1]
    found = rest(*arguments_of(rest, network, call), *hoisted)
    assert all(map(torch.equal, found, expected))


def test_a_view_is_computed_again_and_what_it_shows_is_kept() -> None:
    _, graph_module, _ = attention()
    values = find_step_invariant(graph_module, VARYING)
    assert not any("transpose" in name or "view" in name for name in names(values))


def test_nothing_of_weights_alone_but_matrix_products() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            scaled = self.weight.exp() * 2  # cheap: fused with what reads it
            merged = self.weight + self.up.weight @ self.down.weight  # as an adapter is merged
            return sample @ scaled @ merged * timestep

    graph_module = exported(Network(), torch.randn(3, 8), torch.tensor(1.0))
    (value,) = find_step_invariant(graph_module, VARYING)
    assert str(value.target) == "aten.add.Tensor"


def test_an_expanded_result_is_kept_small() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(8, 8)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
        ) -> torch.Tensor:
            return sample * self.key(text).repeat_interleave(4, 0) + timestep

    call = (torch.randn(8, 8), torch.tensor(1.0), torch.randn(2, 8))
    (value,) = find_step_invariant(exported(Network(), *call), VARYING)
    assert str(value.target) == "aten.linear.default"


def test_random_numbers_are_drawn_at_every_step() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(8, 8)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
        ) -> torch.Tensor:
            return sample * self.key(text + torch.randn_like(text)) + timestep

    call = (torch.randn(2, 8), torch.tensor(1.0), torch.randn(2, 8))
    assert find_step_invariant(exported(Network(), *call), VARYING) == ()


@torch.no_grad()
def test_what_the_network_returns_is_its_own() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(8, 8)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            key = self.key(text)
            return sample * key + timestep, key

    call = (torch.randn(2, 8), torch.tensor(1.0), torch.randn(2, 8))
    graph_module = exported(Network(), *call)
    mark_step_invariant(graph_module, VARYING)
    rest = without_hoisted(graph_module)
    returned = rest.graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    assert str(returned[1].target) == "aten.linear.default"  # type: ignore[union-attr]


def test_two_halves_take_the_values_that_they_read() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = nn.Linear(8, 4), nn.Linear(8, 4)
            self.enter = nn.Conv2d(3, 4, 3, padding=1)
            self.deep = nn.Conv2d(4, 4, 3, padding=1)
            self.leave = nn.Conv2d(8, 3, 3, padding=1)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
        ) -> torch.Tensor:
            outer = self.enter(sample) + self.outer(text)[:, :, None, None] * timestep
            deep = self.deep(outer) + self.inner(text)[:, :, None, None]
            return self.leave(torch.cat([deep, outer], 1))

    call = (torch.randn(2, 3, 8, 8), torch.tensor(1.0), torch.randn(2, 8))
    graph_module = exported(Network(), *call)
    assert len(mark_step_invariant(graph_module, VARYING)) == 2
    (skip,) = find_skip_connections(graph_module, "sample")
    full, shallow = split_at(graph_module, skip)
    for half, trailing, expected in ((full, 0, [-2, -1]), (shallow, 1, [-2])):
        placeholders = without_hoisted(half, trailing).graph.find_nodes(op="placeholder")
        taken = placeholders[: len(placeholders) - trailing]
        assert [n.meta[HOISTED] for n in taken if HOISTED in n.meta] == expected
        assert HOISTED in taken[-1].meta  # after all others, but for what is cached
    assert "inner" not in " ".join(names(shallow.graph.find_nodes(op="placeholder")))


def test_a_graph_without_metadata() -> None:
    _, graph_module, _ = attention()
    for node in graph_module.graph.nodes:
        node.meta = {}
    assert find_step_invariant(graph_module, VARYING) == ()


def test_an_unknown_placeholder() -> None:
    _, graph_module, _ = attention()
    with pytest.raises(PreconditionError, match="no placeholder is called 'noise'"):
        find_step_invariant(graph_module, ["noise"])


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(["sample", "timestep", "text", "size"]), min_size=1))
def test_what_is_left_has_nothing_more_to_hoist(varying: set[str]) -> None:
    _, graph_module, _ = attention()
    values = mark_step_invariant(graph_module, varying)
    hoisted = [f"hoisted_{number}" for number in range(1, len(values) + 1)]
    rest = without_hoisted(graph_module)
    present = {str(node.target) for node in rest.graph.find_nodes(op="placeholder")}
    assert set(hoisted) <= present
    assert find_step_invariant(rest, present & {*varying}) == ()


def test_a_table_that_lies_on_another_device() -> None:
    """Tables that are no buffers stay on the CPU, and are copied to the GPU at every step."""

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(4, 8)
            self.factor = torch.tensor(2.0)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            positions = self.table.to("meta") * self.factor
            return sample * positions.cos() + timestep

    graph_module = exported(
        Embedding(), torch.randn(2, 4, 8, device="meta"), torch.ones((), device="meta")
    )
    (value,) = find_step_invariant(graph_module, VARYING)
    assert value.target is torch.ops.aten.cos.default  # with all that leads to it
    mark_step_invariant(graph_module, VARYING)
    left = without_hoisted(graph_module)
    called = {str(node.target) for node in left.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("aten.to.") for name in called), called


def test_a_number_that_lies_on_another_device() -> None:
    """Operators take it as it is."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.tensor(2.0)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, size: torch.Tensor
        ) -> torch.Tensor:
            return sample * (size * self.factor) + timestep

    numbers = (torch.ones((), device="meta") for _ in range(2))
    graph_module = exported(Scaled(), torch.randn(2, 4, device="meta"), *numbers)
    assert find_step_invariant(graph_module, VARYING) == ()
