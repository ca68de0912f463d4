"""Full and shallow graphs compute what the network computes, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from dcompile.passes import (
    Canonicalize,
    Cost,
    PostconditionError,
    PreconditionError,
    SkipConnection,
    find_skip_connections,
    split_at,
    with_outputs,
)

aten = torch.ops.aten


class UNet(nn.Module):
    """Two skip connections, with attention and dropout in the deep half."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1) for _ in range(2)])
        self.head = nn.Conv2d(4, 3, 3, padding=1)

    def deep(self, x: Tensor, text: Tensor) -> Tensor:
        x = F.dropout(self.middle(x), 0.1, training=False).to(torch.float32)
        tokens = x.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(tokens, text, text, dropout_p=self.dropout)
        return x + attended.transpose(1, 2).reshape(x.shape)

    def features(self, sample: Tensor, text: Tensor) -> Tensor:
        outer = self.stem(sample)
        inner = F.silu(self.down(outer))
        x = self.up[0](torch.cat([self.deep(inner, text), inner], dim=1))
        return self.up[1](torch.cat([F.silu(x), outer], dim=1))

    def forward(self, sample: Tensor, text: Tensor, unread: Tensor) -> Tensor:
        return self.head(self.features(sample, text))


def example() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 6, 6), torch.randn(2, 5, 4), torch.randn(1)


class Case:
    """An exported network with the values of all its placeholders."""

    def __init__(self, module: nn.Module, *args: Tensor) -> None:
        self.module = module.eval()
        self.args = args or example()
        exported = torch.export.export(self.module, self.args, strict=False)
        if calls(exported.graph_module, aten.detach_.default):
            exported = exported.run_decompositions({})  # a tensor literal is detached in place
        self.values = values_of(exported, self.args)
        self.graph_module: GraphModule = Canonicalize()(exported.graph_module).graph_module
        self.skips = find_skip_connections(self.graph_module)

    @torch.no_grad()
    def expected(self) -> tuple[Tensor, ...]:
        result = self.module(*self.args)
        return result if isinstance(result, tuple) else (result,)

    @torch.no_grad()
    def run(self, graph_module: GraphModule, cached: dict[str, Tensor] | None = None) -> Any:
        values = {**self.values, **(cached or {})}
        return graph_module(*(values[name] for name in inputs_of(graph_module)))

    def check(self) -> None:
        """Full is exact, shallow is exact with a fresh cache, and the cut matters."""
        expected = self.expected()
        assert self.skips
        for skip in self.skips:
            full, shallow = split_at(self.graph_module, skip)
            outputs = self.run(full)
            result, boundary = outputs[: len(expected)], outputs[len(expected) :]
            names = [f"cached_{node.name}" for node in skip.boundary]
            fresh = dict(zip(names, boundary, strict=True))
            assert all(map(torch.equal, result, expected))
            again = self.run(shallow, fresh)
            assert len(again) == len(expected)
            assert all(map(torch.equal, again, expected))
            for name in names:
                stale = {**fresh, name: torch.randn_like(fresh[name])}
                assert not all(map(torch.equal, self.run(shallow, stale), expected)), name


