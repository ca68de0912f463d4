"""FLOPs and bytes against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

from dcompile.passes import Cost, node_cost, total_cost
from dcompile.passes.cost import _operator_flops, tensor_bytes, tensor_sizes

aten = torch.ops.aten


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def exported(function: Callable[..., Any], *args: Tensor, **options: Any) -> Graph:
    return torch.export.export(Calls(function), args, strict=False, **options).graph


def node_of(graph: Graph, target: Any) -> Node:
    (node,) = graph.find_nodes(op="call_function", target=target)
    return node


def test_a_convolution() -> None:
    graph = exported(
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        torch.randn(2, 3, 8, 10),
        torch.randn(5, 3, 3, 3),
        torch.randn(5),
    )
    outputs = 2 * 5 * 4 * 5
    assert node_cost(node_of(graph, aten.conv2d.default)) == Cost(
        flops=2 * outputs * (3 * 3 * 3),
        bytes=4 * (2 * 3 * 8 * 10 + 5 * 3 * 3 * 3 + 5 + outputs),
    )


def test_a_grouped_convolution_costs_a_group_less() -> None:
    graph = exported(
        lambda x, w: F.conv2d(x, w, groups=2), torch.randn(1, 4, 6, 6), torch.randn(8, 2, 3, 3)
    )
    assert node_cost(node_of(graph, aten.conv2d.default)).flops == 2 * (8 * 4 * 4) * (2 * 3 * 3)


@pytest.mark.parametrize("bias", [None, torch.randn(7)])
def test_a_linear_layer(bias: Tensor | None) -> None:
    tensors = (torch.randn(2, 3, 5), torch.randn(7, 5), *([] if bias is None else [bias]))
    cost = node_cost(node_of(exported(F.linear, *tensors), aten.linear.default))
    assert cost.flops == 2 * (2 * 3) * 5 * 7
    assert cost.bytes == 4 * (2 * 3 * 5 + 7 * 5 + (0 if bias is None else 7) + 2 * 3 * 7)


def test_attention() -> None:
    batch, heads, queries, keys, width, values = 2, 3, 4, 5, 8, 6
    graph = exported(
        F.scaled_dot_product_attention,
        torch.randn(batch, heads, queries, width),
        torch.randn(batch, heads, keys, width),
        torch.randn(batch, heads, keys, values),
    )
    cost = node_cost(node_of(graph, aten.scaled_dot_product_attention.default))
    assert cost.flops == 2 * batch * heads * queries * keys * (width + values)


def test_half_precision_moves_half_the_bytes() -> None:
    def cost(dtype: torch.dtype) -> Cost:
        matrices = torch.zeros(4, 4, dtype=dtype), torch.zeros(4, 4, dtype=dtype)
        return node_cost(node_of(exported(torch.mm, *matrices), aten.mm.default))

    assert cost(torch.float32) == Cost(flops=2 * 4 * 4 * 4, bytes=4 * 3 * 16)
    assert cost(torch.float16) == Cost(flops=2 * 4 * 4 * 4, bytes=2 * 3 * 16)


def test_a_list_of_operands_counts_as_read() -> None:
    graph = exported(lambda x, y: torch.cat([x, y]), torch.randn(2, 3), torch.randn(4, 3))
    assert node_cost(node_of(graph, aten.cat.default)) == Cost(flops=0, bytes=4 * 2 * 6 * 3)


def test_several_results_count_as_written() -> None:
    graph = exported(lambda x: x.split(2)[0], torch.randn(6, 3))
    assert node_cost(node_of(graph, aten.split.Tensor)) == Cost(flops=0, bytes=4 * 2 * 6 * 3)


@pytest.mark.parametrize("function", [torch.sin, torch.relu, lambda x: x + 1, lambda x: x.t()])
def test_pointwise_operators_and_views_have_no_flops(function: Callable[[Tensor], Tensor]) -> None:
    graph = exported(function, torch.randn(4, 4))
    assert total_cost(graph.nodes) == Cost(flops=0, bytes=4 * 2 * 16)


def test_what_computes_nothing_costs_nothing() -> None:
    graph = exported(torch.mm, torch.randn(4, 4), torch.randn(4, 4))
    for node in graph.nodes:
        assert node.op == "call_function" or node_cost(node) == Cost()


def test_without_metadata_nothing_is_claimed() -> None:
    graph = exported(torch.mm, torch.randn(4, 4), torch.randn(4, 4))
    node = node_of(graph, aten.mm.default)
    del node.meta["val"]
    assert node_cost(node) == Cost()


def test_functions_that_are_no_operators_have_no_flops() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(4, 4)
    node = graph.call_function(torch.mm, (x, x))
    node.meta["val"] = torch.zeros(4, 4)
    assert node_cost(node) == Cost(flops=0, bytes=4 * 2 * 16)


def test_an_operator_without_a_meta_kernel_has_no_flops() -> None:
    with torch.library._scoped_library("passes_test", "FRAGMENT") as library:
        library.define("opaque(Tensor x) -> Tensor")
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(3)
        node = graph.call_function(torch.ops.passes_test.opaque.default, (x,))
        node.meta["val"] = torch.zeros(3)
        assert node_cost(node) == Cost(flops=0, bytes=4 * 2 * 3)


def test_symbolic_sizes_count_as_in_the_example() -> None:
    tensors = torch.randn(6, 4), torch.randn(5, 4)
    fixed = exported(F.linear, *tensors)
    varying = exported(F.linear, *tensors, dynamic_shapes=(({0: Dim("rows")}, None),))
    node = node_of(varying, aten.linear.default)
    assert not isinstance(node.meta["val"].shape[0], int)
    assert tensor_sizes(node.meta["val"]) == (6, 5)
    assert node_cost(node) == node_cost(node_of(fixed, aten.linear.default))


def test_a_graph_costs_what_the_counter_sees_when_it_runs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.up(self.down(x))).flatten(2).transpose(1, 2)
            return self.linear(torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x)

    module, x = Block().eval(), torch.randn(2, 4, 6, 6)
    graph = torch.export.export(module, (x,), strict=False).graph
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(x)
    assert total_cost(graph.nodes).flops == counter.get_total_flops() > 0


def test_costs_add_up() -> None:
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
    assert total_cost([]) == Cost(0, 0)


def test_bytes_of_tensors_and_of_everything_else() -> None:
    assert tensor_bytes(torch.zeros(3, 5, dtype=torch.float16)) == 30
    assert tensor_bytes(torch.zeros(())) == 4
    assert [tensor_bytes(value) for value in (None, 3, "text", [torch.zeros(2)])] == [0, 0, 0, 0]


def test_other_threads_see_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting operators hooks no modules: all threads would run the hooks."""

    def hook(*_: Any, **__: Any) -> None:
        raise AssertionError("a global hook was registered")

    for name in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        monkeypatch.setattr(f"torch.utils.module_tracker.{name}", hook)
    _operator_flops.cache_clear()
    graph_module = torch.export.export(
        torch.nn.Linear(3, 5), (torch.randn(2, 3),), strict=False
    ).graph_module
    assert total_cost(graph_module.graph.nodes).flops == 2 * 2 * 3 * 5
