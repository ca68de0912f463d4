"""The command line: ``dcompile demo``, ``explain``, ``bench``, ``profile``, ``tune`` and more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcompile import models
from dcompile.cli import options
from dcompile.cli.console import (
    console,
    errors_in_one_line,
    note,
    progress_bar,
    quiet_libraries,
    require_writable,
)
from dcompile.cli.fleet import build, serve
from dcompile.cli.generate import generate
from dcompile.errors import DcompileError, DepthError, NoCutError
from dcompile.version import __version__

if TYPE_CHECKING:
    from dcompile.cli.sampling import Sampler

app = typer.Typer(
    help="Diffusion networks, 2 to 5 times faster, without training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dcompile {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Diffusion networks, 2 to 5 times faster, without training."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=options.MODEL_HELP)] = models.DEFAULT,
    prompt: options.Prompts = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="Refresh every Nth step; repeat for several runs. Default: 3 and 5."),
    ] = None,
    depth: Annotated[int, typer.Option(help="The cut; see explain.")] = 0,
    backend: Annotated[str, typer.Option(help="eager, inductor, ...")] = "eager",
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures, in one batch. Default: 8, or one for each prompt."),
    ] = None,
    size: options.Size = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    repeat: Annotated[
        int, typer.Option(min=1, help="Report the fastest of this many runs: for a busy machine.")
    ] = 1,
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("dcompile-demo.png"),
) -> None:
    """Sample uncached and cached with the same seeds; compare time and pictures."""
    with errors_in_one_line(), quiet_libraries():
        require_writable(out)
        from dcompile.cli.demo import run_demo
        from dcompile.cli.grid import picture_grid
        from dcompile.cli.settings import DemoSettings
        from dcompile.cli.tables import demo_table

        settings = DemoSettings(
            model=model,
            prompts=tuple(prompt or ()),
            steps=steps,
            intervals=tuple(interval or (3, 5)),
            depth=depth,
            backend=backend,
            count=count,
            size=size,
            guidance=guidance,
            seed=seed,
            repeat=repeat,
            device=device,
        )
        with progress_bar() as progress:
            result = run_demo(settings, progress)
        picture_grid(result).save(out)
        console().print(demo_table(result))
        note(f"wrote {out}")


@app.command()
def explain(
    model: options.ModelOrNetwork,
    depth: Annotated[int, typer.Option(help="The cut.")] = 0,
    size: options.SizeOfAny = None,
    svg: Annotated[
        Path | None,
        typer.Option(help="Write a drawing of the cut network to this file.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a model can be cut and what that saves, without generating anything."""
    with errors_in_one_line(), quiet_libraries():
        if svg is not None:
            require_writable(svg)
        from dcompile.api import cache_compile, handle
        from dcompile.cli.loading import example_call
        from dcompile.report.svg import draw_svg

        if depth < 0:
            raise DepthError(f"depth: expected an int of at least 0, got {depth}")
        network, args, kwargs = example_call(model, size)
        found = handle(cache_compile(network, depth=depth, backend="eager", verbose=False))
        explanation = found.explain(*args, **kwargs)
        found.remove()
        if not explanation.depths:
            raise NoCutError(
                f"{explanation.network} has neither skip connections nor a residual stream to cut"
            )
        if depth >= len(explanation.depths):
            raise DepthError(
                f"depth {depth} is out of range: {explanation.network} has depths 0 to "
                f"{len(explanation.depths) - 1}"
            )
        if as_json:
            typer.echo(json.dumps(explanation.as_dict(), indent=2))
        else:
            console().print(explanation)
        if svg is not None:
            svg.write_text(draw_svg(explanation), encoding="utf-8")
            note(f"wrote {svg}")


@app.command()
def bench(
    model: options.ModelOrNetwork,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    steps: options.Steps = 30,
    interval: options.Intervals = None,
    depth: Annotated[int, typer.Option(help="The cut; see explain.")] = 0,
    backend: options.Backends = None,
    peer: options.Peers = None,
    count: options.CountForPrompts = None,
    size: options.SizeOfAny = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each way, in turns.")] = 3,
    budget: options.Budget = None,
    device: options.Device = "auto",
    data: options.Numbers = None,
) -> None:
    """Measure speed, fidelity and memory of your own model, uncached and cached."""
    with errors_in_one_line(), quiet_libraries():
        if data is not None:
            require_writable(data)
        from dcompile.cli.bench import run_bench
        from dcompile.cli.bench_result import MEASURED
        from dcompile.cli.bench_tables import bench_tables
        from dcompile.cli.settings import BenchSettings, read_prompts

        settings = BenchSettings(
            model=model,
            prompts=(*(prompt or ()), *(read_prompts(prompts_file) if prompts_file else ())),
            steps=steps,
            intervals=tuple(interval or (2, 3, 5)),
            depth=depth,
            backends=tuple(backend or ()),
            peers=tuple(peer or ()),
            count=count,
            size=size,
            guidance=guidance,
            seed=seed,
            repeat=repeat,
            budget=budget,
            device=device,
        )
        with progress_bar() as progress:
            result = run_bench(settings, progress)
        console().print(bench_tables(result))
        if data is not None:
            result.save(data)
            note(f"wrote {data}")
        if result.uncached.status != MEASURED:
            raise typer.Exit(1)  # nothing to compare with


