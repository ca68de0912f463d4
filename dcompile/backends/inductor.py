"""Inductor without Dynamo, so without Dynamo's guards on every call."""

from __future__ import annotations

import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from dcompile.errors import BackendError


@dataclass(frozen=True)
class Inductor:
    """TorchInductor on a functional graph.

    Attributes:
        options: Inductor settings (``torch._inductor.config``), e.g. ``{"max_autotune": True}``;
            ``{"freezing": True}`` folds weights into the code, which is fastest on CPUs, costs
            their memory again, and means compiling anew when a weight has changed.
    """

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = "inductor"
    needs_examples: bool = True

    def __post_init__(self) -> None:
        import torch._inductor.config as config

        unknown = [
            option for option in self.options if option.replace("-", "_") not in _known(config)
        ]
        if unknown:
            raise BackendError(
                f"Inductor has no option {', '.join(map(repr, unknown))}; "
                "`torch._inductor.list_options()` lists them"
            )

    @property
    def folds_weights(self) -> bool:
        return bool(self.options.get("freezing", False))

    @property
    def records_cuda_graphs(self) -> bool:
        return bool(self.options.get("triton.cudagraphs", False))

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        patches = {option.replace("-", "_"): value for option, value in self.options.items()}
        if self.folds_weights:
            # The standalone form lifts attributes to inputs and saves the artefact; frozen weights
            # are neither.
            from torch._inductor.compile_fx import compile_fx

            return cast(
                Callable[..., Any],
                compile_fx(graph_module, list(inputs), config_patches=patches),
            )
        compiler_config: Any = torch.compiler.config
        fakes = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        fake_mode = _symbolic_mode(fakes)
        if fake_mode is None:
            artifact = torch._inductor.standalone_compile(
                graph_module,
                list(inputs),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": patches},
            )
        else:  # captured with dynamic sizes: keep their symbols, and what is known of them
            # Lowering may tie sizes to numbers, which the capture's guard has to know; a graph out
            # of Inductor's cache would not say so. Its compiled kernels are still found there.
            with (
                compiler_config.patch(cache_key_tag=uuid.uuid4().hex),
                torch._guards.tracing(torch._guards.TracingContext(fake_mode)),
            ):
                artifact = torch._inductor.standalone_compile(
                    graph_module,
                    fakes,
                    dynamic_shapes="from_tracing_context",
                    options={"config_patches": patches},
                )
        return _callable_of(artifact)

    def dump(self, run: Callable[..., Any]) -> dict[str, bytes]:
        """What ``restore`` needs: Inductor's own artefact, and the C++ kernels it loads.

        Raises:
            RuntimeError: Inductor kept nothing of this graph that could be saved.
        """
        artifact = _artifacts.get(run)
        if artifact is None:
            raise RuntimeError("Inductor's caches are switched off, or cannot hold this graph")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph"
            artifact.save(path=str(file))
            kernels = _kernels_loaded_by(file)
            return {"graph": file.read_bytes(), **kernels}

    def restore(self, files: Mapping[str, bytes]) -> Callable[..., Any]:
        """The callable of what ``dump`` returned, without compiling."""
        for name, content in files.items():
            if name != "graph":
                _put_into_cache(name, content)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph"
            file.write_bytes(files["graph"])
            run = _callable_of(_load(file))
        _artifacts[run] = _Restored(files["graph"])
        return run


class _Restored(NamedTuple):
    """An artefact that came from a file."""

    content: bytes

    def save(self, *, path: str) -> None:
        Path(path).write_bytes(self.content)


# Callables that can be saved, and what saves them.
_artifacts: weakref.WeakKeyDictionary[Callable[..., Any], Any] = weakref.WeakKeyDictionary()


def _callable_of(artifact: Any) -> Callable[..., Any]:
    """What the artefact's own __call__ passes its arguments on to."""
    run = cast(Callable[..., Any], getattr(artifact, "_compiled_fn", artifact))
    saved = getattr(artifact, "_artifacts", None)
    if saved is not None:  # an artefact without the callable: that would keep its own key alive
        _artifacts[run] = type(artifact)(_nothing, saved)
    return run


def _nothing(*_: Any) -> None: ...


def _load(file: Path) -> Any:
    """Load an artefact whose kernels are in the cache.

    Left to itself, Inductor would first compile a header, and three programs that find out which
    vector instructions compiler and processor have. The kernels were compiled elsewhere, and who
    reads an artefact has compared the processors.
    """
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.standalone_compile import CompiledArtifact

    with (
        config.patch({"cpp_cache_precompile_headers": False}),
        mock.patch.object(cpu_vec_isa.VecISA, "check_build", return_value=True),
    ):
        return CompiledArtifact.load(path=str(file))


def _kernels_loaded_by(file: Path) -> dict[str, bytes]:
    """The compiled C++ that an artefact would look up in Inductor's cache, by its place there."""
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
        _load(file)
    libraries = [path.with_suffix(".so") for path in written if path.suffix == ".cpp"]
    root = Path(cache_dir())
    return {
        library.relative_to(root).as_posix(): library.read_bytes()
        for library in libraries
        if library.is_file()
    }


def _put_into_cache(name: str, content: bytes) -> None:
    """Names are hashes of what was compiled and how, so one that is there already is the same."""
    from torch._inductor.codecache import write_atomic
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    target = Path(cache_dir(), name)
    if not target.is_file():
        write_atomic(str(target), content, make_dirs=True)


def _symbolic_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode whose symbols the sizes are, if any size is symbolic."""
    for value in values:
        if isinstance(value, FakeTensor) and any(
            isinstance(size, torch.SymInt) for size in value.shape
        ):
            return value.fake_mode
    return None


def _known(config: Any) -> frozenset[str]:
    return frozenset(config.get_config_copy())
