"""Every Python block of README and docs runs, and every ``dcompile`` command there parses.

The blocks of one page share a namespace, as if they were typed one after the other. They may use
what ``Prepared`` has, such as ``pipe``, without saying where it comes from. A block that cannot run
here is preceded by ``<!-- skip: next "reason" -->``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import dcompile

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
)
PROMPTS = ["red apple", "rocket", "pizza", "dog"]


def _pipe() -> Any:
    """The bundled Stable Diffusion, which draws 64x64 emoji."""
    from diffusers import DiffusionPipeline

    from dcompile import models

    pipe = DiffusionPipeline.from_pretrained(models.path("emoji-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(prepared: Prepared) -> Callable[[int], Any]:
    """A sampling function for ``tune``, ``calibrate`` and ``profile``: 6 steps."""

    def run(i: int) -> Any:
        generator = torch.Generator().manual_seed(i)
        return prepared["pipe"](PROMPTS[i], num_inference_steps=6, generator=generator)

    return run


class Prepared(dict[str, Any]):
    """A page's namespace. What a block uses without having made it is made at its first use."""

    def __missing__(self, name: str) -> Any:
        if name == "dcompile":
            self[name] = dcompile
        elif name == "torch":
            self[name] = torch
        elif name == "pipe" or name == "fresh_pipe":
            self[name] = _pipe()
        elif name == "unet":
            self[name] = self["pipe"].unet
        elif name == "prompts":
            self[name] = PROMPTS
        elif name == "run":
            self[name] = _run(self)
        elif name == "sample":
            self[name] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        elif name == "timestep":
            self[name] = torch.tensor(10)
        elif name == "prompt":
            self[name] = _embeddings(self["pipe"])
        else:
            raise KeyError(name)
        return self[name]


def _embeddings(pipe: Any) -> torch.Tensor:
    with torch.no_grad():
        own, unconditional = pipe.encode_prompt("red apple", "cpu", 1, True)
    return torch.cat([unconditional, own])


def _check_commands(example: Example) -> None:
    """Parse each ``dcompile`` command, and find each file that is run with python or pytest."""
    from dcompile.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words[:1] == ["dcompile"] and words[1:2] != ["--version"]:
                name, *arguments = words[1:]
                group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
            for word in words[1:2]:
                if words[0] in ("python", "pytest") and word.endswith(".py"):
                    assert (ROOT / word).is_file(), f"there is no {word}"


PARSERS = (
    PythonCodeBlockParser(),
    CodeBlockParser(language="bash", evaluator=_check_commands),
    SkipParser(),
)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # blocks write files
    document = Document.parse(str(ROOT / page), *PARSERS)
    document.namespace = Prepared()
    for example in document.examples():
        example.evaluate()
