"""Where things are kept for other processes."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "DCOMPILE_CACHE_DIR"


def cache_folder() -> Path | None:
    """``$DCOMPILE_CACHE_DIR``, else ``dcompile`` in the user's cache folder; None if empty."""
    asked = os.environ.get(_VARIABLE)
    if asked is not None:
        return Path(asked).expanduser() if asked.strip() else None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "dcompile"
