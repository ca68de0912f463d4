"""What pipelines change of a network while they draw, to notice it at the next refresh."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ToggleSnapshot:
    """All switches (bools), scales (dicts of numbers) and names (strings, lists) in a module.

    To compare during a run: adapters keep their weights in such dicts, and which are merged or
    active in such lists.

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
            if _are_numbers(value) or _are_names(value)
        ]
        self._seen = self._now()

    def changed(self) -> bool:
        """Whether any is not what it was."""
        return self._now() != self._seen

    def _now(self) -> list[Any]:
        found = [where.get(name) for where, names in self._switches for name in names]
        for where, name in self._scales:
            value = where.get(name)
            found.append(value.copy() if isinstance(value, (dict, list)) else value)
        return found


def _are_names(value: Any) -> bool:
    """A string, or a list of strings, such as the adapters that are active or merged."""
    return type(value) is str or (type(value) is list and all(type(item) is str for item in value))


def _are_numbers(value: Any) -> bool:
    """A dict of nothing but numbers, such as the scales of an adapter layer."""
    return (
        type(value) is dict
        and bool(value)
        and all(type(item) in (int, float) for item in value.values())
    )


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
