"""Canonicalize removes what inference does not need, and not one thing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from dcompile.passes import Canonicalize, PostconditionError, PreconditionError

aten = torch.ops.aten


class Calls(nn.Module):
    """Any function of a tensor as a module, with one weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.function(x @ self.weight, **kwargs)


def export(function: Callable[..., Any], training: bool = False, **kwargs: Any) -> ExportedProgram:
    module = Calls(function).train(training)
    return torch.export.export(module, (torch.randn(3, 4),), kwargs, strict=False)


def canonical(exported: ExportedProgram) -> GraphModule:
    return Canonicalize()(exported.graph_module).graph_module


def targets(graph_module: GraphModule) -> list[str]:
    """What a graph calls besides the product with the weight."""
    return [
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op.startswith("call_") and node.target is not aten.matmul.default
    ]


def check_exact(exported: ExportedProgram) -> GraphModule:
    """Canonicalize and compare with the module itself; a second run must change nothing."""
    x = torch.randn(3, 4)
    expected = exported.module()(x)
    result = Canonicalize()(exported.graph_module)
    actual = result.graph_module(*exported.state_dict.values(), x)
    assert len(actual) == 1
    assert torch.equal(actual[0], expected)
    assert not Canonicalize()(result.graph_module).modified
    return result.graph_module


def test_assertions_go() -> None:
    exported = export(lambda x: x.to(torch.float64))
    assert "aten._assert_tensor_metadata.default" in targets(exported.graph_module)
    assert targets(canonical(exported)) == ["aten.to.dtype"]


def test_the_guards_of_an_exported_module_go() -> None:
    graph_module = export(torch.relu).module()
    assert targets(graph_module) == ["_guards_fn", "aten.relu.default"]
    x = torch.randn(3, 4)
    expected = graph_module(x)
    result = Canonicalize()(graph_module)
    assert result.modified
    assert targets(result.graph_module) == ["aten.relu.default"]
    assert torch.equal(result.graph_module(x), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, 0.0, training=True),
        lambda x: F.feature_alpha_dropout(x, 0.5, training=False),
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
    ],
)
def test_what_returns_its_input_goes(function: Callable[[Tensor], Tensor]) -> None:
    exported = export(lambda x: function(x).relu())
    assert targets(exported.graph_module) != ["aten.relu.default"]
    assert targets(check_exact(exported)) == ["aten.relu.default"]


def test_active_dropout_stays() -> None:
    exported = export(lambda x: F.dropout(x, 0.5), training=True)
    result = Canonicalize()(exported.graph_module)
    assert targets(result.graph_module) == ["aten.dropout.default"]
    assert not result.modified


def test_unread_active_dropout_stays_since_it_draws_numbers() -> None:
    def draws(x: Tensor) -> Tensor:
        F.dropout(x, 0.5)
        return x.relu()

    assert targets(canonical(export(draws, training=True))) == [
        "aten.dropout.default",
        "aten.relu.default",
    ]


def test_a_dropout_that_returns_a_mask_stays() -> None:
    def masked(x: Tensor) -> Tensor:
        kept, mask = torch.native_dropout(x, 0.0, True)
        return kept * mask

    assert "aten.native_dropout.default" in targets(check_exact(export(masked)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: x[None, None].to(torch.float32, memory_format=torch.channels_last),
    ],
)
def test_a_conversion_that_does_something_stays(function: Callable[[Tensor], Tensor]) -> None:
    assert "aten.to.dtype" in targets(check_exact(export(function)))


def test_a_conversion_without_metadata_stays() -> None:
    exported = export(lambda x: x.to(torch.float32))
    for node in exported.graph.nodes:
        node.meta.pop("val", None)
    assert targets(canonical(exported)) == ["aten.to.dtype"]


def test_a_chain_goes_as_a_whole() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.dropout(x.to(torch.float32), 0.1, training=False)
        return x.relu()

    assert targets(check_exact(export(chain))) == ["aten.relu.default"]


def test_there_and_back_again_stays() -> None:
    graph_module = check_exact(export(lambda x: x.to(torch.float16).to(torch.float32)))
    assert targets(graph_module) == ["aten.to.dtype", "aten.to.dtype"]


def test_every_user_is_served() -> None:
    def several(x: Tensor) -> Tensor:
        y = F.dropout(x, 0.1, training=False)
        return y.sin() * y + torch.stack([y, y]).sum(0)

    assert "aten.dropout.default" not in targets(check_exact(export(several)))


