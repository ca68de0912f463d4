"""Weights of a class of their own, as quantization makes them.

Some are made of several tensors, and torch.export traces what their class computes with those. In
the place of others (GGUF's, bitsandbytes') it puts ordinary tensors. Layers read from such weights
how they are quantized, so what stands in for them gets their attributes. What a class does besides
nobody sees, nor that a layer asks for the class of a tensor: a graph with any such weights is
compared with the network itself once (see ``ObservedCapture``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dcompile.compat.tensors import ORDINARY, give_attributes, loses_its_class

_MOST_NAMED = 3
_HINTS = {
    "bitsandbytes.Int8Params": "without outliers, BitsAndBytesConfig(load_in_8bit=True, "
    "llm_int8_threshold=0.0), they can be captured",
}


class WeightAttributes:
    """What the weights of a network that lose their class have besides their values."""

    def __init__(self, network: nn.Module) -> None:
        self._all: list[tuple[nn.Module, str, dict[str, Any]]] = [
            (submodule, name, dict(vars(weight)))
            for submodule, name, weight in _special_weights(network)
            if loses_its_class(weight)
        ]

    def give(self) -> None:
        """Give it to what stands in for them, in the midst of a trace."""
        for submodule, name, attributes in self._all:
            give_attributes(getattr(submodule, name), attributes)


def _special_weights(network: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for submodule in network.modules():
        for table in (submodule._parameters, submodule._buffers):
            for name, weight in table.items():
                if weight is not None and type(weight) not in ORDINARY:
                    yield submodule, name, weight


def special_classes(network: nn.Module) -> list[str]:
    """The classes of such weights, such as ``bitsandbytes.Params4bit``."""
    kinds = dict.fromkeys(type(weight) for *_, weight in _special_weights(network))
    return [f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}" for kind in kinds]


def remark_on(network: nn.Module) -> str:
    """For a message about a network that cannot be captured: perhaps it is for its weights."""
    names = special_classes(network)
    if not names:
        return ""
    hints = [f": {_HINTS[name]}" for name in names if name in _HINTS]
    return f" (its weights are {', '.join(names[:_MOST_NAMED])}{''.join(hints)})"
