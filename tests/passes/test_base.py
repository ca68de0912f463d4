"""The pass contract, and what passes ask of a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.fx.passes.infra.pass_base import PassResult

from dcompile.passes import GraphPass, PassError, PostconditionError, PreconditionError
from dcompile.passes.base import (
    argument,
    has_argument,
    is_assertion,
    is_inactive_dropout,
    is_mutating,
    is_pure,
    require_functional,
)

aten = torch.ops.aten


def one_operator(target: Any, *args: Any, **kwargs: Any) -> GraphModule:
    """A graph of two placeholders and one call; "x" and "y" among its arguments are those."""
    graph = Graph()
    named = {name: graph.placeholder(name) for name in ("x", "y")}
    named_args = map_aggregate(args, lambda value: named.get(value, value))
    graph.output(graph.call_function(target, named_args, kwargs))
    return GraphModule(torch.nn.Module(), graph)


def call_node(target: Any, *args: Any, **kwargs: Any) -> Node:
    return next(
        node
        for node in one_operator(target, *args, **kwargs).graph.nodes
        if node.op == "call_function"
    )


@dataclass(frozen=True)
class Recorder(GraphPass):
    """Replaces its input by another graph, and notes what it was asked to do."""

    result: GraphModule | None
    seen: list[tuple[str, GraphModule]] = field(default_factory=list)

    def requires(self, graph_module: GraphModule) -> None:
        self.seen.append(("requires", graph_module))

    def call(self, graph_module: GraphModule) -> PassResult | None:
        self.seen.append(("call", graph_module))
        return None if self.result is None else PassResult(self.result, modified=True)

    def ensures(self, graph_module: GraphModule) -> None:
        self.seen.append(("ensures", graph_module))


def test_ensures_looks_at_the_result() -> None:
    given, made = one_operator(aten.relu.default, "x"), one_operator(aten.neg.default, "x")
    recorder = Recorder(made)
    result = recorder(given)
    assert recorder.seen == [("requires", given), ("call", given), ("ensures", made)]
    assert result.graph_module is made
    assert result.modified


def test_a_bad_result_is_refused_though_the_input_was_good() -> None:
    class Promise(Recorder):
        def ensures(self, graph_module: GraphModule) -> None:
            if graph_module.graph.find_nodes(op="call_function", target=aten.neg.default):
                raise PostconditionError("a negation is still in the graph")

    given, made = one_operator(aten.relu.default, "x"), one_operator(aten.neg.default, "x")
    with pytest.raises(PostconditionError, match="negation is still"):
        Promise(made)(given)
    assert Promise(given)(made).graph_module is given


def test_a_failed_precondition_stops_the_pass() -> None:
    class Picky(Recorder):
        def requires(self, graph_module: GraphModule) -> None:
            raise PreconditionError("not this one")

    picky = Picky(one_operator(aten.relu.default, "x"))
    with pytest.raises(PreconditionError, match="not this one"):
        picky(one_operator(aten.neg.default, "x"))
    assert picky.seen == []


def test_no_result_names_the_pass() -> None:
    with pytest.raises(PassError, match="Recorder returned no result"):
        Recorder(None)(one_operator(aten.relu.default, "x"))


def test_the_result_is_linted() -> None:
    broken = one_operator(aten.add.Tensor, "x", "y")
    add = next(node for node in broken.graph.nodes if node.op == "call_function")
    add.append(add.all_input_nodes[0])  # an operand after its user
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        Recorder(broken)(one_operator(aten.relu.default, "x"))


def test_errors_are_one_tree() -> None:
    assert issubclass(PreconditionError, PassError)
    assert issubclass(PostconditionError, PassError)
    assert issubclass(PassError, RuntimeError)


@pytest.mark.parametrize(
    ("node", "name", "expected"),
    [
        (call_node(aten.dropout.default, "x", 0.5, True), "p", 0.5),
        (call_node(aten.dropout.default, "x", p=0.5, train=True), "p", 0.5),
        (call_node(aten.to.dtype, "x", torch.float16), "copy", False),  # the schema's default
        (call_node(aten.to.dtype, "x", torch.float16, False, True), "copy", True),
        (call_node(aten.to.dtype, "x", torch.float16, copy=True), "copy", True),
        (call_node(aten.scaled_dot_product_attention.default, "x", "x", "y"), "dropout_p", 0.0),
        (call_node(aten.add.Tensor, "x", "y", alpha=3), "alpha", 3),  # keyword only
        (call_node(aten.add.Tensor, "x", "y"), "alpha", 1),
    ],
)
def test_argument_by_position_by_keyword_and_by_default(
    node: Node, name: str, expected: object
) -> None:
    assert has_argument(node, name)
    assert argument(node, name) == expected


def test_argument_the_operator_does_not_have() -> None:
    node = call_node(aten.relu.default, "x")
    assert not has_argument(node, "dropout_p")
    with pytest.raises(KeyError, match="dropout_p"):
        argument(node, "dropout_p")


def test_only_operators_have_arguments() -> None:
    graph_module = one_operator(torch.relu, "x")
    for node in graph_module.graph.nodes:
        assert not has_argument(node, "self")
        assert not is_mutating(node)
        assert not is_inactive_dropout(node)
        assert not is_assertion(node)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call_node(aten.dropout.default, "x", 0.5, False), True),
        (call_node(aten.dropout.default, "x", 0.0, True), True),
        (call_node(aten.dropout.default, "x", p=0.5, train=False), True),
        (call_node(aten.feature_dropout.default, "x", 0.5, False), True),
        (call_node(aten.dropout.default, "x", 0.5, True), False),
        (call_node(aten.native_dropout.default, "x", 0.0, True), False),  # returns a mask, too
        (call_node(aten.bernoulli.p, "x", 0.0), False),  # has a p, but is no dropout
        (call_node(aten.relu.default, "x"), False),
    ],
)
def test_inactive_dropout(node: Node, expected: bool) -> None:
    assert is_inactive_dropout(node) is expected


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call_node(aten.relu.default, "x"), True),
        (call_node(aten.dropout.default, "x", 0.5, False), True),
        (call_node(aten.dropout.default, "x", 0.5, True), False),
        (call_node(aten.rand_like.default, "x"), False),
        (call_node(aten.relu_.default, "x"), False),
        (call_node(aten.scaled_dot_product_attention.default, "x", "x", "y"), True),
        (call_node(aten.scaled_dot_product_attention.default, "x", "x", "y", None, 0.0), True),
        (call_node(aten.scaled_dot_product_attention.default, "x", "x", "y", None, 0.1), False),
        (call_node(aten.scaled_dot_product_attention.default, "x", "y", "y", dropout_p=0.1), False),
    ],
)
def test_pure_is_what_may_go_unread(node: Node, expected: bool) -> None:
    assert is_pure(node) is expected


def test_inputs_and_output_are_never_removed() -> None:
    nodes = list(one_operator(aten.relu.default, "x").graph.nodes)
    assert [node.name for node in nodes if is_pure(node)] == ["relu_default"]


def test_assertions_of_exported_graphs() -> None:
    class Converts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32)

    exported = torch.export.export(Converts(), (torch.randn(2),))
    of_lifted = [str(node.target) for node in exported.graph.nodes if is_assertion(node)]
    of_module = [str(node.target) for node in exported.module().graph.nodes if is_assertion(node)]
    assert of_lifted == ["aten._assert_tensor_metadata.default"]
    assert of_module == ["_guards_fn", "aten._assert_tensor_metadata.default"]


def test_what_changes_something_is_no_assertion() -> None:
    assert not is_assertion(call_node(aten.relu_.default, "x"))
    assert not is_assertion(call_node(aten._foreach_add_.Scalar, ("x",), 1.0))  # returns nothing


def test_functional_graphs_pass() -> None:
    require_functional(one_operator(aten.add.Tensor, "x", "y"))


def test_mutation_is_named_with_a_way_out() -> None:
    with pytest.raises(PreconditionError) as error:
        require_functional(one_operator(aten.add_.Tensor, "x", "y"))
    assert "node add__tensor calls aten.add_.Tensor" in str(error.value)
    assert "run_decompositions" in str(error.value)
