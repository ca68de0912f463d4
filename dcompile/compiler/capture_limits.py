"""How many captures of one network there may be for one thing that changes again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dcompile.compiler.signature import Signature, constants_that_differ
from dcompile.compiler.sizes import DynamicSizes
from dcompile.errors import CaptureError

# As many as Dynamo's recompile limit.
MAX_VALUES = 8
# Within one run, whatever they are for.
MAX_IN_RUN = 16

Key = tuple[int, Signature, DynamicSizes | None]
"""Of a capture: the number of the structure, the call's signature, the sizes that are left open."""


class CaptureLimits:
    """Refuses captures for one value after another.

    Args:
        name: of the network's class.

    Attributes:
        allowed: how many captures a run that has begun may still need; None if there is none.
    """

    def __init__(self, name: str) -> None:
        self.allowed: int | None = None
        self._name = name
        self._changes: Counter[str] = Counter()  # that led to captures within a run

    def forget(self) -> None:
        """Begin to count again."""
        self._changes.clear()

    def require_few_values(self, key: Key, captured: Iterable[Key]) -> None:
        """Refuse to capture for one value of a constant after another.

        Raises:
            CaptureError: there are ``MAX_VALUES`` captures for other values of an argument.
        """
        number, signature, dynamic = key
        places = [
            places
            for known, other, sizes in captured
            if (known, sizes) == (number, dynamic)
            and (places := constants_that_differ(other, signature))
        ]
        if len(places) >= MAX_VALUES:
            (place, _), *_ = Counter(place for found in places for place in found).most_common(1)
            names = signature[0].names
            name = names[place] if place < len(names) else f"argument {place}"
            raise CaptureError(
                f"{self._name} was captured for {len(places)} values of {name}, "
                "and each value is a graph of its own: with further ones it runs uncached. Pass it "
                "as a tensor, if the network can take one"
            )

    def require_few_changes(self, number: int, captured: Iterable[Key], change: str) -> None:
        """Refuse to capture at one step of a run after another.

        Args:
            number: of the network's structure.
            captured: what was captured so far.
            change: what the structure differs in from the one before.

        Raises:
            CaptureError: there are ``MAX_VALUES`` captures for other values of an attribute, or
                ``MAX_IN_RUN`` for other kinds of calls within one run.
        """
        if self.allowed is None:
            return
        if any(known == number for known, *_ in captured):
            if self.allowed <= 0:
                raise CaptureError(
                    f"{self._name} was captured {MAX_IN_RUN} times in one run, for arguments of "
                    "other sizes, structures or constants at each step: further ones run uncached. "
                    "Pad what grows, pass numbers as tensors, or try dynamic=True"
                )
            return
        self._changes[change] += 1
        if self._changes[change] > MAX_VALUES:
            raise CaptureError(
                f"{self._name} changed within its runs ({change}) and was captured for "
                f"{MAX_VALUES} states, each a graph of its own: in further ones it runs uncached. "
                "Pass what changes as an argument of the call"
            )


__all__ = ["MAX_IN_RUN", "MAX_VALUES", "CaptureLimits"]
