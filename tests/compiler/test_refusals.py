"""What cannot be a graph runs uncached, and one sentence says why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heard import heard
from plain import Plain, compiled, picture, plain, sampled, timesteps

import dcompile

STEPS = 7


class OwnGenerator(Plain):
    """As token merging does in its random mode."""

    generator: Any = None

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        noise = torch.rand(sample.shape[-2:], generator=self.generator)
        return super().forward(sample + noise, timestep, condition)


class Branching(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(sample if sample.mean() > 0 else sample * 2, timestep, condition)


class Selecting(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        kept = torch.nonzero(sample[0, 0, :, 0] > -99)[:, 0]
        return super().forward(sample[:, :, kept], timestep, condition)


class Leaving(Plain):
    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(torch.from_numpy(sample.numpy() * 2), timestep, condition)


REASONS = {
    # torch 2.11 and 2.12 do not trace the first, nor 2.11 the third.
    OwnGenerator: r"computes with an object \(torch.Generator\)|cannot be captured .*generator",
    Branching: r"Branching cannot be captured as a graph: .*if sample.mean\(\) > 0",
    Selecting: r"nonzero.default returns .* depends on the values|Selecting cannot be captured",
    Leaving: r"Leaving cannot be captured as a graph: .*sample.numpy\(\)",
}


@pytest.mark.parametrize("kind", REASONS)
def test_refused_in_a_sentence(kind: type[Plain], capfd: pytest.CaptureFixture[str]) -> None:
    def made() -> Plain:
        torch.manual_seed(0)
        return kind().eval()

    network = compiled(made())
    with heard() as messages:
        for seed in (0, 1):
            found = sampled(network, picture(seed), timesteps(STEPS))
            if seed == 0:
                assert torch.equal(found, sampled(made(), picture(), timesteps(STEPS)))
    (reason,) = dcompile.handle(network).stats.uncached_reasons
    assert dcompile.handle(network).stats.uncached_calls == 2 * STEPS
    assert re.search(REASONS[kind], reason)
    assert len(messages) == 1
    assert "dcompile/" not in reason
    assert "def forward" not in "".join(capfd.readouterr())


class Doubling(torch.Tensor):
    """Convolutions of such tensors are something else."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is F.conv2d else result


class Renamed(torch.Tensor):
    """Overrides nothing."""


@pytest.mark.parametrize(("kind", "uncached"), [(Doubling, 7), (Renamed, 0)])
def test_samples_of_a_tensor_subclass(kind: type[torch.Tensor], uncached: int) -> None:
    network = compiled(interval=1)
    sampled(network, picture(), timesteps())
    x = picture().as_subclass(kind)
    found = sampled(network, x, timesteps())
    expected = sampled(plain(), x, timesteps())
    assert type(found) is type(expected)
    assert torch.equal(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert dcompile.handle(network).stats.uncached_calls == uncached
