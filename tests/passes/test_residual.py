"""Residual streams are found and cut, and look-alikes are not."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import ddpm, sdxl, stable_diffusion
from cut_case import CutCase, close
from torch import Tensor, nn
from torch.export import Dim

from dcompile.passes import (
    Canonicalize,
    PreconditionError,
    ResidualCut,
    SkipConnection,
    find_cuts,
    find_residual_cuts,
    find_skip_connections,
    split_at,
    split_levels,
    total_cost,
    with_drift,
    with_forecast,
)
from dcompile.passes.cost import tensor_bytes

aten = torch.ops.aten
WIDTH = 16


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (query, key, value)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class DiTBlock(nn.Module):
    """Norms that the timestep shifts and scales, and gates that it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), mlp()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        return torch.addcmul(x, gate2, self.mlp(self.norm(x) * (1 + scale2) + shift2))


class ViTBlock(nn.Module):
    """As in timm: a learned scale on each branch, drop paths that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), mlp()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.scale)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.scale)


class ParallelBlock(nn.Module):
    """Attention and MLP read the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        normed = self.norm(x + time[:, None])
        return x + self.attn(normed) + self.mlp(normed)


class PostNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x + time[:, None]))
        return self.norm2(x + self.mlp(x))


class Network(nn.Module):
    """Blocks between an embedding of tokens and a head."""

    def __init__(self, block: type[nn.Module] = DiTBlock, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def stream(self, sample: Tensor, time: Tensor) -> Tensor:
        x = self.embed(sample)
        for block in self.blocks:
            x = block(x, time)
        return x

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        return self.head(self.norm(self.stream(sample, time)))


def example() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 4), torch.randn(2, WIDTH)


def case_of(module: nn.Module, *args: Any) -> CutCase:
    return CutCase(module, *(args or example()))


def find(case: CutCase) -> list[ResidualCut]:
    return find_residual_cuts(case.graph_module, "args_0")


def paths(cuts: list[ResidualCut]) -> list[str]:
    return [cut.module_path.removeprefix("network.") for cut in cuts]


def calls(graph_module: torch.fx.GraphModule, target: Any) -> int:
    return len(graph_module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("block", [DiTBlock, ViTBlock, ParallelBlock, PostNormBlock])
def test_all_blocks_but_the_first_are_skipped_at_depth_0(block: type[nn.Module]) -> None:
    case = case_of(Network(block))
    cuts = find(case)
    assert paths(cuts) == ["blocks.1", "blocks.2", "blocks.3"]
    assert [cut.depth for cut in cuts] == [0, 1, 2]
    assert [len(cut.skipped_blocks) for cut in cuts] == [3, 2, 1]
    assert all(outer.ratio < inner.ratio < 1 for outer, inner in pairwise(cuts))
    for cut in cuts:
        assert len(cut.boundary) == len(cut.entering) == 1
        cached = [tensor_bytes(node.meta["val"]) for node in cut.boundary]
        assert sum(cached) == 2 * 6 * WIDTH * 4
        assert cut.speed_limit(3) == pytest.approx(3 / (1 + 2 * cut.ratio))
        case.check([cut])
    case.check(cuts)


def test_costs_are_those_of_both_graphs() -> None:
    case = case_of(Network())
    for number, cut in enumerate(find(case)):
        shallow = split_at(case.graph_module, cut).shallow
        assert cut.full == total_cost(case.graph_module.graph.nodes)
        assert cut.shallow.flops == total_cost(shallow.graph.nodes).flops
        assert calls(shallow, aten.scaled_dot_product_attention.default) == number + 1


def test_what_enters_is_the_stream_before_the_first_skipped_block() -> None:
    case = case_of(Network())
    cut = find(case)[0]
    ((after, before),) = cut.replaced
    assert cut.entering == (before,)
    assert cut.boundary == (after,)
    assert before.target is after.target is aten.addcmul.default


class Joint(nn.Module):
    """Image and text with weights of their own, in one attention."""

    def __init__(self, keeps_text: bool = True) -> None:
        super().__init__()
        self.keeps_text = keeps_text
        self.image_qkv, self.text_qkv = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.image_proj, self.text_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.image_mlp, self.text_mlp = mlp(), mlp()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [self.text_qkv(text).chunk(3, -1), self.image_qkv(image).chunk(3, -1)]
        attended = attend(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))
        image = image + self.image_proj(attended[:, text.shape[1] :])
        image = image + self.image_mlp(image)
        if not self.keeps_text:
            return image, None
        text = text + self.text_proj(attended[:, : text.shape[1]])
        return image, text + self.text_mlp(text)


