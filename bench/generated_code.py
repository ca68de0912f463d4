"""What a step of Inductor's generated code launches, counted from its text.

Inductor writes one function, ``call``, that runs a graph: a line for each Triton kernel
(``triton_poi_fused_add_3.run(buf2, arg7_1, buf4, 640, stream=stream0)``), for each call of a
library (``extern_kernels.addmm(..., out=buf5)``), for each allocation. It is read as a syntax tree;
a call that is not known to launch something or nothing is an error, so nothing is left out unseen.
"""

from __future__ import annotations

import ast
import collections
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

_LAUNCH_NOTHING = frozenset(
    {
        "args.clear",
        "assert_alignment",
        "assert_size_stride",
        "assert_size_stride_grouped",
        "assert_tensor_metadata",
        "copy_if_misaligned",  # which tensors of torch's allocator never are
        "copy_misaligned",
        "empty_strided_cuda",
        "get_raw_stream",
        "reinterpret_tensor",
        "torch.cuda.set_device",
    }
)


@dataclass(frozen=True)
class Counts:
    """What one step launches.

    Attributes:
        launches: of Triton kernels.
        kernels: distinct ones among them.
        library: calls of libraries, by what they compute. A call may launch several kernels.
        transposes: weights of convolutions that are copied to another layout first.
        transposed_bytes: read and written by that.
    """

    launches: int
    kernels: int
    library: dict[str, int]
    transposes: int
    transposed_bytes: int

    @property
    def library_calls(self) -> int:
        return sum(self.library.values())

    @property
    def all(self) -> int:
        """Triton launches and library calls."""
        return self.launches + self.library_calls


def counted(code: str) -> Counts:
    """Count what ``call`` in ``code`` launches.

    Raises:
        ValueError: there is no such function, or it makes a call that is not known here.
    """
    tree = ast.parse(code)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "call"]
    if len(calls) != 1:
        raise ValueError(f"expected code with one function `call`, got {len(calls)} of them")
    reader = _Reader(dict(_inputs(tree)))
    for statement in _statements(calls[0].body):
        reader.read(statement)
    return reader.counts()


@dataclass
class _Reader:
    """Reads the statements of ``call`` in order.

    Attributes:
        inputs: the graph's inputs, with their bytes; only those of four dimensions or more, which
            weights of convolutions have.
        launches: names of kernels, in order.
        library: calls by what they compute.
        made_from: buffers that a kernel wrote or read last, and which inputs that kernel read.
        transposed: bytes of each weight that a kernel has copied for a convolution.
    """

    inputs: dict[str, int]
    launches: list[str] = field(default_factory=list)
    library: collections.Counter[str] = field(default_factory=collections.Counter)
    made_from: dict[str, list[str]] = field(default_factory=dict)
    transposed: dict[str, int] = field(default_factory=dict)

    def read(self, statement: ast.stmt) -> None:
        value = getattr(statement, "value", None)
        if not isinstance(value, ast.Call):
            return
        function = ast.unparse(value.func)
        if function.endswith(".run"):
            self.launches.append(function.removesuffix(".run"))
            names = [name for name in map(_tensor_name, value.args) if name]
            sources = [name for name in names if name in self.inputs]
            self.made_from |= dict.fromkeys(names, sources)
        elif function.startswith(("extern_kernels.", "torch.ops.")):
            self.library[_operator(function)] += 1
            if _operator(function) == "convolution":
                self._note_weight(_tensor_name(value.args[1]))
        elif function not in _LAUNCH_NOTHING:
            raise ValueError(f"`{ast.unparse(statement)}`: does {function} launch something?")

    def _note_weight(self, operand: str) -> None:
        """A weight that is no input was made from one: by a kernel that only lays it out."""
        sources = [] if operand in self.inputs else self.made_from.get(operand, [])
        if len(sources) == 1:
            self.transposed[sources[0]] = 2 * self.inputs[sources[0]]

    def counts(self) -> Counts:
        return Counts(
            launches=len(self.launches),
            kernels=len(set(self.launches)),
            library=dict(self.library.most_common()),
            transposes=len(self.transposed),
            transposed_bytes=sum(self.transposed.values()),
        )


def _inputs(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Inputs and their bytes, from the lines that make examples of them to time the code with."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        if ast.unparse(node.value.func) == "rand_strided":
            shape = ast.literal_eval(node.value.args[0])
            dtype = next(word.value for word in node.value.keywords if word.arg == "dtype")
            itemsize = getattr(torch, ast.unparse(dtype).removeprefix("torch.")).itemsize
            if len(shape) >= 4:
                yield ast.unparse(node.targets[0]), math.prod(shape) * itemsize


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.With):  # the guard of the device
            yield from _statements(statement.body)
        else:
            yield statement


def _tensor_name(argument: ast.expr) -> str:
    """The buffer or input that an argument is or is a view of; empty for a number."""
    if isinstance(argument, ast.Call) and ast.unparse(argument.func) == "reinterpret_tensor":
        return _tensor_name(argument.args[0])
    return argument.id if isinstance(argument, ast.Name) else ""


def _operator(function: str) -> str:
    """``addmm`` of ``extern_kernels.addmm`` and of ``torch.ops.aten.addmm.default``."""
    parts = function.split(".")
    return parts[1] if parts[0] == "extern_kernels" else parts[3]
