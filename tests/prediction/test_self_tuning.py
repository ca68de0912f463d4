"""``speedup=``: the first run of a kind is watched, and later ones run what was found."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import seam
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from heard import heard, noticed, silent
from hypothesis import given
from hypothesis import strategies as st
from plain import Plain, picture, plain, sampled
from simulated_graphs import SimulatedRecorder
from transformer_pipelines import pipeline

import dcompile
from dcompile import GainWeighted, models, selftuning
from dcompile.policy import codec
from dcompile.policy.aim import Aim
from dcompile.policy.schedule import RunInfo
from dcompile.policy.self_tuned import Kind, Placed, SelfTuned
from dcompile.prediction.recorder import Recorder
from dcompile.runtime.cuda_recorder import RECORDERS

STEPS = 12
PROMPTS = ("red apple", "rocket", "blue heart", "snowman")


@pytest.fixture(scope="module")
def shared_pipe() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe: Any) -> Iterator[Any]:
    shared_pipe.scheduler = DPMSolverMultistepScheduler.from_config(shared_pipe.scheduler.config)
    yield shared_pipe
    with contextlib.suppress(dcompile.NotCompiledError):
        dcompile.handle(shared_pipe).remove()


def drawn(
    pipe: Any, number: int = 0, steps: int = STEPS, output_type: str = "pt", **more: Any
) -> torch.Tensor:
    images: torch.Tensor = pipe(
        PROMPTS[number],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(number),
        output_type=output_type,
        **more,
    ).images
    return images


def self_tuned(module: Any, speedup: float = 2.0, **more: Any) -> Any:
    settings = {"backend": "eager", "verbose": False, "autotune": "first", **more}
    return dcompile.cache_compile(module, speedup=speedup, **settings)


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * math.log10(max(float((found - expected).square().mean()), 1e-12))


def schedule_of(module: Any) -> SelfTuned:
    schedule = seam.settings_of(module).schedule
    assert isinstance(schedule, SelfTuned)
    return schedule


def test_the_second_run_is_far_closer_than_deepcache(pipe: Any) -> None:
    expected = [drawn(pipe, number) for number in range(4)]
    dcompile.cache_compile(pipe, interval=2, backend="eager", verbose=False)
    plainly = [drawn(pipe, number) for number in range(1, 4)]
    speedup = dcompile.handle(pipe).stats.flops_speedup
    self_tuned(pipe, speedup)
    assert torch.equal(drawn(pipe, 0), expected[0])
    before = dcompile.handle(pipe).stats
    assert (before.refresh_steps, before.reuse_steps, before.uncached_calls) == (STEPS, 0, 0)
    found = [drawn(pipe, number) for number in range(1, 4)]
    after = dcompile.handle(pipe).stats
    assert after.forced_steps == after.uncached_calls == 0
    assert after.runs == 4
    gains = [
        psnr(own, true) - psnr(other, true)
        for own, other, true in zip(found, plainly, expected[1:], strict=True)
    ]
    assert min(gains) > 6
    calls = after.refresh_steps + after.partial_steps + after.reuse_steps
    cost = calls / after.flops_speedup - STEPS  # without the run that was watched
    assert 3 * STEPS / cost >= speedup - 1e-6


@pytest.mark.full
def test_it_is_deterministic_and_is_run_again_unchanged(pipe: Any) -> None:
    found = []
    for _ in range(2):
        self_tuned(pipe)
        drawn(pipe)
        found.append((schedule_of(pipe).as_json(), drawn(pipe, 1)))
        dcompile.handle(pipe).remove()
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.full
def test_another_kind_of_run_is_watched_too(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", SimulatedRecorder)
    expected = {steps: drawn(pipe, steps=steps) for steps in (STEPS, 8)}
    self_tuned(pipe)
    for steps in (STEPS, 8):
        assert torch.equal(drawn(pipe, steps=steps), expected[steps])
    cuts = schedule_of(pipe).cuts
    for steps in (STEPS, 8):
        assert not torch.equal(drawn(pipe, steps=steps), expected[steps])
        assert psnr(drawn(pipe, steps=steps), expected[steps]) > 18
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    uncached = drawn(pipe)
    dcompile.handle(pipe).disable()
    assert torch.equal(uncached, drawn(pipe))
    dcompile.handle(pipe).enable()
    assert not torch.equal(drawn(pipe), uncached)
    known = schedule_of(pipe).known
    assert sorted(kind.steps for kind in known) == [8, STEPS, STEPS]
    assert schedule_of(pipe).cuts == cuts
    assert all(len(placed.refresh) == len(cuts) for placed in known.values())


@pytest.mark.one_in(6)
@pytest.mark.parametrize("at", [0, 4])
def test_an_interrupted_run(at: int, pipe: Any) -> None:
    class StopError(Exception):
        pass

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise StopError
        return kwargs

    expected = drawn(pipe)
    self_tuned(pipe)
    with pytest.raises(StopError):
        drawn(pipe, callback_on_step_end=stop)
    for _ in range(3):  # however it was taken, no picture gets worse
        assert psnr(drawn(pipe), expected) > 20
    drawn(pipe)
    (placed,) = (p for kind, p in schedule_of(pipe).known.items() if kind.steps == STEPS)
    assert placed.length == STEPS
    before = dcompile.handle(pipe).stats.reuse_steps + dcompile.handle(pipe).stats.partial_steps
    drawn(pipe)
    after = dcompile.handle(pipe).stats
    assert after.reuse_steps + after.partial_steps > before


@pytest.mark.full
def test_settings_changed_while_a_run_is_watched(pipe: Any) -> None:
    """What was asked for last stays."""

    def change(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            dcompile.cache_compile(pipe, interval=4, backend="eager", verbose=False)
        return kwargs

    self_tuned(pipe)
    drawn(pipe, callback_on_step_end=change)
    drawn(pipe)
    assert seam.settings_of(pipe).schedule == dcompile.Uniform(4)


def test_threads_share_what_is_found() -> None:
    network, reference = plain(), plain()
    scheduler = _Sampler()
    self_tuned(network, 1.5, sampler=scheduler)
    pictures = [picture(seed) for seed in range(4)]

    def draw(own: torch.Tensor) -> torch.Tensor:
        return sampled(network, own, scheduler.timesteps.clone())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, pictures))
        later = list(pool.map(draw, pictures))
    for own, true in zip((*found, *later), (*pictures, *pictures), strict=True):
        expected = sampled(reference, true, scheduler.timesteps)
        assert float((own - expected).norm() / expected.norm()) < 0.5
    assert not dcompile.handle(network).stats.uncached_reasons
    # A run that was under way when the cuts were chosen goes on as one of fewer steps.
    assert 9 in [kind.steps for kind in schedule_of(network).known]


class _Sampler(DDIMScheduler):
    def __init__(self) -> None:
        super().__init__()
        self.set_timesteps(9)


def test_features_that_are_not_finite() -> None:
    network, sampler = plain(), _Sampler()
    with torch.no_grad():
        network.deep[0].bias.fill_(math.inf)
    self_tuned(network, 1.5, sampler=sampler)
    with noticed("autotune: features of step 0 are not finite"):
        sampled(network, picture(), sampler.timesteps)
    assert seam.settings_of(network).schedule == GainWeighted(speedup=1.5)


def test_runs_of_two_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftuning, "MOST_SHORT", 3)
    self_tuned(pipe)
    with noticed("autotune: runs of less than 3 steps"):
        for _ in range(3):
            drawn(pipe, steps=2)
    assert seam.settings_of(pipe).schedule == GainWeighted(speedup=2.0)


@pytest.mark.full
def test_short_runs_to_warm_up_do_not_end_it(pipe: Any) -> None:
    self_tuned(pipe)
    with silent():
        for _ in range(4):
            drawn(pipe, steps=1)
            drawn(pipe, steps=2)
    drawn(pipe)
    assert [kind.steps for kind in schedule_of(pipe).known] == [STEPS]


def interval_two(pipe: Any, steps: int) -> torch.Tensor:
    dcompile.cache_compile(pipe, interval=2, backend="eager", verbose=False)
    return drawn(pipe, 1, steps)


@pytest.mark.full
def test_cuts_chosen_by_one_kind_serve_the_others(shared_pipe: Any) -> None:
    """Whichever was seen first, and with another sampler."""
    pipe = StableDiffusionPipeline(**shared_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    kinds = [(DDIMScheduler, steps) for steps in (10, 20, 8, 12)]
    kinds += [(DPMSolverMultistepScheduler, 10), (EulerDiscreteScheduler, 10)]
    expected, caching = {}, {}
    for sampler, steps in kinds:
        pipe.scheduler = sampler.from_config(shared_pipe.scheduler.config)
        expected[sampler, steps] = drawn(pipe, 1, steps)
        caching[sampler, steps] = psnr(interval_two(pipe, steps), expected[sampler, steps])
        dcompile.handle(pipe).remove()
    self_tuned(pipe)
    for sampler, steps in kinds:
        pipe.scheduler = sampler.from_config(shared_pipe.scheduler.config)
        watched = drawn(pipe, 1, steps)
        assert torch.equal(watched, expected[sampler, steps])
        found = psnr(drawn(pipe, 1, steps), expected[sampler, steps])
        assert found > caching[sampler, steps] + 6, (sampler, steps, found)
    dcompile.handle(pipe).remove()


def test_a_sampler_s_settings_are_another_kind(pipe: Any) -> None:
    """Also where its error gains are the same."""
    self_tuned(pipe)
    for settings in ({"solver_order": 2}, {"solver_order": 1}):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **settings)
        before = dcompile.handle(pipe).stats
        drawn(pipe)
        after = dcompile.handle(pipe).stats
        assert after.refresh_steps - before.refresh_steps == STEPS
    assert len(schedule_of(pipe).known) == 2
    assert after.runs == 2


@pytest.mark.full
def test_runs_interrupted_at_the_same_step(pipe: Any) -> None:
    """Cuts that were chosen by what they had come to are chosen again by a whole run."""

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    expected = drawn(pipe, 1)
    self_tuned(pipe)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            drawn(pipe, callback_on_step_end=stop)
    for _ in range(3):
        found = drawn(pipe, 1)
        with pytest.raises(KeyboardInterrupt):
            drawn(pipe, callback_on_step_end=stop)
    assert [placed.length for placed in schedule_of(pipe).known.values()] == [STEPS]
    assert psnr(found, expected) > 35


@pytest.mark.full
def test_other_settings_in_mid_run_and_back(pipe: Any) -> None:
    """The rest of the run is not what cuts are chosen by."""

    def change(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS - 5:
            self_tuned(pipe)
        return kwargs

    expected = drawn(pipe)
    self_tuned(pipe)
    assert torch.equal(drawn(pipe, callback_on_step_end=change), expected)
    assert torch.equal(drawn(pipe), expected)
    drawn(pipe)
    assert [kind.steps for kind in schedule_of(pipe).known] == [STEPS]
    assert psnr(drawn(pipe), expected) > 35


def test_timesteps_that_say_no_steps() -> None:
    network, sampler = plain(), _Sampler()
    self_tuned(network, 1.5, sampler=sampler)
    with (
        noticed("autotune: runs of less than 3 steps, or over timesteps that are not"),
        torch.no_grad(),
    ):
        for _ in range(4):
            for t in sampler.timesteps.tolist():
                network(picture(), float(t))
    assert dcompile.handle(network).stats.reuse_steps > 0


def test_a_network_that_cannot_be_captured() -> None:
    class Branching(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            if float(sample.sum()) > 1e9:
                sample = sample + 1
            return super().forward(sample, timestep, condition)

    network, sampler = Branching().eval(), _Sampler()
    self_tuned(network, 1.5, sampler=sampler)
    with noticed("cannot be captured"):
        sampled(network, picture(), sampler.timesteps)
    assert dcompile.handle(network).stats.uncached_calls == 9


@pytest.mark.full
def test_two_denoisers() -> None:
    """The first one's runs end before their timesteps do."""
    pipe, kwargs = pipeline("wan22")

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        result: torch.Tensor = pipe(
            **kwargs, num_inference_steps=10, generator=generator, output_type="latent"
        )[0]
        return result

    expected = draw()
    self_tuned(pipe, 1.3)
    assert torch.equal(draw(), expected)
    for _ in range(4):
        found = draw()
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    for network in (pipe.transformer, pipe.transformer_2):
        stats = dcompile.handle(network).stats
        assert stats.reuse_steps + stats.partial_steps > 0
        assert stats.uncached_calls == 0


