"""The tuner: what it predicts, what it finds, and what it refuses."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import Plain, picture, plain, sampled, timesteps

import dcompile
from dcompile import DepthError, NotCompiledError, ScheduleError, Tuned, TuneError
from dcompile.policy.forecast import Damped, Lagrange, Reuse, Taylor
from dcompile.prediction.levels import compute_of
from dcompile.prediction.objective import Objective, Recording, boundary_errors
from dcompile.tuning.candidates import choices
from dcompile.tuning.images import pictures_of, psnr_between
from dcompile.tuning.predictor import Predictor

STEPS = 12


def run_of(network: Plain) -> Any:
    return lambda number: sampled(network, picture(number), timesteps(STEPS))


def tuned(network: Plain | None = None, **settings: Any) -> Tuned:
    network = plain() if network is None else network
    settings = {"samples": 2, "trials": 6, "verbose": False} | settings
    return dcompile.tune(network, run_of(network), **settings)


def quality(seed: int, **settings: Any) -> float:
    """PSNR of a cached run of another picture than those tuned on."""
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False, **settings)
    found = sampled(network, picture(seed), timesteps(STEPS))
    return psnr_between(found, sampled(plain(), picture(seed), timesteps(STEPS)))


# Predictions --------------------------------------------------------------------------------------


def recording(features: np.ndarray[Any, Any], reaction: Any = None) -> Recording:
    steps = len(features)
    return Recording(features @ features.T, np.ones(steps) if reaction is None else reaction, 0.1)


def test_errors_are_those_of_the_features_themselves() -> None:
    features = np.random.default_rng(0).normal(size=(9, 40)).cumsum(axis=0)
    found = recording(features).errors(Reuse(), (0, 3, 7))
    for step, source in enumerate([0, 0, 0, 3, 3, 3, 3, 7, 7]):
        assert found[step] == pytest.approx(((features[step] - features[source]) ** 2).sum())
    linear = recording(features).errors(Lagrange(1), (0, 3, 7))
    expected = features[7] + (features[7] - features[3]) / 4
    assert linear[8] == pytest.approx(((features[8] - expected) ** 2).sum())


def test_a_straight_line_is_forecast_without_error() -> None:
    features = np.arange(8)[:, None] * np.ones((1, 5))
    errors = recording(features).errors(Lagrange(1), (0, 2))
    assert errors[1] > 0
    assert errors[3:] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_dynamic_programming_finds_the_best(count: int) -> None:
    generator = np.random.default_rng(count)
    recordings = tuple(
        recording(generator.normal(size=(9, 30)).cumsum(axis=0), generator.random(9))
        for _ in range(2)
    )
    objective = Objective(recordings, generator.random(9))
    every = ((0, *rest) for rest in combinations(range(1, 9), count - 1))
    best = min(every, key=lambda chosen: objective(Reuse(), chosen))
    assert objective.best_by_dynamic_programming(count) == best


def test_a_damped_forecast_is_predicted_with_its_damping() -> None:
    swinging = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[:, None] * np.ones((1, 3))
    refreshed = (0, 1, 2, 3)
    found = recording(swinging).errors(Damped(), refreshed)
    assert found == pytest.approx(recording(swinging).errors(Reuse(), refreshed))
    straight = np.arange(6)[:, None] * np.ones((1, 3))
    assert recording(straight).errors(Damped(), (0, 1, 2, 3)) == pytest.approx(0, abs=1e-9)
    both = np.stack([swinging @ swinging.T, straight @ straight.T])
    errors = boundary_errors(both, Damped(), refreshed)
    assert errors[0] == pytest.approx(found)
    assert errors[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("forecast", [Reuse(), Lagrange(1), Lagrange(2), Taylor(2), Damped()])
def test_an_objective_adds_up_the_errors_of_all_steps(forecast: Any) -> None:
    generator = np.random.default_rng(1)
    recordings = tuple(
        recording(generator.normal(size=(12, 30)).cumsum(axis=0), generator.random(12))
        for _ in range(2)
    )
    gains = generator.random(12)
    objective = Objective(recordings, gains)
    for refreshed in ((0,), (0, 3), (0, 1, 2, 5, 9), tuple(range(12))):
        expected = sum(
            (one.errors(forecast, refreshed) * (gains * one.reaction) ** 2).sum()
            for one in recordings
        )
        for _ in range(2):  # and again, from what it remembers
            assert objective(forecast, refreshed) == pytest.approx(expected)


def test_local_search_never_makes_it_worse() -> None:
    features = np.random.default_rng(0).normal(size=(12, 30)).cumsum(axis=0)
    objective = Objective((recording(features),), np.ones(12))
    start = (0, 1, 2, 3)
    better = objective.improved(Lagrange(1), start)
    assert objective(Lagrange(1), better) < objective(Lagrange(1), start)
    assert len(set(better)) == 4
    assert better == tuple(sorted(better))
    assert better[0] == 0


def test_the_compute_of_several_cuts() -> None:
    levels = ((0, (0, 2, 4, 6)), (2, (0, 4)))
    # refresh, reuse, partial, reuse, refresh, reuse, partial, reuse
    assert compute_of(levels, 8, {0: 0.1, 2: 0.3}) == pytest.approx(2 + 2 * 0.3 + 4 * 0.1)
    assert compute_of(((1, (0, 3)),), 6, {1: 0.5}) == pytest.approx(2 + 4 * 0.5)


def objectives(steps: int = 20) -> dict[int, Objective]:
    generator = np.random.default_rng(0)
    return {
        depth: Objective(
            (Recording(np.eye(steps) + 1.0, np.ones(steps), ratio),), generator.random(steps) + 0.1
        )
        for depth, ratio in ((0, 0.05), (1, 0.2), (3, 0.5))
    }


@pytest.mark.parametrize("speedup", [1.5, 2.5, 4.0])
def test_choices_are_nested_and_fast_enough(speedup: float) -> None:
    ratios = {depth: objective.ratio for depth, objective in objectives().items()}
    found = choices(objectives(), ("reuse", "damped"), speedup, 0.5)
    chains = {tuple(depth for depth, _ in levels) for levels, _ in found}
    assert {(0,), (0, 1), (0, 3), (0, 1, 3), (1, 3)} >= chains - {(1,), (3,)}
    assert {(0,), (0, 1), (0, 3)} <= chains
    assert len(found) == len(set(found))
    for levels, _ in found:
        assert 20 / compute_of(levels, 20, ratios) >= speedup - 1e-9
        assert levels[-1][1][0] == 0
        for (outer, more), (inner, fewer) in pairwise(levels):
            assert outer < inner
            assert set(more) > set(fewer)


def test_no_choice_is_faster_than_a_reuse_step() -> None:
    assert choices(objectives(), ("reuse",), 21.0, 0.5) == []


def test_a_predictor_learns_what_a_depth_a_forecast_and_their_choice_cost() -> None:
    predictor = Predictor(objectives())
    one = ((0, (0, 4, 8, 12, 16)),), "reuse"
    other = ((0, (0, 2, 8, 12, 16)),), "reuse"
    before = predictor(other) / predictor(one)
    assert not predictor.knows(0)
    predictor.learn(one, 1e-3)
    assert predictor.knows(0)
    assert predictor(one) == pytest.approx(1e-3)
    assert predictor(other) == pytest.approx(1e-3 * before)
    deeper = ((0, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)), (1, (0, 8, 16))), "reuse"
    predictor.learn(deeper, 1e-5)  # less than what depth 0 was thought to cost by itself
    assert predictor.knows(1)
    assert predictor(deeper) < 1e-3
    for _ in range(8):
        predictor.learn(deeper, 1e-5)
    assert predictor(deeper) == pytest.approx(1e-5, rel=0.1)
    linear = one[0], "linear"
    assert predictor.best([one, linear, deeper]) == deeper
    for _ in range(8):
        predictor.learn(linear, 1e-9)
    assert predictor.best([one, linear, deeper]) == linear


# Searching ----------------------------------------------------------------------------------------


def test_it_beats_the_uniform_schedule_on_other_pictures() -> None:
    network = plain()
    before = dict(network.__dict__)
    found = tuned(network, speedup=1.4)
    assert network.__dict__ == before  # left as it was
    assert found.speedup >= 1.4
    assert found.steps == STEPS
    assert len(found.trials) == 6
    assert found.psnr == max(trial.psnr for trial in found.trials)
    ratio = dcompile.handle(dcompile.cache_compile(network, backend="eager", verbose=False))
    depths = ratio.explain(picture(), timesteps()[0], None).depths
    spent = compute_of(found.levels, STEPS, {report.depth: report.ratio for report in depths})
    assert STEPS / spent == pytest.approx(found.speedup)
    uniform = [
        quality(9, interval=n, depth=depth)
        for depth, report in enumerate(depths)
        for n in range(2, STEPS)
        if STEPS / (-(-STEPS // n) + (STEPS - -(-STEPS // n)) * report.ratio) >= found.speedup
    ]
    assert quality(9, schedule=found) > max(uniform)


def test_it_repeats() -> None:
    assert tuned(speedup=1.3) == tuned(speedup=1.3)


def test_no_speed_up_at_all() -> None:
    found = tuned(speedup=1)
    assert found.psnr == np.inf  # refreshing at every step is among what is tried


def test_for_a_quality() -> None:
    found = tuned(psnr=30.0, trials=12)
    assert found.psnr >= 30
    assert found.speedup > 1
    assert not any(t.psnr >= 30 and t.speedup > found.speedup for t in found.trials)


def test_a_quality_that_only_the_uncached_run_has() -> None:
    found = tuned(psnr=1000.0)
    assert found.refresh_steps == tuple(range(STEPS))
    assert found.speedup == 1.0


def test_a_module_that_was_compiled_stays_so() -> None:
    network = dcompile.cache_compile(plain(), interval=4, backend="eager", verbose=False)
    tuned(network, speedup=1.2, samples=1, trials=2)
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.refresh_steps == 3


def test_interrupted_it_returns_the_best_so_far() -> None:
    network, calls = plain(), 0
    run = run_of(network)

    def interrupted(number: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 + 2 + 6 * 2 + 2 * 3:  # recordings, six parts of the run, three trials
            raise KeyboardInterrupt
        return run(number)

    settings: dict[str, Any] = {"samples": 2, "depths": (0, 1), "verbose": False}
    found = dcompile.tune(network, interrupted, speedup=1.2, **settings)
    assert len(found.trials) == 3
    with pytest.raises(NotCompiledError):
        dcompile.handle(network)


def test_features_go_to_a_file_if_they_are_many() -> None:
    assert tuned(speedup=1.3, memory=4096) == tuned(speedup=1.3)


def test_unbatched_guidance() -> None:
    network = plain()
    conditions = [torch.zeros(2, 4), torch.ones(2, 4)]

    def run() -> torch.Tensor:
        x = picture()
        for t in timesteps(STEPS):
            with torch.no_grad():
                one, two = (network(x, t, condition)[0] for condition in conditions)
            x = x - 0.2 * (one + 2 * (two - one))
        return x

    found = dcompile.tune(network, run, speedup=1.3, trials=3, verbose=False)
    assert found.psnr > 20


# Files --------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = tuned(speedup=1.3)
    file = found.save(tmp_path / "tuned.json")
    assert Tuned.load(file) == found
    settings: dict[str, Any] = {"backend": "eager", "verbose": False}
    network = dcompile.cache_compile(plain(), schedule=Tuned.load(file), **settings)
    sampled(network, picture(), timesteps(STEPS))
    handle = dcompile.handle(network)
    assert handle.stats.refresh_steps == len(found.refresh_steps)
    assert handle.explain().chosen == found.depths
    with pytest.raises(ScheduleError, match="tuned for runs of 12 steps, this one has 9"):
        sampled(network, picture(), timesteps(9))
    with pytest.raises(ScheduleError, match=r"tuned for a Plain with [\d,]+ parameters, this is a"):
        dcompile.cache_compile(plain(width=4), schedule=found, **settings)
    with pytest.raises(ScheduleError, match="leave it out"):
        dcompile.cache_compile(plain(), schedule=found, forecast="quadratic", **settings)


def several_cuts(**settings: Any) -> Tuned:
    """One as the tuner finds them for networks that gain by it."""
    network = plain()
    identity = "Plain", sum(parameter.numel() for parameter in network.parameters())
    return Tuned(
        (0, 6), STEPS, 1, "reuse", identity, 2.0, 40.0, (), ((0, (0, 2, 4, 6, 8, 10)),), **settings
    )


def test_several_cuts_are_a_multi_level(tmp_path: Path) -> None:
    found = several_cuts()
    again = Tuned.load(found.save(tmp_path / "tuned.json"))
    assert again == found
    assert again.depths == (0, 1)
    settings: dict[str, Any] = {"backend": "eager", "verbose": False}
    network = dcompile.cache_compile(plain(), schedule=again, **settings)
    result = sampled(network, picture(), timesteps(STEPS))
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.partial_steps, stats.reuse_steps) == (2, 4, 6)
    multi_level = dcompile.MultiLevel([(0, 2), (1, 6)])
    other = dcompile.cache_compile(plain(), schedule=multi_level, **settings)
    assert torch.equal(result, sampled(other, picture(), timesteps(STEPS)))
    folder = dcompile.handle(network).save(tmp_path / "saved")
    loaded = dcompile.load(plain(), folder, verbose=False)
    assert torch.equal(sampled(loaded, picture(), timesteps(STEPS)), result)
    with pytest.raises(DepthError, match="brings its depths, got depth=1"):
        dcompile.cache_compile(plain(), schedule=again, depth=1, **settings)


@pytest.mark.parametrize(
    "outer",
    [
        [[1, [0, 2, 6]]],  # not outside of depth 1
        [[0, [0, 2, 4]]],  # 6 is missing
        [[0, [0, 6]]],  # no more than the inner one's
        [[0, [0, 6, 12]]],  # beyond the run
        [[0, [6, 2, 0]]],
        [0, 1],
        7,
    ],
    ids=str,
)
def test_cuts_that_do_not_go_together(outer: Any, tmp_path: Path) -> None:
    file = several_cuts().save(tmp_path / "tuned.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outer": outer}))
    with pytest.raises(ScheduleError):
        Tuned.load(file)


def test_the_tuner_tries_several_cuts() -> None:
    """With extrapolation a single cut of this network is exact, and several would not be tried."""
    found = tuned(speedup=1.2, trials=9, depths=(0, 1), forecasts=("reuse",))
    assert any(trial.outer for trial in found.trials)
    assert all(trial.speedup >= 1.2 for trial in found.trials)


@pytest.mark.parametrize(
    "change",
    [
        {"network": "ab"},
        {"network": ["Plain", "x"]},
        {"speedup": "fast"},
        {"psnr": "good"},
        {"steps": 3},
        {"steps": 12.0},
        {"depth": True},
        {"forecast": None},
        {"refresh_steps": "05"},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["schedule", "trial"])
def test_a_file_with_one_wrong_value(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    if where == "trial" and not set(change) < {"speedup", "psnr", "depth", "forecast"}:
        change = {"refresh_steps": [0, 40]}
    file = tuned(speedup=1.3, trials=1, samples=1).save(tmp_path / "tuned.json")
    entry = json.loads(file.read_text())
    (entry if where == "schedule" else entry["trials"][0]).update(change)
    file.write_text(json.dumps(entry))
    with pytest.raises(ScheduleError, match="holds no tuned schedule"):
        Tuned.load(file)


@pytest.mark.parametrize(
    "content", ["[" * 50_000, "", "[]", "{}", '{"format": 2}', '{"format": 1, "steps": 3}']
)
def test_what_is_no_tuned_schedule(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(content)
    with pytest.raises(ScheduleError, match="holds no tuned schedule"):
        Tuned.load(file)
    with pytest.raises(ScheduleError, match="holds no tuned schedule"):
        Tuned.load(tmp_path / "missing.json")


def test_a_damaged_one(tmp_path: Path) -> None:
    file = tuned(speedup=1.3).save(tmp_path / "tuned.json")
    entry = json.loads(file.read_text())
    entry["refresh_steps"] = [3, 1]
    file.write_text(json.dumps(entry))
    with pytest.raises(ScheduleError, match="begin with 0"):
        Tuned.load(file)


# Refusals -----------------------------------------------------------------------------------------


def test_a_run_that_does_not_repeat() -> None:
    network = plain()

    def run() -> torch.Tensor:
        return sampled(network, torch.randn(2, 3, 8, 8), timesteps(STEPS))

    with pytest.raises(TuneError, match=r"does not repeat: two uncached runs of sample 0 differ"):
        dcompile.tune(network, run, speedup=1.3, verbose=False)
    with pytest.raises(NotCompiledError):
        dcompile.handle(network)


def test_a_run_that_does_not_repeat_at_the_only_depth() -> None:
    network = plain()

    def run() -> torch.Tensor:
        return sampled(network, torch.randn(2, 3, 8, 8), timesteps(STEPS))

    with pytest.raises(TuneError, match="does not repeat"):
        dcompile.tune(network, run, speedup=1.3, depths=(0,), verbose=False)


def test_timesteps_that_are_plain_numbers() -> None:
    network = plain()

    def run() -> torch.Tensor:
        return sampled(network, picture(), timesteps(STEPS).tolist())

    with pytest.raises(TuneError, match="not elements of one tensor"):
        dcompile.tune(network, run, speedup=1.3, verbose=False)


def test_a_run_that_ends_before_its_timesteps() -> None:
    network = plain()

    def run() -> torch.Tensor:
        return sampled(network, picture(), timesteps(STEPS)[:9])

    found = dcompile.tune(network, run, speedup=1.3, trials=3, verbose=False)
    assert found.steps == STEPS
    assert max(found.refresh_steps) < 9
    dcompile.cache_compile(network, schedule=found, backend="eager", verbose=False)
    run()
    assert dcompile.handle(network).stats.refresh_steps == len(found.refresh_steps)


def test_what_cannot_be_installed_says_why() -> None:
    with pytest.raises(dcompile.BackendError, match="typo"):
        tuned(speedup=1.3, backend="typo")


def test_a_disabled_module_stays_disabled() -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    dcompile.handle(network).disable()
    tuned(network, speedup=1.3, samples=1, trials=1)
    assert not dcompile.handle(network).enabled


def test_features_that_are_not_finite() -> None:
    network = plain()
    with torch.no_grad():
        network.deep[0].weight.fill_(float("nan"))
    with pytest.raises(TuneError, match="run returned values that are not finite"):
        tuned(network, speedup=1.2)
    run = run_of(network)
    settings: dict[str, Any] = {"speedup": 1.2, "samples": 1, "verbose": False}
    with pytest.raises(TuneError, match="features of step 0 are not finite"):
        dcompile.tune(network, lambda number: run(number).nan_to_num(), **settings)


def test_a_run_that_does_not_call_the_network() -> None:
    with pytest.raises(TuneError, match="called the network less than twice"):
        dcompile.tune(plain(), lambda: torch.zeros(3), speedup=1.3, verbose=False)


def test_runs_of_several_lengths() -> None:
    network = plain()

    def run(number: int) -> torch.Tensor:
        return sampled(network, picture(), timesteps(8 + number))

    with pytest.raises(TuneError, match="makes runs of 8, 9 steps"):
        dcompile.tune(network, run, speedup=1.3, samples=2, verbose=False)


def test_pictures_that_are_not_finite() -> None:
    with pytest.raises(TuneError, match="not finite"):
        pictures_of(torch.tensor([1.0, float("nan")]))


def test_nothing_to_compare() -> None:
    with pytest.raises(TuneError, match="run returned str"):
        pictures_of("a picture")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ScheduleError, "give speedup or psnr"),
        ({"speedup": 2.0, "psnr": 30}, ScheduleError, "give speedup or psnr"),
        ({"speedup": 0.5}, ScheduleError, "at least 1, got 0.5"),
        ({"speedup": 50}, ScheduleError, "a speed-up of 50 is beyond"),
        ({"speedup": 1.3, "depths": (7,)}, DepthError, "depth 7 is out of range"),
        ({"speedup": 1.3, "depths": ()}, TuneError, "must not be empty"),
        ({"speedup": 1.3, "depths": 0}, TuneError, "depths: expected a list of int, got 0"),
        ({"speedup": 1.3, "depths": (0, -1)}, DepthError, r"at least 0, got \[0, -1\]"),
        ({"speedup": 1.3, "depths": (True,)}, DepthError, "expected ints of at least 0"),
        ({"speedup": 1.3, "forecasts": "linear"}, TuneError, "expected a list of str"),
        ({"speedup": 1.3, "forecasts": (Lagrange(3),)}, ScheduleError, "expected names, got Lagr"),
        ({"speedup": 1.3, "intervals": 3}, TuneError, "intervals: expected a list"),
        ({"speedup": 1.3, "memory": None}, TuneError, "memory: expected an int of at least 0"),
        ({"psnr": "30"}, ScheduleError, "psnr: expected a number of dB, 0 to 1000, got '30'"),
        ({"psnr": float("nan")}, ScheduleError, "psnr: expected a number"),
        ({"psnr": 4000}, ScheduleError, "psnr: expected a number"),
        ({"speedup": 1.3, "forecasts": ("cubic",)}, ScheduleError, "expected 'reuse'"),
        ({"speedup": 1.3, "trials": 0}, TuneError, "at least 1"),
        ({"speedup": 1.3, "samples": 1.5}, TuneError, "samples: expected an int"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tuned(**settings)
