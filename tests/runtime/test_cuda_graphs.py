"""Recorded graphs: who owns which buffer, and what happens when recording fails."""

import gc
from collections.abc import Sequence
from typing import Any

import plain as plain_module
import pytest
import seam
import torch
from heard import noticed, silent
from plain import Plain, compiled, picture, plain, sampled, steps_of, timesteps
from simulated_graphs import SimulatedRecorder

import dcompile
from dcompile.compat import cuda as compat_cuda
from dcompile.compat.cuda import copy_all
from dcompile.errors import BackendError
from dcompile.runtime.cuda_graphs import RecordedProgram
from dcompile.runtime.cuda_recorder import RECORDERS


@pytest.fixture(autouse=True)
def recorded(graphs: str) -> None:
    if graphs == "plain":
        pytest.skip("about recorded graphs only")


def unrecorded(x: torch.Tensor, ts: torch.Tensor, **settings: Any) -> torch.Tensor:
    return sampled(compiled(cuda_graphs=False, **settings), x, ts)


def only_recording(network: Plain) -> RecordedProgram:
    (found,) = seam.recorded_of(network)
    return found


def test_the_shallow_graph_reads_the_boundary_where_the_full_graph_wrote_it() -> None:
    network, ts = compiled(), timesteps()
    sampled(network, picture(), ts[:1])
    found = only_recording(network)
    (address,) = [x.data_ptr() for x in found._boundary]
    sampled(network, picture(), ts[1:-1])
    assert [x.data_ptr() for x in found._boundary] == [address]
    (held,) = seam.cached_of(network)
    assert held.tensors is found._boundary


def test_one_generation_alone_never_copies_its_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: RecordedProgram, *_: object) -> None:
        raise AssertionError("copied")

    network = compiled()
    monkeypatch.setattr(RecordedProgram, "_copy_out", never)
    assert torch.equal(sampled(network, picture(), timesteps()), unrecorded(picture(), timesteps()))


