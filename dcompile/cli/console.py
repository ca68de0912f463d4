"""What commands print beyond their tables: progress, notes, and errors in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from dcompile.errors import DcompileError

WIDTH_OF_FILES = 110  # columns, where output is not a terminal
BAD_INPUT = 2  # the exit code of a wrong argument, as in typer


def console(stderr: bool = False) -> Console:
    """A console for tables; on standard error, one for everything else."""
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = WIDTH_OF_FILES
    return found


def note(text: str) -> None:
    """Print a line on standard error."""
    console(stderr=True).print(Text(text, style="dim"), soft_wrap=True)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print dcompile's own errors without a traceback, and exit with ``BAD_INPUT``."""
    try:
        yield
    except DcompileError as error:
        # Text, not markup: messages contain brackets. Not wrapped: people search for messages.
        console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence diffusers and transformers, whose bars and notices interrupt the progress display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    yield


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, removed when done; yields what ``cli.sampling.Progress`` is."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting")
        stage = ""

        def show(description: str, done: int, of: int) -> None:
            nonlocal stage
            if description != stage:
                stage = description
                bar.reset(task, description=description, total=of)
            bar.update(task, completed=done, total=of)

        yield show


def require_writable(file: Path) -> None:
    """Check before the work, not after it, that a file can be written.

    Raises:
        DcompileError: it is a folder, its folder does not exist, or it is not allowed.
    """
    if file.is_dir():
        raise DcompileError(f"{file} is a folder; expected a file to write")
    if not file.absolute().parent.is_dir():
        raise DcompileError(f"cannot write {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise DcompileError(f"cannot write {file}: no permission")
