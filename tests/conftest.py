"""For all tests: fixed seeds, few threads, no hub, and libraries that keep quiet."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Read when huggingface_hub, diffusers and transformers are imported, by the tests that need them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

torch.set_num_threads(1)  # the networks are small: several threads would mostly wait for each other
pytest.register_assert_rewrite("networks")


@pytest.fixture(params=["plain", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test as it is, with graphs recorded on the CPU, and on a GPU with CUDA graphs."""
    import plain
    from simulated_graphs import SimulatedRecorder

    from dcompile.cuda_graphs import RECORDERS

    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        monkeypatch.setattr(plain, "DEVICE", torch.device("cuda"))
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        torch.set_default_device("cuda")
    elif request.param == "simulated":
        monkeypatch.setitem(RECORDERS, "cpu", SimulatedRecorder)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
