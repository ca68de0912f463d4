"""torch.compile's own door: ``torch.compile(unet, backend="dcompile")``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from plain import Plain, picture, plain, sampled, timesteps
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import dcompile
from dcompile.integrations import torch_compile as dynamo

EAGER = {"interval": 3, "backend": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that graphs became."""
    found: list[Any] = []

    class Traced(dynamo._Traced):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(dynamo, "_Traced", Traced)
    return found


def through_torch(network: nn.Module, **options: Any) -> Any:
    return torch.compile(network, backend="dcompile", options={**EAGER, **options})


def reference(network: nn.Module, **options: Any) -> Any:
    return dcompile.cache_compile(network, verbose=False, **{**EAGER, **options})


def test_torch_knows_the_backend() -> None:
    assert "dcompile" in torch.compiler.list_backends()


def test_it_is_the_same_as_cache_compile(made: list[Any]) -> None:
    found = sampled(through_torch(plain()), picture(), timesteps(9))
    assert torch.equal(found, sampled(reference(plain()), picture(), timesteps(9)))
    (traced,) = made
    stats = dcompile.handle(traced).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (3, 6)


def test_interval_1_is_identical() -> None:
    found = sampled(through_torch(plain(), interval=1), picture(), timesteps())
    assert torch.equal(found, sampled(plain(), picture(), timesteps()))


def test_options_are_cache_compile_s(made: list[Any]) -> None:
    options: dict[str, Any] = {
        "interval": None,
        "schedule": dcompile.Steps([0, 4]),
        "depth": 1,
        "forecast": "linear",
    }
    found = sampled(through_torch(plain(), **options), picture(), timesteps())
    assert torch.equal(found, sampled(reference(plain(), **options), picture(), timesteps()))
    assert dcompile.handle(made[0]).stats.refresh_steps == 2


def test_inductor_behind_it() -> None:
    found = sampled(through_torch(plain(), backend="inductor"), picture(), timesteps())
    expected = sampled(reference(plain()), picture(), timesteps())
    assert torch.allclose(found, expected, atol=1e-4)


def test_conditioning_and_several_runs(made: list[Any]) -> None:
    network, twin = through_torch(plain()), reference(plain())
    condition = torch.randn(2, 4)
    for seed in (0, 1):
        found = sampled(network, picture(seed), timesteps(), condition)
        assert torch.equal(found, sampled(twin, picture(seed), timesteps(), condition))
    assert len(made) == 1


def test_weights_are_the_network_s_own(made: list[Any]) -> None:
    network = plain()
    compiled = through_torch(network)
    sampled(compiled, picture(), timesteps())
    (traced,) = made
    own = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in traced.parameters()} <= own
    with torch.no_grad():
        network.leave.weight.mul_(0.5)
    network.enter.weight = nn.Parameter(network.enter.weight.detach() * 2)
    found = sampled(compiled, picture(), timesteps())
    twin = plain()
    twin.load_state_dict(network.state_dict())
    assert torch.equal(found, sampled(reference(twin), picture(), timesteps()))


def test_other_sizes() -> None:
    network, twin = through_torch(plain()), reference(plain())
    for size in ((8, 8), (16, 8), (8, 16), (16, 16)):
        found = sampled(network, picture(size=size), timesteps())
        assert torch.equal(found, sampled(twin, picture(size=size), timesteps()))


def test_gradients_pass_through() -> None:
    network = plain()
    compiled = through_torch(network)
    (result,) = compiled(picture(), torch.tensor(5))
    result.sum().backward()
    twin = plain()
    twin(picture(), torch.tensor(5))[0].sum().backward()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-6)


@pytest.mark.full
def test_a_diffusers_network() -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    twin = UNet2DConditionModel.from_config(network.config).eval()
    twin.load_state_dict(network.state_dict())
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    compiled = through_torch(network)
    reference(twin)
    with torch.no_grad():
        for t in timesteps(6):
            found = compiled(x, t, encoder_hidden_states=text).sample
            expected = twin(x, t, encoder_hidden_states=text).sample
            assert torch.equal(found, expected)
            x = x - 0.1 * found


class Renamed(nn.Module):
    """No name speaks of time, and two inputs look like the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, hint: torch.Tensor, image: torch.Tensor, level: torch.Tensor) -> Any:
        return self.inner(image + 0 * hint, level)


def test_names_tell_sample_and_timestep() -> None:
    torch.manual_seed(0)
    network = Renamed().eval()
    with pytest.raises(BackendCompilerFailed, match=r'options=\{"timestep": ...\}'):
        through_torch(network)(picture(1), picture(), torch.tensor(5))
    torch._dynamo.reset()
    compiled = through_torch(network, sample="image", timestep="level")
    with torch.no_grad():
        assert torch.equal(
            compiled(picture(1), picture(), torch.tensor(5))[0],
            network(picture(1), picture(), torch.tensor(5))[0],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "nothing"}, "no input 'nothing'"),
        ({"timestep": "nothing"}, "no timestep among the graph's tensors"),
        ({"interval": 0}, "interval: expected an int of at least 1"),
        ({"depth": 7}, "depth 7 is out of range"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"intervall": 3}, "does not know 'intervall'; it knows .*interval"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        sampled(through_torch(plain(), **options), picture(), timesteps())


def test_a_timestep_that_is_no_tensor() -> None:
    with pytest.raises(BackendCompilerFailed, match="pass it as a tensor"):
        sampled(through_torch(plain()), picture(), [5, 4, 3])


def test_a_graph_without_a_sample() -> None:
    class Embedding(nn.Module):
        def forward(self, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return timestep * x.sum()

    with pytest.raises(BackendCompilerFailed, match="looks like the sample"):
        through_torch(Embedding())(torch.tensor(5.0), picture())


def test_modes_are_refused() -> None:
    with pytest.raises(dcompile.CaptureError, match="no mode 'max-autotune'"):
        dynamo.backend(torch.fx.symbolic_trace(nn.Identity()), (), mode="max-autotune")
