"""Which sizes one capture leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim
from torch.utils._pytree import TreeSpec, tree_unflatten

from dcompile.errors import CaptureError


@dataclass(frozen=True)
class DynamicSizes:
    """Which sizes of the sample one capture leaves open: each None, or (least, greatest).

    Sizes of the other inputs (prompt embeddings, residuals) vary along where they have to.

    Attributes:
        free: leave all of them open, within no range.
        batch: of the sample's first dimension.
        height, width: of its last two, in the sample's own units (latents, not pixels).

    Raises:
        CaptureError: a range is not two ascending positive ints.
    """

    free: bool = True
    batch: tuple[int, int] | None = None
    height: tuple[int, int] | None = None
    width: tuple[int, int] | None = None

    @staticmethod
    def of(dynamic: bool | Mapping[str, Sequence[int]]) -> DynamicSizes | None:
        """From what ``cache_compile`` takes. None for fixed sizes."""
        if isinstance(dynamic, bool):
            return DynamicSizes() if dynamic else None
        if not isinstance(dynamic, Mapping) or not dynamic:
            raise CaptureError(
                f"dynamic: expected True, False or sizes such as {_EXAMPLE_SIZES}, got {dynamic!r}"
            )
        ranges: dict[str, tuple[int, int]] = {}
        for name, bounds in dynamic.items():
            if name not in ("batch", "height", "width"):
                raise CaptureError(
                    f"dynamic: unknown size {name!r}; expected batch, height or width"
                )
            numbers = tuple(bounds) if isinstance(bounds, Sequence) else ()
            if (
                len(numbers) != 2
                or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers)
                or not 1 <= numbers[0] <= numbers[1]
            ):
                raise CaptureError(
                    f"dynamic: {name} must be (least, greatest), two ascending ints of at least "
                    f"1, got {bounds!r}"
                )
            ranges[name] = (numbers[0], numbers[1])
        return DynamicSizes(free=False, **ranges)

    def as_argument(self) -> bool | dict[str, tuple[int, int]]:
        """What ``of`` takes."""
        named = {"batch": self.batch, "height": self.height, "width": self.width}
        return True if self.free else {name: r for name, r in named.items() if r is not None}

    def ranges(self, leaf: int, dimensions: int) -> tuple[tuple[int, int, int, int], ...]:
        """(leaf, dimension, least, greatest) of a sample with this many dimensions."""
        places = ((0, self.batch), (dimensions - 2, self.height), (dimensions - 1, self.width))
        return tuple((leaf, place, *bounds) for place, bounds in places if bounds is not None)

    def covers(self, sample: torch.Tensor) -> bool:
        """Whether a sample's sizes lie within the ranges."""
        return all(
            low <= sample.shape[d] <= high for _, d, low, high in self.ranges(0, sample.dim())
        )

    def of_call(
        self, leaves: Sequence[Any], spec: TreeSpec, sample_leaf: int, bounded: bool
    ) -> Any:
        """``dynamic_shapes`` for ``torch.export``, with or without the ranges in it."""

        def sizes(leaf: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.dim():
                return None
            hints: dict[int, Any] = dict.fromkeys(range(value.dim()), Dim.AUTO)
            if leaf == sample_leaf and not self.free:
                hints = dict.fromkeys(hints, Dim.STATIC)
                for _, place, low, high in self.ranges(leaf, value.dim()):
                    # torch.export treats sizes 0 and 1 as constants, because they broadcast.
                    if value.shape[place] > 1:
                        hints[place] = Dim.AUTO(min=max(low, 2), max=high) if bounded else Dim.AUTO
            return hints

        return tree_unflatten([sizes(i, leaf) for i, leaf in enumerate(leaves)], spec)


_EXAMPLE_SIZES = '{"batch": (2, 8), "height": (64, 128), "width": (64, 128)}'
