"""bench/soak.py, for a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soak
import torch


@pytest.mark.full
def test_a_short_soak(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        soak.main(minutes=0.3, threads=3, seed=1, output=tmp_path / "soak.json")
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["wrong"] == 0
    assert report["counts"]["compared"] > 0


@pytest.mark.full
def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = soak.drawn
    subject = soak.Soak(minutes=0.05, threads=1, seed=2)

    def drawn_with_an_error(base: soak.Subject, request: soak.Request) -> torch.Tensor | None:
        found = drawn(base, request)
        return found if found is None or base is subject.twin else found + 1e-6

    monkeypatch.setattr(soak, "drawn", drawn_with_an_error)
    report = subject.run()
    assert report["wrong"] == report["counts"]["compared"] > 0
