"""What the commands sample: a model, prompts, sizes and seeds."""

from __future__ import annotations

from dataclasses import dataclass

from dcompile import models

DEFAULT_COUNT = 8


@dataclass(frozen=True)
class DemoSettings:
    """A model, what it generates, and the cached runs to compare with the uncached one.

    Attributes:
        model: see ``dcompile.cli.loading.locate``.
        prompts: for text-to-image pipelines; pictures take them in turn. Without any, the model's
            default prompts, see ``dcompile.models.defaults``.
        steps: number of denoising steps.
        intervals: refresh intervals, one cached run for each.
        depth: the skip connection to cut at.
        backend: see ``cache_compile``.
        count: number of pictures, all in one batch; None for one per prompt if there are several
            prompts, else 8.
        size: height and width in pixels; None for the model's default.
        guidance: guidance scale; None for the model's default.
        seed: seed of the first picture; each further picture has the next one.
        repeat: runs of each kind, of which the fastest is reported.
        device: "auto", or any torch device.
    """

    model: str = models.DEFAULT
    prompts: tuple[str, ...] = ()
    steps: int = 50
    intervals: tuple[int, ...] = (3, 5)
    depth: int = 0
    backend: str = "eager"
    count: int | None = None
    size: int | None = None
    guidance: float | None = None
    seed: int = 0
    repeat: int = 1
    device: str = "auto"

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        if self.count is not None:
            return self.count
        return len(self.prompts) if len(self.prompts) > 1 else DEFAULT_COUNT
