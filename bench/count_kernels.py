"""What Inductor launches for dcompile's two graphs on an H100, counted without one.

    python bench/count_kernels.py
    python bench/count_kernels.py --tiny --shape sd15    # seconds, on tiny networks

The networks of bench/shapes.py are cached by dcompile as people cache theirs, on the meta device:
no weights, no arithmetic. Inductor generates its Triton code for both graphs with a pretended card
(pretended_gpu.py), and the code is read (generated_code.py), not run. Needs a CUDA build of torch
with Triton, no GPU and no driver. Writes bench/results/kernels.json, and kernels.md next to it.

What differs from a real card: attention is flash attention, where PyTorch would choose among
several; no kernel is autotuned, no matrix product padded, and SVD's constants are not folded.

Its name is not kernels.py because transformers imports a package of that name where it finds one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import operator
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # a bare checkout will do

import torch  # noqa: E402
import typer  # noqa: E402
from generated_code import Counts, counted  # noqa: E402
from gpu import code_version  # noqa: E402
from kernels_page import key, page  # noqa: E402
from pretended_gpu import DEVICE, PROPERTIES, pretended_h100  # noqa: E402
from shapes import UNETS, Shape  # noqa: E402
from torch.fx import GraphModule, Node  # noqa: E402
from training import replace_file  # noqa: E402

import dcompile  # noqa: E402

RESULTS = ROOT / "bench/results/kernels.json"
META = torch.device("meta")
# Inductor's settings for single shapes. SVD's graph computes with zeros that it creates itself;
# folding such constants runs them, and nothing can run on the pretended card.
SETTINGS: dict[str, dict[str, Any]] = {"svd": {"joint_graph_constant_folding": False}}

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default


class GraphName(StrEnum):
    """The two graphs, in the order in which dcompile compiles them."""

    FULL = "full"
    SHALLOW = "shallow"


class Graph(NamedTuple):
    """A graph as dcompile hands it to its backend, and inputs like those it will get."""

    module: GraphModule
    inputs: list[torch.Tensor]


class Recorder:
    """A backend that keeps the graphs, moved to the pretended card, and compiles nothing.

    What it returns in a graph's place makes empty tensors laid out as Inductor lays out the graph's
    outputs: the shallow graph is compiled for the boundary as the full graph returns it.
    """

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph_module: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graph = Graph(on_the_card(graph_module), inputs)
        self.graphs.append(graph)
        outputs = outputs_of(graph)
        return lambda *_: [torch.empty_like(output, device=META) for output in outputs]


def on_the_card(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph that was captured on the meta device, for CUDA.

    Tensors it creates are created there. Attention is flash attention: PyTorch asks the card which
    one to take. Examples of values in the metadata are on the meta device, so they go.

    Raises:
        ValueError: an attention has a mask, which flash attention does not take.
    """
    moved = copy.deepcopy(graph_module)
    for node in list(moved.graph.nodes):
        node.meta.pop("val", None)
        node.args = tuple(DEVICE if isinstance(arg, torch.device) else arg for arg in node.args)
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": DEVICE}
        if node.target is ATTENTION:
            _make_flash(node)
    moved.recompile()
    return moved


def _make_flash(attention: Node) -> None:
    if len(attention.args) > 3 or set(attention.kwargs) - {"scale"}:
        raise ValueError(
            f"{attention.format_node()}: expected query, key, value and scale; flash attention "
            "takes no mask"
        )
    graph = attention.graph
    with graph.inserting_before(attention):
        flash = graph.call_function(FLASH_ATTENTION, attention.args, dict(attention.kwargs))
        result = graph.call_function(operator.getitem, (flash, 0))
    attention.replace_all_uses_with(result)
    graph.erase_node(attention)


def outputs_of(graph: Graph) -> list[torch.Tensor]:
    """Fake tensors shaped and laid out as the graph's outputs on the card."""
    with pretended_h100(), torch.no_grad(), _fake_mode() as mode:
        return list(graph.module(*_fakes(graph.inputs, mode)))


def graphs_of(shape: Shape, tiny: bool, channels_last: bool) -> dict[GraphName, Graph]:
    """Have dcompile cut the network.

    Args:
        channels_last: lay out the weights of 2D convolutions so.

    Raises:
        RuntimeError: dcompile compiled other graphs than a full and a shallow one.
    """
    network = shape.unfilled(META, torch.float16, tiny)
    if channels_last:
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                weight = module.weight
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    call = shape.call(lambda size: torch.empty(size, dtype=torch.float16, device=META), tiny)
    scheduler = shape.scheduler()
    scheduler.set_timesteps(30)
    recorder = Recorder()
    dcompile.cache_compile(network, interval=2, backend=recorder, on_error="raise", verbose=False)
    with torch.no_grad():
        network(timestep=scheduler.timesteps.to(META)[0], **call)
    # Before them, what is the same at every step has been compiled: it runs once for a picture.
    graphs = recorder.graphs[-2:]
    sizes = [len(graph.module.graph.nodes) for graph in graphs]
    if len(sizes) != 2 or sizes[0] <= sizes[1]:
        raise RuntimeError(f"expected a full and a smaller graph, got some of {sizes} nodes")
    return dict(zip(GraphName, graphs, strict=True))


