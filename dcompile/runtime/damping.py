"""How far a damped forecast would have been right at the latest refreshes.

At each refresh, what the forecast would have added to the latest boundary is compared with what was
really added. The share of it that comes closest, in the sense of least squares over all features,
is the damping factor until the next refresh (see ``policy.forecast.Damped``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from dcompile.compiler.program import CacheLayout
from dcompile.policy.forecast import Damped, Forecast, coefficients_of
from dcompile.runtime.readback import Readback

# The factor is rounded to multiples of 1 / STEPS, so that few coefficient tensors are ever made.
STEPS = 32

Reading = AbstractContextManager[tuple[Any, ...]]
"""The cached values of a lane, to be read."""


class Residual(NamedTuple):
    """What a forecast says of one value of a boundary, before its refresh.

    Attributes:
        value: its number in the boundary.
        base: the latest refresh's, float32.
        added: what the forecast adds to it, float32.
    """

    value: int
    base: torch.Tensor
    added: torch.Tensor


@dataclass(eq=False)
class Damping:
    """Of one cut in one lane.

    Attributes:
        factor: 0 to 1, what the forecast's addition is multiplied with.
        pending: the next factor, while it is still on its way from a device.
        sums: the running sums of the least squares, shape (2,), on the features' device.
    """

    factor: float = 0.0
    pending: Readback | None = None
    sums: torch.Tensor | None = None

    def residuals_of(
        self,
        forecast: Forecast,
        reading: Reading,
        layout: CacheLayout,
        step: int,
        refreshed: Sequence[int],
    ) -> list[Residual]:
        """What a damped forecast says of the boundary that is about to be refreshed.

        Args:
            forecast: of the cut; nothing is compared for one that is not ``Damped``.
            reading: what is cached.
            layout: where the cut's values are in it.
            step: of the refresh.
            refreshed: earlier refresh steps, the latest first.
        """
        if not isinstance(forecast, Damped) or len(refreshed) < 2:
            return []
        factors = coefficients_of(forecast, step, refreshed)
        residuals = []
        with reading as cached:
            values = cached[layout.all]
            for index in range(layout.size):
                latest = values[index]
                if not isinstance(latest, torch.Tensor) or not latest.is_floating_point():
                    continue
                # A copy: recorded graphs write the new values over the old ones.
                base = latest.float().clone()
                added = (factors[0] - 1.0) * base
                for age, factor in enumerate(factors[1:], start=1):
                    if factor:
                        added = added + factor * values[age * layout.size + index].float()
                residuals.append(Residual(index, base, added))
        return residuals

    def update(self, reading: Reading, layout: CacheLayout, residuals: Sequence[Residual]) -> None:
        """Compare the forecast with the boundary that was computed."""
        with reading as cached:
            values = cached[layout.latest]
            right = sum(((values[r.value].float() - r.base) * r.added).sum() for r in residuals)
        size = sum(r.added.square().sum() for r in residuals)
        sums = torch.stack([cast(torch.Tensor, right), cast(torch.Tensor, size)])
        sums = sums.nan_to_num(0.0, 0.0, 0.0)  # an overflow says nothing, now and later
        if self.sums is not None:
            sums = sums + Damped.MEMORY * self.sums
        self.sums = sums
        share = (sums[0] / sums[1]).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
        latest = Readback(share)
        known, self.pending = (self.pending, latest) if latest.late else (latest, None)
        self.factor = round(float(known) * STEPS) / STEPS if known is not None else 0.0
