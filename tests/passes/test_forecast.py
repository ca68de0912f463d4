"""The shallow graph that extrapolates its boundary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from dcompile.passes import PreconditionError, with_forecast


def graph_of(dtype: torch.dtype = torch.float32, extra: object = None) -> GraphModule:
    """x + boundary, and a boundary that is no floating-point tensor."""
    graph = Graph()
    x, boundary = graph.placeholder("x"), graph.placeholder("cached_h")
    boundary.meta["val"] = torch.empty(2, 3, dtype=dtype)
    other = graph.placeholder("cached_n")
    other.meta["val"] = extra if extra is not None else torch.empty(2, dtype=torch.int64)
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, boundary)), other))
    return GraphModule(nn.Module(), graph)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 3, dtype=dtype), *(torch.randn(2, 3, dtype=dtype) for _ in range(2))


NOW, BEFORE = torch.tensor([1, 2]), torch.tensor([3, 4])


def test_coefficients_weigh_the_boundaries() -> None:
    x, latest, earlier = tensors()
    forecast = with_forecast(graph_of(), boundary=2, history=2)
    assert [n.target for n in forecast.graph.find_nodes(op="placeholder")] == [
        *("x", "cached_h", "cached_n", "cached_h_1", "cached_n_1", "coefficients")
    ]
    result, other = forecast(x, latest, NOW, earlier, BEFORE, torch.tensor([1.5, -0.5]))
    torch.testing.assert_close(result, x + 1.5 * latest - 0.5 * earlier)
    assert other is NOW  # no number to extrapolate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_latest_alone_is_bit_for_bit_the_latest(dtype: torch.dtype) -> None:
    x, latest, earlier = tensors(dtype)
    forecast = with_forecast(graph_of(dtype), boundary=2, history=3)
    coefficients = torch.tensor([1.0, 0.0, 0.0])
    result, _ = forecast(x, latest, NOW, earlier, NOW, earlier, NOW, coefficients)
    assert result.dtype == dtype
    assert torch.equal(result, latest)


def test_what_extrapolation_blows_up_is_not_used() -> None:
    x, latest, earlier = tensors(torch.float16)
    latest[0, 0], earlier[0, 0] = 60000, -60000  # the forecast is beyond half precision
    earlier[1, 1], earlier[1, 2] = float("nan"), float("inf")
    forecast = with_forecast(graph_of(torch.float16), boundary=2, history=2)
    result, _ = forecast(x, latest, NOW, earlier, NOW, torch.tensor([2.0, -1.0]))
    for place in ((0, 0), (1, 1), (1, 2)):
        assert result[place] == latest[place]
    expected = (2 * latest.float() - earlier.float()).half()
    assert torch.equal(result[0, 1:], expected[0, 1:])


def test_every_node_has_metadata() -> None:
    forecast = with_forecast(graph_of(), boundary=2, history=2)
    added = [n for n in forecast.graph.nodes if n.op == "call_function"][:-1]
    assert added
    assert all("val" in node.meta for node in added)


def test_the_given_graph_stays_as_it_is() -> None:
    given = graph_of()
    before = given.code
    with_forecast(given, boundary=2, history=2)
    assert given.code == before


@pytest.mark.parametrize(
    ("graph_module", "boundary", "history", "message"),
    [
        (graph_of(), 4, 2, "a boundary of 4 among 3 placeholders"),
        (graph_of(), 0, 2, "a boundary of 0"),
        (graph_of(), 2, 1, "at least two boundaries, got 1"),
        (graph_of(), 1, 2, "no floating-point tensor"),
    ],
)
def test_refuses(graph_module: GraphModule, boundary: int, history: int, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        with_forecast(graph_module, boundary, history)


def test_missing_metadata_is_refused() -> None:
    given = graph_of()
    for node in given.graph.nodes:
        node.meta.clear()
    with pytest.raises(PreconditionError, match="no metadata"):
        with_forecast(given, 1, 2)
