"""What exported graphs call their inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec

from dcompile.compiler.capture import CapturedNetwork


class Names(NamedTuple):
    """What the graphs call their inputs and outputs.

    Attributes:
        inputs: placeholder -> name; the path of the argument, as in
            ``added_cond_kwargs.text_embeds``.
        results: one for each value that the network returns: ``out_0``, or ``out_sample`` where
            it returns named fields.
        boundary: the full graph's further outputs, and the shallow graph's further inputs.
        sample: the name of the noisy sample.
        hoisted: the prologue's outputs, and further inputs of the other graphs.
    """

    inputs: dict[str, str]
    results: tuple[str, ...]
    boundary: tuple[str, ...]
    sample: str
    hoisted: tuple[str, ...]

    @staticmethod
    def of(
        network: CapturedNetwork,
        forward: Callable[..., Any],
        boundary: int,
        hoisted: int,
        weights: Mapping[str, torch.Tensor],
    ) -> Names:
        taken = set(weights)  # a graph's values are one name space

        def unique(name: str) -> str:
            free = name
            while free in taken:
                free += "_"
            taken.add(free)
            return free

        leaves = _argument_names(forward, network.in_spec)
        inputs = {name: unique(leaves[leaf]) for name, leaf in network.inputs.items()}
        paths = list(_paths(network.out_spec))
        results = [unique(f"out_{'.'.join(path) or 0}") for path in paths]
        return Names(
            inputs,
            tuple(results),
            tuple(unique(f"boundary_{i}") for i in range(boundary)),
            inputs[network.sample],
            tuple(unique(f"hoisted_{i}") for i in range(hoisted)),
        )


def _argument_names(forward: Callable[..., Any], spec: TreeSpec) -> list[str]:
    """A dotted path for each leaf of a call, from the parameters of ``forward``."""
    parameters = list(inspect.signature(forward).parameters.values())
    named = []
    for top, position, *path in _paths(spec):
        first = [position]
        if top == "0":  # args, not kwargs
            index = int(position)
            parameter = parameters[min(index, len(parameters) - 1)]
            first = [parameter.name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                first.append(str(index - parameters.index(parameter)))
        named.append(".".join([*first, *path]))
    return named


def _paths(spec: TreeSpec) -> Iterator[tuple[str, ...]]:
    """The keys and indices that lead to each leaf."""
    if spec.is_leaf():
        yield ()
        return
    keys = spec.context
    if spec.type is not None and hasattr(keys, "_fields"):  # a named tuple's class
        keys = keys._fields
    if not isinstance(keys, (list, tuple)) or len(keys) != spec.num_children:
        keys = range(spec.num_children)
    for key, child in zip(keys, spec.children(), strict=True):
        for path in _paths(child):
            yield (str(key), *path)
