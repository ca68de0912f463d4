"""Skip connections are found, in order, and look-alikes are not."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule

from dcompile.passes import (
    Canonicalize,
    Cost,
    PreconditionError,
    SkipConnection,
    find_skip_connections,
    split_at,
    total_cost,
)

aten = torch.ops.aten


def conv(channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, size, stride, padding=size // 2)


class UNet(nn.Module):
    """Three levels, two skip connections, and a time embedding made of a sine and a cosine."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, channels)
        self.down = nn.ModuleList([conv(channels, channels, stride=2) for _ in range(2)])
        self.time = nn.Linear(4, channels)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))
        self.middle = conv(channels, channels)
        self.up = nn.ModuleList([conv(2 * channels, channels) for _ in range(2)])
        self.head = conv(channels, 3)

    def encode(self, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        angles = timestep.reshape(-1, 1) * self.frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        levels = [self.stem(sample) + embedding[:, :, None, None]]
        for down in self.down:
            levels.append(F.silu(down(levels[-1])))
        return levels

    def decode(self, x: Tensor, levels: list[Tensor]) -> Tensor:
        for up in self.up:
            x = F.silu(up(torch.cat([F.interpolate(x, scale_factor=2.0), levels.pop()], dim=1)))
        return x

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        levels = self.encode(sample, timestep)
        return self.head(self.decode(self.middle(levels.pop()), levels))


def example() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3.0, 5.0])


def export(module: nn.Module, *args: Any, **options: Any) -> ExportedProgram:
    return torch.export.export(module.eval(), args or example(), strict=False, **options)


def find(module: nn.Module, *args: Any, **options: Any) -> list[SkipConnection]:
    return find_skip_connections(export(module, *args, **options).graph_module)


def paths(skips: list[SkipConnection]) -> list[str]:
    return [skip.module_path for skip in skips]


def check_order(skips: list[SkipConnection]) -> None:
    assert [skip.depth for skip in skips] == list(range(len(skips)))
    assert all(outer.ratio < inner.ratio < 1 for outer, inner in pairwise(skips))


def test_skip_connections_of_an_exported_graph_outermost_first() -> None:
    exported = export(UNet())
    skips = find_skip_connections(exported.graph_module)
    assert paths(skips) == ["up.1", "up.0"]
    check_order(skips)
    cats = exported.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [skip.cat for skip in skips] == [cats[2], cats[1]]  # and not cats[0], of the time
    for skip in skips:
        assert skip.cat.args[0] == [skip.deep, *skip.skips]
        assert skip.deep.target is aten.upsample_nearest2d.vec
        assert skip.boundary == (skip.deep,)


@pytest.mark.parametrize("name", ["concat", "concatenate", "hstack"])
def test_a_concatenation_by_another_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = paths(find(UNet()))
    other = torch.hstack if name == "hstack" else getattr(torch, name)
    as_cat = (lambda tensors, dim=1: other(tensors)) if name == "hstack" else other
    monkeypatch.setattr(torch, "cat", as_cat)
    exported = export(UNet())
    assert not exported.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert paths(find_skip_connections(exported.graph_module)) == expected


def test_skip_connections_of_an_exported_module_with_its_guards() -> None:
    graph_module = export(UNet()).module()
    assert graph_module.graph.find_nodes(op="call_module", target="_guards_fn")
    skips = find_skip_connections(graph_module)
    assert paths(skips) == ["up.1", "up.0"]
    check_order(skips)


def test_canonicalizing_or_looking_twice_changes_nothing() -> None:
    graph_module = export(UNet()).graph_module
    skips = find_skip_connections(graph_module)
    assert find_skip_connections(graph_module) == skips
    canonical = find_skip_connections(Canonicalize()(graph_module).graph_module)
    assert [(skip.cat, skip.ratio) for skip in canonical] == [
        (skip.cat, skip.ratio) for skip in skips
    ]


def test_costs_are_those_of_both_graphs() -> None:
    graph_module = Canonicalize()(export(UNet()).graph_module).graph_module
    for skip in find_skip_connections(graph_module):
        _, shallow = split_at(graph_module, skip)
        assert skip.full == total_cost(graph_module.graph.nodes)
        assert skip.shallow == total_cost(shallow.graph.nodes)


def test_costs_of_the_outermost_cut_by_hand() -> None:
    outermost = find(UNet())[0]
    pixels, per_channel_pair = 2 * 8 * 8, 2 * 3 * 3
    stem, up, head = 3 * 4, (4 + 4) * 4, 4 * 3
    time = 2 * 2 * 4 * 4
    assert outermost.shallow.flops == pixels * per_channel_pair * (stem + up + head) + time
    quarter, sixteenth = pixels // 4, pixels // 16
    deep = quarter * 4 * 4 + sixteenth * 4 * 4 + sixteenth * 4 * 4 + quarter * (4 + 4) * 4
    assert outermost.full.flops == outermost.shallow.flops + per_channel_pair * deep


