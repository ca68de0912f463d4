"""What a ControlNet costs on a reuse step, before and after: one process, one table.

    python bench/controlnet.py

Writes bench/results/controlnet.md: FLOPs at full size, and times of a network of Stable Diffusion
1.5's structure and a tenth of its size.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import shapes
import torch
import typer
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel

import dcompile
from dcompile.passes import total_cost, with_outputs
from dcompile.runtime.lazy_network import LazyNetwork

ROOT = Path(__file__).resolve().parent.parent
INTERVAL, STEPS, ROUNDS = 3, 12, 3


class Pipe:
    """As much of a pipeline as ``cache_compile`` looks at."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        self.unet, self.controlnet, self.scheduler = unet, controlnet, DDIMScheduler()
        self.components = {"unet": unet, "controlnet": controlnet}


def companion_of(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for ``unet``, with random weights in its last convolutions too."""
    network = ControlNetModel.from_unet(unet)
    for name, parameter in network.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return network.eval().requires_grad_(False)


def seconds(unet: Any, controlnet: Any, call: dict[str, Any], picture: torch.Tensor) -> float:
    """Of one step of a whole run, as a ControlNet pipeline makes it; the median of ROUNDS runs."""
    found = []
    for _ in range(ROUNDS + 1):
        x = call["sample"]
        text = call["encoder_hidden_states"]
        timesteps = torch.arange(STEPS, 0, -1) * 50
        started = time.perf_counter()
        for t in timesteps:
            down, middle = controlnet(
                x, t, encoder_hidden_states=text, controlnet_cond=picture, return_dict=False
            )
            x = unet(
                x,
                t,
                encoder_hidden_states=text,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        found.append((time.perf_counter() - started) / STEPS)
    return statistics.median(found[1:])


def ratio_at_full_size() -> tuple[float, float]:
    """Of Stable Diffusion 1.5's ControlNet: GMACs of a call, and the share at depth 0."""
    with torch.device("meta"):
        network = ControlNetModel(cross_attention_dim=768)
        call = {
            "sample": torch.empty(2, 4, 64, 64),
            "timestep": torch.empty(10)[3],  # one of several: identified by its offset
            "encoder_hidden_states": torch.empty(2, 77, 768),
            "controlnet_cond": torch.empty(2, 3, 512, 512),
            "return_dict": False,
        }
    network.eval()
    wrapper = LazyNetwork(network, network.forward, dcompile.backends.resolve("eager", None), False)
    wrapper(**call)
    (program,) = wrapper.programs._programs.values()
    graph = program.network.graph_module
    whole = total_cost(graph.graph.nodes).flops
    return whole / 2e9, total_cost(with_outputs(graph, (0,)).graph.nodes).flops / whole


@torch.no_grad()
def times() -> str:
    """A table of the ways to run a small network with its ControlNet."""
    unet, call = shapes.sd15(small=True)
    controlnet = companion_of(unet)
    picture = torch.rand(2, 3, 8 * call["sample"].shape[-2], 8 * call["sample"].shape[-1])
    pipe = Pipe(unet, controlnet)
    settings: dict[str, Any] = {"interval": INTERVAL, "backend": "eager", "verbose": False}
    uncached = seconds(unet, controlnet, call, picture)
    dcompile.cache_compile(unet, **settings)
    alone = seconds(unet, controlnet, call, picture)
    limit = dcompile.handle(unet).explain().depths[0].speed_limits[INTERVAL]
    dcompile.cache_compile(pipe, **settings)
    both = seconds(unet, controlnet, call, picture)
    dcompile.handle(unet).remove()
    rows = [
        ("uncached", uncached),
        ("UNet cached", alone),
        ("UNet cached, ControlNet on demand", both),
    ]
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"float32, eager, random weights, N={INTERVAL}, depth 0, a network of Stable Diffusion "
        f"1.5's structure and a tenth of its size, whose own limit is {limit:.2f}x:\n\n"
        "| way | mean step, ms | speed-up |\n| --- | --- | --- |\n"
        + "".join(f"| {name} | {1000 * s:.0f} | {uncached / s:.2f}x |\n" for name, s in rows)
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "bench/results",
    timed: Annotated[bool, typer.Option(help="Off: FLOPs only.")] = True,
) -> None:
    gmacs, ratio = ratio_at_full_size()
    text = (
        "# ControlNet\n\n"
        "Made by `bench/controlnet.py`. A call of Stable Diffusion 1.5's ControlNet, 512x512, with "
        f"guidance, takes {gmacs:.0f} GMACs. On a reuse step at depth 0 the UNet reads one of its "
        f"13 residuals, and that takes {ratio:.3f} of them.\n\n"
        + (times() if timed else "Times: not measured yet.\n")
    )
    (out / "controlnet.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