def test_the_boundary_is_copied_only_when_its_owner_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = 0
    copy_out = RecordedProgram._copy_out

    def counted(self: RecordedProgram) -> None:
        nonlocal copies
        copies += self._owner is not None and self._owner() is not None
        copy_out(self)

    monkeypatch.setattr(RecordedProgram, "_copy_out", counted)
    network = compiled()
    one = steps_of(network, picture(1), timesteps(9))
    two = steps_of(network, picture(2), timesteps(9))
    for _ in range(3):  # one refresh and two reuse steps each
        for run in (one, two):
            for _ in range(3):
                last = next(run)  # type: ignore[call-overload]
    assert copies == 4  # a run that is over leaves nothing to be copied
    assert torch.equal(last, unrecorded(picture(2), timesteps(9)))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs each step copied."""
    counts: list[int] = []

    def counted(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        counts.append(len(targets))
        copy_all(targets, sources)

    monkeypatch.setattr(compat_cuda, "copy_all", counted)
    return counts


def test_a_reuse_step_copies_what_changed(copied: list[int]) -> None:
    network, prompt = compiled(), torch.ones(2, 4, device=plain_module.DEVICE)
    sampled(network, picture(), timesteps(), prompt)
    assert copied == [3, 2, 2, 3, 2, 2, 3]


EDITS = {
    "in place": lambda prompt: prompt.mul_(2),
    "through a view": lambda prompt: prompt[0].zero_(),
    "its data": lambda prompt: setattr(prompt, "data", prompt.data * 2),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("between", range(1, 6))
def test_a_prompt_edited_between_steps(how: str, between: int) -> None:
    results = []
    for graphs in ("auto", False):
        network, x = compiled(cuda_graphs=graphs), picture()
        prompt = torch.ones(2, 4, device=plain_module.DEVICE)
        for number, t in enumerate(timesteps()):
            if number == between:
                EDITS[how](prompt)
            x = sampled(network, x, [t], prompt)
        results.append(x)
    assert torch.equal(*results)


def test_lanes_with_prompts_of_their_own(copied: list[int]) -> None:
    results = []
    for graphs in ("auto", False):
        network, x = compiled(cuda_graphs=graphs), picture()
        prompts = [torch.full((2, 4), value, device=plain_module.DEVICE) for value in (1.0, -1.0)]
        for t in timesteps():
            for prompt in prompts:
                x = sampled(network, x, [t], prompt)
        results.append(x)
    assert torch.equal(*results)
    assert set(copied) == {2, 3}  # the second lane has the timestep of the first


def test_earlier_results_are_never_overwritten() -> None:
    network = compiled()
    results, copies = [], []
    with torch.no_grad():
        for t in timesteps(9):
            results.append(network(picture(int(t)), t)[0])
            copies.append(results[-1].clone())
    assert all(map(torch.equal, results, copies))


def test_a_weight_changed_in_place_is_seen_without_recording_again() -> None:
    network = compiled()
    sampled(network, picture(), timesteps())
    found = only_recording(network)
    expected = plain()
    with torch.no_grad():
        for each in (network, expected):
            each.enter.weight.mul_(2)
    dcompile.cache_compile(expected, backend="eager", verbose=False, cuda_graphs=False)
    result = sampled(network, picture(), timesteps())
    assert torch.equal(result, sampled(expected, picture(), timesteps()))
    assert only_recording(network) is found


def test_a_weight_that_moved_is_recorded_again() -> None:
    network = compiled()
    sampled(network, picture(), timesteps())
    found = only_recording(network)
    expected = plain()
    for each in (network, expected):
        each.enter.weight.data = each.enter.weight.data * 2
    gc.collect()
    dcompile.cache_compile(expected, backend="eager", verbose=False, cuda_graphs=False)
    result = sampled(network, picture(), timesteps())
    assert torch.equal(result, sampled(expected, picture(), timesteps()))
    assert only_recording(network) is not found
    assert dcompile.handle(network).stats.captures == 1  # captured and compiled only once


def test_a_weight_that_moves_in_mid_run_is_not_read_from_freed_memory() -> None:
    network, ts = compiled(), timesteps()
    sampled(network, picture(), ts[:2])
    network.enter.weight.data = network.enter.weight.data * 2
    gc.collect()
    assert sampled(network, picture(), ts[2:]).isfinite().all()


@pytest.mark.parametrize("shape", ["expanded timestep", "every second row"])
def test_inputs_keep_their_layout(shape: str) -> None:
    network, expected = compiled(), compiled(cuda_graphs=False)
    seen: list[tuple[int, ...]] = []
    ts = timesteps()
    with torch.no_grad():
        for t in ts:
            x = picture(int(t), size=(16, 8))
            if shape == "expanded timestep":
                t = t.expand(2)
            else:
                x = x[:, :, ::2]
            assert torch.equal(network(x, t)[0], expected(x, t)[0])
            seen.append(x.stride())
    for i, buffer in only_recording(network)._static.items():
        assert i != 1 or shape != "expanded timestep" or buffer.stride() == (0,)
        assert i != 0 or buffer.stride() == seen[0] or shape != "every second row"


class Pooling(Plain):
    """The boundary is an expanded tensor: each element of it stands for many."""

    def forward(self, sample: Any, timestep: Any) -> Any:  # type: ignore[override]
        outer = self.enter(sample) + self.time(timestep.to(sample).reshape(-1, 1))[:, :, None, None]
        deep = self.deep(self.down(outer)).mean((2, 3), keepdim=True).expand_as(outer)
        return (self.leave(torch.cat([deep, outer], 1)),)


def test_a_boundary_that_is_expanded() -> None:
    runs = {}
    for name, settings in (("recorded", {}), ("not", {"cuda_graphs": False})):
        torch.manual_seed(0)
        module = Pooling().eval().to(plain_module.DEVICE)
        network = dcompile.cache_compile(module, backend="eager", verbose=False, **settings)
        one = steps_of(Without(network), picture(1), timesteps())
        two = steps_of(Without(network), picture(2), timesteps())
        runs[name] = [last for pair in zip(one, two, strict=True) for last in pair]
    assert all(map(torch.equal, runs["recorded"], runs["not"]))


class Without:
    """Leaves the condition out of a call."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, x: Any, t: Any, condition: Any) -> Any:
        return self.network(x, t)


def test_a_weight_at_its_address_in_another_layout_is_recorded_again() -> None:
    network, expected = compiled(), plain()
    sampled(network, picture(), timesteps())
    for each in (network, expected):
        each.down.weight.data = each.down.weight.data.transpose(0, 1)
    dcompile.cache_compile(expected, backend="eager", verbose=False, cuda_graphs=False)
    result = sampled(network, picture(), timesteps())
    assert torch.equal(result, sampled(expected, picture(), timesteps()))


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_inference_mode_on_and_off(order: tuple[bool, bool]) -> None:
    network = compiled()
    expected = unrecorded(picture(), timesteps())
    for mode in order:
        with torch.inference_mode(mode):
            assert torch.equal(sampled(network, picture(), timesteps()), expected)


def failing(after: int, error: Exception) -> type:
    class Failing(RECORDERS["cpu"] if "cpu" in RECORDERS else RECORDERS["cuda"]):  # type: ignore[misc]
        captured = 0

        def capture(self, run: Any, reads: Sequence[Any]) -> Any:
            self.captured += 1
            if self.captured > after:
                raise error
            return super().capture(run, reads)

    return Failing


