"""What runs beside the denoiser, and what a fleet of replicas carries, on paper and by simulation.

    python bench/scaling.py            # all of it; about four minutes on two cores
    python bench/scaling.py --no-cpu   # FLOPs and simulation; seconds on the CPU stay as they were

FLOPs are counted on the meta device, with the configurations of the published models. Step times
are those of bench/results/gpu.json. Nothing but the denoiser was timed on a GPU: encode and decode
times there are derived from FLOPs, and the page says so. Writes bench/results/scaling.json and
scaling.md.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL
from replicas import Autoscaler, Fleet, Service, simulate
from scaling_page import page
from shapes import UNETS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = 77
STEPS = (20, 30, 50)
INTERVALS = (1, 3, 5)

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Model:
    """A published model: what its pipeline runs beside the denoiser.

    Attributes:
        title: for tables.
        latents: width and height of its latents.
        encoders: class and configuration of its text encoders. Each runs twice for a picture, on
            the prompt and on the negative one.
    """

    title: str
    latents: int
    encoders: tuple[tuple[type[nn.Module], dict[str, Any]], ...]


MODELS = {
    "sd15": Model("SD 1.5, 512x512", 64, ((CLIPTextModel, CLIP_L),)),
    "sdxl": Model(
        "SDXL, 1024x1024",
        128,
        ((CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, CLIP_BIG_G)),
    ),
}


def flops_of(function: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def counted(name: str) -> dict[str, Any]:
    """FLOPs of a picture's parts, by their shapes alone."""
    model, shape, meta = MODELS[name], UNETS[name], torch.device("meta")
    with meta:
        vae = AutoencoderKL(**VAE).eval()
        latents = torch.empty(1, 4, model.latents, model.latents)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        encoders = [kind(CLIPTextConfig(**config)).eval() for kind, config in model.encoders]
        network = shape.unfilled(meta, torch.float32)
        call = shape.call(torch.empty)
        timestep = torch.empty(())
    return {
        "title": model.title,
        "encode": 2 * sum(flops_of(lambda one=one: one(tokens)) for one in encoders),
        "step": flops_of(lambda: network(timestep=timestep, **call)),
        "decode": flops_of(lambda: vae.decode(latents)),
    }


def full_steps(steps: int, interval: int, ratio: float) -> float:
    """What a run costs, in steps of the whole network."""
    refreshes = math.ceil(steps / interval)
    return refreshes + (steps - refreshes) * ratio


def shares(parts: dict[str, float], ratio: float) -> list[dict[str, Any]]:
    """Shares of encode, denoise and decode in a picture; ``parts`` in FLOPs or in seconds."""
    rows = []
    for steps in STEPS:
        for interval in INTERVALS:
            denoise = parts["step"] * full_steps(steps, interval, ratio)
            total = parts["encode"] + denoise + parts["decode"]
            rows.append(
                {
                    "steps": steps,
                    "interval": interval,
                    "total": total,
                    "encode": parts["encode"] / total,
                    "denoise": denoise / total,
                    "decode": parts["decode"] / total,
                }
            )
    return rows


# Seconds on this CPU


