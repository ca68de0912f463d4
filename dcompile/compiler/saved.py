"""A compiled program with the calls it serves, as it is saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec

from dcompile.compiler.guards import SizeGuard
from dcompile.compiler.program import Program


@dataclass(frozen=True, eq=False)
class SavedProgram:
    """A program and the calls it serves.

    Attributes:
        calls: the call signatures it was used for, as ``portable_signature`` writes them.
        in_spec: the tree structure of such a call.
        guard: if sizes may vary, the calls it serves in addition.
        program: its graphs.
    """

    calls: tuple[str, ...]
    in_spec: TreeSpec
    guard: SizeGuard | None
    program: Program

    def serves(self, call: str | None, spec: TreeSpec, leaves: Sequence[Any]) -> bool:
        """Whether a call can run it."""
        if call in self.calls:
            return True
        return self.guard is not None and spec == self.in_spec and self.guard.fits(leaves)