@pytest.mark.parametrize(("after", "which"), [(0, "full"), (1, "shallow")])
def test_failure_to_record_falls_back_with_one_warning(
    after: int, which: str, monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    error = torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    for device in list(RECORDERS):
        monkeypatch.setitem(RECORDERS, device, failing(after, error))
    network = compiled()
    with noticed(f"{which} graph cannot.*OutOfMemoryError: tried") as seen:
        first = sampled(network, picture(), timesteps())
    assert len(seen) == 1
    with silent():
        second = sampled(network, picture(), timesteps())
    expected = unrecorded(picture(), timesteps())
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    found = only_recording(network)
    assert not found._static
    assert not found._storages
    assert found._recorder is None


def test_an_argument_elsewhere_falls_back(graphs: str) -> None:
    if graphs != "cuda":
        pytest.skip("needs two devices")

    class Moving(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any) -> Any:
            return super().forward(sample, timestep.to(sample.device), condition.to(sample.device))

    network = dcompile.cache_compile(Moving().eval().cuda(), backend="eager", verbose=False)
    condition = torch.ones(2, 4, device="cpu")
    with silent():  # moved by the prologue, which is not recorded
        sampled(network, picture(), timesteps(), condition)
    with noticed("argument is on cpu, the sample on cuda"):
        sampled(network, picture(), timesteps().cpu(), condition)


def test_few_signatures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcompile.runtime.binder, "MAX_RECORDED", 2)
    network = compiled()
    for size in (4, 8, 12, 8, 4):
        x = picture(size=(size, size))
        assert torch.equal(sampled(network, x, timesteps()), unrecorded(x, timesteps()))
        assert len(seam.recorded_of(network)) <= 2
    assert dcompile.handle(network).stats.captures == 3


def test_disable_frees_the_buffers_and_enable_records_again() -> None:
    network = compiled()
    sampled(network, picture(), timesteps())
    handle = dcompile.handle(network)
    handle.disable()
    assert not seam.recorded_of(handle.module)
    handle.enable()
    expected = unrecorded(picture(), timesteps())
    assert torch.equal(sampled(network, picture(), timesteps()), expected)


def test_lanes_of_unbatched_guidance_take_turns() -> None:
    def guided(network: Plain) -> torch.Tensor:
        x = picture()
        uncond, cond = torch.zeros(2, 4), torch.ones(2, 4)
        with torch.no_grad():
            for t in timesteps(9):
                base = network(x, t, uncond)[0]
                x = x - 0.2 * (base + 3 * (network(x, t, cond)[0] - base))
        return x

    assert torch.equal(guided(compiled()), guided(compiled(cuda_graphs=False)))


def test_a_lane_that_ends_is_not_copied() -> None:
    network = compiled()
    for seed in range(3):
        assert torch.equal(
            sampled(network, picture(seed), timesteps()), unrecorded(picture(seed), timesteps())
        )
        gc.collect()
    assert dcompile.handle(network).stats.cache_bytes == 0


def test_the_simulation_is_unforgiving() -> None:
    recorder = SimulatedRecorder(torch.device("cpu"))
    given = torch.ones(3, device="cpu")
    doubling = lambda reads: (reads[0] * 2,)  # noqa: E731
    recording, (doubled,) = recorder.capture(doubling, (given,))
    assert doubled.isnan().all()
    recorder.replay(recording)
    assert doubled.tolist() == [2, 2, 2]
    given.add_(1)
    recorder.replay(recording)
    assert doubled.tolist() == [4, 4, 4]
    later, (tripled,) = recorder.capture(lambda reads: (reads[0] * 3,), (given,))
    recorder.replay(later)
    recorder.replay(recording)
    assert tripled.isnan().all()
    del given
    gc.collect()
    with pytest.raises(AssertionError, match="freed"):
        recorder.replay(recording)


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_a_bad_setting_is_refused(value: object) -> None:
    with pytest.raises(BackendError, match=r'expected "auto", True or False'):
        compiled(cuda_graphs=value)


def test_asked_for_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA device here"):
        compiled(cuda_graphs=True)


def test_asked_for_with_a_sample_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(RECORDERS, "cpu", raising=False)
    network = compiled(cuda_graphs=True).cpu()
    x, ts = picture().cpu(), timesteps().cpu()
    with noticed("the sample is on cpu") as seen:
        sampled(network, x, ts)
    assert len(seen) == 1


def test_a_backend_that_records_by_itself_is_left_alone() -> None:
    def cudagraphs(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return graph.forward

    network = dcompile.cache_compile(plain(), backend=cudagraphs, verbose=False)
    sampled(network, picture(), timesteps())
    assert not seam.recorded_of(network)


def test_a_warmed_up_call_is_recorded_once_however_it_is_written() -> None:
    network = compiled()
    x, ts, condition = picture(), timesteps(), torch.ones(2, 4)
    dcompile.handle(network).warmup({"condition": condition, "timestep": ts[0], "sample": x})
    found = only_recording(network)
    result = sampled(network, x, ts, condition)
    assert only_recording(network) is found
    assert torch.equal(result, sampled(compiled(cuda_graphs=False), x, timesteps(), condition))


def test_nothing_is_recorded_under_offload() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    network = plain()
    hooks.add_hook_to_module(network, hooks.ModelHook())
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    found = sampled(network, picture(), timesteps())
    assert torch.equal(found, unrecorded(picture(), timesteps()))
    assert not seam.recorded_of(network)
