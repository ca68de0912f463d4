"""Results come back in the form in which the network itself returns them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, picture, timesteps
from torch import Tensor
from torch.utils._pytree import tree_flatten

import dcompile

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x,
    "one": lambda x: (x,),
    "two": lambda x: (x, x + 1),
    "a list": lambda x: [x],
    "a list of one in a tuple": lambda x: ([x],),
    "a list of two and an empty one": lambda x: ([x, x + 1], []),
    "a tuple within a tuple": lambda x: ((x, x + 1),),
    "with nothing": lambda x: (x, None),
    "by name": lambda x: {"sample": x},
}


class Formed(Plain):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, sample: Any, timestep: Any) -> Any:  # type: ignore[override]
        return self.form(super().forward(sample, timestep)[0])


def made(form: str) -> Formed:
    torch.manual_seed(0)
    return Formed(FORMS[form]).eval()


@torch.no_grad()
def run(network: Any) -> list[Any]:
    return [network(picture(), t) for t in timesteps(3)]


@pytest.mark.parametrize("form", FORMS)
def test_results_keep_their_form(form: str, tmp_path: Path) -> None:
    expected = [tree_flatten(result)[1] for result in run(made(form))]
    network = made(form)
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    found = run(network)
    assert [tree_flatten(result)[1] for result in found] == expected
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (1, 2)
    dcompile.handle(network).save(tmp_path)
    loaded = dcompile.load(made(form), tmp_path, verbose=False)
    assert [tree_flatten(result)[1] for result in run(loaded)] == expected
