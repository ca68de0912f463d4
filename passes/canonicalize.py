"""Drop what ``torch.export`` adds to a graph and inference does not need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from .base import (
    GraphPass,
    PostconditionError,
    argument,
    is_assertion,
    is_inactive_dropout,
    is_pure,
    require_functional,
)


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Rewrite a functional inference graph in place, without changing one bit of its results.

    1. Assertions go: they return nothing, and the call signature already checks what they check.
    2. A dropout outside training, or with probability zero, is its input.
    3. A conversion to the dtype a tensor already has is that tensor: ``Tensor.to`` returns its
       own argument then. Left alone where metadata is missing, a copy is asked for, or the
       memory format may change.
    4. ``type_as`` is a conversion to a dtype, and reads nothing of the other tensor, which need not
       be computed for it. Left alone where metadata is missing or the devices differ.
    5. Constants of the call (``return_dict=False``) became placeholders nobody reads.
    6. What nobody reads is not computed. See ``is_pure`` for what that means for attention.
    """

    def requires(self, graph_module: GraphModule) -> None:
        require_functional(graph_module)

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if _is_type_as(node):
                _convert(node)
                modified = True
            if is_assertion(node):
                graph.erase_node(node)
            elif is_inactive_dropout(node) or _is_conversion_to_same_dtype(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            else:
                continue
            modified = True
        modified |= graph.eliminate_dead_code(lambda node: not is_pure(node))
        for node in graph.find_nodes(op="placeholder"):
            if _is_unused_constant(node):
                graph.erase_node(node)
                modified = True
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if is_assertion(node) or is_inactive_dropout(node):
                raise PostconditionError(f"{node.name} ({node.target}) is still in the graph")


def _is_conversion_to_same_dtype(node: Node) -> bool:
    if node.target is not torch.ops.aten.to.dtype or not isinstance(node.args[0], Node):
        return False
    value = node.args[0].meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == argument(node, "dtype")
        and not argument(node, "copy")
        and argument(node, "memory_format") is None
    )


def _is_type_as(node: Node) -> bool:
    if node.target is not torch.ops.aten.type_as.default:
        return False
    values = [operand.meta.get("val") for operand in node.args if isinstance(operand, Node)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return len(tensors) == 2 and tensors[0].device == tensors[1].device


def _convert(node: Node) -> None:
    """Make ``type_as`` a conversion to the dtype that the other tensor has."""
    tensor, other = node.args
    assert isinstance(other, Node)
    node.target = torch.ops.aten.to.dtype
    node.args = (tensor, other.meta["val"].dtype)


def _is_unused_constant(node: Node) -> bool:
    """Metadata must show that the placeholder stands for no tensor."""
    return not node.users and "val" in node.meta and not isinstance(node.meta["val"], torch.Tensor)
