"""Finds a model by the name a user gives, and loads its pipeline."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcompile import models
from dcompile.errors import DcompileError, ModelError, first_line

PIPELINE_FILE, NETWORK_FILE = "model_index.json", "config.json"

# What loading files of unknown origin may raise; huggingface_hub's own errors are OSErrors.
LOAD_ERRORS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_INSTALL_TRANSFORMERS = 'pip install "dcompile[demo]"'


def locate(model: str) -> str | Path:
    """The folder, or the id on the Hugging Face hub, of a model.

    Args:
        model: a bundled model's name or alias ("ddpm", "sd"), a folder with a diffusers pipeline or
            network, or an id, ``owner/name``.

    Raises:
        ModelError: it is none of these.
    """
    if model in models.ALIASES or model in models.names():
        return models.path(models.ALIASES.get(model, model))
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in (PIPELINE_FILE, NETWORK_FILE)):
            raise ModelError(
                f"{model} is not a diffusers model: expected a {PIPELINE_FILE} (pipeline) or a "
                f"{NETWORK_FILE} (network) in it"
            )
        return path
    if path.exists():
        raise ModelError(f"{model} is a file; expected the folder of a diffusers pipeline")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return model
    if "/" in model or "\\" in model:
        raise ModelError(f"there is no folder {model}")
    known = sorted({*models.ALIASES, *models.names()})
    raise ModelError(
        f"unknown model {model!r}: expected {', '.join(known)}, the folder of a diffusers "
        "pipeline, or an id on the Hugging Face hub (owner/name)"
    )


def is_network(model: str) -> bool:
    """Whether this is the folder of a bare network, not of a pipeline.

    Raises:
        ModelError: there is no such model.
    """
    source = locate(model)
    return isinstance(source, Path) and not (source / PIPELINE_FILE).is_file()


def load_pipeline(model: str, device: torch.device | None = None) -> Any:
    """A diffusers pipeline, without progress bars, on ``device``.

    Half precision on CUDA, except for the bundled models; otherwise float32.

    Raises:
        ModelError: there is no such model, it cannot be loaded, or transformers is missing.
    """
    source = locate(model)
    if is_network(model):
        raise ModelError(
            f"{model} is a network, not a pipeline: expected a folder with a {PIPELINE_FILE}"
        )
    # diffusers' own error names neither transformers nor the model.
    without_transformers = importlib.util.find_spec("transformers") is None
    if isinstance(source, Path) and without_transformers and _has_parts_of_transformers(source):
        raise ModelError(f"{model} needs transformers: {_INSTALL_TRANSFORMERS}")
    import diffusers

    bundled = isinstance(source, Path) and source.parent == Path(models.__file__).parent
    half = device is not None and device.type == "cuda" and not bundled
    pipeline_class = diffusers.DiffusionPipeline  # imports transformers, if it is there
    try:
        with without_bars(), warnings.catch_warnings():
            # Newer releases warn of torch_dtype=, older ones have no dtype=.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = pipeline_class.from_pretrained(
                source, torch_dtype=torch.float16 if half else torch.float32
            )
    except LOAD_ERRORS as error:
        origin = "" if isinstance(source, Path) else ", no folder here, from the Hugging Face hub"
        hint = f" (without transformers: {_INSTALL_TRANSFORMERS})" if without_transformers else ""
        raise ModelError(f"cannot load {model}{origin}: {first_line(error)}{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def is_unconditional(pipeline: Any) -> bool:
    """Whether a pipeline consists of a UNet and a scheduler only, as ``DDPMPipeline`` does."""
    return set(pipeline.components) == {"unet", "scheduler"} and "encoder_hidden_states" not in (
        inspect.signature(pipeline.unet.forward).parameters
    )


def with_few_steps(pipeline: Any) -> Any:
    """An unconditional pipeline with DDIM, which samples in 50 steps what DDPM does in 1,000."""
    import diffusers

    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    return diffusers.DDIMPipeline(pipeline.unet, scheduler)


def _has_parts_of_transformers(folder: Path) -> bool:
    return b'"transformers"' in (folder / PIPELINE_FILE).read_bytes()


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        DcompileError: this machine has no such device.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if device == "auto":
        return torch.device(available[0])
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DcompileError(
            f"unknown device {device!r}: expected auto, {', '.join(available)}"
        ) from error
    if chosen.type not in available:
        raise DcompileError(f"no device {device!r} here; there is {', '.join(available)}")
    return chosen


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable the progress bars that diffusers and transformers show for the files they read."""
    loaded = [sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    enabled: list[Any] = [log for log in loaded if log and log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()