@given(st.data())
def test_other_lengths_are_refreshed_as_densely(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 60))
    inner: set[int] = set(range(1, length))
    refresh: list[tuple[int, ...]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        inner = data.draw(st.sets(st.sampled_from(sorted(inner)))) if inner else inner
        refresh.append((0, *sorted(inner)))
    steps = data.draw(st.integers(1, 120))
    found = Placed(tuple(refresh), length)
    scaled = found.scaled(steps)
    assert found.scaled(length) == found
    assert scaled.length == steps
    for own, before in zip(scaled.refresh, found.refresh, strict=True):
        assert own[0] == 0
        assert list(own) == sorted(set(own))
        assert own[-1] < steps
        # Never more: refreshes cost time. Fewer where two fall on one step.
        assert len(own) <= max(1, round(len(before) * steps / length))
        assert len(own) >= min(1 + (len(before) - 1) * steps / length / 2, steps / 2) - 1
    assert all(set(outer) >= set(deeper) for outer, deeper in pairwise(scaled.refresh))


@pytest.mark.full
def test_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    expected = drawn(pipe, 1, steps=8)
    self_tuned(pipe)
    drawn(pipe)
    found = drawn(pipe)
    folder = dcompile.handle(pipe).save(tmp_path / "saved")
    dcompile.handle(pipe).remove()
    with silent():
        dcompile.load(pipe, folder, verbose=False)
        assert torch.equal(drawn(pipe), found)
        before = dcompile.handle(pipe).stats
        like_it = psnr(drawn(pipe, 1, steps=8), expected)  # unknown: as densely as those of 12
    stats = dcompile.handle(pipe).stats
    assert stats.refresh_steps + stats.partial_steps > before.refresh_steps + before.partial_steps
    assert like_it > 25
    assert stats.captures == 0
    assert stats.reuse_steps > 0


def test_settings_that_do_not_go_together() -> None:
    for settings, message in (
        ({"autotune": "first"}, "autotune needs the speedup"),
        ({"autotune": "later", "speedup": 2.0}, 'expected "auto", "first" or False'),
        ({"autotune": True, "speedup": 2.0}, 'expected "auto", "first" or False'),
        ({"autotune": None, "speedup": 2.0}, 'expected "auto", "first" or False'),
        ({"autotune": 0, "speedup": 2.0}, 'expected "auto", "first" or False'),
        ({"autotune": "first", "speedup": 2.0, "depth": 1}, "finds depths and forecast itself"),
        ({"autotune": "first", "speedup": 2.0, "forecast": "linear"}, "finds depths and forecast"),
        ({"autotune": "first", "speedup": 2.0}, "sampler"),
    ):
        with pytest.raises(dcompile.ScheduleError, match=message):
            dcompile.cache_compile(plain(), verbose=False, **settings)


def test_it_is_the_default_where_only_a_speedup_is_given(pipe: Any) -> None:
    expected = drawn(pipe)
    given: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"autotune": "auto"}, True),
        ({"autotune": False}, False),
        ({"forecast": "reuse"}, False),
        ({"depth": 1}, False),
    ]
    for settings, watched in given:
        dcompile.cache_compile(pipe, speedup=1.5, backend="eager", verbose=False, **settings)
        assert torch.equal(drawn(pipe), expected) == watched
        assert isinstance(seam.settings_of(pipe).schedule, SelfTuned) == watched


