"""Residual cuts beside cache-dit and diffusers' First Block Cache, in one run.

    pip install -e ".[peers]"
    python bench/residual.py

Networks of the structure of FLUX, SD 3, Wan and PixArt, a tenth as wide, of random weights, in the
pipelines of diffusers. Each way runs in a process of its own, at the same steps: cache-dit with a
mask of steps, one front block and no back block; First Block Cache at a threshold that refreshes at
these steps, if there is one. Writes bench/results/residual.json and residual.md.
"""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from peers import cache_dit_masked, compile_blocks
from torch.utils._python_dispatch import TorchDispatchMode

import dcompile

RESULTS = Path(__file__).resolve().parent / "results"
INTERVAL, STEPS = 3, 9
MASK = [int(step % INTERVAL == 0) for step in range(STEPS)]
TEXT, TOKENS = 256, 64
# Thresholds of First Block Cache that are tried; the first that refreshes at the right steps.
THRESHOLDS = [round(0.002 * 2.0**n, 4) for n in range(9)]

Made = tuple[Any, dict[str, Any]]


def text() -> torch.Tensor:
    return torch.randn(1, TOKENS, TEXT)


def flux() -> Made:
    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=2,
        attention_head_dim=128,
        joint_attention_dim=TEXT,
        pooled_projection_dim=96,
        guidance_embeds=True,
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)
    call = {"prompt_embeds": text(), "pooled_prompt_embeds": torch.randn(1, 96)}
    return pipe, {**call, "height": 256, "width": 256}


def sd3() -> Made:
    network = SD3Transformer2DModel(
        sample_size=64,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT,
        caption_projection_dim=192,
        pooled_projection_dim=96,
        pos_embed_max_size=96,
    )
    encoders = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        **dict.fromkeys(encoders),
    )
    prompts = {
        f"{negative}{pooled}prompt_embeds": torch.randn(1, 96) if pooled else text()
        for negative in ("", "negative_")
        for pooled in ("", "pooled_")
    }
    return pipe, {**prompts, "height": 256, "width": 256}


def wan() -> Made:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        text_dim=TEXT,
        freq_dim=64,
        ffn_dim=896,
        num_layers=30,
    )
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanPipeline(
        transformer=network, scheduler=sampler, tokenizer=None, text_encoder=None, vae=None
    )
    prompts = {"prompt_embeds": text(), "negative_prompt_embeds": text()}
    return pipe, {**prompts, "height": 128, "width": 128, "num_frames": 9}


def pixart() -> Made:
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=72,
        num_layers=28,
        sample_size=64,
        cross_attention_dim=144,
        caption_channels=TEXT,
        use_additional_conditions=False,
        out_channels=8,
    )
    pipe = PixArtAlphaPipeline(
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(),
        tokenizer=None,
        text_encoder=None,
        vae=None,
    )
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    prompts = {
        f"{negative}prompt_{what}": value
        for negative in ("", "negative_")
        for what, value in (("embeds", text()), ("attention_mask", mask))
    }
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return pipe, {**prompts, **size, "negative_prompt": None}


SHAPES: dict[str, Callable[[], Made]] = {"FLUX": flux, "SD 3": sd3, "Wan": wan, "PixArt": pixart}


def uncached(pipe: Any) -> None:
    """Nothing is done to it."""


def compiled(pipe: Any) -> None:
    compile_blocks(pipe.transformer, fullgraph=True)


def cache_dit_compiled(pipe: Any) -> None:
    """As its documentation says: the cache first, then the blocks."""
    import cache_dit

    cache_dit_masked(pipe, MASK)
    cache_dit.set_compile_configs()
    compile_blocks(pipe.transformer)


def ours(pipe: Any) -> None:
    dcompile.cache_compile(pipe, interval=INTERVAL, backend="eager", verbose=False)


def ours_compiled(pipe: Any) -> None:
    options = {"regions": True}
    dcompile.cache_compile(pipe, interval=INTERVAL, options=options, verbose=False)


def first_block_cache(threshold: float) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        from diffusers.hooks import FirstBlockCacheConfig

        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    return prepare