def test_what_a_cut_saves_in_numbers() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    skip = SkipConnection(0, x, x, (), (x,), "", Cost(flops=100), Cost(flops=25))
    assert skip.ratio == 0.25
    assert skip.speed_limit(1) == 1
    assert skip.speed_limit(3) == 3 / 1.5
    assert dataclasses.replace(skip, full=Cost()).ratio == 1.0  # nothing to save


def test_varying_sizes_change_nothing() -> None:
    batch = Dim("batch")
    skips = find(UNet(), dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}})
    fixed = find(UNet())
    assert paths(skips) == ["up.1", "up.0"]
    assert [skip.ratio for skip in skips] == [skip.ratio for skip in fixed]


def test_the_sample_by_name_by_node_and_by_default() -> None:
    class Swapped(UNet):
        def forward(self, timestep: Tensor, sample: Tensor) -> Tensor:
            return super().forward(sample, timestep)

    sample, timestep = example()
    graph_module = export(Swapped(), timestep, sample).graph_module
    node = graph_module.graph.find_nodes(op="placeholder", target="sample")[0]
    named = find_skip_connections(graph_module, "sample")
    assert paths(named) == ["up.1", "up.0"]
    assert find_skip_connections(graph_module, node) == named


def test_by_default_the_sample_is_the_first_input_that_is_not_lifted() -> None:
    class Literal(UNet):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(sample * torch.tensor([2.0]), timestep)

    graph_module = export(Literal()).graph_module
    lifted = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    assert lifted[0].startswith("p_")
    assert lifted[-4:] == ["b_frequencies", "c_lifted_tensor_0", "sample", "timestep"]
    skips = find_skip_connections(graph_module)
    assert paths(skips) == ["up.1", "up.0"]
    assert find_skip_connections(graph_module, "sample") == skips


def test_a_sample_of_another_graph_is_refused() -> None:
    foreign = Graph().placeholder("sample")
    with pytest.raises(PreconditionError, match="sample belongs to another graph"):
        find_skip_connections(GraphModule(nn.Module(), Graph()), foreign)


def test_an_unknown_sample_lists_the_names_there_are() -> None:
    with pytest.raises(PreconditionError, match="no placeholder is called 'latent'") as error:
        find_skip_connections(export(UNet()).graph_module, "latent")
    assert "sample, timestep" in str(error.value)


def test_a_graph_of_nothing_but_parameters_has_no_sample() -> None:
    graph = Graph()
    graph.output((graph.placeholder("p_weight"),))
    with pytest.raises(PreconditionError, match="no input that is not a lifted parameter"):
        find_skip_connections(GraphModule(nn.Module(), graph))


def test_without_metadata_nothing_is_claimed() -> None:
    graph_module = export(UNet()).graph_module
    for node in graph_module.graph.nodes:
        node.meta.clear()
    assert find_skip_connections(graph_module) == []


def test_text_is_no_skip_connection() -> None:
    class Conditioned(UNet):
        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            text = torch.cat([text @ torch.eye(4), text], dim=1)
            attended = sample.flatten(2).mean(-1, keepdim=True) @ text.mean((1, 2))[:, None, None]
            return super().forward(sample + attended[..., None], timestep)

    assert paths(find(Conditioned(), *example(), torch.randn(2, 5, 4))) == ["up.1", "up.0"]


def test_a_text_next_to_the_sample_is_no_skip_connection() -> None:
    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, sample: Tensor, text: Tensor) -> Tensor:
            return self.layers[1](torch.cat([text, self.layers[0](sample)], dim=1))

    assert find(Prefixed(), torch.randn(2, 3, 4), torch.randn(2, 5, 4)) == []


def test_a_tensor_of_the_samples_size_is_no_sample() -> None:
    class Padded(nn.Module):
        """As I2VGen-XL makes its text: what it is made of knows the sample's size only."""

        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Linear(4, 4)

        def forward(self, sample: Tensor, text: Tensor) -> Tensor:
            empty = sample.new_zeros(sample.shape[0], 0, 4)
            ones, zeros = torch.ones_like(sample), torch.zeros_like(sample)
            text = torch.cat([empty, ones, zeros, self.deep(text) + sample.new_full((), 2.0)], 1)
            return sample + text.mean(1, keepdim=True)

    arguments = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    assert find(Padded(), *arguments) == []
    assert find(Padded(), *arguments, dynamic_shapes={"sample": {1: Dim.AUTO}, "text": None}) == []


