"""For all tests: fixed seeds, few threads, no hub, and libraries that keep quiet."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# Read when huggingface_hub, diffusers and transformers are imported, by the tests that need them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

torch.set_num_threads(1)  # the networks are small: several threads would mostly wait for each other
pytest.register_assert_rewrite("networks")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
