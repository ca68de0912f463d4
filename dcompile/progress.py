"""Shows what is being captured and compiled, and how long it took.

On a terminal a spinner and a line for each stage. In any case a record of the logger "dcompile": at
level INFO if it was asked for and no terminal watches, else at level DEBUG.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from dcompile.notices import logger

SHOWN_FROM = 0.05  # seconds; shorter stages print nothing


class Display:
    """Progress: a spinner while a stage runs, one line when it is done.

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
        console = self._terminal()
        spinner = console.status(f"{self.subject}: {name} …") if console else nullcontext()
        started = time.perf_counter()
        with spinner:
            yield
        took = self.seconds[name] = time.perf_counter() - started
        self.completed[name] += 1
        if console and took >= SHOWN_FROM:
            console.print(f"[dim]{self.subject}:[/dim] {name} [cyan]{took:.1f} s[/cyan]")
        self._log(f"{name} {took:.2f} s", asked=self.verbose and not console)

    def note(self, text: str) -> None:
        """Print or log a line."""
        console = self._terminal()
        if console:
            console.print(f"[dim]{self.subject}:[/dim] {text}")
        self._log(text, asked=self.verbose and not console)

    def _terminal(self) -> Any:
        """Standard error, if it is a terminal and something is to be shown; else None."""
        if not self.verbose:
            return None
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        return console if console.is_terminal else None

    def _log(self, text: str, *, asked: bool) -> None:
        logger.log(logging.INFO if asked else logging.DEBUG, "%s: %s", self.subject, text)


class StepBar:
    """Replaces the tqdm bar of a pipeline, the one progress hook that all pipelines have.

    Args:
        iterable: what the pipeline goes over, if it does not call ``update`` itself.
        tick: called with how many steps are done.
    """

    def __init__(self, iterable: Iterable[Any], tick: Callable[[int], object]) -> None:
        self._iterable, self._tick, self._done = iterable, tick, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self._done += count
        self._tick(self._done)
