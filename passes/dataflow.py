"""What depends on what in a graph, and what of it depends on the sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from torch.fx import Graph, Node

from .base import PreconditionError, is_pure

# They read a tensor's size, dtype and device, and none of its values.
_READ_NO_VALUES = frozenset(
    {
        torch.ops.aten.empty_like,
        torch.ops.aten.full_like,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_full,
        torch.ops.aten.new_ones,
        torch.ops.aten.new_zeros,
        torch.ops.aten.ones_like,
        torch.ops.aten.sym_numel,
        torch.ops.aten.sym_size,
        torch.ops.aten.sym_stride,
        torch.ops.aten.zeros_like,
    }
)

# They give the first operand the size or dtype of the second.
_READ_FIRST_OPERAND = frozenset(
    {
        torch.ops.aten.expand_as,
        torch.ops.aten.reshape_as,
        torch.ops.aten.type_as,
        torch.ops.aten.view_as,
    }
)


class Dependencies:
    """Who depends on whom, as bit sets over node positions: one big integer per node."""

    def __init__(self, graph: Graph, samples: Collection[Node]) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.cones: list[int] = []
        self.on_sample = sum(1 << self.index[sample] for sample in set(samples))
        for position, node in enumerate(self.nodes):
            cone = 1 << position
            for operand in node.all_input_nodes:
                cone |= self.cones[self.index[operand]]
            self.cones.append(cone)
            if any(map(self.depends_on_sample, operands_read(node))):
                self.on_sample |= 1 << position

    def cone(self, node: Node) -> int:
        """The node and everything it depends on."""
        return self.cones[self.index[node]]

    def depends_on_sample(self, node: Node) -> bool:
        """Whether the sample's values, not just its sizes, have a say in the node's values."""
        return bool(self.on_sample >> self.index[node] & 1)

    def members(self, bits: int) -> list[Node]:
        """The nodes of a bit set, in order."""
        return [node for position, node in enumerate(self.nodes) if bits >> position & 1]


Sample: TypeAlias = str | Node | Sequence[str | Node] | None
"""Which placeholder is the noisy sample; several, where a network takes it as a list of tensors."""


def sample_placeholders(graph: Graph, sample: Sample) -> tuple[Node, ...]:
    """The placeholders of the noisy sample: one, or several of a network that takes a list.

    Args:
        sample: its name, or the node, or all of them; by default the first placeholder that is not
            a lifted parameter, buffer or constant.

    Raises:
        PreconditionError: there is no placeholder of that name, or it is of another graph.
    """
    if sample is None or isinstance(sample, (str, Node)):
        return (_sample_placeholder(graph, sample),)
    if not sample:
        raise PreconditionError("sample: expected at least one placeholder, got none")
    return tuple(_sample_placeholder(graph, one) for one in sample)


def _sample_placeholder(graph: Graph, sample: str | Node | None) -> Node:
    placeholders: list[Node] = graph.find_nodes(op="placeholder")
    if isinstance(sample, Node):
        if sample.graph is not graph:
            raise PreconditionError(f"node {sample.name} belongs to another graph")
        return sample
    if sample is None:
        # torch.export's names for what it lifts: parameters, buffers, constants, objects, tokens.
        lifted = ("p_", "b_", "c_", "obj_", "token")
        inputs = [node for node in placeholders if not str(node.target).startswith(lifted)]
        if inputs:
            return inputs[0]
        raise PreconditionError("the graph has no input that is not a lifted parameter")
    for node in placeholders:
        if sample in (node.target, node.name):
            return node
    names = ", ".join(str(node.target) for node in placeholders[-8:])
    raise PreconditionError(f"no placeholder is called {sample!r}; the last ones are: {names}")


def is_view(node: Node) -> bool:
    """Whether the result shares an operand's storage: kept, it would keep all of that."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def operands_read(node: Node) -> list[Node]:
    """The operands whose values matter to a node, and not their sizes alone."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.overloadpacket in _READ_NO_VALUES:
            return []
        if target.overloadpacket in _READ_FIRST_OPERAND:
            return [operand for operand in node.args[:1] if isinstance(operand, Node)]
    return node.all_input_nodes


def nodes_with_effects(graph: Graph) -> set[Node]:
    """Nodes that run whether anybody reads them or not."""
    return {node for node in graph.nodes if node.op != "placeholder" and not is_pure(node)}


def needed_nodes(
    graph: Graph,
    exposed: Collection[Node],
    replaced: Collection[Node],
    effects: Collection[Node] | None = None,
) -> set[Node]:
    """What ``exposed`` and the graph's outputs depend on; and what has side effects.

    Args:
        replaced: values that come from elsewhere: they and what only they depend on are left out,
            even if exposed.
        effects: ``nodes_with_effects``, if they are known.
    """
    needed = {*exposed, *(nodes_with_effects(graph) if effects is None else effects)}
    needed.difference_update(replaced)
    for node in reversed(graph.nodes):
        read = node.op == "output" or any(user in needed for user in node.users)
        if read and node not in replaced:
            needed.add(node)
    return needed