def values_of(exported: ExportedProgram, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    values, inputs = {}, iter(args)
    for spec in exported.graph_signature.input_specs:
        tables = (exported.state_dict, exported.constants)
        found = [table[spec.target] for table in tables if spec.target in table]
        values[spec.arg.name] = found[0] if found else next(inputs)
    return values


def inputs_of(graph_module: GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


def calls(graph_module: GraphModule, target: Any) -> int:
    return len(graph_module.graph.find_nodes(op="call_function", target=target))


def test_both_graphs_are_exact_at_every_depth() -> None:
    case = Case(UNet())
    assert [skip.depth for skip in case.skips] == [0, 1]
    case.check()


def test_the_shallow_graph_holds_what_it_needs_and_nothing_else() -> None:
    case = Case(UNet())
    shallow = [split_at(case.graph_module, skip).shallow for skip in case.skips]
    assert inputs_of(shallow[0]) == [
        "p_stem_weight",
        "p_stem_bias",
        "p_up_1_weight",
        "p_up_1_bias",
        "p_head_weight",
        "p_head_bias",
        "sample",
        "cached_silu_1",
    ]
    assert [calls(graph_module, aten.conv2d.default) for graph_module in shallow] == [3, 5]
    for graph_module in shallow:
        assert calls(graph_module, aten.scaled_dot_product_attention.default) == 0
        assert len(graph_module.graph.nodes) < len(case.graph_module.graph.nodes)


def test_the_full_graph_keeps_its_inputs_but_for_unread_ones() -> None:
    case = Case(UNet())
    before = inputs_of(case.graph_module)
    assert before[-3:] == ["sample", "text", "unread"]
    for skip in case.skips:
        full, _ = split_at(case.graph_module, skip)
        assert inputs_of(full) == before[:-1]


def test_the_given_graph_stays_as_it_is() -> None:
    case = Case(UNet())
    code, nodes = case.graph_module.code, list(case.graph_module.graph.nodes)
    for skip in case.skips:
        split_at(case.graph_module, skip)
    assert list(case.graph_module.graph.nodes) == nodes
    assert case.graph_module.code == code
    assert torch.equal(case.run(case.graph_module)[0], case.expected()[0])


def test_splitting_twice_gives_the_same_graphs() -> None:
    case = Case(UNet())
    once, twice = (split_at(case.graph_module, case.skips[0]) for _ in range(2))
    assert once.full.code == twice.full.code
    assert once.shallow.code == twice.shallow.code


def test_both_graphs_can_be_split_again() -> None:
    case = Case(UNet())
    full, _ = split_at(case.graph_module, case.skips[0])
    inner = find_skip_connections(full)[1]
    full, shallow = split_at(full, inner)
    output, outer_boundary, inner_boundary = case.run(full)
    assert torch.equal(output, case.expected()[0])
    again = case.run(shallow, {f"cached_{inner.deep.name}": inner_boundary})
    assert torch.equal(again[0], output)
    assert torch.equal(again[1], outer_boundary)


def test_weights_of_an_exported_module_are_shared() -> None:
    module = UNet().eval()
    exported_module = torch.export.export(module, example(), strict=False).module()
    graph_module = Canonicalize()(exported_module).graph_module
    skip = find_skip_connections(graph_module)[0]
    full, shallow = split_at(graph_module, skip)
    assert full.get_parameter("head.weight") is module.head.weight
    assert shallow.get_parameter("head.weight") is module.head.weight
    assert "middle.weight" not in dict(shallow.named_parameters())

    sample, text, _ = example()
    with torch.no_grad():
        output, boundary = full(sample, text)
        assert torch.equal(output, module(sample, text, torch.zeros(1)))
        assert torch.equal(shallow(sample, boundary)[0], output)


def test_two_up_paths_are_cut_together() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
    )

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.unet(sample, timestep).sample

    case = Case(First(), torch.randn(1, 3, 8, 8), torch.tensor(0.5))
    assert [len(skip.boundary) for skip in case.skips] == [2, 2, 1, 1]
    shallow = split_at(case.graph_module, case.skips[0]).shallow
    assert inputs_of(shallow)[-2:] == [f"cached_{node.name}" for node in case.skips[0].boundary]
    case.check()


def test_several_outputs_some_of_them_cached() -> None:
    class Several(UNet):
        def forward(self, sample: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            outer = self.stem(sample)
            inner = F.silu(self.down(outer))
            deep = self.deep(inner, text)
            x = self.up[0](torch.cat([deep, inner], dim=1)) + deep
            return self.head(self.up[1](torch.cat([x, outer], dim=1))), deep, sample

    case = Case(Several(), *example()[:2])
    deep = case.skips[1].deep
    assert len(deep.users) == 3  # the concatenation, the sum and the output
    assert case.skips[1].boundary == (deep,)
    case.check()


def test_an_output_that_is_no_tuple_becomes_one() -> None:
    case = Case(UNet())
    graph: Graph = case.graph_module.graph
    (output,) = graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    full, shallow = split_at(case.graph_module, case.skips[0])
    result, boundary = case.run(full)
    assert torch.equal(result, case.expected()[0])
    (again,) = case.run(shallow, {"cached_silu_1": boundary})
    assert torch.equal(again, result)


def test_metadata_goes_along_and_may_be_missing() -> None:
    case = Case(UNet())
    skip = case.skips[0]
    shallow = split_at(case.graph_module, skip).shallow
    cached = shallow.graph.find_nodes(op="placeholder")[-1]
    assert cached.meta == {"val": skip.deep.meta["val"]}
    for node in case.graph_module.graph.nodes:
        node.meta.clear()
    shallow = split_at(case.graph_module, skip).shallow
    assert shallow.graph.find_nodes(op="placeholder")[-1].meta == {}


def test_attention_that_draws_numbers_stays_on_reuse_steps() -> None:
    case = Case(UNet(dropout=0.1))
    shallow = split_at(case.graph_module, case.skips[1]).shallow
    assert calls(shallow, aten.scaled_dot_product_attention.default) == 1


def test_a_graph_that_writes_to_its_arguments_is_refused() -> None:
    class Writes(UNet):
        def forward(self, sample: Tensor, text: Tensor) -> Tensor:
            return self.features(sample, text).mul_(2)

    exported = torch.export.export(Writes().eval(), example()[:2], strict=False)
    skip = find_skip_connections(exported.graph_module)[0]
    with pytest.raises(PreconditionError, match=r"node mul_ calls aten\.mul_\.Tensor"):
        split_at(exported.graph_module, skip)
    functional = exported.run_decompositions({}).graph_module
    split_at(functional, find_skip_connections(functional)[0])


def test_a_skip_connection_of_another_graph_is_refused() -> None:
    case, other = Case(UNet()), Case(UNet())
    with pytest.raises(PreconditionError, match=r"cat_1 belongs to another graph"):
        split_at(case.graph_module, other.skips[0])
    mixed = dataclasses.replace(case.skips[0], boundary=other.skips[0].boundary)
    with pytest.raises(PreconditionError, match=r"cat_1 belongs to another graph"):
        split_at(case.graph_module, mixed)


def test_a_cut_that_saves_nothing_is_refused() -> None:
    case = Case(UNet())
    empty = dataclasses.replace(case.skips[0], boundary=())
    with pytest.raises(PostconditionError, match="the cut at cat_1 leaves nothing out"):
        split_at(case.graph_module, empty)


def test_a_graph_without_metadata_can_be_cut_by_hand() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    skip = graph.call_function(aten.relu.default, (x,))
    deep = graph.call_function(aten.sin.default, (graph.call_function(aten.exp.default, (skip,)),))
    cat = graph.call_function(aten.cat.default, ([deep, skip],))
    graph.output((cat,))
    graph_module = GraphModule(nn.Module(), graph)
    connection = SkipConnection(0, cat, deep, (skip,), (deep,), "", Cost(), Cost())
    full, shallow = split_at(graph_module, connection)
    x_value = torch.randn(3)
    result, boundary = full(x_value)
    assert torch.equal(result, torch.cat([x_value.relu().exp().sin(), x_value.relu()]))
    assert torch.equal(shallow(x_value, boundary)[0], result)
    assert [node.op for node in shallow.graph.nodes] == [
        "placeholder",
        "placeholder",
        "call_function",
        "call_function",
        "output",
    ]


class Residuals(nn.Module):
    """Three results, each with compute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

    def forward(self, sample: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        found = []
        for layer in self.layers:
            sample = layer(sample)
            found.append(sample * scale)
        return tuple(found)


@pytest.mark.parametrize("chosen", [(0,), (2, 0), (1,), (0, 1, 2), ()])
def test_a_graph_with_some_of_its_outputs(chosen: tuple[int, ...]) -> None:
    module, args = Residuals(), (torch.randn(1, 3, 4, 4), torch.tensor(0.5))
    graph_module = torch.export.export(module, args).graph_module
    before = len(graph_module.graph.nodes)
    part = with_outputs(graph_module, chosen)
    state = {f"p_{name.replace('.', '_')}": p for name, p in module.named_parameters()}
    names = [str(node.target) for node in part.graph.find_nodes(op="placeholder")]
    found = part(
        *(state.get(name, {"sample": args[0], "scale": args[1]}.get(name)) for name in names)
    )
    expected = module(*args)
    assert all(map(torch.equal, found, (expected[number] for number in chosen)))
    assert len(found) == len(chosen)
    convolutions = sum(node.target is aten.conv2d.default for node in part.graph.nodes)
    assert convolutions == max(chosen, default=-1) + 1
    assert len(graph_module.graph.nodes) == before


def test_an_output_that_there_is_not() -> None:
    args = torch.randn(1, 3, 4, 4), torch.tensor(0.5)
    graph_module = torch.export.export(Residuals(), args).graph_module
    with pytest.raises(PreconditionError, match=r"outputs \[3\] of a graph that has 3"):
        with_outputs(graph_module, [3])
