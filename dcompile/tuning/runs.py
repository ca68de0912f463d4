"""The runs that are measured: those of the user's function, or the pipeline's own calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dcompile.errors import DcompileError, TuneError
from dcompile.integrations.pipelines import is_pipeline, network_of
from dcompile.progress import StepBar

PROMPTS = (
    "a red apple on a wooden table",
    "a portrait of an old man with a beard",
    "a city street at night in the rain",
    "a dog running on a beach",
    "mountains behind a lake, oil painting",
    "a bowl of soup, seen from above",
    "a steam locomotive",
    "a bird on a branch in the snow",
)
"""What a text-to-image pipeline is given unless the user names prompts."""

_CLASS_COUNTS = ("num_class_embeds", "num_embeds_ada_norm", "num_classes")


def runs_of(
    module: Any,
    run: Callable[..., Any] | None,
    samples: int,
    arguments: Mapping[str, Any] | None = None,
) -> list[Callable[[], Any]]:
    """One function for each sample.

    Args:
        module: the network or pipeline that is measured.
        run: the user's, called with the sample's number if it takes an argument; None to call the
            pipeline, with a seed for each sample.
        samples: number of samples, unless ``run`` takes no number.
        arguments: of those calls; a list of prompts or class labels is taken in turn.

    Raises:
        TuneError: ``run`` is no function; there is none, and ``module`` is no pipeline; or there
            are both ``run`` and ``arguments``.
    """
    if run is None:
        if not is_pipeline(module):
            raise TuneError(
                f"{type(module).__name__} is no pipeline, so its runs are not known: give "
                "run=, a function that generates one sample"
            )
        return [_Call(module, number, samples, arguments or {}) for number in range(samples)]
    if arguments is not None:
        raise TuneError("arguments= are those of the pipeline's own calls: run= makes its own")
    if not callable(run):
        raise TuneError(f"run: expected a function, got {run!r}")
    if not _takes_number(run):
        return [run]
    return [lambda number=number: run(number) for number in range(samples)]  # type: ignore[misc]


def _takes_number(run: Callable[..., Any]) -> bool:
    return any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        for parameter in inspect.signature(run).parameters.values()
    )


class _Call:
    """A call of a pipeline for one sample, the same each time."""

    def __init__(
        self, pipeline: Any, number: int, samples: int, arguments: Mapping[str, Any]
    ) -> None:
        self._pipeline = pipeline
        self._seed = number
        parameters = inspect.signature(pipeline.__call__).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [name for name in arguments if name not in parameters and not anything]
        if unknown:
            raise TuneError(
                f"{type(pipeline).__name__} takes no {', '.join(unknown)}: arguments= are those of "
                "its call"
            )
        self._arguments = dict(arguments)
        for name, own in (
            ("prompt", PROMPTS),
            ("class_labels", _labels(pipeline, samples) if "class_labels" in parameters else ()),
        ):
            if name not in parameters or arguments.get(f"{name}_embeds") is not None:
                continue
            given = self._arguments.get(name, own)
            if isinstance(given, (list, tuple)) and given:
                each = given[number % len(given)]
                self._arguments[name] = [each] if name == "class_labels" else each
        if "output_type" in parameters:  # in full precision, not as pictures of 8 bits
            self._arguments.setdefault("output_type", "pt")

    def __call__(self) -> Any:
        generator = torch.Generator().manual_seed(self._seed)
        with _without_progress_bar(self._pipeline):
            try:
                return self._pipeline(**{"generator": generator, **self._arguments})
            except DcompileError:
                raise
            except (TypeError, ValueError, AttributeError) as error:  # so do they refuse arguments
                first = (str(error).strip() or "no message").splitlines()[0]
                raise TuneError(
                    f"{type(self._pipeline).__name__} cannot be called with "
                    f"{', '.join(self._arguments) or 'nothing'} alone ({type(error).__name__}: "
                    f"{first}): give arguments=, or run=, a function that generates one sample"
                ) from error


def _labels(pipeline: Any, samples: int) -> tuple[int, ...]:
    """Class labels far apart."""
    config = getattr(network_of(pipeline), "config", {})
    counts = [getattr(config, name, None) for name in _CLASS_COUNTS]
    count = next((count for count in counts if type(count) is int and count > 0), 1)
    return tuple(number * count // samples for number in range(samples))


@contextmanager
def _without_progress_bar(pipeline: Any) -> Iterator[None]:
    """Ours shows the progress."""
    own = vars(pipeline)
    before = {"progress_bar": own["progress_bar"]} if "progress_bar" in own else {}
    pipeline.progress_bar = _silent
    try:
        yield
    finally:
        del pipeline.progress_bar
        own.update(before)


def _silent(iterable: Iterable[Any] = (), total: int | None = None) -> StepBar:
    return StepBar(iterable, lambda done: None)


__all__ = ["PROMPTS", "runs_of"]
