"""Source text of the code that torch.fx generates. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

import linecache
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import graph_module

LIMIT = 8_000_000
"""Characters of source text that are kept, for the tracebacks of the latest graphs."""

_loader: Any = graph_module._loader
_lock = threading.Lock()
_kept: deque[str] = deque()


@contextmanager
def forgotten_later() -> Iterator[None]:
    """Whatever source text torch.fx keeps for the code it generates meanwhile goes in time.

    It keeps all of it for ever, 70 kB each time that a small U-Net's graph is changed, so that
    tracebacks can show lines. Here the oldest goes when there is more than ``LIMIT``.
    """
    before = {*_loader.eval_cache}
    try:
        yield
    finally:
        with _lock:
            _kept.extend(key for key in [*_loader.eval_cache] if key not in before)
            kept = dict.fromkeys(_kept)  # threads may have noted the same
            size = sum(len(_loader.eval_cache.get(key, "")) for key in kept)
            for key in kept:
                if size <= LIMIT:
                    break
                size -= len(_loader.eval_cache.pop(key, ""))
                linecache.cache.pop(key, None)
            _kept.clear()
            _kept.extend(key for key in kept if key in _loader.eval_cache)
