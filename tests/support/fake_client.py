"""A client of the server that generates nothing: canned pictures, and whatever should go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image

from dcompile.serving.metrics import Snapshot
from dcompile.serving.pictures import Trace, digest, encoded
from dcompile.serving.worker import Event, Made, Preview, Request, Step

STEPS = ("refresh", "reuse", "reuse", "refresh")


def about(**changes: Any) -> dict[str, Any]:
    """What ``Engine.describe`` says of a small text-to-image model."""
    return {
        "model": "fake",
        "pipeline": "FakePipeline",
        "prompt": True,
        "negative_prompt": True,
        "guidance": 5.0,
        "takes_guidance": True,
        "steps": len(STEPS),
        "width": 64,
        "height": 64,
        "multiple": 8,
        "resizes": True,
        "samplers": ["DDIMScheduler", "EulerDiscreteScheduler"],
        "sampler": "DDIMScheduler",
        "loras": ["sketch"],
        "schedule": ["interval 3"],
        "ready": True,
        **changes,
    }


def snapshot(process: str = "one", pictures: int = 1, **changes: Any) -> Snapshot:
    """Counts of a process that made so many pictures."""
    given: dict[str, Any] = {
        "process": process,
        "model": "fake",
        "pictures": pictures,
        "batches": pictures,
        "failed": 0,
        "cancelled": 0,
        "steps": {"refresh": 2 * pictures, "reuse": 2 * pictures},
        "forced": 0,
        "uncached": {},
        "flops_spent": 2.5 * pictures,
        "flops_asked": 4.0 * pictures,
        "captures": 1,
        "cache_bytes": 8,
    }
    return Snapshot(**{**given, **changes})


def trace(levels: tuple[str, ...] = STEPS, **changes: Any) -> dict[str, Any]:
    """Of a run that took a quarter of a second."""
    seconds = {"encode": 0.0625, "denoise": 0.125, "decode": 0.0625}
    found = Trace(levels, 0, 1.6, seconds, batch=1).as_dict()
    return {**found, "waited": 0.0, **changes}


def made(
    seed: int = 0, image: Image.Image | None = None, form: str = "png", **changes: Any
) -> Made:
    """A picture of one colour, that of its seed."""
    image = image or Image.new("RGB", (64, 64), (seed % 256, 100, 100))
    content = encoded(image, form)
    found = {**trace(), **changes}
    return Made(content, form, seed, digest(image), found, ("a note",), snapshot())


class FakeClient:
    """Makes canned pictures.

    Args:
        error: raised instead.
        takes: seconds of a picture.
        about: what ``describe`` returns.
        steps: what the steps of its pictures ran.

    Attributes:
        asked: requests so far.
        cancelled: how many were cancelled.
    """

    def __init__(
        self,
        error: Exception | None = None,
        takes: float = 0.0,
        about: dict[str, Any] | None = None,
        steps: tuple[str, ...] = STEPS,
    ) -> None:
        self.steps = steps
        self.error = error
        self.takes = takes
        self.about = about
        self.asked: list[Request] = []
        self.cancelled = 0

    async def describe(self) -> dict[str, Any]:
        return about() if self.about is None else self.about

    async def generate(self, request: Request) -> Made:
        self.asked.append(request)
        await self._wait()
        if self.error is not None:
            raise self.error
        return made(request.job.seed, form=request.form, steps=list(self.steps))

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Fails after its first step, if it is to fail."""
        self.asked.append(request)
        steps = request.job.steps
        for done in range(1, steps + 1):
            await self._wait()
            yield Step(done, steps)
            if self.error is not None:
                raise self.error
            if done == 1 and request.previews:
                yield Preview(b"half way", "jpeg", 0)
        yield made(request.job.seed, form=request.form)

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(self.takes)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