def test_the_output_itself_may_be_what_goes() -> None:
    exported = export(lambda x: x.to(torch.float32))
    assert targets(check_exact(exported)) == []


def test_unread_attention_goes_unless_it_draws_numbers() -> None:
    def unread(x: Tensor, p: float) -> Tensor:
        F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=p)
        return x.relu()

    assert targets(canonical(export(lambda x: unread(x, 0.0)))) == ["aten.relu.default"]
    drawing = targets(canonical(export(lambda x: unread(x, 0.1))))
    assert drawing.count("aten.unsqueeze.default") == 3  # nor does what it reads
    assert "aten.scaled_dot_product_attention.default" in drawing


def test_attention_that_is_read_stays() -> None:
    exported = export(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]))
    graph_module = check_exact(exported)
    assert "aten.scaled_dot_product_attention.default" in targets(graph_module)


def test_unread_compute_goes() -> None:
    def wasteful(x: Tensor) -> Tensor:
        (x.sin() + 1).exp()
        return x.relu()

    assert targets(check_exact(export(wasteful))) == ["aten.relu.default"]


def placeholders(graph_module: GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


def test_constants_of_the_call_go_and_unread_tensors_stay() -> None:
    exported = export(
        lambda x, flag, scale, unread: x * scale if flag else x,
        flag=True,
        scale=2.0,
        unread=torch.ones(1),
    )
    before = placeholders(exported.graph_module)
    assert before == ["p_weight", "x", "flag", "scale", "unread"]
    assert placeholders(canonical(exported)) == ["p_weight", "x", "unread"]


def test_an_unread_input_without_metadata_stays() -> None:
    exported = export(lambda x, flag: x.relu(), flag=True)
    for node in exported.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)
    assert placeholders(canonical(exported)) == ["p_weight", "x", "flag"]


def test_a_graph_that_writes_to_its_arguments_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"node mul_ calls aten\.mul_\.Tensor"):
        canonical(export(lambda x: x.sin().mul_(2)))
    exported = export(lambda x: x.sin().mul_(2)).run_decompositions({})
    assert targets(check_exact(exported)) == ["aten.sin.default", "aten.mul.Tensor"]


def test_a_promise_that_is_not_kept_is_noticed() -> None:
    @dataclass(frozen=True)
    class Lazy(Canonicalize):
        def call(self, graph_module: GraphModule) -> PassResult:
            return PassResult(graph_module, modified=False)

    with pytest.raises(PostconditionError, match="still in the graph"):
        Lazy()(export(lambda x: F.dropout(x, 0.5, training=False)).graph_module)


def test_an_empty_graph_is_left_alone() -> None:
    graph = Graph()
    graph.output((graph.placeholder("x"),))
    result = Canonicalize()(GraphModule(nn.Module(), graph))
    assert not result.modified
    assert torch.equal(result.graph_module(torch.ones(2))[0], torch.ones(2))


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "same dtype": lambda x: x.to(x.dtype),
    "copy": lambda x: x.to(x.dtype, copy=True),
    "double": lambda x: x.to(torch.float64),
    "single": lambda x: x.to(torch.float32),
    "sine": torch.sin,
    "twice": lambda x: x + x,
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "unread attention": lambda x: (F.scaled_dot_product_attention(x[None], x[None], x[None]), x)[1],
}


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=6))
def test_any_chain_is_exact_and_done_after_one_run(names: list[str]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name in names:
            x = OPERATIONS[name](x)
        return x.cos()

    graph_module = check_exact(export(chain))
    assert "aten.dropout.default" not in targets(graph_module)
    assert targets(graph_module).count("aten.scaled_dot_product_attention.default") == names.count(
        "attention"
    )


def test_type_as_reads_nothing_of_the_other_tensor() -> None:
    class TypeAs(nn.Module):
        def forward(self, sample: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return sample.type_as(other.half()), sample.type_as(other.exp()) + 1

    args = torch.randn(3), torch.randn(3)
    graph_module = torch.export.export(TypeAs(), args).graph_module
    assert Canonicalize()(graph_module).modified
    targets = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.to.dtype, torch.ops.aten.add.Tensor]
    assert all(map(torch.equal, graph_module(*args), TypeAs()(*args)))
    assert not Canonicalize()(graph_module).modified


def test_type_as_without_metadata_is_left_alone() -> None:
    graph = torch.fx.Graph()
    one, other = graph.placeholder("one"), graph.placeholder("other")
    graph.output((graph.call_function(torch.ops.aten.type_as.default, (one, other)),))
    assert not Canonicalize()(torch.fx.GraphModule(nn.Module(), graph)).modified
