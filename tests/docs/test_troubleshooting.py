"""docs/troubleshooting.md has a row for every error and warning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_message_has_a_cure() -> None:
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs/tools/messages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/troubleshooting.md").read_text().replace("/", "|")
    found = module.messages()
    assert len(found) > 150
    for message in found:
        searched = module.fragment(message.text).replace("`", "").replace("/", "|")
        assert searched in page, f"no row for the {message.kind} {message.text!r}"
