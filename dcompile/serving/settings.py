"""What an engine and a server are started with; plain data that JSON and YAML can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from dcompile import models
from dcompile.errors import DcompileError, ScheduleError
from dcompile.policy.checks import require_speedup
from dcompile.policy.fixed import Uniform


@dataclass(frozen=True)
class EngineSettings:
    """How one model is loaded and cached.

    Attributes:
        model: see ``dcompile.models.loading.locate``.
        speedup, interval: see ``cache_compile``; 2.5 times fewer FLOPs if neither is given.
        backend, options: see ``cache_compile``.
        device: "auto", or any torch device.
        steps: of the sampler, for jobs that do not say.
        programs: a folder that ``Handle.save`` wrote; None to compile when a call needs it.
        new_calls: what a call does that no program serves; see ``load``.
        loras: names of sets of LoRA weights, and the folders or files they are in.
        components: see ``cache_compile``: "compile" for text encoders and the VAE's decoder, too.
        verbose: whether progress is shown.
    """

    model: str = models.DEFAULT
    speedup: float | None = None
    interval: int | None = None
    backend: str = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    steps: int = 20
    programs: str | None = None
    new_calls: Literal["compile", "uncached"] = "compile"
    loras: Mapping[str, str] = field(default_factory=dict)
    components: Literal["compile", False] = False
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.interval is not None and self.speedup is not None:
            raise ScheduleError(
                f"give one of interval and speedup, not interval={self.interval!r} and "
                f"speedup={self.speedup!r}"
            )
        if self.interval is not None:
            Uniform(self.interval)
        if self.speedup is not None:
            require_speedup(self.speedup)
        if self.components not in ("compile", False):
            raise DcompileError(f'components: expected "compile" or False, got {self.components!r}')
        if type(self.steps) is not int or self.steps < 1:
            raise DcompileError(f"steps: expected a positive int, got {self.steps!r}")

    @property
    def name(self) -> str:
        """Of the model, for people and metrics."""
        return models.ALIASES.get(self.model, self.model.rstrip("/").rpartition("/")[2])

    def caching_arguments(self) -> dict[str, Any]:
        """Those of ``cache_compile`` that decide what is refreshed."""
        if self.interval is not None:
            return {"interval": self.interval}
        return {"speedup": 2.5 if self.speedup is None else self.speedup}


@dataclass(frozen=True)
class Limits:
    """What one client may ask for; beyond that a request is refused with a reason.

    Attributes:
        pixels: width times height of one picture.
        steps: of the sampler.
        prompt: characters of a prompt.
        images: pictures of one request.
        queue: pictures that wait or are being made at a time; beyond it, 429.
    """

    pixels: int = 1024 * 1024
    steps: int = 150
    prompt: int = 2000
    images: int = 4
    queue: int = 64

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not int or value < 1:
                raise DcompileError(f"limit on {one.name}: expected a positive int, got {value!r}")

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ServeSettings:
    """What a server is started with.

    Attributes:
        engines: one for each model; the first is the default.
        limits: what a client may ask for.
        replicas: processes that generate.
        autoscale: instead, the least and the most of them.
        batch_pixels: most pixels of one batch; None for no limit.
        batch_wait: seconds to wait for others of the same kind; they collect anyway while a batch
            runs.
        cpus, gpus: of Ray's, for each process that generates.
        threads: torch's, in each of them; 0 leaves them as Ray sets them.
        drain: seconds that a process may take to finish its pictures when it is stopped.
        chooses_caching: whether requests may say how they are cached; the page's always may.
        page: whether there is a page for people.
    """

    engines: tuple[EngineSettings, ...] = (EngineSettings(new_calls="uncached"),)
    limits: Limits = field(default_factory=Limits)
    replicas: int = 1
    autoscale: tuple[int, int] | None = None
    batch_pixels: int | None = None
    batch_wait: float = 0.0
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 0
    drain: float = 60.0
    chooses_caching: bool = False
    page: bool = False

    def __post_init__(self) -> None:
        names = [one.name for one in self.engines]
        if not names or len(set(names)) < len(names):
            raise DcompileError(f"models: expected one or more different ones, got {names}")
        if self.replicas < 1:
            raise DcompileError(f"replicas: expected at least 1, got {self.replicas}")
        if self.autoscale is not None and not 0 <= self.autoscale[0] <= self.autoscale[1] > 0:
            raise DcompileError(f"autoscale: expected least:most, got {self.autoscale}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON and YAML; ``of`` reads it."""
        return asdict(self)

    @staticmethod
    def of(settings: Mapping[str, Any]) -> ServeSettings:
        """From plain data, such as a YAML file has; what is left out has its default.

        Raises:
            DcompileError: something is unknown, or of the wrong type.
        """
        given = dict(settings)
        try:
            if "engines" in given:
                given["engines"] = tuple(EngineSettings(**one) for one in given["engines"])
            if "limits" in given:
                given["limits"] = Limits(**given["limits"])
            if given.get("autoscale") is not None:
                least, most = given["autoscale"]
                given["autoscale"] = (least, most)
            return ServeSettings(**given)
        except (TypeError, ValueError) as error:
            raise DcompileError(f"settings of the server: {error}") from error

    def page_arguments(self) -> dict[str, bool]:
        """Those of ``http.app_of``."""
        return {"page": True} if self.page else {}
