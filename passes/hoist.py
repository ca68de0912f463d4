"""Compute once what does not change from step to step.

A denoiser reads its sample and its timestep at every step, and much else that stays: projections
of the text to keys and values, embeddings of sizes and classes. ``find_step_invariant`` finds such
values, ``prologue_of`` makes a graph that computes nothing else, and ``without_hoisted`` a graph
that takes them as inputs.

    values = mark_step_invariant(graph_module, ["sample", "timestep"])
    prologue = prologue_of(graph_module, values)
    rest = without_hoisted(graph_module)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .base import PreconditionError, is_pure, require_functional
from .cost import node_cost, tensor_bytes
from .dataflow import is_view

HOISTED = "hoisted"
"""Key in a node's metadata: which of the hoisted values it is, counted from the end (-1: last)."""


def find_step_invariant(graph_module: GraphModule, varying: Iterable[str]) -> tuple[Node, ...]:
    """The values to compute once for all steps, in the graph's order.

    1. None of them depends on an input that varies, not even on its size, nor on random numbers:
       the same operators on the same inputs give the same bits whenever they run.
    2. Each takes compute, a matrix product or a convolution, or comes from another device, which
       a GPU waits for and no CUDA graph may do: cheap operators on weights or inputs stay where
       they are, and compilers fuse them with what reads them.
    3. Each is read by something that does vary. A view, and a cheap result that is larger than what
       it is made of, is computed again from its operands, which are kept instead.

    Args:
        graph_module: a functional ATen graph with metadata; without, nothing is found.
        varying: names of the placeholders that differ from step to step.

    Raises:
        PreconditionError: the graph is not functional, or has no such placeholder.
    """
    require_functional(graph_module)
    graph = graph_module.graph
    varies = _varying(graph, set(varying))
    worthwhile: set[Node] = set()
    for node in graph.nodes:
        if node not in varies and (
            _takes_time(node) or any(operand in worthwhile for operand in node.all_input_nodes)
        ):
            worthwhile.add(node)
    found: set[Node] = set()
    for node in graph.nodes:
        read = any(user in varies and user.op != "output" for user in node.users)
        if node in worthwhile and read:
            found |= _smallest(node, worthwhile)
    return tuple(node for node in graph.nodes if node in found)


def mark_step_invariant(graph_module: GraphModule, varying: Iterable[str]) -> tuple[Node, ...]:
    """``find_step_invariant``, noted in the nodes' metadata, which copies of them keep."""
    values = find_step_invariant(graph_module, varying)
    for number, node in enumerate(values):
        node.meta[HOISTED] = number - len(values)
    return values


def prologue_of(graph_module: GraphModule, values: Sequence[Node]) -> GraphModule:
    """A graph that computes ``values`` and nothing else; the given one stays as it is.

    Placeholders keep their names; those nobody reads are left out.
    """
    needed = set(values)
    for node in reversed(graph_module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta.pop(HOISTED, None)
    graph.output(tuple(copies[value] for value in values))
    graph.lint()
    return GraphModule(graph_module, graph)


def without_hoisted(graph_module: GraphModule, trailing: int = 0) -> GraphModule:
    """Make the marked values of a graph inputs of it, in place.

    They come after all other placeholders but the last ``trailing``, and carry the mark. Those that
    the graph does not read are no inputs, and of the other placeholders those nobody reads any more
    are left out.
    """
    graph = graph_module.graph
    own = graph.find_nodes(op="placeholder")
    following = own[len(own) - trailing] if trailing else _first_after(own, graph)
    read_before = {node for node in own if node.users}
    for node in [node for node in graph.nodes if HOISTED in node.meta]:
        with graph.inserting_before(following):
            taken = graph.placeholder(f"hoisted_{-node.meta[HOISTED]}")
        taken.meta = {key: node.meta[key] for key in ("val", HOISTED) if key in node.meta}
        del node.meta[HOISTED]
        # What the network returns is its own, not something that is kept for the next step.
        node.replace_all_uses_with(taken, delete_user_cb=lambda user: user.op != "output")
        if not taken.users:
            graph.erase_node(taken)
    graph.eliminate_dead_code(lambda node: not is_pure(node))
    for node in own[: len(own) - trailing]:
        if node in read_before and not node.users:
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _first_after(placeholders: Sequence[Node], graph: Graph) -> Node:
    return placeholders[-1].next if placeholders else next(iter(graph.nodes))


def _varying(graph: Graph, names: set[str]) -> set[Node]:
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    unknown = names - placeholders.keys()
    if unknown:
        raise PreconditionError(f"no placeholder is called {', '.join(map(repr, sorted(unknown)))}")
    varies = {placeholders[name] for name in names}
    for node in graph.nodes:
        # What may draw random numbers is not pure.
        impure = node.op != "placeholder" and not is_pure(node)
        other = node.op not in ("placeholder", "get_attr", "call_function")
        if impure or other or any(operand in varies for operand in node.all_input_nodes):
            varies.add(node)
    return varies


def _takes_time(node: Node) -> bool:
    return node_cost(node).flops > 0 or _comes_from_elsewhere(node)


def _comes_from_elsewhere(node: Node) -> bool:
    """Whether it copies from another device. Operators take single numbers of a CPU as they are."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    operands = [operand.meta.get("val") for operand in node.all_input_nodes]
    return any(
        isinstance(operand, torch.Tensor)
        and operand.device != value.device
        and (operand.dim() > 0 or len(operands) == 1)
        for operand in operands
    )


def _is_view(node: Node) -> bool:
    return is_view(node.all_input_nodes[0] if node.target is operator.getitem else node)


def _smallest(node: Node, worthwhile: set[Node]) -> set[Node]:
    """The values to keep in the place of one, from which it follows cheaply."""
    operands = [operand for operand in node.all_input_nodes if operand in worthwhile]
    size = tensor_bytes(node.meta.get("val"))
    larger = size > sum(tensor_bytes(operand.meta.get("val")) for operand in operands)
    kept = isinstance(node.meta.get("val"), torch.Tensor)
    if kept and (_takes_time(node) or not operands or not (_is_view(node) or larger)):
        return {node}
    if not operands:  # no tensor: it stays where it is
        return set()
    return set().union(*(_smallest(operand, worthwhile) for operand in operands))