WAYS: dict[str, Callable[[Any], None]] = {
    "diffusers": uncached,
    "cache-dit": lambda pipe: cache_dit_masked(pipe, MASK),
    "dcompile, eager": ours,
    "torch.compile of blocks": compiled,
    "cache-dit, blocks compiled": cache_dit_compiled,
    "dcompile, inductor": ours_compiled,
}
FIRST_BLOCK_CACHE = "diffusers' First Block Cache"
UNCOMPILED = ("diffusers", "cache-dit", "dcompile, eager", FIRST_BLOCK_CACHE)


class Clock:
    """Calls of a network's forward, by hooks around whatever has been put in its place."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.seconds: list[float] = []
        self._network, self._forward = network, network.forward

    def __enter__(self) -> Clock:
        inner = self._forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            self.seconds.append(time.perf_counter() - started)
            return result

        self._network.forward = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._network.forward = self._forward  # type: ignore[method-assign]


class Syncs(TorchDispatchMode):
    """Counts reads of a tensor's value, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def run(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe(
        num_inference_steps=STEPS, generator=generator, output_type="latent", **call
    )[0]
    return latents


def measured(shape: str, way: str, rounds: int) -> dict[str, Any]:
    """One way, in this process."""
    torch.manual_seed(0)
    pipe, call = SHAPES[shape]()
    network = pipe.transformer
    for parameter in network.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter.detach(), std=0.02)
    network.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    row: dict[str, Any] = {}
    if way == FIRST_BLOCK_CACHE:
        if not hasattr(network, "enable_cache"):
            return {"note": "diffusers has no cache for this network"}
        threshold = threshold_of(pipe, call)
        if threshold is None:
            return {"note": "no threshold refreshes at these steps"}
        row["threshold"] = threshold
        network.disable_cache()
        first_block_cache(threshold)(pipe)
    else:
        WAYS[way](pipe)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    started = time.perf_counter()
    latents = run(pipe, call)
    row["first_run_seconds"] = time.perf_counter() - started
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    frames = torch._dynamo.utils.counters["frames"].get("ok", 0)
    best: list[float] = []
    for _ in range(rounds):
        with Clock(network) as clock:
            found = run(pipe, call)
        best = min(best or clock.seconds, clock.seconds, key=sum)
    row["recompiles"] = torch._dynamo.utils.counters["frames"].get("ok", 0) - frames
    row["graph_breaks"] = breaks
    row["step_seconds"] = sum(best) / STEPS
    if way in UNCOMPILED:
        with Syncs() as syncs:
            run(pipe, call)
        row["value_reads"] = syncs.count
    assert torch.equal(found, latents) or torch.allclose(found, latents, rtol=1e-3, atol=1e-3)
    if way.startswith("dcompile"):
        handle = dcompile.handle(pipe)
        stats = handle.stats
        assert stats.uncached_calls == stats.forced_steps == 0
        row["ratio"] = handle.explain().depths[0].ratio
    return {**row, "latents": latents.flatten().tolist()}


def threshold_of(pipe: Any, call: dict[str, Any]) -> float | None:
    """A threshold at which First Block Cache refreshes at the steps of the mask."""
    for threshold in THRESHOLDS:
        if steps_computed(pipe, call, threshold) == [n for n, full in enumerate(MASK) if full]:
            return threshold
    return None


