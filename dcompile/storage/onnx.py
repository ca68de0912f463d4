"""Write a captured network as ONNX graphs, one file of weights and a manifest.

The folder runs wherever ONNX does, without Python: ``full.onnx`` and ``shallow.onnx`` are the two
halves of a program, ``prologue.onnx``, if asked for, computes what is the same at every step,
``weights.data`` holds every weight once for all, and ``manifest.json`` says what to feed them and
in which order.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim
from torch.fx import Graph, GraphModule

from dcompile.compiler.build import choose_cut, with_weights
from dcompile.compiler.capture import CapturedNetwork
from dcompile.compiler.program import weights_of
from dcompile.errors import ExportError, root_cause
from dcompile.passes import Cut, prologue_of, split_at, without_hoisted
from dcompile.passes.hoist import HOISTED
from dcompile.policy.schedule import Schedule
from dcompile.progress import Display
from dcompile.storage.onnx_folder import (
    FORMAT,
    FORMAT_VERSION,
    GRAPHS,
    MANIFEST,
    WEIGHTS,
    WeightsFile,
    move_weights_out,
    replacing,
    require_replaceable,
    write_model,
)
from dcompile.storage.onnx_names import Names
from dcompile.version import __version__


def export(
    network: CapturedNetwork,
    module: nn.Module,
    forward: Callable[..., Any],
    depth: int,
    schedule: Schedule,
    prologue: bool,
    folder: Path,
    display: Display,
) -> None:
    """Write ``network``, cut at ``depth``, to ``folder``; see ``Handle.export_onnx``.

    Args:
        network: a capture of ``module`` as it is now.
        module: its weights are written.
        forward: the module's own forward; its parameters name the graphs' inputs.
        depth: where to cut.
        schedule: written to the manifest.
        prologue: have a graph of its own compute what is the same at every step.
        folder: replaced if it holds an export, created if it does not exist.
        display: shows progress.

    Raises:
        ExportError: see ``Handle.export_onnx``.
        NoCutError, DepthError: see ``choose_cut``.
    """
    _require_packages()
    require_replaceable(folder)
    weights = weights_of(module)
    _require_values(weights, network)
    with display.stage("cutting"):
        cut = choose_cut(network, depth)
        full_graph, shallow_graph = split_at(network.graph_module, cut)
        values = network.hoisted if prologue else ()
        if values:
            without_hoisted(full_graph)
            without_hoisted(shallow_graph, len(cut.boundary))
    names = Names.of(network, forward, len(cut.boundary), len(values), weights)
    models, hoisted = [], ()
    if values:
        with display.stage("translating the prologue (ONNX)"):
            first_graph = prologue_of(network.graph_module, values)
            first = _translated("prologue", first_graph, network, weights, names, names.hoisted)
            models, hoisted = [first.model], first.outputs
    with display.stage("translating the full graph (ONNX)"):
        outputs = (*names.results, *names.boundary)
        full = _translated("full", full_graph, network, weights, names, outputs, hoisted)
    with display.stage("translating the shallow graph (ONNX)"):
        boundary = full.outputs[-len(names.boundary) :]
        shallow = _translated(
            "shallow", shallow_graph, network, weights, names, names.results, hoisted, boundary
        )
    models = [full.model, shallow.model, *models]
    with display.stage("writing"), replacing(folder) as draft:
        stored = WeightsFile(draft / WEIGHTS)
        with stored:
            for model in models:
                move_weights_out(model, network, stored)
        for model, file in zip(models, GRAPHS, strict=False):
            write_model(model, draft / file)
        manifest = _manifest(type(module).__name__, cut, schedule, names, models, stored)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


class _Translated(NamedTuple):
    """A graph in ONNX.

    Attributes:
        model: an ``onnx_ir.Model``; weights are initializers with the parameters' own names.
        outputs: what the traced graph returned, fake tensors.
    """

    model: Any
    outputs: tuple[Any, ...]


def _translated(
    label: str,
    graph_module: GraphModule,
    network: CapturedNetwork,
    weights: Mapping[str, torch.Tensor],
    names: Names,
    outputs: Sequence[str],
    hoisted: Sequence[torch.Tensor] = (),
    boundary: Sequence[torch.Tensor] = (),
) -> _Translated:
    graph_module = with_weights(graph_module, network, weights).eval()
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    taken = [node for node in placeholders if str(node.target) in network.inputs]
    inputs = [names.inputs[str(node.target)] for node in taken]
    # Metadata of other graphs' results may be of another dtype: what autocast made of them in the
    # capture.
    values = [node.meta["val"] for node in taken]
    marks = [node.meta[HOISTED] for node in placeholders if HOISTED in node.meta]
    inputs += [names.hoisted[mark] for mark in marks]
    values += [*(hoisted[mark] for mark in marks), *boundary]
    inputs += names.boundary[: len(boundary)]
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad(), without_autocast(values):
            exported = torch.export.export(
                graph_module,
                tuple(map(_example, values)),
                dynamic_shapes=tuple(map(_dynamic_sizes, values)),
                strict=False,
            )
            results = [getattr(node, "meta", {}).get("val") for node in _returned(exported.graph)]
            _convert_before_joining(exported.graph_module)
            program = torch.onnx.export(exported, dynamo=True, verbose=False, optimize=False)
            assert program is not None
            model = _optimized(program, network)
            # None is no output in ONNX.
            _rename(
                model, inputs, list(compress(outputs, (value is not None for value in results)))
            )
            program.rename_axes(_axis_names(model))
    except Exception as error:
        raise ExportError(
            f"the {label} graph has no ONNX form: {root_cause(error)}\nA newer torch or "
            'onnxscript may know the operator (pip install --upgrade "dcompile[onnx]"). A capture '
            "without dynamic=True asks less of the exporter; one made under autocast asks for what "
            "ONNX may not have: give an example call"
        ) from error
    return _Translated(model, tuple(results))


def _returned(graph: Graph) -> Sequence[Any]:
    returned = graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    return returned


aten = torch.ops.aten
_JOINS = (
    *(aten.cat, aten.concat, aten.concatenate, aten.stack),
    *(aten.hstack, aten.vstack, aten.dstack, aten.row_stack, aten.column_stack),
)


def _convert_before_joining(graph_module: GraphModule) -> None:
    """Make the type promotion of concatenations explicit: the exporter knows it for arithmetic
    only, and ONNX for nothing. SDXL in half precision joins text_embeds with float32.
    """
    graph = graph_module.graph
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in _JOINS:
            continue
        dtype = node.meta["val"].dtype
        for operand in dict.fromkeys(node.all_input_nodes):
            if operand.meta["val"].dtype != dtype:
                with graph.inserting_before(node):
                    converted = graph.call_function(aten.to.dtype, (operand, dtype))
                    converted.meta["val"] = operand.meta["val"].to(dtype)
                node.replace_input_with(operand, converted)
    graph_module.recompile()


def _example(value: torch.Tensor) -> torch.Tensor:
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)


def _dynamic_sizes(value: torch.Tensor) -> dict[int, Any]:
    """Sizes that were left open by the capture."""
    return {
        axis: Dim.AUTO
        for axis, size in enumerate(value.shape)
        if not isinstance(size, int) and size.node.maybe_as_int() is None
    }


def _optimized(program: Any, network: CapturedNetwork) -> Any:
    """Let the exporter simplify the graph, but keep every weight as it is and by its name.

    While the values of the weights are out of sight they are neither folded into others nor, if
    equal, merged.
    """
    hidden = {}
    for name, value in program.model.graph.initializers.items():
        if name in network.parameters:
            hidden[name] = value.const_value
            value.const_value = None
    program.optimize()
    model = program.model
    for name, value in list(model.graph.initializers.items()):
        if name in hidden:
            value.const_value = hidden[name]
            value.name = network.parameters[name]
    return model


def _rename(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs; drop notes of where in this process a node came from."""
    graph = model.graph
    renamed = {
        **dict(zip(graph.inputs, inputs, strict=True)),
        **dict(zip(graph.outputs, outputs, strict=True)),
    }
    reserved = set(renamed.values())
    for value in _values(model):
        value.metadata_props.clear()
        if value not in renamed and value.name in reserved:
            value.name = f"{value.name}_{uuid.uuid5(uuid.NAMESPACE_OID, value.name).hex[:8]}"
    for value in renamed:  # by way of names nobody has, as they may change places
        value.name = f"dcompile.{id(value)}"
    for value, name in renamed.items():
        value.name = name
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from list(model.graph.initializers.values())
    for node in model.graph:
        yield from node.outputs


