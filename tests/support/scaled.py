"""A tensor that is made of others, as quantized weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Scaled(torch.Tensor):
    """Whole numbers and a scale."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, dtype=scale.dtype, device=scale.device
        )

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @staticmethod
    def of(weight: torch.Tensor) -> Any:
        scale = weight.detach().abs().max() / 127
        return Scaled((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, metadata: Any, size: Any, stride: Any) -> Any:
        return Scaled(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].numbers, args[0].scale)

        def plain(tensor: Any) -> torch.Tensor:
            return tensor.numbers.to(tensor.scale.dtype) * tensor.scale

        return func(*tree_map_only(Scaled, plain, args), **(kwargs or {}))
