"""The pass contract, ``requires -> call -> ensures``, and what passes ask of and add to graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult


class PassError(RuntimeError):
    """A pass could not do its work."""


class PreconditionError(PassError):
    """The graph a pass was given is not of the form the pass needs."""


class PostconditionError(PassError):
    """The graph a pass made is not of the form it promises: a bug in the pass."""


class GraphPass(PassBase):
    """A pass over one graph.

    ``torch.fx``'s own ``PassBase`` runs ``ensures`` on the graph it was *given*, which says
    nothing of a pass that returns a new one. Here ``ensures`` looks at the result, and the
    result is linted.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        self.requires(graph_module)
        result = self.call(graph_module)
        if result is None:
            raise PassError(f"{type(self).__name__} returned no result")
        result.graph_module.graph.lint()
        self.ensures(result.graph_module)
        return result


def argument(node: Node, name: str) -> Any:
    """The value ``node`` passes for an operator's argument ``name``, or the schema's default.

    Raises:
        KeyError: the operator has no such argument.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            if not declared.kwarg_only and position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(name)


def has_argument(node: Node, name: str) -> bool:
    """Whether ``node`` calls an operator whose schema declares an argument ``name``."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        declared.name == name for declared in node.target._schema.arguments
    )


def is_mutating(node: Node) -> bool:
    """Whether ``node`` calls an operator that writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_inactive_dropout(node: Node) -> bool:
    """Whether ``node`` is a dropout (``input, p, train``) that returns its input.

    ``native_dropout`` is not one: it returns a mask as well.
    """
    if not (has_argument(node, "p") and has_argument(node, "train")):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    if len(node.target._schema.returns) != 1:
        return False
    return argument(node, "train") is False or argument(node, "p") == 0.0


def is_random(node: Node) -> bool:
    """Whether ``node`` drops values at random: a dropout in training mode."""
    if has_argument(node, "dropout_p"):
        return bool(argument(node, "dropout_p") != 0.0)
    return has_argument(node, "p") and has_argument(node, "train") and not is_inactive_dropout(node)


def is_assertion(node: Node) -> bool:
    """Whether ``node`` only checks something: it returns nothing and changes nothing."""
    if node.op == "call_module":  # torch.export's guards, when taken from ExportedProgram.module()
        return node.target == "_guards_fn" and not node.users
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.returns
        and not node.target._schema.is_mutable
    )


def is_pure(node: Node) -> bool:
    """Whether an unused ``node`` may be removed from an inference graph.

    FX's own rule keeps every operator that *may* draw random numbers, and so a network's deep
    half alive through its attention, which draws them only with a positive ``dropout_p``.
    """
    if node.op in ("placeholder", "output"):
        return False
    if has_argument(node, "dropout_p"):
        return bool(argument(node, "dropout_p") == 0.0)
    return is_inactive_dropout(node) or not node.is_impure()


def require_functional(graph_module: GraphModule) -> None:
    """Raise PreconditionError if some operator of the graph writes to its arguments."""
    for node in graph_module.graph.nodes:
        if is_mutating(node):
            raise PreconditionError(
                f"expected a functional graph, but node {node.name} calls {node.target}, which "
                "writes to its argument; functionalize it first "
                "(ExportedProgram.run_decompositions({}))"
            )


def call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Append a call, with metadata from its operands'."""
    node = graph.call_function(target, args, kwargs)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    node.meta["val"] = target(*values, **kwargs)
    return node


def placeholder(graph: Graph, name: str, value: Any) -> Node:
    """Append a placeholder with metadata."""
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def is_floating(value: Any) -> bool:
    """Whether a node's metadata is that of a floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