def test_where_nobody_asked_for_it_nothing_is_warned_of() -> None:
    network, sampler = plain(), _Sampler()
    with torch.no_grad():
        network.deep[0].bias.fill_(math.inf)
    dcompile.cache_compile(network, speedup=1.5, sampler=sampler, backend="eager", verbose=False)
    with heard() as messages:
        sampled(network, picture(), sampler.timesteps)
    assert not any("autotune" in message for message in messages)
    assert seam.settings_of(network).schedule == GainWeighted(speedup=1.5)


def test_a_bad_first_call_does_not_end_it() -> None:
    network, sampler = plain(), _Sampler()
    self_tuned(network, 1.5, sampler=sampler)
    with pytest.raises(RuntimeError):
        network(torch.randn(2, 7, 3), sampler.timesteps[0])
    network.train()
    with noticed("training mode"):
        network(picture(), sampler.timesteps[0])
    network.eval()
    expected = sampled(plain(), picture(), sampler.timesteps)
    assert torch.equal(sampled(network, picture(), sampler.timesteps), expected)
    assert schedule_of(network).known


def test_it_says_what_it_does(pipe: Any) -> None:
    self_tuned(pipe)
    drawn(pipe, steps=2)
    handle = dcompile.handle(pipe)
    assert "the first run of each kind (steps, sampler) is watched" in handle.report()
    drawn(pipe)
    (found,) = schedule_of(pipe).known.values()
    cuts = ", ".join(
        f"depth {depth} at {len(own)}"
        for depth, own in zip(schedule_of(pipe).cuts, found.refresh, strict=True)
    )
    line = f"speedup=2, found by watching a run: of {STEPS} steps, those that refresh are {cuts}"
    assert line in handle.report()
    drawn(pipe)
    assert handle.explain().schedule[0].startswith(line)
    assert "found by watching a run" in " ".join(str(handle.explain()).split())


