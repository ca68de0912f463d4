"""profile and its picture; calibrate; what tune tries to compare with."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seam
import torch
from PIL import Image
from plain import picture, plain, sampled, timesteps

import dcompile
from dcompile import Adaptive, DcompileError, DepthError, ScheduleError, Trial, Tuned, TuneError
from dcompile.report.plots import pareto_front

STEPS = 9


def run_of(network: Any, steps: int = STEPS) -> Any:
    return lambda: sampled(network, picture(), timesteps(steps))


@pytest.fixture(scope="module")
def profiled() -> Any:
    network = plain()
    return dcompile.profile(network, run_of(network), verbose=False)


def test_profile_measures_every_depth(profiled: Any) -> None:
    network = plain()
    dcompile.cache_compile(network, backend="eager", verbose=False)
    run_of(network)()
    expected = dcompile.handle(network).explain().depths
    assert [depth.depth for depth in profiled.depths] == [row.depth for row in expected]
    assert [depth.ratio for depth in profiled.depths] == [row.ratio for row in expected]
    assert profiled.steps == STEPS
    assert profiled.gains is None


def test_similarities_are_cosines(profiled: Any) -> None:
    for depth in profiled.depths:
        assert depth.similarity.shape == (STEPS, STEPS)
        assert np.allclose(depth.similarity, depth.similarity.T)
        assert np.allclose(np.diag(depth.similarity), 1.0)
        assert depth.change[0] == 0.0
        assert (depth.change[1:] > 0).all()


def test_profile_equals_features_taken_by_hand() -> None:
    network = plain()
    seen: list[torch.Tensor] = []
    found = dcompile.profile(network, run_of(network), depths=(1,), verbose=False)
    dcompile.cache_compile(network, interval=1, depth=1, backend="eager", verbose=False)
    dispatcher = seam.dispatcher_of(network)
    dispatcher.observer = lambda refreshed: seen.append(refreshed.cached[0].flatten().double())
    run_of(network)()
    (depth,) = found.depths
    similar = torch.nn.functional.cosine_similarity(seen[2], seen[6], dim=0)
    assert depth.similarity[2, 6] == pytest.approx(float(similar), abs=1e-5)
    change = (seen[5] - seen[4]).norm() / seen[5].norm()
    assert depth.change[5] == pytest.approx(float(change), rel=1e-3)


def test_profile_leaves_the_network_alone() -> None:
    network = plain()
    before = run_of(network)()
    dcompile.profile(network, run_of(network), depths=(0,), verbose=False)
    assert "forward" not in network.__dict__
    assert torch.equal(run_of(network)(), before)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"run": "pipe"}, TuneError),
        ({"samples": 0}, TuneError),
        ({"depths": ()}, TuneError),
        ({"depths": (0, 99)}, DepthError),
        ({"run": lambda: torch.zeros(3)}, TuneError),
    ],
)
def test_profile_refuses(arguments: dict[str, Any], kind: type[Exception]) -> None:
    network = plain()
    given = {"run": run_of(network), "verbose": False, **arguments}
    with pytest.raises(kind):
        dcompile.profile(network, **given)


def test_profile_on_paper(profiled: Any, tmp_path: Path) -> None:
    drawn = profiled.plot(tmp_path / "profile.png")
    with Image.open(drawn) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    content = json.loads(profiled.save(tmp_path / "profile.json").read_text())
    assert content["steps"] == STEPS
    assert len(content["depths"]) == len(profiled.depths)


def test_plots_without_matplotlib(
    profiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(DcompileError, match=r'pip install "dcompile\[plots\]"'):
        profiled.plot(tmp_path / "profile.png")


# What tune tries


@pytest.fixture(scope="module")
def compared() -> Any:
    network = plain()
    return dcompile.tune(
        network,
        run_of(network),
        speedup=1.5,
        trials=4,
        depths=(0, 1),
        intervals=(2, 3),
        verbose=False,
    )


def test_tune_compares_with_deepcache(compared: Any) -> None:
    found = {(t.depth, t.interval) for t in compared.trials if t.interval}
    assert {(0, 2), (0, 3), (1, 2), (1, 3)} <= found
    assert compared.speedup >= 1.5 - 1e-9


def test_the_result_is_no_slower_than_asked() -> None:
    network = plain()
    tuned = dcompile.tune(
        network, run_of(network), speedup=1.4, trials=2, depths=(0,), intervals=(1,), verbose=False
    )
    assert math.inf in {trial.psnr for trial in tuned.trials}
    assert tuned.speedup >= 1.4 - 1e-9


def test_the_pareto_picture(compared: Any, tmp_path: Path) -> None:
    with Image.open(compared.plot(tmp_path / "tuned.png")) as image:
        assert image.format == "PNG"
    again = Tuned.load(compared.save(tmp_path / "tuned.json"))
    again.plot(tmp_path / "again.png")


def test_front() -> None:
    def trial(speedup: float, psnr: float) -> Trial:
        return Trial((0,), 0, "reuse", speedup, psnr)

    best = [trial(1.0, 40.0), trial(2.0, 35.0), trial(3.0, 20.0)]
    assert pareto_front([*best, trial(1.5, 30.0), trial(2.0, 34.0), trial(3.0, 20.0)]) == best


def test_what_is_deepcache(compared: Any) -> None:
    for trial in compared.trials:
        expected = [
            n
            for n in range(1, STEPS + 1)
            if trial.forecast == "reuse" and trial.refresh_steps == tuple(range(0, STEPS, n))
        ]
        assert trial.interval == (expected[0] if expected else None)


def test_an_infinite_psnr_in_json(tmp_path: Path) -> None:
    trial = Trial((0, 1), 0, "reuse", 1.0, math.inf, 1)
    tuned = Tuned((0, 1), 2, 0, "reuse", ("Plain", 3), 1.0, math.inf, (trial,))
    file = tuned.save(tmp_path / "tuned.json")
    assert "Infinity" not in file.read_text()
    assert Tuned.load(file) == tuned


def test_one_equal_sample_does_not_make_up_for_the_others() -> None:
    network = plain()

    def run(number: int) -> torch.Tensor:
        found = sampled(network, picture(number), timesteps(STEPS))
        return torch.zeros(3) + (number == 0) if number < 2 else found

    tuned = dcompile.tune(
        network, run, samples=3, speedup=1.3, trials=2, depths=(0,), verbose=False
    )
    assert all(math.isfinite(trial.psnr) for trial in tuned.trials)


def test_what_is_never_cached_is_said() -> None:
    network = plain().train()
    for measure in (dcompile.profile, dcompile.tune, dcompile.calibrate):
        more: dict[str, Any] = {} if measure is dcompile.profile else {"speedup": 1.3}
        with pytest.raises(TuneError, match="training mode"):
            measure(network, run_of(network), **more)  # type: ignore[operator]


def test_trials_must_be_deepcache_s_intervals() -> None:
    network = plain()
    with pytest.raises(ScheduleError, match="interval"):
        dcompile.tune(network, run_of(network), speedup=1.5, intervals=(0,), verbose=False)


# calibrate


def test_calibrate_reaches_the_speed_up() -> None:
    network = plain()
    found = dcompile.calibrate(network, run_of(network, 30), speedup=1.4, probe="l2")
    assert found.probe == "l2"

    def reached(schedule: Adaptive) -> float:
        dcompile.cache_compile(network, schedule=schedule, backend="eager", verbose=False)
        run_of(network, 30)()
        return dcompile.handle(network).stats.flops_speedup

    assert reached(found) >= 1.4
    assert reached(Adaptive(found.threshold * 0.8, probe="l2")) <= reached(found)


def test_calibrate_leaves_the_network_alone() -> None:
    network = plain()
    dcompile.calibrate(network, run_of(network), speedup=1.3, trials=2)
    assert "forward" not in network.__dict__


def test_calibrate_refuses() -> None:
    network = plain()
    with pytest.raises(ScheduleError, match=r"no threshold .* at most 1\.\d\d times"):
        dcompile.calibrate(network, run_of(network), speedup=1.6, max_interval=2)
    with pytest.raises(ScheduleError, match="speedup"):
        dcompile.calibrate(network, run_of(network), speedup=0.5)
    with pytest.raises(TuneError, match="run"):
        dcompile.calibrate(network, "run", speedup=1.5)  # type: ignore[arg-type]
    with pytest.raises(TuneError, match="never called"):
        dcompile.calibrate(network, lambda: torch.zeros(1), speedup=1.5)
    with pytest.raises(TuneError, match="trials"):
        dcompile.calibrate(network, run_of(network), speedup=1.5, trials=0)


# What a run took


def test_flops_speedup_counts_every_step() -> None:
    network = plain()
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    handle = dcompile.handle(network)
    assert handle.stats.flops_speedup == 1.0
    run_of(network)()
    ratio = handle.explain().depths[0].ratio
    assert handle.stats.flops_speedup == pytest.approx(9 / (3 + 6 * ratio))
