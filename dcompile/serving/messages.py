"""What requests look like, as JSON: OpenAI's images API and a plain one, and the jobs they mean."""

from __future__ import annotations

import re
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator

from dcompile.errors import JobError
from dcompile.serving.jobs import DEFAULT, Caching, Job
from dcompile.serving.pictures import LARGEST_SIDES
from dcompile.serving.settings import Limits
from dcompile.serving.worker import Request

LARGEST_SEED = 2**63 - 1
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

Form = Literal["png", "jpeg", "webp"]


class CachingField(BaseModel):
    """How the denoiser is cached, for servers that let requests choose: one of the three."""

    model_config = ConfigDict(extra="forbid")

    off: StrictBool = Field(False, description="Run uncached.")
    interval: StrictInt | None = Field(
        None, ge=1, le=1000, description="Refresh every so many steps, as DeepCache does."
    )
    speedup: float | None = Field(
        None, ge=1, le=100, allow_inf_nan=False, description="So many times fewer FLOPs."
    )

    def caching(self) -> Caching:
        """What it means.

        Raises:
            JobError: several are given.
        """
        given = [self.off, self.interval is not None, self.speedup is not None]
        if sum(given) > 1:
            raise JobError("caching", "give one of off, interval and speedup")
        if self.off:
            return Caching("off")
        if self.interval is not None:
            return Caching("interval", float(self.interval))
        return Caching("speedup", self.speedup) if self.speedup is not None else DEFAULT


class _Common(BaseModel):
    """Fields of both APIs."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", description="What to show; empty for an unconditional model.")
    negative_prompt: str = Field("", description="What not to show.")
    seed: StrictInt | None = Field(
        None, ge=0, le=LARGEST_SEED, description="Of the noise; drawn by the server if not given."
    )
    steps: StrictInt | None = Field(None, ge=1, description="Of the sampler.")
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Guidance scale."
    )
    sampler: str = Field("", max_length=100, description="Class of a diffusers scheduler.")
    lora: str = Field("", max_length=200, description="A set of LoRA weights the server has.")
    caching: CachingField | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _text(cls, value: str) -> str:
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            raise ValueError("is no valid Unicode")
        return value


class PlainRequest(_Common):
    """``POST /generate``: one picture, returned as a file's content."""

    width: StrictInt | None = Field(None, ge=1, description="In pixels.")
    height: StrictInt | None = Field(None, ge=1, description="In pixels.")
    format: Form = "png"
    quality: StrictInt = Field(
        90, ge=1, le=100, description="Of JPEG and WebP; 100: lossless WebP."
    )
    stream: StrictBool = Field(False, description="Send progress as server-sent events.")
    previews: StrictInt = Field(0, ge=0, le=10, description="Pictures to send on the way.")


class ImagesRequest(_Common):
    """``POST /v1/images/generations``: OpenAI's images API, with more fields.

    Fields of OpenAI's that have no meaning here are accepted and ignored: background, moderation,
    quality, style, user.
    """

    model: str | None = Field(None, max_length=200)
    n: StrictInt = Field(1, ge=1, description="Pictures, with seeds one after another.")
    size: str | None = Field(None, description='"512x512", width first, or "auto".')
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Form = "png"
    output_compression: StrictInt = Field(90, ge=0, le=100)
    stream: StrictBool = False
    partial_images: StrictInt = Field(0, ge=0, le=10)
    background: Any = None
    moderation: Any = None
    quality: Any = None
    style: Any = None
    user: Any = None

    def sides(self) -> tuple[int | None, int | None]:
        """Width and height.

        Raises:
            JobError: it is not written so.
        """
        if self.size is None or self.size == "auto":
            return None, None
        found = _SIZE.fullmatch(self.size)
        if found is None or not all(map(int, found.groups())):
            raise JobError("size", f'expected "<width>x<height>" or "auto", got {self.size[:40]!r}')
        return int(found[1]), int(found[2])


def requests_of(
    message: PlainRequest | ImagesRequest,
    about: dict[str, Any],
    limits: Limits,
    *,
    chooses_caching: bool,
) -> list[Request]:
    """One request for each picture.

    Args:
        message: from a client.
        about: see ``Engine.describe``.
        limits: what a client may ask for.
        chooses_caching: whether requests may say how they are cached.

    Raises:
        JobError: something is beyond the limits, or the model does not do it.
    """
    if isinstance(message, ImagesRequest):
        width, height = message.sides()
        count, form, previews = message.n, message.output_format, message.partial_images
        quality = max(1, message.output_compression)
    else:
        width, height = message.width, message.height
        count, form, previews, quality = 1, message.format, message.previews, message.quality
    if count > limits.images:
        raise JobError("n", f"expected at most {limits.images}, got {count}")
    _require_prompt(message, about, limits)
    width, height = width or about["width"], height or about["height"]
    if width * height > limits.pixels:
        raise JobError("size", f"expected at most {limits.pixels} pixels, got {width} x {height}")
    forms = (form, "jpeg") if previews else (form,)  # previews are JPEG
    largest = min(LARGEST_SIDES.get(one, limits.pixels) for one in forms)
    if max(width, height) > largest:
        raise JobError("size", f"expected sides of at most {largest} pixels in this format")
    steps = message.steps or about["steps"]
    if steps > limits.steps:
        raise JobError("steps", f"expected at most {limits.steps}, got {steps}")
    if message.guidance is not None and not about["takes_guidance"]:
        raise JobError("guidance", f"{about['model']} takes none")
    if message.caching is not None and not chooses_caching:
        raise JobError("caching", "this server does not let requests choose")
    _require_known("sampler", message.sampler, about["samplers"])
    _require_known("lora", message.lora, about["loras"])
    for field, value, own in (
        ("width", width, about["width"]),
        ("height", height, about["height"]),
    ):
        if value % about["multiple"]:
            raise JobError(field, f"expected a multiple of {about['multiple']}, got {value}")
        if not about["resizes"] and value != own:
            raise JobError(field, f"{about['model']} makes pictures of {own} pixels only")
    seed = secrets.randbits(31) if message.seed is None else message.seed
    if seed + count - 1 > LARGEST_SEED:
        raise JobError("seed", f"expected at most {LARGEST_SEED - count + 1} for {count} pictures")
    sampler = "" if message.sampler == about["sampler"] else message.sampler
    job = Job(
        prompt=message.prompt,
        seed=seed,
        steps=steps,
        width=width,
        height=height,
        negative_prompt=message.negative_prompt,
        guidance=about["guidance"] if message.guidance is None else float(message.guidance),
        sampler=sampler,
        caching=message.caching.caching() if message.caching is not None else DEFAULT,
        lora=message.lora,
    )
    return [
        Request(job.with_seed(seed + number), form, quality, previews) for number in range(count)
    ]


def _require_prompt(message: _Common, about: dict[str, Any], limits: Limits) -> None:
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(message, field))
        if length > limits.prompt:
            raise JobError(field, f"expected at most {limits.prompt} characters, got {length}")
        if length and not about[field]:
            raise JobError(field, f"{about['model']} takes none")
    if about["prompt"] and not message.prompt.strip():
        raise JobError("prompt", "expected some text")


def _require_known(field: str, value: str, known: list[str]) -> None:
    if value and value not in known:
        listed = ", ".join(known) or "none here"
        raise JobError(field, f"expected one of: {listed}; got {value[:100]!r}")
