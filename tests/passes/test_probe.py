"""The drift that a shallow graph returns is the one computed in the open."""

from __future__ import annotations

import pytest
import torch
from networks import capture_call
from plain import picture, plain
from torch import Tensor, nn
from torch.fx import GraphModule

from dcompile.passes import (
    PreconditionError,
    SkipConnection,
    find_skip_connections,
    split_at,
    split_levels,
    with_drift,
    with_forecast,
)

Values = dict[str, Tensor]


def captured(network: nn.Module) -> tuple[GraphModule, list[SkipConnection], Values, str]:
    """Its graph, skip connections, the values of all inputs but the sample, and that one's name."""
    found, _ = capture_call(network, (picture(), torch.tensor(500)), {})
    weights = dict(network.named_parameters())
    values = {name: weights[path] for name, path in found.parameters.items()}
    values |= dict.fromkeys(found.inputs, torch.tensor(500))
    skips = find_skip_connections(found.graph_module, found.samples)
    return found.graph_module, skips, values, found.sample


@torch.no_grad()
def run(graph: GraphModule, values: Values, *cached: Tensor) -> tuple[Tensor, ...]:
    names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    rest = iter(cached)
    return tuple(graph(*[values[n] if n in values else next(rest) for n in names]))


@pytest.mark.parametrize("probe", ["l1", "l2"])
@pytest.mark.parametrize("depth", [0, 1])
def test_the_drift_is_that_of_what_enters(probe: str, depth: int) -> None:
    graph, skips, values, sample = captured(plain())
    skip = skips[depth]
    full, shallow = split_at(graph, skip, skip.entering)
    measuring = with_drift(shallow, len(skip.entering), probe)
    assert len(skip.entering) == 1
    result, boundary, entered = run(full, values | {sample: picture(1)})
    same = run(measuring, values | {sample: picture(1)}, boundary, entered)
    assert torch.equal(same[0], result)
    assert float(same[1]) == 0.0
    now = run(full, values | {sample: picture(2)})
    found = run(measuring, values | {sample: picture(2)}, boundary, entered)
    order = 1 if probe == "l1" else 2
    expected = (now[2] - entered).norm(order) / entered.norm(order)
    torch.testing.assert_close(found[1], expected)


def test_with_a_forecast_it_is_the_distance_from_what_was_foreseen() -> None:
    graph, skips, values, sample = captured(plain())
    full, shallow = split_at(graph, skips[0], skips[0].entering)
    measuring = with_forecast(with_drift(shallow, 1), boundary=2, history=2)
    runs = [run(full, values | {sample: picture(seed)}) for seed in range(3)]
    cached = (*runs[1][1:], *runs[0][1:], torch.tensor([2.0, -1.0]))
    found = run(measuring, values | {sample: picture(2)}, *cached)
    foreseen = 2 * runs[1][2] - runs[0][2]
    expected = (runs[2][2] - foreseen).abs().sum() / foreseen.abs().sum()
    torch.testing.assert_close(found[1], expected)


def test_what_enters_is_kept_apart_from_the_sample() -> None:
    """The full graph returns a copy: a sampler may write to its sample in place."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Conv2d(3, 3, 1)
            self.last = nn.Conv2d(6, 3, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.last(torch.cat([self.deep(sample), sample], 1))

    graph, skips, values, sample = captured(Bare().eval())
    (skip,) = skips
    assert [node.op for node in skip.entering] == ["placeholder"]
    full, _ = split_at(graph, skip, skip.entering)
    x = picture()
    *_, entered = run(full, values | {sample: x})
    assert torch.equal(entered, x)
    assert entered.data_ptr() != x.data_ptr()


def test_refusals() -> None:
    graph, skips, *_ = captured(plain())
    outer, inner = skips
    shallow = split_at(graph, outer, outer.entering).shallow
    with pytest.raises(PreconditionError, match="unknown probe 'l3'; known are l1, l2"):
        with_drift(shallow, 1, "l3")
    with pytest.raises(PreconditionError, match="9 values to probe among 2 outputs"):
        with_drift(shallow, 9)
    with pytest.raises(PreconditionError, match="beyond the cut"):
        split_at(graph, outer, inner.boundary)
    with pytest.raises(PreconditionError, match="do not ascend"):
        split_levels(graph, [inner, outer])


def test_each_level_gives_what_the_full_graph_gives() -> None:
    graph, skips, values, sample = captured(plain())
    outermost, between, full = split_levels(graph, skips)
    result, outer, inner = run(full, values | {sample: picture(1)})
    again = run(between, values | {sample: picture(1)}, inner)
    assert torch.equal(again[0], result)
    assert torch.equal(again[1], outer)
    (last,) = run(outermost, values | {sample: picture(1)}, outer)
    assert torch.equal(last, result)
    assert len(outermost.graph.nodes) < len(between.graph.nodes) < len(full.graph.nodes)