class TwoStreams(nn.Module):
    """Blocks with a stream each for text and image, then blocks with one for both."""

    def __init__(self, joint: int = 2, single: int = 2) -> None:
        super().__init__()
        self.embed, self.embed_text = nn.Linear(4, WIDTH), nn.Linear(5, WIDTH)
        self.joint = nn.ModuleList([Joint() for _ in range(joint)])
        self.single = nn.ModuleList([ParallelBlock() for _ in range(single)])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
        image, text = self.embed(sample), self.embed_text(text)
        for block in self.joint:
            image, text = block(image, text)
        x = torch.cat([text, image], dim=1)
        for block in self.single:
            x = block(x, time)
        return self.head(x[:, text.shape[1] :])


def test_two_streams_and_then_one() -> None:
    case = case_of(TwoStreams(), *example(), torch.randn(2, 3, 5))
    cuts = find(case)
    assert paths(cuts) == ["joint.1", "single.0", "single.1"]
    assert [[len(part.after) for part in cut.segments] for cut in cuts] == [[2, 1], [1], [1]]
    outermost = cuts[0].segments[0]
    assert sorted(outermost.follows_sample) == [False, True]  # and not the text's
    (entering,) = cuts[0].entering
    assert entering.meta["val"].shape == (2, 6, WIDTH)
    for cut in cuts:
        case.check([cut])
    case.check(cuts)


