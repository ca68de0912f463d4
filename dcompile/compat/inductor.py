"""Inductor without Dynamo: compile a graph, save the result, load it again.

``torch._inductor.standalone_compile`` is the documented way to compile ahead of time; what is
private is the callable inside of its artefact, what the artefact stores, and where compiled C++
kernels are cached. Seen in torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch.fx import GraphModule

from dcompile.compat.export import fake_mode_of


def known_options() -> frozenset[str]:
    """Names of all settings of ``torch._inductor.config``."""
    import torch._inductor.config as config

    settings: Any = config
    return frozenset(settings.get_config_copy())


def compile_with_weights(
    graph_module: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a graph whose weights are attributes, so that Inductor can fold them (freezing).

    The standalone form lifts attributes to inputs and saves the artefact; frozen weights allow
    neither.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph_module, list(inputs), config_patches=patches)
    return cast(Callable[..., Any], compiled)


def compile_standalone(
    graph_module: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]
) -> Any:
    """Compile a graph for inputs like these; symbolic sizes in its metadata stay symbolic.

    Returns:
        Inductor's artefact; see ``callable_of``.
    """
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    has_regions = graph_module.graph.find_nodes(op="call_function", target=invoke_subgraph)
    with _offsets_of_regions_counted_once() if has_regions else contextlib.nullcontext():
        return _compile_standalone(graph_module, inputs, {"config_patches": patches})


def _compile_standalone(
    graph_module: GraphModule, inputs: Sequence[Any], options: dict[str, Any]
) -> Any:
    fakes = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
    fake_mode = fake_mode_of(fakes)
    if fake_mode is None:
        return torch._inductor.standalone_compile(
            graph_module, list(inputs), dynamic_shapes="from_example_inputs", options=options
        )
    # Lowering may specialize sizes, which the capture's guard has to know; a graph out of
    # Inductor's cache would not say so. Its compiled kernels are still found there.
    compiler_config: Any = torch.compiler.config
    with (
        compiler_config.patch(cache_key_tag=uuid.uuid4().hex),
        torch._guards.tracing(torch._guards.TracingContext(fake_mode)),
    ):
        return torch._inductor.standalone_compile(
            graph_module, fakes, dynamic_shapes="from_tracing_context", options=options
        )


def call_regions(graph_module: GraphModule) -> GraphModule:
    """Calls of submodules become calls of subgraphs, each of which Inductor compiles once.

    ``invoke_subgraph`` is what ``torch.compiler.nested_compile_region`` leaves in a graph.
    """
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module"):
        with graph.inserting_before(node):
            body = graph.get_attr(node.target)
            called = graph.call_function(invoke_subgraph, (body, node.target, *node.args))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    graph_module.recompile()
    return graph_module


@contextlib.contextmanager
def _offsets_of_regions_counted_once() -> Iterator[None]:
    """What a subgraph returns begins where its own tensor begins.

    Inductor gives the results of ``invoke_subgraph`` the offsets that they have inside of the
    subgraph's buffers. The tensors that come out have these offsets already, so kernels outside
    read beyond them (torch 2.11 to 2.15). What was compiled without this is not taken from
    Inductor's cache.
    """
    from torch._inductor import ir

    create = ir.InvokeSubgraph.create

    def created(*args: Any, **kwargs: Any) -> Any:
        outputs = create(*args, **kwargs)
        for output in outputs:
            layout = getattr(output, "layout", None)
            if isinstance(layout, ir.FixedLayout):
                layout.offset *= 0
        return outputs

    config: Any = torch.compiler.config
    with (
        config.patch(cache_key_tag=f"{config.cache_key_tag}-dcompile-offsets"),
        mock.patch.object(ir.InvokeSubgraph, "create", created),
    ):
        yield


def callable_of(artifact: Any) -> Callable[..., Any]:
    """The function that the artefact's own ``__call__`` passes its arguments on to."""
    return cast(Callable[..., Any], getattr(artifact, "_compiled_fn", artifact))


def saveable_part(artifact: Any) -> Any | None:
    """What of an artefact can be saved, without its function; None if nothing can.

    The function would keep a weak-keyed table's own key alive.
    """
    stored = getattr(artifact, "_artifacts", None)
    return None if stored is None else type(artifact)(_nothing, stored)


def load_artifact(file: Path) -> Any:
    """Load an artefact whose kernels are in the cache.

    Left alone, Inductor would first compile a header, and three programs that find out which
    vector instructions compiler and processor have. The kernels were compiled elsewhere, and
    whoever loads an artefact has compared the processors.
    """
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.standalone_compile import CompiledArtifact

    with (
        config.patch({"cpp_cache_precompile_headers": False}),
        mock.patch.object(cpu_vec_isa.VecISA, "check_build", return_value=True),
    ):
        return CompiledArtifact.load(path=str(file))


def kernels_loaded_by(file: Path) -> dict[str, bytes]:
    """The compiled C++ that an artefact looks up in Inductor's cache, by relative path."""
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    written: list[Path] = []
    write = codecache.write

    def noted(*args: Any, **kwargs: Any) -> Any:
        key, path = write(*args, **kwargs)
        written.append(Path(path))
        return key, path

    modules = codecache.PyCodeCache.modules_no_attr
    with mock.patch.object(codecache, "write", noted), mock.patch.dict(modules, clear=True):
        load_artifact(file)
    libraries = [path.with_suffix(".so") for path in written if path.suffix == ".cpp"]
    root = Path(cache_dir())
    return {
        library.relative_to(root).as_posix(): library.read_bytes()
        for library in libraries
        if library.is_file()
    }


def put_into_cache(name: str, content: bytes) -> None:
    """Store a compiled kernel where Inductor looks for it.

    Names are hashes of what was compiled and how, so one that is there already is the same.
    """
    from torch._inductor.codecache import write_atomic
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    target = Path(cache_dir(), name)
    if not target.is_file():
        write_atomic(str(target), content, make_dirs=True)


def _nothing(*_: Any) -> None: ...