class _Generated(BaseException):
    """The code is there. No Exception: Inductor would take it for a failure of its own."""


def generated_code(graph: Graph, settings: dict[str, Any]) -> str:
    """Inductor's code for a graph on the card, as text: loading it would compile its kernels.

    dcompile calls Inductor by ``standalone_compile``, which calls ``compile_fx`` with these
    arguments. The one setting it adds has kernels autotuned while code is generated.

    Args:
        settings: of ``torch._inductor.config``.

    Raises:
        RuntimeError: Inductor generated none.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    def stop(code: str) -> None:
        raise _Generated(code)

    settings = {"force_disable_caches": True, "compile_threads": 1, **settings}
    mode = _fake_mode()
    with (
        pretended_h100(),
        torch.no_grad(),
        torch._guards.tracing(torch._guards.TracingContext(mode)),
        mock.patch.object(GraphLowering, "save_output_code", stop),
        config.patch(settings),
    ):
        try:
            compile_fx(
                copy.deepcopy(graph.module), _fakes(graph.inputs, mode), ignore_shape_env=True
            )
        except _Generated as generated:
            return str(generated)
    raise RuntimeError("Inductor generated no code; does save_output_code still exist?")


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv())


def _fakes(tensors: Iterable[torch.Tensor], mode: Any) -> list[torch.Tensor]:
    with mode:
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE) for t in tensors
        ]


def reason_to_skip() -> str:
    """Why nothing can be counted here; empty if it can."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is no CUDA build, so Inductor generates no code for CUDA."
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and Inductor generates code for it."
    return ""


def made_with(tiny: bool) -> dict[str, Any]:
    """What the counts depend on; those of others are not kept."""
    packages = ("torch", "triton", "diffusers")
    return {
        "card": PROPERTIES.name,
        "dtype": "float16",
        "tiny": tiny,
        "code": code_version(),
        **{package: metadata.version(package) for package in packages},
    }


class Record:
    """The results on disk, written after every count.

    Args:
        file: of the JSON; the page is next to it. Counts it has from the same code and versions
            are kept.
        identity: from ``made_with``.
    """

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        self._file = file
        found = json.loads(file.read_text()) if file.exists() else {}
        rows = found.get("rows", {}) if found.get("made_with") == identity else {}
        self.results: dict[str, Any] = {"made_with": identity, "rows": rows}

    def put(self, name: str, counts: Counts) -> None:
        self.results["rows"][name] = asdict(counts)
        replace_file(self._file, lambda path: _write_json(path, self.results))
        self._file.with_suffix(".md").write_text(page(self.results))


def _write_json(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(UNETS)}.")] = None,
    graph: Annotated[list[GraphName] | None, typer.Option(help="Default: both.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny networks, to try it.")] = False,
    channels_last: Annotated[
        bool | None, typer.Option(help="Only weights that lie so, or only those that do not.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Results; the page is written next to it.")
    ] = None,
    only_page: Annotated[
        bool, typer.Option("--page", help="Rewrite the page, count nothing.")
    ] = False,
) -> None:
    file = json_file or RESULTS
    if only_page:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    if unknown := set(shape or ()) - set(UNETS):
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(UNETS)}")
    if reason := reason_to_skip():
        typer.echo(f"Skipped: {reason}")
        return
    # Counts of tiny networks are not for the results.
    record = None if tiny and json_file is None else Record(file, made_with(tiny))
    layouts = (False, True) if channels_last is None else (channels_last,)
    for name in shape or UNETS:
        for layout in layouts:
            graphs = graphs_of(UNETS[name], tiny, layout)
            for which in graph or GraphName:
                started = time.monotonic()
                counts = counted(generated_code(graphs[which], SETTINGS.get(name, {})))
                row = key(name, which, layout)
                seconds = time.monotonic() - started
                typer.echo(
                    f"{row}: {counts.launches} Triton launches of {counts.kernels} kernels, "
                    f"{counts.library_calls} library calls, {counts.transposes} weights "
                    f"transposed, {counts.transposed_bytes / 1e6:.0f} MB ({seconds:.0f} s)"
                )
                if record is not None:
                    record.put(row, counts)


if __name__ == "__main__":
    typer.run(main)
