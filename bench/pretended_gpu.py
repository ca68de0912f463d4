"""An H100 that is not there, for generating Inductor's code on a machine without a GPU.

Inductor asks for the card before it writes a line: whether there is one, how many multiprocessors
it has, what Triton compiles for. All that answers in the card's place is in one table, each entry
with its reason, and is taken back afterwards. What torch remembers of the card meanwhile (it caches
its properties) stays, so a process that works with a real one is not the place for this. Nothing
can run on it: tensors have to be fake ones. Seen in torch 2.11 with Triton 3.6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
)


class Replacement(NamedTuple):
    """A part of torch or Triton that looks for the card.

    Attributes:
        owner: the module, class or object it belongs to.
        name: its name there.
        stand_in: what answers in its place.
        reason: why it cannot stay.
    """

    owner: Any
    name: str
    stand_in: Any
    reason: str


@contextlib.contextmanager
def pretended_h100() -> Iterator[torch.device]:
    """One H100 is there, as far as torch and Triton can tell, as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in, _ in replacements():
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield DEVICE


def replacements() -> Iterator[Replacement]:
    """All that is replaced. Inductor and Triton are imported here: CI's torch has no Triton."""
    yield from _of_cuda()
    yield from _of_fake_tensors()
    yield from _of_inductor()


def _of_cuda() -> Iterator[Replacement]:
    from torch._dynamo.device_interface import CudaInterface

    cuda = torch.cuda
    shapes_kernels = "how many multiprocessors, registers and threads kernels are written for"
    yield Replacement(cuda, "is_available", lambda: True, "without a card nothing is generated")
    for name in ("_exchange_device", "_maybe_exchange_device"):
        yield Replacement(cuda, name, lambda _: DEVICE.index, "`with torch.cuda.device(0):`")
    for owner in (cuda, CudaInterface, CudaInterface.Worker):  # the latter two hold it themselves
        yield Replacement(owner, "get_device_properties", lambda *_: PROPERTIES, shapes_kernels)
    random = "AOT autograd saves the state of the random number generator while it traces"
    yield Replacement(cuda, "get_rng_state", lambda *_: torch.empty(0), random)
    yield Replacement(cuda, "set_rng_state", _nothing, "and would put that back once CUDA starts")


def _of_fake_tensors() -> Iterator[Replacement]:
    from torch._subclasses import fake_tensor

    starts_cuda = "the first fake tensor on CUDA makes a real one, to start CUDA"
    yield Replacement(fake_tensor, "init_gpu_context", _nothing, starts_cuda)


def _of_inductor() -> Iterator[Replacement]:
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)
    triton_driver = SimpleNamespace(get_current_target=lambda: target)
    yield Replacement(driver, "_active", triton_driver, "Triton's own loads libcuda")
    traces = "patterns are traced with small real tensors on the card"
    yield Replacement(fuse_attention, "_sfdp_init", _nothing, traces)
    yield Replacement(pad_mm, "_pad_mm_init", _nothing, traces)


def _nothing(*_: Any, **__: Any) -> None: ...