def _axis_names(model: Any) -> dict[Any, str]:
    """A size's symbol -> the first axis that has it, as in ``sample_2``."""
    found: dict[Any, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size.value).isidentifier():
                found.setdefault(str(size.value), re.sub(r"\W", "_", f"{value.name}_{axis}"))
    return found


def _manifest(
    network: str,
    cut: Cut,
    schedule: Schedule,
    names: Names,
    models: Sequence[Any],
    stored: WeightsFile,
) -> dict[str, Any]:
    graphs = {
        file.removesuffix(".onnx"): {
            "file": file,
            "inputs": [_described(value) for value in model.graph.inputs],
            "outputs": [_described(value) for value in model.graph.outputs],
        }
        for model, file in zip(models, GRAPHS, strict=False)
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dcompile": __version__,
        "torch": torch.__version__,
        "opset": models[0].opset_imports[""],
        "network": network,
        "depth": cut.depth,
        "cut_at": cut.module_path,
        "sample": names.sample,
        "results": [value.name for value in models[1].graph.outputs],
        "boundary": [{"output": name, "input": name} for name in names.boundary],
        "schedule": _described_schedule(schedule),
        "weights": {"file": stored.path.name, "bytes": stored.size, "sha256": stored.sha256},
        **graphs,
    }


def _described(value: Any) -> dict[str, Any]:
    return {
        "name": value.name,
        "dtype": str(value.dtype.numpy()),
        "shape": [size if isinstance(size, int) else size.value for size in value.shape],
    }


def _described_schedule(schedule: Schedule) -> dict[str, Any]:
    names: list[str] = []
    if dataclasses.is_dataclass(schedule):
        names = [field.name for field in dataclasses.fields(schedule)]
    return {
        "class": type(schedule).__name__,
        "fields": {name: _plain(getattr(schedule, name)) for name in names},
        "repr": repr(schedule),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON knows no infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return repr(value)


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f'export_onnx needs {" and ".join(missing)}: pip install "dcompile[onnx]"'
        )


def _require_values(weights: Mapping[str, torch.Tensor], network: CapturedNetwork) -> None:
    for name in network.parameters.values():
        if weights[name].is_meta:
            raise ExportError(
                f"{name} is on the meta device, without values. Sequential offloading puts weights "
                "there: export before enable_sequential_cpu_offload()"
            )


@contextmanager
def without_autocast(leaves: Iterable[Any]) -> Iterator[None]:
    """Autocast off on the devices of these tensors."""
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
    with ExitStack() as stack:
        for device in devices - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter has to say concerns its authors; errors come as exceptions."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
