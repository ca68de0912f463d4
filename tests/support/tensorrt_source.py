"""Torch-TensorRT's own converters, decompositions and signatures, read from its wheel.

TensorRT's libraries cannot be installed here, so neither can ``torch_tensorrt`` be imported. Its
wheel is downloaded and its Python source parsed. What decides whether an operator has a converter
is plain Python around ``torch``: those files are run with every import of ``tensorrt`` and
``torch_tensorrt`` replaced by a stand-in, so that the registry is filled and asked by its own code.
Nothing is ever converted.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import MagicMock

import torch

VERSION = "2.13.0"
_FOREIGN = ("tensorrt", "torch_tensorrt")


class NotAvailableError(RuntimeError):
    """The wheel could not be downloaded."""


def download() -> Path:
    """The unpacked ``torch_tensorrt`` of the wheel, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "dcompile-tests" / f"torch-tensorrt-{VERSION}"
    package = folder / "torch_tensorrt"
    if package.is_dir():
        return package
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "10",
        "--dest",
        str(folder),
        f"torch-tensorrt=={VERSION}",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotAvailableError(f"pip download torch-tensorrt=={VERSION}: {error}") from error
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotAvailableError(f"pip download torch-tensorrt=={VERSION}: {reason}")
    partial = folder / f"partial-{os.getpid()}"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(partial, [name for name in wheel.namelist() if name.endswith(".py")])
    if not package.is_dir():  # another test run may have been faster
        (partial / "torch_tensorrt").rename(package)
    return package


class _StandIns(ast.NodeTransformer):
    """``from torch_tensorrt.x import a as b`` becomes ``b = __stand_in__("a")``, wherever it is."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.level == 0 and (node.module or "").split(".")[0] not in _FOREIGN:
            return node
        return [self._assign(alias.asname or alias.name, alias.name, node) for alias in node.names]

    def visit_Import(self, node: ast.Import) -> Any:
        if node.names[0].name.split(".")[0] not in _FOREIGN:
            return node
        return [
            self._assign(alias.asname or alias.name.split(".")[0], alias.name, node)
            for alias in node.names
        ]

    @staticmethod
    def _assign(name: str, source: str, node: ast.stmt) -> ast.stmt:
        call = ast.parse(f"{name} = __stand_in__({source!r})").body[0]
        return ast.fix_missing_locations(ast.copy_location(call, node))


def _run(
    path: Path, known: dict[str, Any], only: Callable[[ast.stmt], bool] | None = None
) -> dict[str, Any]:
    """Run a file's statements, or some of them. A foreign name is what ``known`` has, or a mock."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if not _is_future(node) and (only is None or only(node))]
    module = _StandIns().visit(ast.Module(body, []))
    code = compile(module, str(path), "exec", flags=annotations.compiler_flag)
    holder = ModuleType(f"read.{path.stem}")
    names: dict[str, Any] = holder.__dict__
    names["__stand_in__"] = lambda name: known.get(name, MagicMock(name=name))
    with mock.patch.dict(sys.modules, {holder.__name__: holder}):  # where dataclasses look
        exec(code, names)
    return names


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@dataclass(frozen=True)
class Source:
    """What the tests ask of Torch-TensorRT.

    Attributes:
        package: its folder.
        registry: its ``DYNAMO_CONVERTERS``: ``node in registry``.
        decompositions: its ``get_decompositions``.
    """

    package: Path
    registry: Any
    decompositions: Callable[[], dict[Any, Any]]

    @staticmethod
    def read() -> Source:
        package = download()
        dynamo = package / "dynamo"
        conversion, lowering = dynamo / "conversion", dynamo / "lowering"
        registry = _run(conversion / "_ConverterRegistry.py", {})
        helpers = ("args_bounds_check", "parse_cat_args", "get_positive_dim")
        utilities = _run(
            conversion / "converter_utils.py",
            {},
            lambda node: (
                isinstance(node, ast.Import | ast.ImportFrom)
                or (
                    isinstance(node, ast.FunctionDef)
                    and (node.name in helpers or node.name.startswith("is_only_operator"))
                )
            ),
        )
        known = {
            **{name: value for name, value in utilities.items() if inspect.isfunction(value)},
            **{name: value for name, value in registry.items() if not name.startswith("__")},
            "ENABLED_FEATURES": SimpleNamespace(tensorrt_rtx=False),
            "ITensor": type("ITensor", (), {}),
        }
        for name in ("aten_ops_converters", "ops_evaluators", "prims_ops_converters"):
            _run(conversion / f"{name}.py", known)
        groups = _run(lowering / "_decomposition_groups.py", {})
        decompositions = _run(lowering / "_decompositions.py", {**known, **groups})
        return Source(package, registry["DYNAMO_CONVERTERS"], decompositions["get_decompositions"])

    def parameters(self, path: str, function: str) -> list[str]:
        """The named parameters of a function defined at the top of a file."""
        for node in ast.parse((self.package / path).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                arguments = node.args
                return [arg.arg for arg in (*arguments.args, *arguments.kwonlyargs)]
        raise LookupError(f"{path} defines no {function}")

    def lowered(self, exported: torch.export.ExportedProgram) -> torch.fx.GraphModule:
        """What ``compile`` partitions: decomposed, assertions removed (``remove_assert_nodes``)."""
        graph_module = exported.run_decompositions(self.decompositions()).module()
        for node in graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
        ):
            graph_module.graph.erase_node(node)
        graph_module.graph.eliminate_dead_code()
        return graph_module