def test_passes_over_the_same_timesteps() -> None:
    """A loop that makes them once."""
    network, sampler = plain(), _Sampler()
    self_tuned(network, 1.5, sampler=sampler)
    for steps in (9, 12):  # the second kind is found while the tracker stays
        sampler.set_timesteps(steps)
        before = dcompile.handle(network).stats.refresh_steps
        sampled(network, picture(), sampler.timesteps)
        assert dcompile.handle(network).stats.refresh_steps - before == steps
        before = dcompile.handle(network).stats.refresh_steps
        for _ in range(2):
            sampled(network, picture(), sampler.timesteps)
        assert dcompile.handle(network).stats.refresh_steps - before < steps


@pytest.mark.full
def test_so_many_kinds_are_watched_and_no_more(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftuning, "MOST_KINDS", 2)
    self_tuned(pipe)
    for steps in (6, 7, 8):
        drawn(pipe, steps=steps)
    assert [kind.steps for kind in schedule_of(pipe).known] == [6, 7]
    assert dcompile.handle(pipe).stats.reuse_steps  # the third, by the sampler


def test_warming_up_before_the_first_run_is_warned_of() -> None:
    network, sampler = plain(), _Sampler()
    self_tuned(network, 1.5, sampler=sampler)
    call = (picture(), sampler.timesteps[0])
    with noticed("make one run, then warm up"):
        dcompile.handle(network).warmup(call)
    sampled(network, picture(), sampler.timesteps)
    with silent():
        dcompile.handle(network).warmup(call)


