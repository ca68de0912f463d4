"""Canaries for what dcompile does about weights of classes of their own."""

from __future__ import annotations

from typing import Any

import torch
from scaled import Scaled
from torch import nn

from dcompile.compat import export, tensors


class Marked(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_inputs_for_the_parts_of_a_wrapper() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    network[0].weight = nn.Parameter(Scaled.of(network[0].weight), requires_grad=False)
    assert tensors.is_wrapper(network[0].weight)
    assert not tensors.loses_its_class(network[0].weight)
    with torch.no_grad():
        exported = torch.export.export(network, (torch.ones(1, 4),), strict=False)
    assert export.has_wrappers(exported), (
        "a traced wrapper is none any more: graphs of quantized networks would keep its operators"
    )
    exported = export.functionalized(exported)
    assert not export.has_wrappers(exported), "run_decompositions leaves wrappers in a graph now"
    names = {spec.target for spec in exported.graph_signature.input_specs}
    assert tensors.parts_by_name("0.", "weight", network[0].weight).keys() <= names, (
        f"torch.export gives other names to the parts of a wrapper: {sorted(map(str, names))}"
    )


def test_stand_ins_of_weights() -> None:
    seen = []

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Marked(torch.ones(2), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight: Any = self.weight
            seen.append(type(weight))
            tensors.give_attributes(weight, {"factor": 3})
            return x * weight.as_tensor() * weight.factor

    network = Reads()
    assert tensors.loses_its_class(network.weight)
    exported = torch.export.export(network, (torch.ones(2),), strict=False)
    assert not issubclass(seen[0], Marked), (
        "torch.export keeps the classes of weights now: no attributes need to be handed on"
    )
    assert torch.equal(exported.module()(torch.ones(2)), torch.full((2,), 3.0))
    assert not hasattr(network.weight, "factor"), "a stand-in is the weight itself now"


def test_a_weight_without_its_class() -> None:
    weight = Marked(torch.ones(2), requires_grad=False)
    plain = tensors.without_class(weight)
    assert type(plain) is torch.Tensor, "as_subclass keeps the class: graphs would compute with it"
    before = tensors.version_of(plain)
    weight.add_(1)
    assert torch.equal(plain, torch.full((2,), 2.0)), "as_subclass copies: writes would be missed"
    assert tensors.version_of(plain) != before
