"""Loading saved programs against compiling them: each in a process and a code cache of its own.

pytest bench/bench_artifact.py --benchmark-only --benchmark-json=bench/results/artifact.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import shapes, torch
import dcompile
folder, load, small = Path(sys.argv[1]), sys.argv[2] == "load", sys.argv[3] == "small"
batch, side = int(sys.argv[4]), int(sys.argv[5])
network, call = shapes.sd15(small=small)
call["sample"] = torch.randn(batch, 4, side, side)
call["encoder_hidden_states"] = call["encoder_hidden_states"][:batch].clone()
ts = torch.arange(9, 0, -1)
with torch.no_grad():
    network(timestep=ts[0], **call)  # touches every weight, and starts the threads
    begun = time.perf_counter()
    if load:
        dcompile.load(network, folder, verbose=False)
    else:
        dcompile.cache_compile(network, interval=3, verbose=False)
    ready = time.perf_counter()
    for t in ts[:2]:  # one refresh and one reuse step
        network(timestep=t, **call)
    done = time.perf_counter()
stats = dcompile.handle(network).stats
if not load:
    dcompile.handle(network).save(folder)
print(json.dumps({
    "seconds": done - begun, "load_seconds": ready - begun,
    "captures": stats.captures,
    "threads": torch.get_num_threads(), "torch": torch.__version__,
    "parameters": sum(p.numel() for p in network.parameters()),
    "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
}))
"""


def run(way: str, folder: Path, cache: Path, *size: str) -> dict[str, Any]:
    """One process: seconds from ``cache_compile`` or ``load`` to the end of a first reuse step."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), way, *size],
        env=dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache)),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


# The second size is for the overhead alone: at the first, most of the time is the two steps' own.
@pytest.mark.benchmark(group="artifact")
@pytest.mark.parametrize("size", ["2 64", "1 16"])
@pytest.mark.parametrize("way", ["compile", "load"])
def test_to_the_first_reuse_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    folder: Path,
    tmp_path: Path,
    way: str,
    size: str,
) -> None:
    """Afresh: nothing compiled before. Loaded: in another process, with an empty code cache."""
    arguments = (request.config.getoption("--width"), *size.split())
    found: list[dict[str, Any]] = []
    benchmark.pedantic(
        lambda: found.append(
            run(way, folder / size.replace(" ", "-"), tmp_path / "cache", *arguments)
        ),
        rounds=1,
    )
    assert found[0]["captures"] == (way == "compile")
    benchmark.extra_info.update(found[0])
