"""Models that come with the package, as stock diffusers pipeline folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcompile.errors import ModelError

_FOLDER = Path(__file__).parent

ALIASES = {"ddpm": "ddpm-emoji", "sd": "emoji-sd"}
"""Short names for bundled models."""

DEFAULT = "emoji-sd"
"""The demo's model."""


@dataclass(frozen=True)
class Defaults:
    """What to draw with a text-to-image model where a user does not say.

    Attributes:
        prompts: pictures take them in turn.
        guidance: guidance scale; None is the pipeline's own.
    """

    prompts: tuple[str, ...] = ("a photograph of an astronaut riding a horse",)
    guidance: float | None = None


_DEFAULTS = {
    "emoji-sd": Defaults(
        prompts=(
            "red apple",
            "grinning face",
            "blue heart",
            "dog",
            "pizza",
            "rocket",
            "cactus",
            "snowman",
        ),
        guidance=5.0,
    )
}


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


def defaults(model: str) -> Defaults:
    """What suits a model, by its bundled name or alias; any other has the general defaults."""
    return _DEFAULTS.get(ALIASES.get(model, model), Defaults())


__all__ = ["ALIASES", "DEFAULT", "Defaults", "defaults", "names", "path"]