def test_it_survives_json() -> None:
    kind = Kind(4, (0.5, 0.4, 0.3, 0.2), "DDIMScheduler 0")
    schedule = SelfTuned(Aim(2.0), (0, 2), "reuse", {kind: Placed(((0, 2), (0,)), 4, 31.5)})
    entry = json.loads(json.dumps(codec.to_json(schedule)))
    again = codec.from_json(entry)
    assert isinstance(again, SelfTuned)
    assert again.as_json() == schedule.as_json()
    plan = again.plan(RunInfo(4, 2, 0.1, kind.gains, sampler=kind.sampler))
    assert [plan.level(step) for step in range(5)] == [2, 0, 1, 0, 2]

    def known(refresh: Any, length: int = 4, steps: Any = 4, gains: int = 4) -> tuple[str, Any]:
        one = {"steps": steps, "gains": [1.0] * gains, "sampler": "", "psnr": None}
        return "known", [{**one, "refresh": refresh, "length": length}]

    codec.from_json({**entry, "known": known([[0, 2], [0]])[1]})
    for field, value in (
        ("speedup", 0.5),
        ("psnr", -1.0),
        ("cuts", [2, 0]),
        ("cuts", [0.0, 2.0]),
        ("cuts", [False, 2]),
        ("cuts", []),
        ("forecast", "nonsense"),
        ("known", [{"steps": 4}]),
        ("known", 3),
        known([[0, 2], [0]], steps=4.0),
        known([[0], [0, 2]]),
        known([[0, 2], [0]], gains=1),
        known([[0, 4], [0]]),
        known([[0, 2], [0]], length=5),
        known([[0], [0]], length=0),
    ):
        with pytest.raises(dcompile.ScheduleError):
            codec.from_json({**entry, field: value})


