"""What is to be generated: one job is one picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Caching(NamedTuple):
    """How a job is cached.

    Attributes:
        mode: "default", the schedule that the server was started with; "off"; "interval", refresh
            every ``value``-th step, as DeepCache does; "speedup", refreshes placed for ``value``
            times fewer FLOPs.
        value: see there; 0 otherwise.
    """

    mode: str = "default"
    value: float = 0.0


DEFAULT = Caching()


class Kind(NamedTuple):
    """Jobs of one kind may be one batch."""

    steps: int
    width: int
    height: int
    guidance: float | None
    sampler: str
    caching: Caching
    lora: str


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        prompt, negative_prompt: empty for an unconditional model.
        seed: of the initial noise, drawn on the CPU: the same on every device.
        steps: of the sampler.
        width, height: in pixels.
        guidance: guidance scale; None for the pipeline's default.
        sampler: class of a diffusers scheduler; empty for the pipeline's own.
        caching: see ``Caching``.
        lora: name of a set of LoRA weights that the server was started with; empty for none.
    """

    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    negative_prompt: str = ""
    guidance: float | None = None
    sampler: str = ""
    caching: Caching = DEFAULT
    lora: str = ""

    @property
    def kind(self) -> Kind:
        """What has to be equal for two jobs to share a batch."""
        return Kind(
            self.steps,
            self.width,
            self.height,
            self.guidance,
            self.sampler,
            self.caching,
            self.lora,
        )

    def with_seed(self, seed: int) -> Job:
        """The same with another seed."""
        return replace(self, seed=seed)


def split(count: int, batches: tuple[int, ...]) -> list[int]:
    """Sizes of batches that make ``count``, each one of ``batches``, the largest first.

    Args:
        count: jobs.
        batches: sizes that there are programs for; 1 is always possible.
    """
    sizes: list[int] = []
    for size in sorted({1, *batches}, reverse=True):
        sizes += [size] * (count // size)
        count %= size
    return sizes
