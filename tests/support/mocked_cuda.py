"""A ``torch.cuda`` without a device: records what is done, and enforces CUDA's rules of capture.

Enforced, as torch 2.11 and CUDA do:

1. One capture at a time in the process; it begins and ends on one stream, not the default one.
2. Whatever waits for the device while its thread captures invalidates the capture; ending an
   invalidated capture raises, and leaves the stream as it is.
3. A pool takes one capture at a time, and an invalidated capture does not stop recording into its
   pool, nor releases it.
4. Nothing is replayed that was not captured to its end.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dcompile.compat import cuda as compat_cuda


class MockedStream:
    """A stream that only has a name."""

    def __init__(self, cuda: MockedCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: MockedStream) -> None:
        self._cuda.log(f"{self.name} waits for {other.name}")

    def __repr__(self) -> str:
        return self.name


class MockedGraph:
    """What ``torch.cuda.CUDAGraph`` does to streams and pools."""

    def __init__(self, cuda: MockedCuda) -> None:
        self._cuda = cuda
        self._pool: Any = None
        self._stream: Any = None
        self.ended = False
        self.valid = True

    def capture_begin(self, pool: Any, capture_error_mode: str, **_: Any) -> None:
        cuda = self._cuda
        assert capture_error_mode == "thread_local"
        if cuda.stream is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if pool in cuda.recording_into:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._pool, self._stream = pool, cuda.stream
        cuda.uses[pool] += 1
        cuda.recording_into.add(pool)
        if cuda.capturing is not None:
            raise AssertionError("two captures at a time")
        cuda.capturing, cuda.capturing_thread = self, threading.get_ident()
        cuda.log("begin")

    def capture_end(self) -> None:
        cuda = self._cuda
        assert cuda.capturing is self
        assert cuda.stream is self._stream, "Capture must end on the same stream it began on."
        cuda.capturing = None
        cuda.log("end")
        if not self.valid:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")
        cuda.recording_into.remove(self._pool)
        self.ended = True

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def replay(self) -> None:
        assert self.ended, "Called CUDAGraph::replay without a preceding successful capture."
        self._cuda.log(f"replay on {self._cuda.stream}")

    def __del__(self) -> None:
        if self.ended:
            self._cuda.uses[self._pool] -= 1


class MockedCuda:
    """The state of the pretended device.

    Attributes:
        default: the stream that threads begin on.
        calls: what was done, in order.
        recording_into: pools that take allocations of a capture.
        uses: how many graphs hold a pool.
        capturing: the graph that is being captured.
    """

    def __init__(self) -> None:
        self.default = MockedStream(self, "default")
        self.calls: list[str] = []
        self.recording_into: set[Any] = set()
        self.uses: Counter[Any] = Counter()
        self.capturing: MockedGraph | None = None
        self.capturing_thread = 0
        self._streams = itertools.count(1)
        self._pools = itertools.count(1)
        self._current = threading.local()

    @property
    def stream(self) -> MockedStream:
        """The thread's current stream."""
        return getattr(self._current, "stream", self.default)

    def log(self, what: str) -> None:
        self.calls.append(what)

    def set_stream(self, stream: MockedStream) -> None:
        self._current.stream = stream

    def synchronize(self, device: Any = None) -> None:
        """Wait for the device: what no thread may do while it captures."""
        if self.capturing is not None and self.capturing_thread == threading.get_ident():
            self.capturing.valid = False
            raise torch.AcceleratorError("operation not permitted when stream is capturing")
        self.log("synchronize")

    def disturb(self) -> None:
        """Another thread breaks the capture that is under way."""
        assert self.capturing is not None
        self.capturing.valid = False

    @contextlib.contextmanager
    def on_stream(self, stream: MockedStream) -> Iterator[None]:
        before = self.stream
        self.set_stream(stream)
        yield  # not in a try: torch's own is left by an exception in ``capture_end``
        self.set_stream(before)

    def end_allocation(self, pool: Any) -> None:
        if pool not in self.recording_into:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording_into.remove(pool)

    def release_pool(self, pool: Any) -> None:
        assert self.uses[pool] > 0, "a pool released twice"
        self.uses[pool] -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MockedCuda:
    """``torch.cuda`` as one pretended device; ``torch.cuda.graph`` is torch's own."""
    mocked = MockedCuda()
    replaced = {
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, next(mocked._pools)),
        "Stream": lambda device=None: MockedStream(mocked, f"side {next(mocked._streams)}"),
        "current_stream": lambda device=None: mocked.stream,
        "set_stream": mocked.set_stream,
        "stream": mocked.on_stream,
        "synchronize": mocked.synchronize,
        "empty_cache": lambda: None,
        "CUDAGraph": lambda: MockedGraph(mocked),
        "is_available": lambda: True,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(compat_cuda, "clear_cublas_workspaces", lambda: mocked.log("workspaces"))
    for name, value in {
        "_cuda_endAllocateToPool": lambda device, pool: mocked.end_allocation(pool),
        "_cuda_releasePool": lambda device, pool: mocked.release_pool(pool),
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    return mocked
