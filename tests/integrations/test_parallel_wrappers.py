"""Networks that are not whole in this process are named in the error."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from plain import plain
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dcompile


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel() -> None:
    wrapped = DistributedDataParallel(plain())
    with pytest.raises(dcompile.DcompileError, match="DistributedDataParallel is a parallel wrap"):
        dcompile.cache_compile(wrapped)
    pipe = SimpleNamespace(components={"unet": wrapped}, unet=wrapped)
    with pytest.raises(dcompile.DcompileError):
        dcompile.cache_compile(pipe)
    inside = dcompile.cache_compile(wrapped.module, backend="eager", verbose=False)
    with torch.no_grad():
        assert torch.isfinite(inside(torch.randn(1, 3, 8, 8), 3)[0]).all()


def test_fully_sharded() -> None:
    wrapped = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    with pytest.raises(dcompile.DcompileError, match="FullyShardedDataParallel is a parallel wrap"):
        dcompile.cache_compile(wrapped)
    with pytest.raises(dcompile.DcompileError, match="_flat_param is spread over several proc"):
        dcompile.cache_compile(wrapped.module)


def test_fully_sharded_in_place() -> None:
    network = plain()
    fully_shard(network, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(dcompile.DcompileError, match=r"enter.weight|time.weight.* is spread over"):
        dcompile.cache_compile(network)


def test_partitioned_by_deepspeed() -> None:
    """ZeRO-3 marks the parameters it has taken apart so."""
    network = plain()
    network.deep[0].weight.ds_id = 3
    with pytest.raises(dcompile.DcompileError, match=r"deep.0.weight is spread.*DeepSpeed"):
        dcompile.cache_compile(network)


class Engine(nn.Module):
    """DeepSpeed's wrapper has this form."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: object, **kwargs: object) -> object:
        return self.module(*inputs, **kwargs)


def test_an_engine_around_it() -> None:
    with pytest.raises(dcompile.DcompileError, match="Engine is a parallel wrapper around Plain"):
        dcompile.cache_compile(Engine(plain()))
