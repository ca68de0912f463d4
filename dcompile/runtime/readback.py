"""Numbers that a device computes and the host decides by, without stalling the device."""

from __future__ import annotations

from typing import Any

import torch


class Readback:
    """One number on its way to the host.

    From a CUDA device it is copied to pinned memory behind the work that computes it; ``float()``
    waits for that copy only, not for what was launched since.

    Attributes:
        late: whether ``float()`` right away would have to wait for the device.
    """

    __slots__ = ("_arrived", "_value", "late")

    def __init__(self, value: torch.Tensor) -> None:
        self.late = value.device.type != "cpu"
        self._value = value.detach()
        self._arrived: Any = None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(value.device))

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)
