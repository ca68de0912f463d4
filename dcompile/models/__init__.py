"""The bundled models: folders in the format of diffusers pipelines."""

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
    """Default arguments for a text-to-image model.

    Attributes:
        prompts: pictures take them in turn.
        guidance: guidance scale; None for the pipeline's default.
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
    """The folder of a bundled model, for ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModelError: there is no bundled model of that name; the message lists the names.
    """
    bundled = names()
    if name not in bundled:
        raise ModelError(f"no bundled model {name!r}; bundled are: {', '.join(bundled) or 'none'}")
    return _FOLDER / name


def defaults(model: str) -> Defaults:
    """Default arguments of a bundled model, by name or alias; those of any other are general."""
    return _DEFAULTS.get(ALIASES.get(model, model), Defaults())


__all__ = ["ALIASES", "DEFAULT", "Defaults", "defaults", "names", "path"]
