"""What is the same at every step of a run, computed when it is first needed.

Identity and version of the prologue's inputs decide whether it has to run again, never their
values: prompts that are edited between steps, in place or not, guidance that halves its batch, and
tensors that a pipeline makes at each step are all noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dcompile.compat.tensors import version_of
from dcompile.compiler.lazy import LazyTensor
from dcompile.compiler.program import Bound


class Hoisted:
    """Results of a program's prologue for one lane, which owns them.

    Args:
        prologue: with the module's weights.
        leaves: of a call.

    Attributes:
        tensors: the results.
    """

    __slots__ = ("_prologue", "_sources", "_versions", "tensors")

    def __init__(self, prologue: Bound, leaves: Sequence[Any]) -> None:
        self._prologue = prologue
        self._sources = [(i, *_source(leaves[i])) for i in prologue.inputs]
        self._versions = _versions(prologue)
        self.tensors: tuple[torch.Tensor, ...] = tuple(prologue(leaves))

    def holds(self, prologue: Bound, leaves: Sequence[Any], *, thoroughly: bool) -> bool:
        """Whether the prologue would certainly compute the same for another call.

        Args:
            thoroughly: look at the weights, too.
        """
        if prologue is not self._prologue:
            return False
        for place, source, state in self._sources:
            leaf = leaves[place]
            if leaf is not source() or state is None or _state(leaf) != state:
                return False
        return not thoroughly or (
            None not in self._versions and _versions(prologue) == self._versions
        )


def followed_by_hoisted(
    leaves: Sequence[Any], prologue: Bound | None, known: Hoisted | None, *, thoroughly: bool
) -> tuple[Sequence[Any], Hoisted | None]:
    """A call's leaves as a program's graphs read them, and what to keep for the next call.

    Args:
        leaves: of the call.
        prologue: of the bound program; None if it has none.
        known: from an earlier call of the same lane.
        thoroughly: see ``Hoisted.holds``.
    """
    if prologue is None:
        return leaves, None
    if known is None or not known.holds(prologue, leaves, thoroughly=thoroughly):
        known = Hoisted(prologue, leaves)
    return [*leaves, *known.tensors], known


def _source(leaf: Any) -> tuple[Callable[[], Any], Any]:
    if isinstance(leaf, torch.Tensor):
        return weakref.ref(leaf), _state(leaf)
    return lambda: leaf, ()


def _state(leaf: Any) -> Any:
    """Changes with a tensor's values; None if that cannot be known."""
    if not isinstance(leaf, torch.Tensor):
        return ()
    version = None if type(leaf) is LazyTensor else version_of(leaf)
    return None if version is None else (version, leaf.data_ptr())


def _versions(prologue: Bound) -> list[int | None]:
    return [version_of(weight) for weight in prologue.weights]
