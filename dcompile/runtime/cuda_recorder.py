"""Records CUDA graphs: what a function launches, to be launched again as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dcompile.compat import cuda as compat_cuda
from dcompile.notices import logger

Tensors = tuple[Any, ...]
Runs = Callable[[Sequence[Any]], Sequence[Any]]

WARM_UPS = 2  # runs before recording: autotuning, lazy handles and workspaces come first


class Recorder(Protocol):
    """Records what a function launches, and launches it again.

    A recording reads its inputs and weights from the addresses they had, and writes its outputs
    to the addresses they were given while recording. All recordings of one recorder share memory
    for what they do not return.
    """

    def capture(self, run: Runs, reads: Sequence[Any]) -> tuple[Any, Tensors]:
        """Record ``run(reads)``: the recording, and its output tensors (filled by replays only)."""
        ...

    def replay(self, recording: Any) -> None:
        """Launch it again, after all that was launched before."""
        ...


_capturing = threading.Lock()
"""CUDA allows one capture at a time into a memory pool, and other captures disturb it."""


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool and on one side stream.

    One stream, because the caching allocator keeps free blocks apart by stream: temporaries of one
    graph are the next one's only if both are captured on the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.graph_pool_handle()
            # Not the stream of the caller: what a graph holds must not be ordered after the
            # legacy default stream (PyTorch, "CUDA semantics", whole-network capture).
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Runs, reads: Sequence[Any]) -> tuple[Any, Tensors]:
        with _capturing, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            try:
                self._side.wait_stream(stream)
                with torch.cuda.stream(self._side):
                    for _ in range(WARM_UPS):
                        run(reads)
                stream.wait_stream(self._side)
                try:
                    return self._captured(run, reads)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # another thread may have disturbed it
                    logger.info("dcompile: recording failed, trying again: %s", error)
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize()  # raises if the device itself has failed
                return self._captured(run, reads)
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails stays on the side stream

    def _captured(self, run: Runs, reads: Sequence[Any]) -> tuple[Any, Tensors]:
        graph = torch.cuda.CUDAGraph()
        # cuBLAS keeps a workspace for each stream, and somebody may free it (Inductor's CUDA
        # graph trees do). One that is made while capturing lives in the graph's own pool.
        compat_cuda.clear_cublas_workspaces()
        begun, cause = False, None
        try:
            # Other threads may go on launching and allocating meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ):
                begun = True
                try:
                    outputs = tuple(run(reads))
                except RuntimeError as error:
                    cause = error
                    raise
        except BaseException:
            if begun and not _has_ended(graph):
                compat_cuda.abandon_pool(self._device, self._pool)
                self._pool = torch.cuda.graph_pool_handle()
            if cause is not None:  # not that the capture could not be ended then
                raise cause from None
            raise
        compat_cuda.clear_cublas_workspaces()
        return graph, outputs

    def replay(self, recording: Any) -> None:
        recording.replay()


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a capture came to its end."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""What records graphs, by type of device."""


__all__ = ["RECORDERS", "WARM_UPS", "CudaRecorder", "Recorder", "Runs", "Tensors"]