def timed(functions: dict[str, Callable[[], Any]], times: int) -> dict[str, dict[str, float]]:
    """The least wall and processor seconds of each, measured in turns after one call of each.

    Processor seconds are those of all threads; where other processes compete for the cores they
    are the better measure.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    first = {}
    for number in range(times + 1):
        for name, function in functions.items():
            began = time.perf_counter(), time.process_time()
            with torch.no_grad():
                function()
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            if number:
                found[name].append(took)
            else:
                first[name] = took[0]
    return {
        name: {
            "seconds": round(min(wall for wall, _ in rows), 3),
            "processor_seconds": round(min(cpu for _, cpu in rows), 3),
            "first_seconds": round(first[name], 1),
        }
        for name, rows in found.items()
    }


def seconds_of_encoder() -> dict[str, Any]:
    encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L)).eval()
    compiled = copy.deepcopy(encoder)
    compiled.compile(dynamic=False)
    tokens = torch.randint(0, 1000, (1, TOKENS))
    parts = {
        "encode one prompt": lambda: encoder(tokens),
        "encode one prompt, compiled": lambda: compiled(tokens),
    }
    return timed(parts, 5)


def seconds_of_decoder() -> dict[str, Any]:
    decoder = AutoencoderKL(**VAE).eval().decoder
    compiled = copy.deepcopy(decoder)
    compiled.compile(dynamic=False)
    small, whole = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 64, 64)
    parts = {
        "decode 256x256": lambda: decoder(small),
        "decode 256x256, compiled": lambda: compiled(small),
    }
    return timed(parts, 2) | timed({"decode 512x512": lambda: decoder(whole)}, 1)


def seconds_of_step() -> dict[str, Any]:
    network, call = UNETS["sd15"].build(torch.device("cpu"), torch.float32)
    timestep = torch.tensor(500)
    return timed({"one step": lambda: network(timestep=timestep, **call)}, 1)


def measured_on_cpu(threads: int) -> dict[str, Any]:
    """Seconds of the parts of SD 1.5, float32, random weights, and of two of them compiled."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    began = os.getloadavg()[0]
    found: dict[str, Any] = {}
    for measure in (seconds_of_encoder, seconds_of_decoder, seconds_of_step):
        found |= measure()
        gc.collect()
    return {
        "parts": found,
        "machine": f"{processor()}, {threads} thread{'s' * (threads > 1)}",
        "load": [round(began, 1), round(os.getloadavg()[0], 1)],
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# A GPU's seconds, as far as they were measured


def services(name: str, parts: dict[str, Any], steps: int) -> dict[str, Service]:
    """A picture's seconds on the GPU of bench/results/gpu.json.

    Steps were measured. Encoding and decoding are derived: their FLOPs at the rate of the uncached
    step, compiled or as diffusers runs it, whichever they are.
    """
    rows = json.loads((RESULTS / "gpu.json").read_text())["shapes"][name]["rows"]
    ms = {way: rows[way]["step_ms"] for way in ("eager@1", "torch-graphs@1", "dcompile-graphs@3")}

    def service(step: str, beside: str) -> Service:
        rate = parts["step"] / ms[beside] * 1000
        return Service(parts["encode"] / rate, ms[step] / 1000, parts["decode"] / rate, steps)

    return {
        "diffusers, eager": service("eager@1", "eager@1"),
        "torch.compile": service("torch-graphs@1", "eager@1"),
        "cached, N=3": service("dcompile-graphs@3", "eager@1"),
        "torch.compile, all of it": service("torch-graphs@1", "torch-graphs@1"),
        "cached, N=3, companions compiled": service("dcompile-graphs@3", "torch-graphs@1"),
    }


REPLICAS = (1, 8, 64, 1000)
# Nobody should plan for more: a fleet this full has no room for a bad minute.
LOADS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def most_loaded(replicas: int) -> dict[str, Any]:
    """At the highest load with 95 % of the pictures done in twice the time that one takes.

    Times are in pictures: without batches, fleets of any service behave alike.
    """
    fleet = Fleet(replicas, Service(0, 1, 0, 1))
    for load in LOADS:
        rate = load * replicas
        found = simulate(fleet, rate, max(20_000, 60 * replicas) / rate)
        if found["p95"] <= 2:
            return {"replicas": replicas, "load": load, **found}
    raise AssertionError("twice the time of one picture was out of reach")


def by_kinds(service: Service) -> list[dict[str, Any]]:
    """Eight replicas at nine tenths of what they could do one by one."""
    rows = []
    for marginal in (1.0, 0.8, 0.6):
        for kinds in (1, 4, 16):
            one = replace(service, marginal=marginal)
            fleet = Fleet(8, one, (1, 2, 4, 8), 0.005, (1 / kinds,) * kinds)
            found = simulate(fleet, 0.9 * 8 / one.seconds(), 600)
            rows.append({"marginal": marginal, "kinds": kinds, **found})
    return rows


SURGE = 4.0  # times as many requests
REPLICAS_BEFORE = 8
# Process, weights and a first picture: a guess. Compiling an SD 1.5-shaped network: gpu.json.
PROCESS_SECONDS = 12.0


def surges(service: Service, compile_seconds: float) -> list[dict[str, Any]]:
    """Four times as many requests from one second to the next, for ten minutes."""
    before = 0.5 * REPLICAS_BEFORE / service.seconds()
    plan = [(0.0, before), (120.0, SURGE * before), (720.0, before)]
    rows = []
    for target in (0.7, 1.0, 2.0, 4.0):
        for start in (PROCESS_SECONDS, PROCESS_SECONDS + compile_seconds):
            for queue in (None, 64):
                rule = Autoscaler(REPLICAS_BEFORE, 64, target, start)
                fleet = Fleet(REPLICAS_BEFORE, service, queue=queue, autoscaler=rule)
                found = simulate(fleet, plan, 840.0)
                rows.append({"target": target, "start": start, "queue": queue, **found})
    return rows


def main(
    cpu: Annotated[bool, typer.Option(help="Measure seconds on this CPU again.")] = True,
    threads: Annotated[
        int, typer.Option(help="More wait for each other where cores are shared.")
    ] = 1,
    steps: Annotated[int, typer.Option(help="Of the simulated pictures.")] = 30,
    output: Path = RESULTS / "scaling.json",
) -> None:
    earlier = json.loads(output.read_text()) if output.is_file() else {}
    gpu = json.loads((RESULTS / "gpu.json").read_text())
    flops = {name: counted(name) for name in MODELS}
    ways = {
        name: {
            way: {**asdict(service), "seconds": service.seconds()}
            for way, service in services(name, parts, steps).items()
        }
        for name, parts in flops.items()
    }
    cached = services("sd15", flops["sd15"], steps)["cached, N=3"]
    compiling = gpu["shapes"]["sd15"]["rows"]["dcompile-graphs@3"]["compile_seconds"]
    result = {
        "flops": flops,
        "ratios": {name: gpu["shapes"][name]["ratio"] for name in MODELS},
        "shares": {
            name: shares(parts, gpu["shapes"][name]["ratio"]) for name, parts in flops.items()
        },
        "cpu": measured_on_cpu(threads) if cpu else earlier.get("cpu"),
        "gpu": f"{gpu['card']['name']}, {gpu['date']}",
        "steps": steps,
        "ways": ways,
        "fleets": [most_loaded(replicas) for replicas in REPLICAS],
        "kinds": by_kinds(cached),
        "surges": surges(cached, compiling),
        "date": date.today().isoformat(),
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    typer.run(main)
