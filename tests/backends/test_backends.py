"""Backends other than eager, on a network small enough to compile in seconds."""

import pytest
import torch
from plain import picture, plain, sampled, timesteps
from torch import nn

import dcompile


def test_inductor_is_close_to_eager_and_sees_weights_change() -> None:
    networks = {
        backend: dcompile.cache_compile(plain(), interval=3, backend=backend, verbose=False)
        for backend in ("eager", "inductor")
    }
    for _ in range(2):
        eager, inductor = (sampled(net, picture(), timesteps()) for net in networks.values())
        torch.testing.assert_close(inductor, eager, rtol=1e-4, atol=1e-5)
        for network in networks.values():
            with torch.no_grad():
                network.enter.weight.mul_(1.5)
    assert dcompile.handle(networks["inductor"]).stats.captures == 1


def test_frozen_weights_are_compiled_anew_when_they_change() -> None:
    frozen = dcompile.cache_compile(
        plain(), interval=3, backend="inductor", options={"freezing": True}, verbose=False
    )
    network = plain()
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    for write in (lambda w: None, lambda w: w.mul_(1.5), lambda w: w.data.add_(0.1)):
        with torch.no_grad():
            write(frozen.enter.weight)
            write(network.enter.weight)
        found, expected = (sampled(net, picture(), timesteps()) for net in (frozen, network))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["aot_eager", "eager_noexcept"])
def test_any_registered_backend(name: str) -> None:
    network = dcompile.cache_compile(plain(), interval=3, backend=name, verbose=False)
    eager = dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)
    found, expected = (sampled(net, picture(), timesteps()) for net in (network, eager))
    torch.testing.assert_close(found, expected)
    assert dcompile.handle(network).stats.reuse_steps == 4


def test_a_callable_gets_both_graphs_and_fitting_inputs() -> None:
    seen: list[tuple[int, int]] = []

    def backend(graph_module: nn.Module, inputs: list[torch.Tensor]) -> object:
        graph_module(*inputs)  # they fit
        seen.append((len(inputs), len(graph_module.graph.nodes)))
        return graph_module.forward

    network = dcompile.cache_compile(plain(), interval=3, backend=backend, verbose=False)
    eager = dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)
    assert torch.equal(
        sampled(network, picture(), timesteps()), sampled(eager, picture(), timesteps())
    )
    (_, full_nodes), (_, shallow_nodes) = seen
    assert shallow_nodes < full_nodes


def test_compiled_graphs_hold_no_weights() -> None:
    graphs: list[nn.Module] = []

    def backend(graph_module: nn.Module, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph_module)
        return graph_module.forward

    network = dcompile.cache_compile(plain(), interval=3, backend=backend, verbose=False)
    sampled(network, picture(), timesteps())
    assert len(graphs) == 2
    for graph in graphs:
        assert not list(graph.parameters())
        assert not list(graph.buffers())


def test_dynamic_sizes_share_one_capture() -> None:
    network = dcompile.cache_compile(
        plain(), interval=3, backend="eager", dynamic=True, verbose=False
    )
    expected = dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)
    for batch, size in ((2, (8, 8)), (3, (16, 8)), (4, (12, 20)), (2, (8, 8))):
        x = picture(batch=batch, size=size)
        assert torch.equal(sampled(network, x, timesteps()), sampled(expected, x, timesteps())), (
            batch,
            size,
        )
    assert dcompile.handle(network).stats.captures == 1
    x = picture(batch=1)  # export treats a size of 1 as a constant
    other = dcompile.cache_compile(
        plain(), interval=3, backend="eager", dynamic=True, verbose=False
    )
    for batch in (1, 2, 1):
        y = picture(batch=batch)
        assert torch.equal(sampled(other, y, timesteps()), sampled(expected, y, timesteps()))
    assert dcompile.handle(other).stats.captures == 2
    assert torch.equal(sampled(network, x, timesteps()), sampled(expected, x, timesteps()))
    assert dcompile.handle(network).stats.captures == 2
