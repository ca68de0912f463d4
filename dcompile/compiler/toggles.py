"""What pipelines change of a network while they draw, to notice it at the next refresh."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ToggleSnapshot:
    """All switches (attributes that are bools) and scales (dicts of numbers) in a module.

    To compare during a run: adapters keep their weights in such dicts.

    Some pipelines turn parts of a network off while they draw, or change an adapter's weight.
    Comparing the whole structure takes too long for that.
    """

    def __init__(self, module: nn.Module) -> None:
        switches = [
            (
                submodule.__dict__,
                [name for name, v in submodule.__dict__.items() if v is True or v is False],
            )
            for submodule in module.modules()
        ]
        self._switches = [(where, names) for where, names in switches if names]
        self._scales = [
            (submodule.__dict__, name)
            for submodule in module.modules()
            for name, value in submodule.__dict__.items()
            if _are_numbers(value)
        ]
        self._seen = self._now()

    def changed(self) -> bool:
        """Whether any is not what it was."""
        return self._now() != self._seen

    def _now(self) -> list[Any]:
        found = [where.get(name) for where, names in self._switches for name in names]
        for where, name in self._scales:
            value = where.get(name)
            found.append(dict(value) if isinstance(value, dict) else value)
        return found


def _are_numbers(value: Any) -> bool:
    """A dict of nothing but numbers, such as the scales of an adapter layer."""
    return (
        type(value) is dict
        and bool(value)
        and all(type(item) in (int, float) for item in value.values())
    )


class WeightIdentities:
    """A module's parameters, to notice that others were put in their places.

    ``torch.func.functional_call`` does so for the time of one call. Held weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._all = [
            (submodule._parameters, name, weakref.ref(parameter))
            for submodule in module.modules()
            for name, parameter in submodule._parameters.items()
            if parameter is not None
        ]
        self._some = self._all[-1:]  # a reuse step reads it too: it is in the processor's cache

    def changed(self, thoroughly: bool) -> bool:
        """Whether any is another object now; of the last one only, unless ``thoroughly``."""
        for table, name, reference in self._all if thoroughly else self._some:
            if table.get(name) is not reference():
                return True
        return False
