"""Weights of a class of their own that torch.export does not trace: GGUF's, bitsandbytes'.

While a network is traced, ordinary tensors stand in for them. Their layers read from them how they
are quantized, so the stand-ins get their attributes. What a class does besides, nobody sees: such
a graph is compared with the network itself once (see ``ObservedCapture``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dcompile.compat.tensors import give_attributes, loses_its_class

_HINTS = {
    "bitsandbytes.Int8Params": "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) "
    "makes weights without a path that depends on values",
}


class WeightAttributes:
    """What those weights of a network have besides their values."""

    def __init__(self, network: nn.Module) -> None:
        self._all: list[tuple[nn.Module, str, dict[str, Any]]] = [
            (submodule, name, dict(vars(weight)))
            for submodule, name, weight in _weights_without_class(network)
        ]

    def give(self) -> None:
        """Give it to what stands in for them, in the midst of a trace."""
        for submodule, name, attributes in self._all:
            give_attributes(getattr(submodule, name), attributes)


def _weights_without_class(network: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for submodule in network.modules():
        for table in (submodule._parameters, submodule._buffers):
            for name, weight in table.items():
                if weight is not None and loses_its_class(weight):
                    yield submodule, name, weight


def lost_class(network: nn.Module) -> str | None:
    """One of those classes, such as ``bitsandbytes.Params4bit``; None if there are none."""
    for _, _, weight in _weights_without_class(network):
        kind = type(weight)
        return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"
    return None


def remark_on(network: nn.Module) -> str:
    """For a message about a network that cannot be captured: perhaps it is for its weights."""
    kind = lost_class(network)
    if kind is None:
        return ""
    hint = _HINTS.get(kind)
    return f" (its weights are {kind}" + (f": {hint})" if hint else ")")