@app.command()
def profile(
    model: options.Model,
    prompt: options.Prompts = None,
    steps: options.Steps = 50,
    depth: Annotated[
        list[int] | None, typer.Option(help="A depth to measure; repeat for several. Default: all.")
    ] = None,
    count: options.Count = 4,
    size: options.Size = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("dcompile-profile.png"),
    data: options.Numbers = None,
) -> None:
    """Measure how similar deep features are from step to step, at each depth."""
    with errors_in_one_line(), quiet_libraries():
        from dcompile.cli.tables import profile_table
        from dcompile.report.plots import require_matplotlib
        from dcompile.tuning.profile import profile as measure

        require_matplotlib(out)
        for file in (out, data):
            if file is not None:
                require_writable(file)
        if data == out:
            raise DcompileError(f"{out} is the picture's file: choose another for the numbers")
        sampler = _sampler(model, prompt, steps, count, size, guidance, seed, device)
        found = measure(sampler.pipeline, sampler.pictures, depths=tuple(depth) if depth else None)
        console().print(profile_table(found))
        found.plot(out)
        note(f"wrote {out}")
        if data is not None:
            found.save(data)
            note(f"wrote {data}")


@app.command()
def tune(
    model: options.Model,
    speedup: Annotated[
        float | None,
        typer.Option(help="Speed-up in FLOPs to reach. Default: 2.5, unless --psnr is given."),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(help="Instead: PSNR in dB to reach against the uncached pictures."),
    ] = None,
    prompt: options.Prompts = None,
    steps: options.Steps = 50,
    depth: Annotated[
        list[int] | None,
        typer.Option(help="A depth to try; repeat for several. Default: those worth trying."),
    ] = None,
    forecast: Annotated[
        list[str] | None,
        typer.Option(
            help="A forecast to try; repeat for several. Default: reuse, damped, linear, taylor."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to try in real runs.")] = 8,
    interval: Annotated[
        list[int] | None,
        typer.Option(
            help="A DeepCache interval to compare with; repeat for several. Default: 2, 3, 5, 10."
        ),
    ] = None,
    count: options.Count = 4,
    size: options.Size = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="The schedule to write.")] = Path("tuned.json"),
    plot: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write. Default: next to the schedule.", show_default=False
        ),
    ] = None,
) -> None:
    """Find refresh steps, depth and forecast for a model, and compare with DeepCache."""
    with errors_in_one_line(), quiet_libraries():
        from dcompile.cli.tables import tuned_table
        from dcompile.report.plots import require_matplotlib
        from dcompile.tuning.tune import FORECASTS
        from dcompile.tuning.tune import tune as find

        require_matplotlib(plot)
        require_writable(out)
        picture = out.with_suffix(".png") if plot is None else plot
        require_writable(picture)
        if picture == out:
            raise DcompileError(f"{out} is the schedule's file: choose another for the picture")
        sampler = _sampler(model, prompt, steps, count, size, guidance, seed, device)
        tuned = find(
            sampler.pipeline,
            sampler.pictures,
            speedup=2.5 if speedup is None and psnr is None else speedup,
            psnr=psnr,
            depths=tuple(depth) if depth else None,
            forecasts=tuple(forecast) if forecast else FORECASTS,
            trials=trials,
            intervals=tuple(interval) if interval else (2, 3, 5, 10),
        )
        tuned.save(out)
        tuned.plot(picture)
        console().print(tuned_table(tuned))
        note(f"wrote {out} and {picture}")
        note(f'use it: cache_compile(pipe, schedule=Tuned.load("{out}"))')


app.command()(serve)
app.command()(build)
app.command()(generate)


def _sampler(
    model: str,
    prompt: list[str] | None,
    steps: int,
    count: int,
    size: int | None,
    guidance: float | None,
    seed: int,
    device: str,
) -> Sampler:
    from dcompile.cli.sampling import Sampler
    from dcompile.cli.settings import DemoSettings
    from dcompile.models.loading import load_pipeline, resolve_device

    settings = DemoSettings(
        model=model,
        prompts=tuple(prompt or ()),
        steps=steps,
        count=max(count, len(prompt or ())),
        size=size,
        guidance=guidance,
        seed=seed,
    )
    return Sampler(load_pipeline(model, resolve_device(device)), settings)
