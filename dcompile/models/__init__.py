"""Models that come with the package, as stock diffusers pipeline folders beside this file."""

from __future__ import annotations

from pathlib import Path

from dcompile.errors import ModelError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The bundled models, sorted."""
    return sorted(index.parent.name for index in _FOLDER.glob("*/model_index.json"))


def path(name: str) -> Path:
    """The folder of a bundled model, to be given to ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModelError: there is none of that name; lists those there are.
    """
    bundled = names()
    if name not in bundled:
        raise ModelError(f"no bundled model {name!r}; bundled are: {', '.join(bundled) or 'none'}")
    return _FOLDER / name


__all__ = ["names", "path"]