# A quality instead of a speed-up ------------------------------------------------------------------


def latents(pipe: Any, number: int) -> torch.Tensor:
    return drawn(pipe, number, output_type="latent")


def for_quality(module: Any, psnr: float, **more: Any) -> Any:
    return dcompile.cache_compile(module, psnr=psnr, backend="eager", verbose=False, **more)


def test_a_quality_is_reached_and_cheaper_ones_are_faster(pipe: Any) -> None:
    expected = [latents(pipe, number) for number in range(4)]
    span = float(expected[0].max() - expected[0].min())
    speedups = []
    for wanted in (30.0, 55.0):
        for_quality(pipe, wanted)
        assert torch.equal(latents(pipe, 0), expected[0])
        before = dcompile.handle(pipe).stats
        found = [latents(pipe, number) for number in range(1, 4)]
        after = dcompile.handle(pipe).stats
        reached = [
            20 * math.log10(span) + psnr(own, true)
            for own, true in zip(found, expected[1:], strict=True)
        ]
        assert sum(reached) / len(reached) > wanted - 6
        spent = after.calls / after.flops_speedup - before.calls / before.flops_speedup
        speedups.append((after.calls - before.calls) / spent)
        lines = " ".join(dcompile.handle(pipe).schedule.describe())
        assert f"psnr={wanted:g}, found by watching a run" in lines
        assert float(lines.split("; about ")[1].split(" dB")[0]) >= wanted - 0.5
        dcompile.handle(pipe).remove()
    assert speedups[0] > 1.3 * speedups[1] > 1.3


@pytest.mark.full
def test_a_quality_beyond_reach_runs_every_step(pipe: Any) -> None:
    expected = drawn(pipe, 1)
    for_quality(pipe, 500.0)
    with noticed(r"autotune: no refresh steps .* psnr=500; every step is refreshed instead"):
        drawn(pipe, 0)
    assert torch.equal(drawn(pipe, 1), expected)


@pytest.mark.full
def test_a_quality_is_not_guessed_for_other_runs(pipe: Any, tmp_path: Path) -> None:
    """From saved programs nothing is watched, and an unknown kind of run refreshes at each step."""
    expected = drawn(pipe, 1, steps=7)
    for_quality(pipe, 30.0)
    for _ in range(2):
        drawn(pipe)
    dcompile.handle(pipe).save(tmp_path)
    dcompile.load(pipe, tmp_path, verbose=False)
    assert torch.equal(drawn(pipe, 1, steps=7), expected)
    before = dcompile.handle(pipe).stats.reuse_steps
    drawn(pipe, 1)
    assert dcompile.handle(pipe).stats.reuse_steps > before


