"""The random number generators that a call of a network may draw from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomStates:
    """The states of the random number generators that a call may draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._devices = (
            {i: torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
            if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            else {}
        )
        self._numpy = _numpy_state()

    def drawn_outside_of_torch(self) -> str | None:
        """Which random numbers have been drawn since that a graph cannot draw."""
        if random.getstate() != self._python:
            return "Python's random numbers"
        if self._numpy is not None and str(_numpy_state()) != str(self._numpy):
            return "NumPy's random numbers"
        return None

    def restore(self) -> None:
        """Draw the same numbers again."""
        drawn = self.drawn_outside_of_torch()  # other threads draw from them, too
        if drawn is not None:
            random.setstate(self._python)
            if self._numpy is not None:
                sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.cuda.set_rng_state(state, device)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
