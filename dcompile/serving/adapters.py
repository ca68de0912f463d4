"""Sets of LoRA weights, swapped between runs without compiling anything again.

A set is fused into the weights once, and the parameters that this changes are kept. Using it means
to copy their values in place, so that the network's structure, and with it every program, stays the
same. Two uses of one set are bit for bit alike, which fusing and unfusing in turn would not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dcompile.errors import ModelError, first_line
from dcompile.models.loading import LOAD_ERRORS

_NAME = "dcompile"


class Adapters:
    """The sets that one pipeline may use.

    Args:
        pipeline: of diffusers.
        sources: name of a set -> folder or file.

    Raises:
        ModelError: the pipeline takes no LoRA weights, or a set cannot be loaded.
    """

    def __init__(self, pipeline: Any, sources: Mapping[str, str]) -> None:
        self._pipeline = pipeline
        self._current = ""
        self._base: dict[tuple[str, str], torch.Tensor] = {}
        self._sets = {name: self._fused(name, source) for name, source in sources.items()}

    def use(self, name: str) -> None:
        """Give the pipeline the weights of this set; of none if the name is empty."""
        if name == self._current:
            return
        live = self._parameters()
        # Of the set that was used so far, everything goes back first.
        before, after = self._sets.get(self._current, {}), self._sets.get(name, {})
        with torch.no_grad():
            for key in before.keys() - after.keys():
                live[key].copy_(self._base[key])
            for key, value in after.items():
                live[key].copy_(value)
        self._current = name

    def _fused(self, name: str, source: str) -> dict[tuple[str, str], torch.Tensor]:
        pipeline = self._pipeline
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelError(f"{type(pipeline).__name__} takes no LoRA weights")
        before = {key: value.detach().clone() for key, value in self._parameters().items()}
        attributes = {module: set(vars(module)) for module in self._modules()}
        try:
            pipeline.load_lora_weights(source, adapter_name=_NAME)
            pipeline.fuse_lora(adapter_names=[_NAME])
            pipeline.unload_lora_weights()
        except LOAD_ERRORS as error:
            raise ModelError(f"cannot load LoRA weights {name!r}: {first_line(error)}") from error
        for module, names in attributes.items():  # unloading leaves some, and programs look at them
            for added in vars(module).keys() - names:
                del vars(module)[added]
        found: dict[tuple[str, str], torch.Tensor] = {}
        with torch.no_grad():
            for key, value in self._parameters().items():
                if not torch.equal(value, before[key]):
                    found[key] = value.detach().clone()
                    self._base.setdefault(key, before[key])
                    value.copy_(before[key])
        if not found:
            raise ModelError(f"LoRA weights {name!r} change nothing in this pipeline")
        return found

    def _modules(self) -> list[nn.Module]:
        components = self._pipeline.components.values()
        return [one for held in components if isinstance(held, nn.Module) for one in held.modules()]

    def _parameters(self) -> dict[tuple[str, str], torch.Tensor]:
        return {
            (component, name): parameter
            for component, module in self._pipeline.components.items()
            if isinstance(module, nn.Module)
            for name, parameter in module.named_parameters()
        }
