"""Compares what an artefact was made for with what it is loaded into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcompile.errors import ArtifactError

_SHOWN = 160  # characters of a value that an error message quotes


def compare(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise an ArtifactError that names the first difference."""
    for name in saved.keys() | here.keys():
        if saved.get(name) != here.get(name):
            raise ArtifactError(
                f"saved for another {what}: {name} is {here.get(name)!r} here, "
                f"{saved.get(name)!r} there. Compiled code fits only where it was made for: "
                "compile and save it here"
            )


def compare_structures(saved: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]]) -> None:
    """Raise an ArtifactError that names the first difference."""
    for path in [*saved, *(path for path in here if path not in saved)]:
        where = path or "the network itself"
        if path not in here or path not in saved:
            place = "the saved one" if path in saved else "this module"
            raise ArtifactError(f"saved for another module: only {place} has {where}")
        for name in [*saved[path], *(name for name in here[path] if name not in saved[path])]:
            one, two = saved[path].get(name, "absent"), here[path].get(name, "absent")
            if one != two:
                raise ArtifactError(
                    f"saved for another module: {name} of {where} is {_short(two)} here, "
                    f"{_short(one)} there"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
