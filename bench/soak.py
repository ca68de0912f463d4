"""Threads around shared networks, for half an hour: is any result wrong, does memory grow?

    MALLOC_ARENA_MAX=1 python bench/soak.py --minutes 30

One arena: with one for each thread, memory that a thread has freed is not given back.
Every thread draws random pictures with pipelines of its own around two networks that all share:
sizes, samplers, step counts, text to image and image to image at random; some runs end
in an exception, some are interrupted. Now and then, while nobody draws, something is done to the
networks: adapters are weighted anew, fused, switched off; hooks come and go; attributes change;
``cache_compile`` and ``reset`` are called. Before memory is measured all programs are dropped: how
many are kept varies. Each result is compared bit for bit with that of a twin
of the network on which the same request runs alone, right after a ``reset``. Writes
bench/results/soak.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig

import dcompile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from small_pipelines import DDIM, image, stable_diffusion, stable_diffusion_xl  # noqa: E402

SAMPLERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
]
SETTINGS: dict[str, Any] = {
    "interval": 3,
    "backend": "eager",
    "verbose": False,
    "program_memory": 96 << 20,  # so little that programs come and go
}
MEMORY_EVERY = 60.0  # seconds between measurements
WARM_UP = 0.2  # of the time: whatever is captured once is captured by then


class Request(NamedTuple):
    """One picture that a thread draws."""

    network: int
    kind: type
    sampler: type
    seed: int
    steps: int
    size: int
    end: str  # "whole", or how it ends at ``at``: "raised", "cancelled", "interrupted"
    at: int


class StoppedError(Exception):
    """What a callback raises in the middle of a run."""


class Cancelled(BaseException):
    """What a server raises in a worker whose client went away."""


def random_request(chance: random.Random) -> Request:
    network = chance.randrange(2)
    kinds = [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline]
    steps = chance.randint(4, 10)
    return Request(
        network,
        StableDiffusionXLPipeline if network else chance.choice(kinds),
        chance.choice(SAMPLERS),
        chance.randrange(1000),
        steps,
        chance.choice([16, 24]),
        chance.choices(["whole", "raised", "cancelled", "interrupted"], [12, 1, 1, 1])[0],
        chance.randrange(steps),
    )


def embeddings_of(base: Any) -> list[dict[str, torch.Tensor]]:
    """Of several prompts, made beforehand: transformers' encoders mix up those of threads."""
    found = []
    for prompt in "abcdefgh":
        with torch.no_grad():
            made = base.encode_prompt(
                prompt=prompt,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        found.append(dict(zip(names, made, strict=False)))
    return found


def pipeline_for(base: Any, request: Request) -> Any:
    """A pipeline of a thread's own around the parts that all share."""
    parts = {**base.components, "scheduler": request.sampler.from_config(DDIM.config)}
    more = {} if "XL" in request.kind.__name__ else {"requires_safety_checker": False}
    pipe = request.kind(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(subject: Subject, request: Request) -> torch.Tensor | None:
    """The final latents; None if the run ended in an exception."""
    pipe = pipeline_for(subject.bases[request.network], request)

    def at_end_of_step(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == request.at and request.end == "raised":
            raise StoppedError
        if step == request.at and request.end == "cancelled":
            raise Cancelled
        if step == request.at and request.end == "interrupted":
            pipe._interrupt = True
        return given

    arguments: dict[str, Any] = {
        **subject.prompts[request.network][request.seed % 8],
        "num_inference_steps": request.steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "latent",
        "callback_on_step_end": at_end_of_step,
    }
    if request.kind is StableDiffusionImg2ImgPipeline:
        arguments |= {"image": image(request.seed), "strength": 0.8}
    else:
        arguments |= {"height": request.size, "width": request.size}
    try:
        found = pipe(**arguments).images
    except (StoppedError, Cancelled):
        return None
    assert isinstance(found, torch.Tensor)
    return found


class Subject:
    """Two shared networks, and what can be done to them while nobody draws."""

    def __init__(self) -> None:
        self.bases = [stable_diffusion(), stable_diffusion_xl()]
        for base in self.bases:
            torch.manual_seed(7)
            for name in ("a", "b"):
                targets = ["to_q", "to_v"]
                config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
                base.unet.add_adapter(config, adapter_name=name)
            base.unet.eval()
            dcompile.cache_compile(base, **SETTINGS)
        self.prompts = [embeddings_of(base) for base in self.bases]
        self.hooks: dict[str, Any] = {}
        self.collected: list[Any] = []

    def change(self, what: str, chance: random.Random) -> None:
        """One of CHANGES, the same on every subject for the same state of ``chance``."""
        unet = chance.choice(self.bases).unet
        if what == "set_adapters":
            unet.set_adapters(["a", "b"], chance.choice([[0.5, 0.7], [1.0, 0.2]]))
        elif what == "adapters off":
            unet.disable_adapters()
        elif what == "adapters on":
            unet.enable_adapters()
        elif what == "weights":
            parameter = unet.conv_out.weight
            parameter.data.mul_(chance.choice([0.99, 1.01]))
        elif what == "attribute":
            unet.mid_block.resnets[0].output_scale_factor = chance.choice([1.0, 1.1])
        elif what == "hook inside":
            self._hook(what, unet.mid_block, lambda m, i, o: self.collected.append(None))
        elif what == "hook around":
            self._hook(what, unet, lambda m, i, o: None)
        elif what == "cache_compile":
            dcompile.cache_compile(unet, **SETTINGS | {"depth": chance.choice([0, 1])})
        elif what == "reset":
            dcompile.handle(unet).reset(programs=chance.random() < 0.2)

    def drop_programs(self) -> None:
        for base in self.bases:
            dcompile.handle(base).reset(programs=True)

    def _hook(self, what: str, module: Any, hook: Any) -> None:
        if what in self.hooks:
            self.hooks.pop(what).remove()
        else:
            self.hooks[what] = module.register_forward_hook(hook)


CHANGES = [
    "set_adapters",
    "adapters off",
    "adapters on",
    "weights",
    "attribute",
    "hook inside",
    "hook around",
    "cache_compile",
    "reset",
]


class Gate:
    """Many draw at once, or one changes something."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._drawing = 0
        self._changing = False

    @contextmanager
    def drawing(self) -> Any:
        with self._turn:
            self._turn.wait_for(lambda: not self._changing)
            self._drawing += 1
        try:
            yield
        finally:
            with self._turn:
                self._drawing -= 1
                self._turn.notify_all()

    @contextmanager
    def alone(self) -> Any:
        with self._turn:
            self._turn.wait_for(lambda: not self._changing)
            self._changing = True
            self._turn.wait_for(lambda: not self._drawing)
        try:
            yield
        finally:
            with self._turn:
                self._changing = False
                self._turn.notify_all()


class Soak:
    """The whole of it.

    Args:
        minutes: how long.
        threads: how many draw at once.
        seed: of all that is random.
    """

    def __init__(self, minutes: float, threads: int, seed: int) -> None:
        self.seconds, self.threads, self.seed = 60 * minutes, threads, seed
        self.shared, self.twin = Subject(), Subject()
        self.gate, self.twin_turn = Gate(), threading.Lock()
        self.known: dict[Request, torch.Tensor | None] = {}  # of the twin, as it is now
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        with ThreadPoolExecutor(self.threads + 1) as pool:
            works = [pool.submit(self._draw, number) for number in range(self.threads)]
            works.append(pool.submit(self._steer))
            for work in works:
                work.result()
        return self._report()

    def _over(self) -> bool:
        return time.monotonic() - self.started > self.seconds or len(self.wrong) > 20

    def _draw(self, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        while not self._over():
            request = random_request(chance)
            with self.gate.drawing():
                try:
                    found = drawn(self.shared, request)
                except Exception as error:
                    self.wrong.append(f"{request}: {type(error).__name__}: {error}")
                    continue
                expected = self._expected(request)
            self.counts["runs"] += 1
            self.counts[request.end] += 1
            if found is None or expected is None:
                same = found is expected
            else:
                self.counts["compared"] += 1
                same = torch.equal(found, expected)
            if not same:
                self.wrong.append(f"{request}")

    def _expected(self, request: Request) -> torch.Tensor | None:
        with self.twin_turn:
            if request not in self.known:
                dcompile.handle(self.twin.bases[request.network]).reset()
                self.known[request] = drawn(self.twin, request)
            return self.known[request]

    def _steer(self) -> None:
        chance = random.Random(f"{self.seed} steering")
        measured = 0.0
        while not self._over():
            time.sleep(chance.uniform(1.0, 4.0))
            what, state = chance.choice(CHANGES), chance.random()
            with self.gate.alone():
                for subject in (self.shared, self.twin):
                    subject.change(what, random.Random(state))
                self.known.clear()
                self.shared.collected.clear()
                self.twin.collected.clear()
                self.counts[f"change: {what}"] += 1
                elapsed = time.monotonic() - self.started
                if elapsed - measured > MEMORY_EVERY:
                    measured = elapsed
                    for subject in (self.shared, self.twin):
                        subject.drop_programs()  # kept on purpose, and more or less of them
                    self.memory.append((elapsed, megabytes()))

    def _report(self) -> dict[str, Any]:
        after = [size for at, size in self.memory if at > WARM_UP * self.seconds]
        third = max(1, len(after) // 3)
        early, late = after[:third], after[-third:]
        start, end = (sum(part) / len(part) if part else 0.0 for part in (early, late))
        return {
            "minutes": round(self.seconds / 60, 2),
            "threads": self.threads,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "wrong": len(self.wrong),
            "which": self.wrong[:5],
            "counts": dict(sorted(self.counts.items())),
            "memory_megabytes": {"early": round(start, 1), "late": round(end, 1)},
            "memory_growth": round(end / start - 1, 4) if start else None,
            "memory_over_time": [(round(at), round(size, 1)) for at, size in self.memory],
            "report": [dcompile.handle(base).report() for base in self.shared.bases],
        }


def megabytes() -> float:
    """Resident memory, after what is garbage was collected and given back."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    threads: Annotated[int, typer.Option(help="How many draw at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = (
        ROOT / "bench" / "results" / "soak.json"
    ),
) -> None:
    """Draw with many threads around shared networks, and compare every result."""
    torch.set_num_threads(1)
    report = Soak(minutes, threads, seed).run()
    output.write_text(json.dumps(report, indent=1) + "\n")
    growth = report["memory_growth"]
    typer.echo(
        f"{report['counts'].get('compared', 0)} results compared, {report['wrong']} wrong; "
        f"memory {'not measured' if growth is None else f'{growth:+.1%}'}"
    )
    if report["wrong"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
