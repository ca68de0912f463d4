"""Recording CUDA graphs, on a pretended device that enforces CUDA's rules of capture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from mocked_cuda import MockedCuda, cuda

from dcompile.runtime.cuda_recorder import WARM_UPS, CudaRecorder

__all__ = ["cuda"]  # a fixture

DEVICE = torch.device("cuda", 0)


class Launches:
    """Work to record: fails while captured, as often as it is told to.

    Attributes:
        streams: the stream of each call that was not captured.
        captured: the stream of each call that was.
    """

    def __init__(self, cuda: MockedCuda, *failures: Callable[[], None]) -> None:
        self._cuda = cuda
        self._failures = list(failures)
        self.streams: list[Any] = []
        self.captured: list[Any] = []

    def __call__(self, reads: Sequence[Any]) -> Sequence[Any]:
        capturing = self._cuda.capturing is not None
        (self.captured if capturing else self.streams).append(self._cuda.stream)
        self._cuda.log("captured" if capturing else "launched")
        if capturing and self._failures:
            self._failures.pop(0)()
        return [*reads]


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_warm_ups_come_first_and_on_the_side_stream(cuda: MockedCuda) -> None:
    recorder, launches = CudaRecorder(DEVICE), Launches(cuda)
    recording, outputs = recorder.capture(launches, [1, 2])
    recorder.replay(recording)
    assert outputs == (1, 2)
    assert len(launches.streams) == WARM_UPS
    assert len({*launches.streams, *launches.captured}) == 1
    assert cuda.default not in launches.streams
    assert cuda.calls == [
        "side 1 waits for default",
        *["launched"] * WARM_UPS,
        "default waits for side 1",
        "workspaces",
        "synchronize",  # torch.cuda.graph's own, before it begins
        "begin",
        "captured",
        "end",
        "workspaces",
        "replay on default",
    ]


def test_one_stream_and_one_pool_for_all_captures_of_a_recorder(cuda: MockedCuda) -> None:
    recorder, launches = CudaRecorder(DEVICE), Launches(cuda)
    recordings = [recorder.capture(launches, [n])[0] for n in range(3)]
    assert len({*launches.streams, *launches.captured}) == 1
    assert len({recording.pool() for recording in recordings}) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), ValueError("no"), KeyboardInterrupt()],
    ids=["memory", "error", "interrupt"],
)
def test_a_capture_that_fails_gives_the_thread_its_stream_back(
    cuda: MockedCuda, error: BaseException
) -> None:
    recorder = CudaRecorder(DEVICE)
    own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(own)
    with pytest.raises(type(error)):
        recorder.capture(Launches(cuda, raising(error)), [1])
    assert cuda.stream is own
    assert not cuda.recording_into
    assert recorder.capture(Launches(cuda), [1])[1] == (1,)


@pytest.mark.parametrize("stage", ["begin", "end"])
def test_a_disturbed_capture_is_tried_again_once(
    cuda: MockedCuda, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA says so at the end of the capture, or at a call in it that is refused."""
    disturbed = cuda.disturb if stage == "end" else cuda.synchronize
    recorder = CudaRecorder(DEVICE)
    with caplog.at_level("INFO", "dcompile"):
        recording, outputs = recorder.capture(Launches(cuda, disturbed), [1])
    assert outputs == (1,)
    assert recording.ended
    assert cuda.stream is cuda.default
    assert "trying again" in caplog.text


def test_a_second_failure_is_the_callers(cuda: MockedCuda) -> None:
    """And its error is the one that was raised in between, not that the capture was invalid."""
    recorder = CudaRecorder(DEVICE)
    refused = Launches(cuda, cuda.synchronize, cuda.synchronize)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.capture(refused, [1])
    assert cuda.stream is cuda.default


def test_an_invalid_capture_releases_its_pool(cuda: MockedCuda) -> None:
    recorder = CudaRecorder(DEVICE)
    first, _ = recorder.capture(Launches(cuda), [1])
    with pytest.raises(RuntimeError):
        recorder.capture(Launches(cuda, cuda.disturb, cuda.disturb), [1])
    assert not cuda.recording_into
    assert +cuda.uses == {first.pool(): 1}  # what was recorded before stays
    second, _ = recorder.capture(Launches(cuda), [1])
    assert second.pool() != first.pool()
    del first, second
    assert not +cuda.uses


def test_a_version_of_torch_that_ends_the_allocation_itself(
    cuda: MockedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops recording into the pool and still does not release it."""

    def ended_already(device: int, pool: Any) -> None:
        cuda.recording_into.discard(pool)
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended_already)
    recorder = CudaRecorder(DEVICE)
    recorder.capture(Launches(cuda, cuda.disturb), [1])
    assert not +cuda.uses


def test_threads_capture_one_after_the_other(cuda: MockedCuda) -> None:
    """The mock fails if a second capture begins before the first has ended."""
    together = threading.Barrier(4, timeout=30)
    failed: list[BaseException] = []

    def slow() -> None:
        threading.Event().wait(0.02)

    def capture() -> None:
        try:
            recorder = CudaRecorder(DEVICE)
            together.wait()
            for _ in range(3):
                recorder.capture(Launches(cuda, slow), [1])
            assert cuda.stream is cuda.default
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert cuda.calls.count("begin") == cuda.calls.count("end") == 12


def test_replays_follow_the_callers_stream(cuda: MockedCuda) -> None:
    recorder = CudaRecorder(DEVICE)
    recording, _ = recorder.capture(Launches(cuda), [1])
    own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(own)
    recorder.replay(recording)
    assert cuda.calls[-1] == f"replay on {own}"
