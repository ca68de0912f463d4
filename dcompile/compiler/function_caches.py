"""``functools`` caches: what a trace puts into them is forgotten after it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable
from typing import Any

from dcompile.compiler.introspection import function_behind, is_library

_CACHED = functools._lru_cache_wrapper


class FunctionCaches:
    """The ``functools`` caches of all code but the libraries that tracing itself runs.

    What they hold cannot be looked at, and a tensor of a trace in one of them would come out of it
    for the rest of the process. Those in modules, in their classes, and those a snapshot came by:
    to ask the garbage collector for all objects would disturb threads that are building some.

    Args:
        reached: from ``Snapshot.caches``.
    """

    def __init__(self, reached: Iterable[Any]) -> None:
        found = {id(cached): cached for cached in reached}
        for module in list(sys.modules.values()):
            if not isinstance(module, types.ModuleType) or is_library(module.__name__):
                continue
            for member in list(vars(module).values()):
                members = [member]
                if isinstance(member, type) and member.__module__ == module.__name__:
                    members = list(vars(member).values())
                for one in map(function_behind, members):
                    if type(one) is _CACHED:
                        found[id(one)] = one
        self._misses = [(cached, cached.cache_info().misses) for cached in found.values()]

    def forget_new(self) -> None:
        """Clear those that something was added to; they fill again."""
        for cached, misses in self._misses:
            if cached.cache_info().misses != misses:
                cached.cache_clear()
