"""Conditions on sizes: parsed, never evaluated as Python."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import seam
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import picture, plain, timesteps
from torch import Tensor, nn
from torch.nn import functional as F

import dcompile
from dcompile.compiler.guards import GuardSyntaxError, SizeGuard, parse_condition

SIZES = st.integers(1, 40)


def holds(text: str, *shape: int) -> bool:
    return parse_condition(text)([torch.empty(shape)])


@given(SIZES, SIZES)
def test_arithmetic_and_comparisons(height: int, width: int) -> None:
    given = {"h": "L['t0'].size()[0]", "w": "L['t0'].size()[1]", "s": "L['t0'].stride()[0]"}
    for text in (
        "({h} % 4) == 0 and {w} != 7",
        "2 <= {h} <= {w} or not {h} < 3",
        "1 + (((-1) + {h}) // 2) >= {w}*{h} - 5",
        "{s} == {w}",
        "max({h}, {w}, 3) - min({h}, {w}) > abs({h} - {w})",
        "math.floor({h} / 3) == {w} // 2",
        "{h}**2 < 5*{w} if {w} > 2 else {h} == 1",
    ):
        tensor = torch.empty(height, width)
        expected = eval(  # the text is this test's own
            text.format(h=height, w=width, s=tensor.stride(0)), {"math": __import__("math")}
        )
        assert parse_condition(text.format(**given))([tensor]) == expected, text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "L['t0'].numpy()",
        "L['t0'].size().__class__",
        "L['t0'].size()[0].bit_length()",
        "L['x'].size()[0] == 1",
        "L[0].size()[0] == 1",
        "[1 for _ in L]",
        "(lambda: 1)()",
        "open('x')",
        "math.factorial(9)",
        "getattr(L, 'x')",
        "'a' == 'a'",
        "f'{L}'",
        "1 if L else 2",
        "x := 1",
        "1 in (1, 2)",
        "1 is 1",
        "max(*L)",
        "max(1, default=2)",
        "",
        "1 ==",
        "(" * 500 + "1" + ")" * 500,
        "-" * 100_000 + "1",
        "1 " * 150_000,
    ],
)
def test_all_else_is_refused(text: str) -> None:
    with pytest.raises(GuardSyntaxError):
        parse_condition(text)


def test_what_cannot_be_computed_does_not_hold() -> None:
    for text in ("1 // 0 == 1", "L['t0'].size()[5] == 1", "9**9**9 > 1", "10**999 > 1"):
        assert not holds(text, 2, 2)


class Picky(nn.Module):
    """Treats some sizes in another way than others."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        deep = F.interpolate(self.down(sample), size=sample.shape[-2:])
        batch, _, height, width = sample.shape
        if width > 5 and height % 4 == 0 and batch != 7 and width * height < 5000:
            return self.up(torch.cat([deep, sample], 1))
        return self.up(torch.cat([deep, sample], 1)) + 1


@pytest.fixture(scope="module")
def guard() -> SizeGuard:
    network = Picky().eval()
    dcompile.cache_compile(network, backend="eager", dynamic=True, verbose=False)
    found = seam.captured(network, picture(batch=2), timesteps()[0]).guard
    assert found is not None
    assert found.expression is not None
    return found


@settings(deadline=None)
@given(batch=st.integers(1, 16), height=st.integers(2, 80), width=st.integers(2, 80))
def test_agrees_with_torch(guard: SizeGuard, batch: int, height: int, width: int) -> None:
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    sample = torch.empty(batch, 3, height, width)
    known: dict[str, Any] = {"L": {"t0": sample, "t1": torch.tensor(1)}}
    assert guard.expression is not None
    expected = bool(eval(guard.expression, SYMPY_INTERP, known))  # what torch itself does
    assert parse_condition(guard.expression)([sample, torch.tensor(1)]) == expected
    assert guard.fits([sample, torch.tensor(1)]) == expected


def test_conditions_that_are_not_understood_mean_fixed_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SizeGuard, "understood", property(lambda self: False))
    network = dcompile.cache_compile(plain(), backend="eager", dynamic=True, verbose=False)
    assert seam.captured(network, picture(batch=2), timesteps()[0]).guard is None


def test_a_manifest_with_code_in_it_is_refused(guard: SizeGuard) -> None:
    harmful = dataclasses.replace(guard, expression="__import__('os').system('true') == 0")
    assert not harmful.understood
    with pytest.raises(GuardSyntaxError):
        harmful.fits([torch.empty(2, 3, 8, 8), torch.tensor(1)])
