"""What was found by watching a run is kept for other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import seam
import torch
from diffusers import DDIMScheduler
from heard import noticed, silent
from plain import Plain, picture, plain, sampled

import dcompile
from dcompile import GainWeighted


class Sampler(DDIMScheduler):
    def __init__(self, steps: int = 9) -> None:
        super().__init__(prediction_type="epsilon")
        self.set_timesteps(steps)


def tuned(network: Plain | None = None, speedup: float = 1.5, **more: Any) -> tuple[Plain, Sampler]:
    network, sampler = network or plain(), Sampler()
    settings = {"sampler": sampler, "backend": "eager", "verbose": False, **more}
    return dcompile.cache_compile(network, speedup=speedup, **settings), sampler


def is_watched(network: Plain, sampler: Sampler, size: tuple[int, int] = (8, 8)) -> bool:
    """Whether a run refreshes at every step."""
    before = dcompile.handle(network).stats
    sampled(network, picture(size=size), sampler.timesteps)
    after = dcompile.handle(network).stats
    return after.refresh_steps - before.refresh_steps == len(sampler.timesteps)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "made when needed"
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(folder))
    return folder


def test_another_process_s_first_run_is_tuned(folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    expected = sampled(network, picture(), sampler.timesteps)
    (file,) = folder.iterdir()
    with silent():
        again, sampler = tuned()
        assert torch.equal(sampled(again, picture(), sampler.timesteps), expected)
    assert dcompile.handle(again).stats.reuse_steps > 0
    assert dcompile.handle(again).report().count("found by watching a run") == 1
    assert [file] == list(folder.iterdir())


def test_a_further_kind_of_run_is_added(folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    again, sampler = tuned()
    sampler.set_timesteps(12)
    assert is_watched(again, sampler)
    third, sampler = tuned()
    schedule = seam.settings_of(third).schedule
    assert isinstance(schedule, GainWeighted)  # until the first call
    for steps in (12, 9):
        sampler.set_timesteps(steps)
        assert not is_watched(third, sampler)
    assert len(list(folder.iterdir())) == 1


def test_what_it_depends_on(folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)

    assert is_watched(*tuned(speedup=1.4))
    assert is_watched(*tuned(), size=(16, 16))
    other = plain()
    with torch.no_grad():
        other.deep[0].weight.mul_(1.01)
    assert is_watched(*tuned(other))
    other = plain()
    other.deep.append(torch.nn.ReLU())
    assert is_watched(*tuned(other))
    assert len(list(folder.iterdir())) == 5
    assert not is_watched(*tuned())


def test_it_is_watched_again_if_that_is_asked_for(folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    assert is_watched(*tuned(autotune="first"))
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_kept_if_nothing_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", "")
    assert is_watched(*tuned())
    assert is_watched(*tuned())
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("DCOMPILE_CACHE_DIR")
    assert is_watched(*tuned())
    assert not is_watched(*tuned())
    assert len(list((tmp_path / "dcompile").glob("*.json"))) == 1


BAD = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    b'{"kind": "Uniform", "interval": 3}',
    b'{"kind": "SelfTuned"}',
    b'{"kind": "SelfTuned", "speedup": 1e999, "psnr": null, "cuts": [0], "forecast": "reuse", '
    b'"known": []}',
]


@pytest.mark.parametrize("content", BAD)
def test_a_damaged_file_is_ignored_with_a_warning(content: bytes, folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (content, content + whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with noticed("is not used: ") as messages:
            assert is_watched(*tuned())
        assert len(messages) == 1
        assert file.read_bytes() == whole  # and replaced


@pytest.mark.parametrize(("field", "value"), [("cuts", [7]), ("cuts", [-1]), ("forecast", "x")])
def test_a_file_of_another_network(field: str, value: Any, folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    (file,) = folder.iterdir()
    entry = json.loads(file.read_bytes())
    known = [{**one, "refresh": one["refresh"][:1]} for one in entry["known"]]
    file.write_text(json.dumps({**entry, "cuts": entry["cuts"][:1], "known": known, field: value}))
    with noticed("is not used: ") as messages:
        assert is_watched(*tuned())
    assert len(messages) == 1


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("a file")
    with noticed("autotune: what was found is not kept on disk") as messages:
        network, sampler = tuned()
        assert is_watched(network, sampler)
        sampler.set_timesteps(12)
        assert is_watched(network, sampler)
    assert len([m for m in messages if "not kept" in m]) == 1
    assert not is_watched(network, sampler)


def test_a_network_that_has_changed_adds_nothing(folder: Path) -> None:
    network, sampler = tuned()
    assert is_watched(network, sampler)
    with torch.no_grad():
        network.deep[0].weight.mul_(1.01)
    sampler.set_timesteps(12)
    assert is_watched(network, sampler)
    again, sampler = tuned()
    sampler.set_timesteps(12)
    assert is_watched(again, sampler)


def test_what_two_processes_find_is_joined(folder: Path) -> None:
    assert is_watched(*tuned())
    one, other = tuned(), tuned()
    for (network, sampler), steps in ((one, 12), (other, 15)):
        assert not is_watched(network, sampler)
        sampler.set_timesteps(steps)
    assert is_watched(*one)
    assert is_watched(*other)
    network, sampler = tuned()
    for steps in (9, 12, 15):
        sampler.set_timesteps(steps)
        assert not is_watched(network, sampler)


@pytest.mark.parametrize("where", ["~nobody-of-this-name/x", None])
def test_no_home(where: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is in no list."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DCOMPILE_CACHE_DIR")
    if where is not None:
        monkeypatch.setenv("DCOMPILE_CACHE_DIR", where)

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with noticed("autotune: what was found is not kept on disk: RuntimeError") as messages:
        network, sampler = tuned()
        assert is_watched(network, sampler)
    assert len(messages) == 1


def test_a_relative_cache_folder_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DCOMPILE_CACHE_DIR")
    assert is_watched(*tuned())
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_many_at_a_time_leave_one_whole_file(folder: Path) -> None:
    networks = [tuned(plain()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: is_watched(*pair), networks))
    assert len(list(folder.iterdir())) == 1
    assert not is_watched(*tuned())


def test_weights_of_every_kind(folder: Path) -> None:
    """A sample of each is read: complex, whole, empty, half, without values."""
    network = plain()
    for name, buffer in {
        "of_complex": torch.ones(3, dtype=torch.complex64),
        "of_bools": torch.ones(2, dtype=torch.bool),
        "of_halves": torch.ones(100, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "single": torch.tensor(3),
    }.items():
        network.register_buffer(name, buffer)
    assert is_watched(*tuned(network))
    assert len(list(folder.iterdir())) == 1


SCRIPT = """
import sys
sys.path.append(sys.argv[1])
import torch
from test_tuned_cache import is_watched, tuned
torch.set_num_threads(1)
print(is_watched(*tuned()))
"""


@pytest.mark.full
def test_processes(folder: Path) -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found == [["True"], ["False"]]
