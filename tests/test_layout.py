"""The shape of the repository: limits, public names, what importing costs, what a wheel holds."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcompile

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 500, 250, 60  # lines; of functions, of code
REASONS = {
    "dcompile/cli/app.py: tune": "its options are its parameters, one or two lines each",
    "dcompile/cli/fleet.py: serve": "its options are its parameters, one or two lines each",
}


def sources() -> Iterator[tuple[str, str]]:
    for folder in ("dcompile", "passes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text()


def lines_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_nothing_is_too_long() -> None:
    found = []
    for name, text in sources():
        if len(text.splitlines()) > LONGEST_FILE:
            found.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                too_long = node.end_lineno - node.lineno + 1 > LONGEST_CLASS
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                too_long = lines_of_code(node) > LONGEST_FUNCTION
            else:
                continue
            if too_long:
                found.append(f"{name}: {node.name}")
    assert sorted(found) == sorted(REASONS)


def test_the_hot_path_is_one_screen() -> None:
    tree = ast.parse((ROOT / "dcompile/runtime/dispatcher.py").read_text())
    (kind,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Dispatcher")
    assert kind.end_lineno is not None
    assert kind.end_lineno - kind.lineno < 200
    (call,) = (n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__call__")
    assert lines_of_code(call) <= 50


def test_public_names_are_where_they_are_said_to_be() -> None:
    assert sorted(dcompile.__all__) == list(dcompile.__all__)
    assert set(dcompile.__all__) == {*dcompile._HOME, "__version__"}
    for name, module in dcompile._HOME.items():
        value = getattr(dcompile, name)
        assert value is getattr(importlib.import_module(module), name)
        assert value.__module__ == module, f"{name} is defined in {value.__module__}"
        assert value.__doc__, f"{name} has no docstring"
        assert name in dir(dcompile)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dcompile.nonsense  # noqa: B018


def test_imports_for_type_checkers_agree_with_the_lazy_ones() -> None:
    tree = ast.parse((ROOT / "dcompile/__init__.py").read_text())
    found = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == dcompile._HOME


@pytest.mark.parametrize("statement", ["import dcompile", "import dcompile.cli.app"])
def test_importing_the_package_or_its_command_imports_no_torch(statement: str) -> None:
    script = f"{statement}, sys; assert not {{'torch', 'diffusers', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; {script}"], check=True, cwd=ROOT)


def test_passes_know_nothing_of_dcompile() -> None:
    script = (
        "import sys, dcompile.passes;"
        "own = {name for name in sys.modules if name.startswith('dcompile.')};"
        "assert all(name.startswith(('dcompile.passes', 'dcompile.version')) for name in own), own"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.full
def test_a_wheel_has_passes_inside_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dcompile/passes/skips.py" in names
    assert "dcompile/py.typed" in names
    assert any(name.startswith("dcompile/models/emoji-sd/") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dcompile"}
    folders = {Path(name).parent.as_posix() for name in names if name.endswith("__init__.py")}
    here = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("dcompile/**/*.py")}
    assert folders == here | {"dcompile/passes"}
