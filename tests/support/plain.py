"""A U-Net of a few convolutions that has nothing to do with diffusers: captured in a blink."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dcompile

DEVICE = torch.device("cpu")  # the fixture ``graphs`` moves the tests to a GPU


class Plain(nn.Module):
    """Three levels, so two skip connections (depths 0 and 1); an optional conditioning vector."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.condition = nn.Linear(4, width)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.deep = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.Dropout(0.1), nn.SiLU()
        )
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor | None = None,
        scale: float = 1.0,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor] | dict[str, torch.Tensor]:
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        bias = self.time(timestep.to(sample).reshape(-1, 1) / 1000)
        if condition is not None:
            bias = bias + scale * self.condition(condition)
        outer = self.enter(sample) + bias[:, :, None, None]
        inner = F.silu(self.down(outer))
        deep = F.interpolate(self.deep(inner), size=inner.shape[-2:])
        up = F.silu(self.up(torch.cat([deep, inner], 1)))
        up = F.interpolate(up, size=outer.shape[-2:])
        result = self.leave(torch.cat([up, outer], 1))
        return {"sample": result} if return_dict else (result,)


def plain(seed: int = 0, width: int = 8) -> Plain:
    torch.manual_seed(seed)
    return Plain(width).eval().to(DEVICE)


def compiled(network: nn.Module | None = None, **settings: Any) -> Any:
    """A network after ``cache_compile``, by default a ``plain()`` one on the eager backend."""
    settings = {"backend": "eager", "verbose": False, **settings}
    return dcompile.cache_compile(plain() if network is None else network, **settings)


def picture(seed: int = 0, batch: int = 2, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, device="cpu").to(DEVICE)


def timesteps(count: int = 7) -> torch.Tensor:
    return torch.linspace(999, 0, count, device="cpu").round().long().to(DEVICE)


@torch.no_grad()
def sampled(
    network: Callable[..., tuple[torch.Tensor]],
    x: torch.Tensor,
    ts: Iterable[object],
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """A crude sampler: what matters is that every step's output reaches the result."""
    for t in ts:
        x = x - 0.2 * network(x, t, condition)[0]
    return x


def steps_of(
    network: Callable[..., tuple[torch.Tensor]],
    x: torch.Tensor,
    ts: Iterable[object],
    condition: torch.Tensor | None = None,
) -> Iterable[torch.Tensor]:
    """The same sampler, one step at a time."""
    for t in ts:
        with torch.no_grad():
            x = x - 0.2 * network(x, t, condition)[0]
        yield x