def test_a_last_block_that_drops_the_text_is_a_block() -> None:
    network = TwoStreams(joint=3, single=0)
    network.joint.append(Joint(keeps_text=False))

    def forward(sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
        image, text = network.embed(sample), network.embed_text(text)
        for block in network.joint:
            image, text = block(image, text)
        return network.head(image)

    network.forward = forward  # type: ignore[method-assign]
    case = case_of(network, *example(), torch.randn(2, 3, 5))
    cuts = find(case)
    assert paths(cuts) == ["joint.1", "joint.2", "joint.3"]
    assert [len(cut.boundary) for cut in cuts] == [1, 1, 1]  # the text ends there
    case.check(cuts)


def test_without_metadata_on_modules_every_sum_ends_a_block() -> None:
    case = case_of(Network(ViTBlock, 2))
    assert find(case) == []
    for node in case.graph_module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    cuts = find(case)
    assert len(cuts) == 3
    assert paths(cuts) == ["", "", ""]
    case.check(cuts)


def test_without_metadata_on_values_nothing_is_found() -> None:
    case = case_of(Network())
    for node in case.graph_module.graph.nodes:
        node.meta.clear()
    assert find(case) == []


def test_a_stream_that_others_read_too() -> None:
    class Aside(Network):
        def forward(self, sample: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            x, seen = self.embed(sample), []
            for block in self.blocks:
                x = block(x, time)
                seen.append(x)
            return self.head(self.norm(x)), seen[1].mean(dim=1)

    case = case_of(Aside())
    cuts = find(case)
    assert paths(cuts)[-1] == "blocks.3"
    for cut in cuts:
        assert calls(split_at(case.graph_module, cut).shallow, aten.mean.dim) == 1
    case.check(cuts)


def test_control_of_skipped_blocks_is_part_of_the_difference() -> None:
    """A reuse step reads the control of the blocks that run, and of no others."""

    class Controlled(Network):
        def forward(self, sample: Tensor, time: Tensor, control: Tensor) -> Tensor:
            x = self.embed(sample)
            for block, residual in zip(self.blocks, control.unbind(), strict=True):
                x = block(x, time) + residual
            return self.head(self.norm(x))

    case = case_of(Controlled(), *example(), torch.randn(4, 2, 6, WIDTH))
    cuts = find(case)
    assert paths(cuts) == ["blocks.1", "blocks.2", "blocks.3"]
    shallow = split_at(case.graph_module, cuts[0]).shallow
    (residuals,) = (n for n in shallow.graph.nodes if "unbind" in str(n.target))
    assert [n.args[1] for n in residuals.users] == [0]
    case.check(cuts)


def test_a_sample_that_is_added_to_the_output_is_no_stream() -> None:
    class Preconditioned(Network):
        def forward(self, sample: Tensor, time: Tensor) -> Tensor:
            return 0.5 * sample + super().forward(sample, time)

    case = case_of(Preconditioned())
    cuts = find(case)
    assert paths(cuts) == ["blocks.1", "blocks.2", "blocks.3"]
    assert all(cut.boundary[0].meta["val"].shape == (2, 6, WIDTH) for cut in cuts)
    case.check(cuts)


def test_layouts_that_alternate_between_blocks() -> None:
    class Factorized(Network):
        def stream(self, sample: Tensor, time: Tensor) -> Tensor:
            x = self.embed(sample).reshape(2 * 2, 3, WIDTH)
            for number, block in enumerate(self.blocks):
                x = block(x, time.repeat_interleave(x.shape[0] // 2, 0))
                tokens = (3, 2) if number % 2 else (2, 3)
                x = x.reshape(2, *tokens, WIDTH).transpose(1, 2).flatten(0, 1)
            return x

    case = case_of(Factorized())
    cuts = find(case)
    assert paths(cuts) == ["blocks.1", "blocks.2", "blocks.3"]
    case.check(cuts)


def test_streams_in_half_precision_are_cached_in_it() -> None:
    class Mixed(Network):
        def forward(self, sample: Tensor, time: Tensor) -> Tensor:
            x = self.embed(sample).bfloat16()
            for block in self.blocks:
                x = (x.float() + block.mlp(block.norm(x.float()))).type_as(x)
            return self.head(x.float())

    case = case_of(Mixed())
    cuts = find(case)
    assert [cut.boundary[0].meta["val"].dtype for cut in cuts] == [torch.bfloat16] * 3
    for number, cut in enumerate(cuts):
        full, shallow = split_at(case.graph_module, cut)
        result, difference = case.run(full)
        assert difference.dtype == torch.bfloat16
        assert torch.equal(result, case.expected[0])
        assert torch.allclose(case.run(shallow, [difference])[0], result, rtol=0.05, atol=0.05)
        assert calls(shallow, aten.layer_norm.default) == number + 1


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        for layer in self.layers:
            sample = F.gelu(layer(sample))
        return sample


class Recurrent(nn.Module):
    """Its state is multiplied by what it computes from it: nothing is carried."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 2 * WIDTH)
        self.gate, self.candidate = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        state = time
        for token in self.read(sample).unbind(1):
            opened, new = token.chunk(2, dim=-1)
            gate = (self.gate(state) + opened).sigmoid()
            state = (1 - gate) * state + gate * (self.candidate(state) + new).tanh()
        return state


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, WIDTH, num_layers=3, batch_first=True)

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        return self.lstm(sample)[0]


@pytest.mark.parametrize("module", [MLP(), Recurrent(), LSTM(), Network(blocks=2)])
def test_networks_without_a_stream_worth_cutting(module: nn.Module) -> None:
    case = case_of(module)
    assert find(case) == []
    assert find_cuts(case.graph_module, "args_0") == []


def test_text_that_does_not_depend_on_the_sample_is_no_stream() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([ViTBlock() for _ in range(4)])
            self.out = nn.Linear(WIDTH, 4)

        def forward(self, sample: Tensor, time: Tensor) -> Tensor:
            x = time[:, None]
            for block in self.blocks:
                x = block(x, time)
            return sample * self.out(x)

    assert find(case_of(Text())) == []


def test_sizes_that_vary() -> None:
    module, (sample, time) = Network().eval(), example()
    tokens = Dim("tokens", min=2, max=64)
    exported = torch.export.export(
        module, (sample, time), dynamic_shapes=({1: tokens}, None), strict=False
    )
    graph_module = Canonicalize()(exported.graph_module).graph_module
    cuts = find_residual_cuts(graph_module)
    assert paths(cuts) == ["blocks.1", "blocks.2", "blocks.3"]
    full, shallow = split_at(graph_module, cuts[0])
    assert calls(shallow, aten.scaled_dot_product_attention.default) == 1
    sample = torch.randn(2, 9, 4)
    values = {
        spec.arg.name: exported.state_dict.get(spec.target)
        for spec in exported.graph_signature.input_specs
    }
    values.update(sample=sample, time=time)

    def run(graph: torch.fx.GraphModule, *cached: Tensor) -> tuple[Tensor, ...]:
        names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
        return graph(*(values[name] for name in names if name in values), *cached)

    with torch.no_grad():
        result, difference = run(full)
        assert torch.equal(result, module(sample, time))
        assert close(run(shallow, difference)[0], result)


def test_looking_and_splitting_twice_give_the_same() -> None:
    case = case_of(Network())
    code = case.graph_module.code
    cuts = find(case)
    assert find(case) == cuts
    once, twice = (split_levels(case.graph_module, cuts) for _ in range(2))
    assert [level.code for level in once] == [level.code for level in twice]
    assert case.graph_module.code == code


def test_forecasts_and_drift_of_differences() -> None:
    case = case_of(Network())
    cut = find(case)[0]
    full, shallow = split_at(case.graph_module, cut, cut.entering)
    result, difference, entered = case.run(full)
    measured = with_drift(shallow, 1)
    again, drift = case.run(measured, [difference, entered])
    assert close(again, result)
    assert drift == 0
    forecast = with_forecast(split_at(case.graph_module, cut).shallow, 1, 2)
    cached = [difference, torch.zeros_like(difference), torch.tensor([2.0, 5.0])]
    (twice,) = case.run(forecast, cached)
    (expected,) = case.run(split_at(case.graph_module, cut).shallow, [2 * difference])
    assert torch.equal(twice, expected)


def test_cuts_of_another_graph_or_out_of_order_are_refused() -> None:
    case, other = case_of(Network()), case_of(Network())
    cuts = find(case)
    with pytest.raises(PreconditionError, match=r"a cut of .*blocks\.1 belongs to another graph"):
        split_at(other.graph_module, cuts[0])
    with pytest.raises(PreconditionError, match=r"depths \[1, 0\] do not ascend"):
        split_levels(case.graph_module, [cuts[1], cuts[0]])
    with pytest.raises(PreconditionError, match="lies beyond the cut"):
        split_at(case.graph_module, cuts[0], probed=cuts[1].entering)
    with pytest.raises(PreconditionError, match="no placeholder is called 'nothing'"):
        find_residual_cuts(case.graph_module, "nothing")


def test_costs_that_are_not_known() -> None:
    cut = dataclasses.replace(find(case_of(Network()))[0], full=total_cost(()))
    assert cut.ratio == 1.0


@pytest.mark.parametrize("build", [ddpm, stable_diffusion, sdxl])
def test_unets_keep_their_skip_connections(build: Any) -> None:
    sample, time, text = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 5, 16)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.zeros(2, 6)}
    if build is ddpm:
        case = CutCase(build(), torch.randn(2, 3, 16, 16), time)
    elif build is sdxl:
        case = CutCase(build(), sample, time, text, added_cond_kwargs=added)
    else:
        case = CutCase(build(), sample, time, text)
    skips = find_skip_connections(case.graph_module, "args_0")
    assert find_cuts(case.graph_module, "args_0") == skips
    assert all(isinstance(skip, SkipConnection) for skip in skips)


def test_transformers_are_cut_along_their_stream() -> None:
    case = case_of(TwoStreams(), *example(), torch.randn(2, 3, 5))
    cuts = find_cuts(case.graph_module, "args_0")
    assert cuts == find(case)
