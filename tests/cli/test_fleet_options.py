"""Options of dcompile build and dcompile serve."""

import pytest

from dcompile.cli import fleet
from dcompile.errors import DcompileError


def test_sizes() -> None:
    assert fleet._sizes("512, 768x512,512x512") == ((512, 512), (768, 512))
    assert fleet._sizes("") == ()
    for text in ("0", "0x64", "64x0", "64x", "x64", "²", "64x²", "-8", "a"):
        with pytest.raises(DcompileError, match="sizes: expected 512 or 768x512"):
            fleet._sizes(text)


def test_numbers() -> None:
    assert fleet._numbers("steps", "20, 30,20") == (20, 30)
    for text in ("", "0", "²", "2,", "-1"):
        with pytest.raises(DcompileError, match="steps: expected positive numbers"):
            fleet._numbers("steps", text)
    for text in ("1", "²:8", "1:", ":8"):
        with pytest.raises(DcompileError, match="autoscale: expected"):
            fleet._range(text)
