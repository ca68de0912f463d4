"""``dcompile generate``: a picture for each row of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dcompile import models
from dcompile.cli import options
from dcompile.cli.console import console, errors_in_one_line, note, quiet_libraries
from dcompile.errors import DcompileError

if TYPE_CHECKING:
    from dcompile.serving.bulk import Summary

Rows = Annotated[
    Path,
    typer.Argument(
        metavar="PROMPTS",
        help="A .parquet, .csv or .jsonl file with a row for each picture.",
        show_default=False,
    ),
]
ModelOption = Annotated[str, typer.Option(help=options.MODEL_HELP, show_default=False)]
Out = Annotated[
    Path, typer.Option(help="A folder of its own for the pictures.", show_default=False)
]
Form = Annotated[
    str,
    typer.Option("--format", help="parquet, with the pictures as PNG in it; or files: webp, png."),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows that are generated at a time, at most.")]
ActorCount = Annotated[int, typer.Option("--actors", min=1, help="Processes that generate.")]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-actor", min=0, help="May be part of one. Default: 1 where there are any."
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each process.")]
Speedup = Annotated[
    float | None, typer.Option(help="So many times fewer FLOPs. Default: 2.5, without --interval.")
]
Interval = Annotated[int | None, typer.Option(help="Instead: refresh every Nth step.")]
StepCount = Annotated[int, typer.Option(min=1, help="Denoising steps of rows that do not say.")]
Programs = Annotated[
    Path | None, typer.Option(help="A folder with compiled programs.", show_default=False)
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="NAME=PATH of LoRA weights that rows may name; repeat for several."
    ),
]
BaseSeed = Annotated[
    int, typer.Option(min=0, help="Of the first row without a seed of its own; each row adds 1.")
]


def generate(
    prompts: Rows,
    model: ModelOption,
    out: Out,
    form: Form = "parquet",
    batch: Batch = 8,
    actors: ActorCount = 1,
    gpus: Gpus = None,
    threads: Threads = 1,
    speedup: Speedup = None,
    interval: Interval = None,
    backend: Annotated[str, typer.Option(help="inductor, eager, ...")] = "inductor",
    steps: StepCount = 20,
    programs: Programs = None,
    lora: Loras = None,
    seed: BaseSeed = 0,
    device: options.Device = "auto",
) -> None:
    """Generate a picture for each row of a file; run it again to go on where it stopped."""
    with errors_in_one_line(), quiet_libraries():
        _require_libraries()
        from dcompile.integrations.bulk import Actors
        from dcompile.models.loading import locate
        from dcompile.serving.bulk import BulkSettings, generate_all
        from dcompile.serving.settings import EngineSettings

        if speedup is not None and interval is not None:
            raise DcompileError("--speedup and --interval exclude each other: give one of them")
        locate(model)  # to refuse before anything is started
        engine = EngineSettings(
            model=_absolute(model),
            speedup=speedup,
            interval=interval,
            backend=backend,
            device=device,
            steps=steps,
            programs=None if programs is None else str(programs.absolute()),
            loras=_named(lora or []),
        )
        settings = BulkSettings(engine, batch, seed, form, threads)
        with _progress_bar() as progress:
            summary = generate_all(prompts, out, settings, Actors(actors, gpus).run, progress)
        console().print(_table(summary))
        note(f"wrote {summary.manifest}")
        if summary.failed:
            note(f"why rows failed is in {out / 'failed.jsonl'}; run it again to try them again")
            raise typer.Exit(1)


def _require_libraries() -> None:
    try:
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as error:
        raise DcompileError(
            f'dcompile generate needs {error.name}: pip install "dcompile[serve]"'
        ) from error


def _named(loras: list[str]) -> dict[str, str]:
    found = {}
    for entry in loras:
        name, equals, path = entry.partition("=")
        if not name or not equals or not path:
            raise DcompileError(f"--lora: expected NAME=PATH, got {entry!r}")
        found[name] = _absolute(path)
    return found


def _absolute(path: str) -> str:
    """What names a folder or file here does so for processes elsewhere; other names stay."""
    if path in models.ALIASES or path in models.names() or not Path(path).expanduser().exists():
        return path
    return str(Path(path).expanduser().absolute())


class _Rate(ProgressColumn):
    """Pictures per second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g} pictures/s")


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error of the pictures that were left, removed when done."""
    errors = console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,  # a file would get an empty line
        speed_estimate_period=600,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, of: int) -> None:
            bar.update(task, description="generating", completed=done, total=of)

        yield show


def _table(summary: Summary) -> Table:
    table = Table(title=f"{summary.rows} rows")
    for name in ("made", "already there", "failed", "seconds", "pictures/s", "FLOPs saved"):
        table.add_column(name, justify="right")
    saved = summary.flops_speedup
    table.add_row(
        str(summary.made),
        str(summary.present),
        str(summary.failed),
        f"{summary.seconds:.1f}",
        f"{summary.made / summary.seconds:.3g}",
        "" if saved is None else f"{1 - 1 / saved:.0%} ({saved:.2f} times fewer)",
    )
    return table
