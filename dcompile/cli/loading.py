"""Makes an example call of a model's denoiser, and loads bare networks."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcompile.api import cache_compile, handle
from dcompile.errors import ModelError, first_line
from dcompile.models.loading import (
    LOAD_ERRORS,
    NETWORK_FILE,
    is_network,
    is_unconditional,
    load_pipeline,
    locate,
    without_bars,
)

_EXAMPLE_PROMPT = "a photograph"
_EXAMPLE_STEPS = 4  # enough for image-to-image, which skips the first steps
_TEXT_TOKENS = 77  # sequence length of CLIP's text encoders


def example_call(
    model: str, size: int | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model's denoiser and the arguments of one call of it.

    A pipeline runs up to the first call of its denoiser. A bare network is built on the meta
    device, from its configuration and without weights; its arguments follow from that.

    Args:
        model: see ``locate``.
        size: height and width: in pixels for a pipeline, of the sample for a network.

    Raises:
        ModelError: there is no such model, or no example call can be made of it.
    """
    source = locate(model)
    if isinstance(source, Path) and is_network(model):
        return _network_call(model, source, size)
    return _first_call(load_pipeline(model), size)


def set_sample_size(pipeline: Any, size: int) -> None:
    """Make an unconditional pipeline generate pictures of another size, in pixels.

    Raises:
        ModelError: the network halves the resolution more often than the size allows.
    """
    factor = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if size % factor:
        raise ModelError(f"size: expected a multiple of {factor} for this network, got {size}")
    pipeline.unet.register_to_config(sample_size=size)


class _FirstCallError(Exception):
    """Ends a pipeline's run at the first call of its denoiser."""


def _first_call(
    pipeline: Any, size: int | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    found = handle(cache_compile(pipeline, backend="eager", verbose=False))
    network = found.module
    found.remove()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _FirstCallError

    arguments = _pipeline_arguments(pipeline, size)
    network.__dict__["forward"] = record
    try:
        pipeline(**arguments)
    except _FirstCallError:
        pass
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot make an example call of {type(pipeline).__name__}: {first_line(error)}"
        ) from error
    finally:
        del network.__dict__["forward"]
    if not calls:
        raise ModelError(
            f"{type(pipeline).__name__} never called its {type(network).__name__} as a function"
        )
    return network, *calls[0]


def _pipeline_arguments(pipeline: Any, size: int | None) -> dict[str, Any]:
    """Arguments for a run of the pipeline of which only the first step is needed."""
    parameters = inspect.signature(pipeline.__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": _EXAMPLE_PROMPT,
        "batch_size": 1,
        "num_inference_steps": _EXAMPLE_STEPS,
        "output_type": "pt",
    }
    if "image" in parameters or "mask_image" in parameters:
        from PIL import Image

        wanted["image"] = Image.new("RGB", (size or 512, size or 512), "gray")
        wanted["mask_image"] = Image.new("L", (size or 512, size or 512), "white")
    if size is not None:
        if is_unconditional(pipeline):
            set_sample_size(pipeline, size)
        wanted |= {"height": size, "width": size}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in wanted
    ]
    if missing:
        raise ModelError(
            f"cannot make an example call of {type(pipeline).__name__}: it needs "
            f"{', '.join(missing)}. In Python: handle(network).explain(sample, timestep, ...)"
        )
    return {name: value for name, value in wanted.items() if name in parameters}


def load_network(
    model: str, device: torch.device, size: int | None = None
) -> tuple[nn.Module, dict[str, Any], bool]:
    """A bare network on ``device``, half precision on CUDA, otherwise float32.

    Args:
        model: its folder.
        device: where to put it.
        size: height and width of the sample.

    Returns:
        The network; the arguments of one call of batch size 1, on the meta device; and whether its
        weights were in the folder, rather than random ones.

    Raises:
        ModelError: it cannot be loaded, or its configuration does not say how to call it.
    """
    folder = Path(model).expanduser()
    trained = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        config, network_class = _network_class(folder)
        if trained:
            with without_bars():
                network = network_class.from_pretrained(folder)
        else:
            torch.manual_seed(0)
            network = network_class.from_config(config)
        network = network.to(device, dtype).eval()
    except LOAD_ERRORS as error:
        raise ModelError(f"cannot load {model}: {first_line(error)}") from error
    return network, _network_arguments(model, network, size), trained


def _network_class(folder: Path) -> tuple[dict[str, Any], Any]:
    import diffusers

    config = json.loads((folder / NETWORK_FILE).read_text())
    return config, getattr(diffusers, config["_class_name"])


def _network_call(
    model: str, folder: Path, size: int | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    try:
        config, network_class = _network_class(folder)
        with torch.device("meta"):
            network = network_class.from_config(config).eval()
    except LOAD_ERRORS as error:
        raise ModelError(f"cannot build a network from {model}: {first_line(error)}") from error
    return network, (), _network_arguments(model, network, size)


def _network_arguments(model: str, network: Any, size: int | None) -> dict[str, Any]:
    """Arguments for a network with the signature of diffusers' 2-D UNets."""
    config = network.config
    parameters = inspect.signature(network.forward).parameters
    side = size or config.get("sample_size")
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    arguments: dict[str, Any] = {}
    if None not in sides and "in_channels" in config:
        arguments |= {
            "sample": torch.empty(1, config["in_channels"], *sides, device="meta"),
            "timestep": torch.empty((), dtype=torch.int64, device="meta"),
        }
    width = config.get("cross_attention_dim")
    if "encoder_hidden_states" in parameters and width is not None:
        width = width[0] if isinstance(width, (list, tuple)) else width
        arguments["encoder_hidden_states"] = torch.empty(1, _TEXT_TOKENS, width, device="meta")
    if config.get("addition_embed_type") == "text_time":  # SDXL: pooled text and six sizes
        sizes = 6
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= sizes * config["addition_time_embed_dim"]
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, sizes, device="meta"),
        }
    if config.get("num_class_embeds") is not None:
        arguments["class_labels"] = torch.empty(1, dtype=torch.int64, device="meta")
    missing = [
        name
        for name, parameter in parameters.items()
        if (parameter.default is parameter.empty and name not in arguments)
    ]
    unknown = config.get("addition_embed_type") not in (None, "text_time")
    if missing or unknown or "sample" not in parameters:
        reason = (
            f"its configuration does not determine {', '.join(missing)}"
            if missing
            else "its inputs are unusual"
        )
        hint = " (try --size)" if side is None else ""
        raise ModelError(
            f"{model} is a bare {type(network).__name__}, and {reason}{hint}: give the folder of a "
            "pipeline it belongs to"
        )
    return arguments
