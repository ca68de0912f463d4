"""What the commands sample: a model, prompts, sizes and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcompile import models
from dcompile.errors import DcompileError

DEFAULT_COUNT = 8


@dataclass(frozen=True)
class SampleSettings:
    """A model and what it generates.

    Attributes:
        model: see ``dcompile.models.loading.locate``.
        prompts: for text-to-image pipelines; pictures take them in turn. Without any, the model's
            default prompts, see ``dcompile.models.defaults``.
        steps: number of denoising steps.
        count: number of pictures, all in one batch; None for one per prompt if there are several
            prompts, else 8.
        size: height and width in pixels; None for the model's default.
        guidance: guidance scale; None for the model's default.
        seed: seed of the first picture; each further picture has the next one.
        device: "auto", or any torch device.
    """

    model: str = models.DEFAULT
    prompts: tuple[str, ...] = ()
    steps: int = 50
    count: int | None = None
    size: int | None = None
    guidance: float | None = None
    seed: int = 0
    device: str = "auto"

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        if self.count is not None:
            return self.count
        return len(self.prompts) if len(self.prompts) > 1 else DEFAULT_COUNT

    def require_a_picture_for_each_prompt(self) -> None:
        """Refuse to leave out prompts.

        Raises:
            DcompileError: there are fewer pictures than prompts.
        """
        if self.pictures < len(self.prompts):
            raise DcompileError(
                f"count: expected at least {len(self.prompts)}, a picture for each prompt, "
                f"got {self.pictures}"
            )


@dataclass(frozen=True)
class DemoSettings(SampleSettings):
    """What the demo samples, and the cached runs to compare with the uncached one.

    Attributes:
        intervals: refresh intervals, one cached run for each.
        depth: of the cut.
        backend: see ``cache_compile``.
        repeat: runs of each kind, of which the fastest is reported.
    """

    intervals: tuple[int, ...] = (3, 5)
    depth: int = 0
    backend: str = "eager"
    repeat: int = 1


@dataclass(frozen=True)
class BenchSettings(SampleSettings):
    """What ``dcompile bench`` samples, and the ways of doing so that it measures.

    Attributes:
        intervals: refresh intervals, each measured with every backend; 1 is always measured.
        depth: of the cut.
        backends: see ``cache_compile``; none for Inductor on CUDA devices and eager elsewhere.
        peers: ``torch.compile``, or with a mode, ``torch.compile:reduce-overhead``: the uncached
            network so compiled.
        repeat: timed runs of each way.
        budget: seconds after which no further run is begun; None for no limit. The first uncached
            run always is.
    """

    steps: int = 30  # whole cycles of 2, 3 and 5 steps
    intervals: tuple[int, ...] = (2, 3, 5)
    depth: int = 0
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    repeat: int = 3
    budget: float | None = None

    @property
    def pictures(self) -> int:
        """Number of pictures: one for each prompt, unless ``count`` says otherwise."""
        if self.count is not None:
            return self.count
        return len(self.prompts or models.defaults(self.model).prompts)


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a file, without empty ones.

    Raises:
        DcompileError: it cannot be read, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DcompileError(f"cannot read prompts from {file}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DcompileError(f"{file} has no prompts: expected one on each line")
    return prompts