def test_a_sampler_without_noise_levels(pipe: Any) -> None:
    network, timesteps = plain(), torch.arange(40, 0, -4)

    class Levelless:
        def set_timesteps(self, steps: int) -> None: ...

    sampler = Levelless()
    sampler.timesteps = timesteps  # type: ignore[attr-defined]
    for_quality(network, 30.0, sampler=sampler)
    with noticed("noise levels cannot be read, so no PSNR is predicted; every step is refreshed"):
        found = sampled(network, picture(), timesteps)
    assert torch.equal(found, sampled(plain(), picture(), timesteps))


def test_wrong_qualities(pipe: Any) -> None:
    for wrong in (0, -3.0, math.inf, math.nan, True, "40"):
        with pytest.raises(dcompile.ScheduleError, match="psnr: expected a number of dB above 0"):
            for_quality(pipe, wrong)  # type: ignore[arg-type]
    with pytest.raises(dcompile.ScheduleError, match="give one of interval, speedup, psnr and"):
        for_quality(pipe, 40.0, speedup=2.0)
    with pytest.raises(dcompile.ScheduleError, match="psnr is reached by watching a run"):
        for_quality(pipe, 40.0, autotune=False)
    with pytest.raises(dcompile.ScheduleError, match="autotune finds depths and forecast itself"):
        for_quality(pipe, 40.0, depth=1)
    with pytest.raises(dcompile.ScheduleError, match="psnr looks at the sampler: pass the pipe"):
        for_quality(plain(), 40.0)


@pytest.mark.full
def test_fewer_measurements_of_the_reaction(pipe: Any) -> None:
    """Every fourth step and evenly spaced elements say nearly the same."""
    found = {}
    for every, elements in ((1, None), (4, 1 << 12)):
        depths = (0, 2)
        dcompile.cache_compile(
            pipe,
            schedule=dcompile.MultiLevel([(depth, 1) for depth in depths]),
            backend="eager",
            verbose=False,
        )
        recorder = Recorder(len(depths), 1 << 28, every, elements)
        dcompile.handle(pipe)._dispatcher.observer = recorder
        drawn(pipe)
        found[every] = [own[0] for own in recorder.recordings()]
        dcompile.handle(pipe).remove()
    for exact, sparse in zip(found[1], found[4], strict=True):
        ratio = sparse.gram.diagonal() / exact.gram.diagonal()
        assert ratio.min() > 0.8
        assert ratio.max() < 1.25
        assert abs(math.log(sparse.reaction[6] / exact.reaction[6])) < 0.7


def test_a_speedup_beyond_reach_is_said_at_once(pipe: Any) -> None:
    self_tuned(pipe, 100.0)
    with pytest.raises(dcompile.ScheduleError, match="a speed-up of 100 is beyond this network"):
        drawn(pipe)


@pytest.mark.full
def test_a_speedup_that_needs_no_cuts(pipe: Any) -> None:
    expected = drawn(pipe)
    self_tuned(pipe, 1.0)
    with noticed("autotune: no refresh steps of the cuts at depths .* 12 steps speedup=1"):
        drawn(pipe)
    assert torch.equal(drawn(pipe), expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["take", "choose"])
def test_watching_that_fails(method: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture does not."""

    def fail(*_: Any) -> Any:
        raise ValueError("of the watcher")

    expected = drawn(pipe)
    self_tuned(pipe)
    if method == "take":
        monkeypatch.setattr(selftuning._Watched, "take", fail)
    else:
        monkeypatch.setattr(selftuning, "choose", fail)
    with noticed("autotune: of the watcher; refreshes are placed by the sampler instead"):
        found = drawn(pipe)
    if method != "take":
        assert torch.equal(found, expected)
    drawn(pipe)
    assert dcompile.handle(pipe).stats.reuse_steps > 0


def test_saved_before_anything_is_found(pipe: Any, tmp_path: Path) -> None:
    def save(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            dcompile.handle(pipe).save(tmp_path / "saved")
        return kwargs

    self_tuned(pipe)
    with pytest.raises(dcompile.ArtifactError, match="the first run is still being watched"):
        drawn(pipe, callback_on_step_end=save)
