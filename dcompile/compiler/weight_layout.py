"""How the weights of convolutions lie in memory."""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import nn

from dcompile.backends import Backend
from dcompile.compat.export import one_at_a_time
from dcompile.compat.storages import storage_of
from dcompile.compat.tensors import is_wrapper


class WeightLayout:
    """Lays out the weights of a network's convolutions channels-last, in place, and back.

    The kernels for half precision on a GPU take them so. From a contiguous weight Inductor's code
    makes a channels-last copy at every step: 2.2 GB of copies for SD 1.5's full graph. Values,
    parameters and everything else stay as they are.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._wanted: bool | Literal["cuda"] = False
        self._changed: dict[int, weakref.ref[nn.Parameter]] = {}

    def configure(self, wanted: bool | Literal["auto"], backend: Backend) -> None:
        """Have ``apply`` lay weights out or not.

        Args:
            wanted: "auto" for weights on CUDA devices, with a backend that is better off so.
            backend: compiles the network.
        """
        if wanted == "auto":
            self._wanted = "cuda" if backend.prefers_channels_last else False
        else:
            self._wanted = wanted
        if not self._wanted:
            self.restore()

    def apply(self) -> None:
        """Lay out those weights that are not laid out yet, such as new ones."""
        if not self._wanted:
            return
        with one_at_a_time, torch.inference_mode(False), torch.no_grad():
            for submodule in self._module.modules():
                if not isinstance(submodule, (nn.Conv2d, nn.ConvTranspose2d)):
                    continue
                weight = submodule._parameters.get("weight")
                if weight is not None and self._is_due(weight):
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                    self._changed[id(weight)] = weakref.ref(weight)

    def restore(self) -> None:
        """Lay out as before what ``apply`` has changed."""
        with one_at_a_time, torch.inference_mode(False), torch.no_grad():
            for reference in self._changed.values():
                weight = reference()
                if weight is not None:
                    weight.data = weight.data.contiguous()
            self._changed = {}

    def _is_due(self, weight: nn.Parameter) -> bool:
        return (
            (self._wanted is True or weight.device.type == self._wanted)
            and not weight.is_contiguous(memory_format=torch.channels_last)
            and weight.is_contiguous()
            and not weight.is_inference()
            and not is_wrapper(weight)
            and _has_memory_of_its_own(weight)
        )


def _has_memory_of_its_own(weight: torch.Tensor) -> bool:
    """Not a view of a larger buffer, nor shared with another process."""
    if storage_of(weight).nbytes() != weight.nbytes:
        return False
    # It calls every tensor on a GPU shared.
    return weight.device.type != "cpu" or not weight.is_shared()  # type: ignore[no-untyped-call]


__all__ = ["WeightLayout"]