def test_keys_and_values_of_such_a_text_are_not_cached() -> None:
    class Attends(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            levels = self.encode(sample, timestep)
            text = self.key(torch.cat([sample.new_zeros(2, 0, 4), text], dim=1))
            bias = text.mean(1)[:, :, None, None]
            deep = self.middle(levels.pop()) + bias
            return self.head(self.decode(deep, levels) + bias)

    for skip in find(Attends(), *example(), torch.randn(2, 5, 4)):
        assert skip.boundary == (skip.deep,)


def test_the_halves_of_a_rotary_embedding_are_no_skip_connection() -> None:
    class Rotary(UNet):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            sample = sample @ torch.eye(8)
            left, right = sample.chunk(2, dim=-1)
            return super().forward(sample + torch.cat([-right, left], dim=-1).sin(), timestep)

    assert paths(find(Rotary())) == ["up.1", "up.0"]


def test_a_tensor_next_to_itself_is_no_skip_connection() -> None:
    class Doubled(UNet):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            features = super().forward(sample, timestep)
            return torch.cat([features, features], dim=1)

    assert paths(find(Doubled())) == ["up.1", "up.0"]


def test_branches_of_a_stem_are_no_skip_connection() -> None:
    class Branches(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([conv(3, 1, size) for size in (1, 3, 5)])

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            sample = torch.cat([branch(sample) for branch in self.branches], dim=1)
            return super().forward(sample, timestep)

    assert paths(find(Branches())) == ["up.1", "up.0"]


def test_a_dense_block_behind_the_network_is_no_skip_connection() -> None:
    class Refined(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.ModuleList([conv(3, 3), conv(6, 3)])

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = super().forward(sample, timestep)
            return self.dense[1](torch.cat([self.dense[0](x), x], dim=1))

    assert paths(find(Refined())) == ["up.1", "up.0"]


def test_two_encoders_that_exchange_features_are_no_skip_connection() -> None:
    class SideBySide(UNet):
        """As ControlNet-XS does: a second, slimmer down path reads the first one's features."""

        def __init__(self) -> None:
            super().__init__()
            self.control_stem = conv(3, 2)
            self.control_down = nn.ModuleList([conv(4 + 2, 2, stride=2) for _ in range(2)])
            self.to_base = nn.ModuleList([conv(2, 4, 1) for _ in range(2)])

        def encode(self, sample: Tensor, timestep: Tensor) -> list[Tensor]:
            levels, control = [self.stem(sample)], self.control_stem(sample)
            for down, control_down, to_base in zip(
                self.down, self.control_down, self.to_base, strict=True
            ):
                control = F.silu(control_down(torch.cat([control, levels[-1]], dim=1)))
                levels.append(F.silu(down(levels[-1])) + to_base(control))
            return levels

    skips = find(SideBySide())
    assert paths(skips) == ["up.1", "up.0"]
    check_order(skips)


def test_a_global_skip_connection_is_the_outermost() -> None:
    class Global(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.last = conv(3 + 3, 3)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.last(torch.cat([sample, super().forward(sample, timestep)], dim=1))

    skips = find(Global())
    assert paths(skips) == ["last", "up.1", "up.0"]
    assert skips[0].skips[0].target == "sample"  # the deep operand comes second here
    check_order(skips)


def test_a_skip_connection_may_have_several_skips() -> None:
    class Nested(UNet):
        """As UNet++ does: the first level is read twice."""

        def __init__(self) -> None:
            super().__init__()
            self.last = conv(4 + 4 + 4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            levels = self.encode(sample, timestep)
            stem = levels[0]
            x = self.decode(self.middle(levels.pop()), levels)
            return self.head(self.last(torch.cat([x, stem, stem.sin()], dim=1)))

    skips = find(Nested())
    assert paths(skips) == ["last", "up.1", "up.0"]
    assert len(skips[0].skips) == 2
    check_order(skips)


def test_a_deep_operand_with_several_users_is_one_boundary() -> None:
    class Shared(UNet):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            levels = self.encode(sample, timestep)
            deep = F.interpolate(self.middle(levels[2]), scale_factor=4.0)
            x = self.up[0](torch.cat([deep, levels[0]], dim=1)) + deep
            return self.head(x), deep

    (skip,) = find(Shared())
    assert skip.boundary == (skip.deep,)
    assert len(skip.deep.users) == 3


def test_a_second_up_path_is_cut_as_well() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
    )
    skips = find(unet, torch.randn(1, 3, 8, 8), torch.tensor(0.5))
    shapes = [[tuple(node.meta["val"].shape) for node in skip.boundary] for skip in skips]
    features, picture = (1, 32, 8, 8), (1, 3, 4, 4)  # before it is enlarged: fewer bytes
    assert [set(shape) for shape in shapes[:2]] == [{features, picture}] * 2
    assert shapes[2:] == [[(1, 32, 4, 4)], [(1, 32, 4, 4)]]
    assert all(skip.deep in skip.boundary for skip in skips)
    check_order(skips)


class Doubled(UNet):
    """Attention whose two variants are one batch (perturbed-attention guidance)."""

    def decode(self, x: Tensor, levels: list[Tensor]) -> Tensor:
        one, two = x, F.silu(self.middle(x))
        both = torch.cat([one, two], dim=-4)
        return super().decode(both.chunk(2)[1], levels)


def test_a_joined_batch_is_no_skip_connection() -> None:
    args = torch.randn(2, 3, 8, 8), torch.tensor(3.0)
    joined, plain = (
        torch.export.export(kind().eval(), args).graph_module for kind in (Doubled, UNet)
    )
    assert len(find_skip_connections(joined)) == len(find_skip_connections(plain)) == 2
