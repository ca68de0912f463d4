"""``dcompile generate`` on a Ray of its own, with processes that are killed."""

from __future__ import annotations

import json
from pathlib import Path

import bulk
import pytest
import ray

from dcompile.errors import DcompileError
from dcompile.integrations.bulk import Actors


def test_gpus_of_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    assert Actors()._gpus("auto") == 0
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    assert Actors()._gpus("auto") == 1
    assert Actors()._gpus("cpu") == 0
    assert Actors(4, 0.5)._gpus("auto") == 0.5
    with pytest.raises(DcompileError, match=r"5 actors with 0.5 GPUs each need 2.5, and Ray has 2"):
        Actors(5, 0.5)._gpus("auto")


@pytest.mark.full
def test_killed_runs_go_on_to_the_same_pictures(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    bulk.write_prompts(prompts, 12)
    assert bulk.start(prompts, tmp_path / "whole", 1).wait() == 0
    kills = [
        bulk.Kill(parts=1, delay=0.1, driver=False),
        bulk.Kill(parts=1, delay=0.0, driver=True),
    ]
    status, killed = bulk.interrupted_run(prompts, tmp_path / "out", kills, actors=2)
    assert status == 0
    assert killed == ["actor", "driver"]
    wrong = bulk.compared(tmp_path / "whole", tmp_path / "out", 12)
    assert wrong == {"missing": 0, "doubled": 0, "differing": 0}
    agreed = [
        json.loads((tmp_path / name / "agreed.json").read_text()) for name in ("whole", "out")
    ]
    assert agreed[0] == agreed[1]  # found on one actor, and on two
