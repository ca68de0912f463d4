"""Collects the messages of all errors and warnings that dcompile raises: ``messages()``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2] / "dcompile"
_OWN_ERROR = re.compile(r"(?!Guard|Training)[A-Z]\w*Error")
_PYTHON_ERRORS = {"AttributeError", "OverflowError", "RuntimeError", "TypeError", "ValueError"}


class Message(NamedTuple):
    """One message.

    Attributes:
        kind: the error's class, or "warning".
        text: the message, with an ellipsis in place of each value.
    """

    kind: str
    text: str


def messages() -> list[Message]:
    """All messages that a user can see, sorted, each once."""
    found: set[Message] = set()
    for file in ROOT.rglob("*.py"):
        if file.parent.name != "compat":
            found.update(_of(ast.parse(file.read_text())))
    return sorted(found)


def _of(tree: ast.Module) -> Iterator[Message]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind = ast.unparse(node.exc.func)
            if _OWN_ERROR.fullmatch(kind) and kind not in _PYTHON_ERRORS:
                yield Message(kind, _text(node.exc.args[0]))
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("warn"):
            yield Message("warning", _text(node.args[0]).removeprefix("dcompile: "))


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str() as value):
            return " ".join(value.split())
        case ast.JoinedStr(values=values):
            parts = (v.value if isinstance(v, ast.Constant) else "…" for v in values)
            return " ".join("".join(map(str, parts)).split())
        case ast.BinOp(left=left, right=right):
            return f"{_text(left)} {_text(right)}".strip()
    return "…"


def fragment(text: str) -> str:
    """The part of a message to search for: its longest piece without a value in it."""
    return max(text.split("…"), key=len).strip()
