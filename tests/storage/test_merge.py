"""Saved programs of several folders in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, picture, plain, sampled, timesteps

import dcompile
from dcompile import ArtifactError
from dcompile.storage.merge import merge

SIZES = {"a": (8, 8), "b": (12, 8), "c": (8, 12)}


def saved(folder: Path, *names: str, interval: int = 2, network: Plain | None = None) -> Path:
    network = plain() if network is None else network
    dcompile.cache_compile(network, interval=interval, backend="eager", verbose=False)
    for name in names:
        sampled(network, picture(size=SIZES[name]), timesteps())
    return dcompile.handle(network).save(folder)


def captures(folder: Path, *names: str) -> int:
    network = dcompile.load(plain(), folder, verbose=False)
    for name in names:
        sample = picture(size=SIZES[name])
        compiled: Any = dcompile.cache_compile(plain(), interval=2, backend="eager", verbose=False)
        found = sampled(network, sample, timesteps())
        assert torch.equal(found, sampled(compiled, sample, timesteps()))
    return dcompile.handle(network).stats.captures


def test_programs_of_all_folders(tmp_path: Path) -> None:
    parts = [saved(tmp_path / "1", "a", "b"), saved(tmp_path / "2", "b", "c")]
    merge(parts, tmp_path / "all")
    assert captures(tmp_path / "all", "a", "b", "c") == 0
    merge([tmp_path / "all"], tmp_path / "all")  # onto itself
    assert captures(tmp_path / "all", "a", "b", "c") == 0
    assert len(dcompile.handle(dcompile.load(plain(), tmp_path / "all")).signatures) == 3


def test_other_settings(tmp_path: Path) -> None:
    parts = [saved(tmp_path / "1", "a"), saved(tmp_path / "2", "b", interval=3)]
    with pytest.raises(ArtifactError, match="2 has another schedule than the folders before it"):
        merge(parts, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_another_structure(tmp_path: Path) -> None:
    other = plain()
    other.up.scale = 0.5  # type: ignore[assignment]
    parts = [saved(tmp_path / "1", "a"), saved(tmp_path / "2", "b", network=other)]
    with pytest.raises(ArtifactError, match="of another structure"):
        merge(parts, tmp_path / "all")


def test_a_damaged_folder(tmp_path: Path) -> None:
    parts = [saved(tmp_path / "1", "a"), saved(tmp_path / "2", "b")]
    for file in parts[1].glob("data-*/*"):
        file.write_bytes(b"")
    with pytest.raises(ArtifactError, match="is damaged"):
        merge(parts, tmp_path / "all")
