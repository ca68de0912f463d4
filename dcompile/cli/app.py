"""The command line: ``dcompile demo``, ``explain``, ``profile`` and ``tune``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcompile import models
from dcompile.errors import DcompileError, DepthError, NoSkipConnectionError
from dcompile.version import __version__

if TYPE_CHECKING:
    from dcompile.cli.demo import Sampler

app = typer.Typer(
    help="Diffusion networks with skip connections, 2 to 5 times faster, without training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

WIDTH_OF_FILES = 110  # columns, where there is no terminal to ask
BAD_INPUT = 2  # the exit code of a wrong argument, as typer's own

_MODEL_HELP = (
    f"{', '.join(sorted({models.DEFAULT, 'ddpm'}))} (bundled), a diffusers pipeline's folder, or "
    "its id on the Hugging Face hub."
)


# Options of several commands.
_Prompts = Annotated[
    list[str] | None,
    typer.Option(help="What to draw; repeat for several. Takes a text-to-image model."),
]
_Steps = Annotated[int, typer.Option(min=2, help="Denoising steps.")]
_Size = Annotated[
    int | None, typer.Option(min=1, help="Pixels per side. Default: the model's own.")
]
_Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. Default: what suits the model.")
]
_Seed = Annotated[int, typer.Option(help="Of the first picture; the next has the next.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dcompile {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Diffusion networks with skip connections, 2 to 5 times faster, without training."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = models.DEFAULT,
    prompt: _Prompts = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="Refresh every Nth step; repeat for several runs. Default: 3 and 5."),
    ] = None,
    depth: Annotated[int, typer.Option(help="The skip connection to cut at; see explain.")] = 0,
    backend: Annotated[str, typer.Option(help="eager, inductor, ...")] = "eager",
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures, in one batch. Default: 8, or one for each prompt."),
    ] = None,
    size: _Size = None,
    guidance: _Guidance = None,
    seed: _Seed = 0,
    repeat: Annotated[
        int, typer.Option(min=1, help="Time the best of this many runs: for a busy machine.")
    ] = 1,
    device: _Device = "auto",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("dcompile-demo.png"),
) -> None:
    """Sample uncached and cached with the same seeds; compare time and pictures."""
    with _errors_in_one_line(), _quiet_libraries():
        _check_writable(out)
        from dcompile.cli.demo import DemoSettings, picture_grid, run_demo
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
        with _progress() as progress:
            result = run_demo(settings, progress)
        picture_grid(result).save(out)
        _console().print(demo_table(result))
        _note(f"wrote {out}")


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help=f"{_MODEL_HELP} Or a bare network's folder.", show_default=False)
    ],
    depth: Annotated[int, typer.Option(help="The skip connection to cut at.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width. Pixels; of a bare network, its sample's."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Write a drawing of the cut network.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Show where a model can be cut and what that saves, without generating anything."""
    with _errors_in_one_line(), _quiet_libraries():
        if svg is not None:
            _check_writable(svg)
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
            raise NoSkipConnectionError(
                f"{explanation.network} has no skip connection, so there is nothing to cut"
            )
        if depth >= len(explanation.depths):
            raise DepthError(
                f"depth {depth} is out of range: {explanation.network} has depths 0 to "
                f"{len(explanation.depths) - 1}"
            )
        if as_json:
            typer.echo(json.dumps(explanation.as_dict(), indent=2))
        else:
            _console().print(explanation)
        if svg is not None:
            svg.write_text(draw_svg(explanation), encoding="utf-8")
            _note(f"wrote {svg}")


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)],
    prompt: _Prompts = None,
    steps: _Steps = 50,
    depth: Annotated[
        list[int] | None, typer.Option(help="A cut to look at; repeat for several. Default: all.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures, in one batch.")] = 4,
    size: _Size = None,
    guidance: _Guidance = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("dcompile-profile.png"),
    data: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers, too.", show_default=False)
    ] = None,
) -> None:
    """Show how alike deep features are from step to step, at each depth."""
    with _errors_in_one_line(), _quiet_libraries():
        from dcompile.cli.tables import profile_table
        from dcompile.report.plots import require_matplotlib
        from dcompile.tuning.profile import profile as measure

        require_matplotlib(out)
        for file in (out, data):
            if file is not None:
                _check_writable(file)
        if data == out:
            raise DcompileError(f"{out} is the picture's file: choose another for the numbers")
        sampler = _sampler(model, prompt, steps, count, size, guidance, seed, device)
        found = measure(sampler.pipeline, sampler.pictures, depths=tuple(depth) if depth else None)
        _console().print(profile_table(found))
        found.plot(out)
        _note(f"wrote {out}")
        if data is not None:
            found.save(data)
            _note(f"wrote {data}")


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)],
    speedup: Annotated[
        float | None, typer.Option(help="How much less compute (FLOPs); 2.5 if nothing is said.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="Or: as fast as can be at this PSNR against uncached, dB.")
    ] = None,
    prompt: _Prompts = None,
    steps: _Steps = 50,
    depth: Annotated[
        list[int] | None,
        typer.Option(help="A cut to try; repeat for several. Default: those worth trying."),
    ] = None,
    forecast: Annotated[
        list[str] | None,
        typer.Option(help="To try; repeat for several. Default: reuse, checked, linear, taylor."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to try in real runs.")] = 24,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="DeepCache's, to compare with; repeat. Default: 2, 3, 5 and 10."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures, in one batch.")] = 4,
    size: _Size = None,
    guidance: _Guidance = None,
    seed: _Seed = 0,
    device: _Device = "auto",
    out: Annotated[Path, typer.Option(help="The schedule to write.")] = Path("tuned.json"),
    plot: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write. Default: next to the schedule.", show_default=False
        ),
    ] = None,
) -> None:
    """Find the refresh steps, depth and forecast that suit a model; compare with DeepCache's."""
    with _errors_in_one_line(), _quiet_libraries():
        from dcompile.cli.tables import tuned_table
        from dcompile.report.plots import require_matplotlib
        from dcompile.tuning.tune import FORECASTS
        from dcompile.tuning.tune import tune as find

        require_matplotlib(plot)
        _check_writable(out)
        picture = out.with_suffix(".png") if plot is None else plot
        _check_writable(picture)
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
        _console().print(tuned_table(tuned))
        _note(f"wrote {out} and {picture}")
        _note(f'use it: cache_compile(pipe, schedule=Tuned.load("{out}"))')


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
    from dcompile.cli.demo import DemoSettings, Sampler
    from dcompile.cli.loading import load_pipeline, resolve_device

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


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Print dcompile's own errors, which say what to do, without a traceback."""
    try:
        yield
    except DcompileError as error:
        from rich.text import Text

        # Text, not markup: messages have brackets in them. Not wrapped: they are searched for.
        _console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """diffusers' and transformers' bars and notices would tear up the progress display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    yield


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, gone when done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting")
        stage = ""

        def tell(description: str, done: int, of: int) -> None:
            nonlocal stage
            if description != stage:
                stage = description
                bar.reset(task, description=description, total=of)
            bar.update(task, completed=done, total=of)

        yield tell


def _check_writable(file: Path) -> None:
    """Complain before the work rather than after it."""
    if file.is_dir():
        raise DcompileError(f"{file} is a folder; expected a file to write")
    if not file.absolute().parent.is_dir():
        raise DcompileError(f"cannot write {file}: there is no folder {file.parent}")


def _note(text: str) -> None:
    from rich.text import Text

    _console(stderr=True).print(Text(text, style="dim"), soft_wrap=True)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_FILES
    return console
