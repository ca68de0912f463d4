"""Whether others were put in the places of a module's parameters, for the time of a call."""

from __future__ import annotations

import weakref

from torch import nn


class WeightIdentities:
    """A module's parameters, buffers and submodules, to notice that others are in their places.

    ``torch.func.functional_call`` does so for the time of one call. Held weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._all = [
            (table, name, weakref.ref(value))
            for submodule in module.modules()
            for table in (submodule._modules, submodule._buffers, submodule._parameters)
            for name, value in table.items()
            if value is not None
        ]
        self._some = self._all[-1:]  # a reuse step reads it too: it is in the processor's cache

    def changed(self, thoroughly: bool) -> bool:
        """Whether any is another object now; of the last one only, unless ``thoroughly``."""
        for table, name, reference in self._all if thoroughly else self._some:
            if table.get(name) is not reference():
                return True
        return False