def steps_computed(pipe: Any, call: dict[str, Any], threshold: float) -> list[int]:
    """The steps at which First Block Cache runs the second block."""
    network = pipe.transformer
    second = next(one for name, one in network.named_modules() if name.endswith("blocks.1"))
    part = next(one for one in second.modules() if isinstance(one, torch.nn.Linear))
    called: list[int] = []  # numbers of calls
    calls = itertools.count()
    number = -1

    def begin(*_: Any) -> None:
        nonlocal number
        number = next(calls)

    first_block_cache(threshold)(pipe)
    hooks = [
        network.register_forward_pre_hook(begin),
        part.register_forward_hook(lambda *_: called.append(number)),
    ]
    try:
        run(pipe, call)
    finally:
        for hook in hooks:
            hook.remove()
        network.disable_cache()
    each = (number + 1) // STEPS
    return sorted({one // each for one in called})


def job(shape: str, way: str, rounds: int) -> dict[str, Any]:
    """One way, in a process of its own: what one compiles is not another's."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--job", shape, "--way", way, "--into", str(out)]
        found = subprocess.run(
            [*command, "--rounds", str(rounds)], capture_output=True, text=True, check=False
        )
        if found.returncode:
            return {"note": (found.stderr.strip().splitlines() or ["failed"])[-1]}
        row: dict[str, Any] = json.loads(out.read_text())
        return row


def relative(one: list[float], other: list[float]) -> float:
    first, second = torch.tensor(one), torch.tensor(other)
    return float((first - second).norm() / second.norm())


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Residual cuts beside cache-dit and diffusers",
        "",
        "Written by `python bench/residual.py`. Networks of random weights with the structure of",
        "the ones named, a tenth as wide; one picture or video of 256x256 (Wan: nine frames of",
        f"128x128), {STEPS} steps, every {INTERVAL}rd refreshed; mean step of the best of",
        f"{results['rounds']} runs, on {results['threads']} threads of {results['processor']}, "
        f"torch {results['torch']},",
        f"diffusers {results['diffusers']}, cache-dit {results['cache-dit']}. Value reads are of",
        "a whole run: each waits for a GPU, and breaks a graph. The difference of the results is",
        "relative, to cache-dit's, uncompiled. Limits count FLOPs alone: networks as small as",
        "these also save overhead, so that shares beyond 100% are possible. Ways are timed one",
        "after another, and times vary from run to run.",
        "",
    ]
    for shape, rows in results["shapes"].items():
        ours = rows.get("dcompile, eager", {})
        limit = INTERVAL / (1 + (INTERVAL - 1) * ours["ratio"]) if "ratio" in ours else None
        base = rows["diffusers"]["step_seconds"]
        lines += [f"## {shape}", ""]
        if limit:
            share = base / ours["step_seconds"] / limit
            lines += [
                f"r = {ours['ratio']:.3f}, limit {limit:.2f}x; dcompile on eager reaches "
                f"{share:.1%} of it.",
                "",
            ]
        lines += [
            "| way | mean step, ms | speed-up | first run, s | graph breaks | recompiles | "
            "value reads | difference |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for way, row in rows.items():
            if "note" in row:
                lines.append(f"| {way} | {row['note']} | | | | | | |")
                continue
            difference = f"{row['difference']:.1e}" if "difference" in row else "–"
            lines.append(
                f"| {way} | {1e3 * row['step_seconds']:.1f} | {base / row['step_seconds']:.2f}x | "
                f"{row['first_run_seconds']:.1f} | {row['graph_breaks']} | {row['recompiles']} | "
                f"{row.get('value_reads', '–')} | {difference} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(
    shapes: Annotated[str, typer.Option(help="Of these, separated by commas.")] = ",".join(SHAPES),
    rounds: Annotated[int, typer.Option(help="Timed runs of each way.")] = 3,
    job_of: Annotated[str, typer.Option("--job", hidden=True)] = "",
    way: Annotated[str, typer.Option(hidden=True)] = "",
    into: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every way on every shape, and write the page."""
    if job_of:
        Path(into).write_text(json.dumps(measured(job_of, way, rounds)))
        return
    from importlib.metadata import version

    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "cache-dit": version("cache-dit"),
        "rounds": rounds,
        "shapes": {},
    }
    for shape in shapes.split(","):
        rows = results["shapes"][shape] = {}
        for name in (*WAYS, FIRST_BLOCK_CACHE):
            rows[name] = job(shape, name, rounds)
            print(shape, name, {k: v for k, v in rows[name].items() if k != "latents"}, flush=True)
        reference = rows["cache-dit"].get("latents")
        for name, row in rows.items():
            latents = row.pop("latents", None)
            if (
                reference is not None
                and latents is not None
                and name
                not in (
                    "diffusers",
                    "torch.compile of blocks",
                )
            ):
                row["difference"] = relative(latents, reference)
    (RESULTS / "residual.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "residual.md").write_text(page(results))


if __name__ == "__main__":
    typer.run(main)
