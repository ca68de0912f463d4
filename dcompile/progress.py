"""Shows what is being captured and compiled, and how long it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

SHOWN_FROM = 0.05  # seconds; shorter stages print nothing


class Display:
    """Progress on standard error: a spinner while a stage runs, one line when it is done.

    Attributes:
        subject: named at the beginning of each line, such as a class name.
        verbose: whether anything is shown.
        seconds: stage -> duration of its latest run.
        completed: stage -> number of completed runs.
    """

    def __init__(self, subject: str, verbose: bool) -> None:
        self.subject = subject
        self.verbose = verbose
        self.seconds: dict[str, float] = {}
        self.completed: Counter[str] = Counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and show it if ``verbose``."""
        console: Any = _console() if self.verbose else None
        spinner = console.status(f"{self.subject}: {name} …") if console else nullcontext()
        started = time.perf_counter()
        with spinner:
            yield
        took = self.seconds[name] = time.perf_counter() - started
        self.completed[name] += 1
        if console and took >= SHOWN_FROM:
            console.print(f"[dim]{self.subject}:[/dim] {name} [cyan]{took:.1f} s[/cyan]")

    def note(self, text: str) -> None:
        """Print a line if ``verbose``."""
        if self.verbose:
            _console().print(f"[dim]{self.subject}:[/dim] {text}")


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
