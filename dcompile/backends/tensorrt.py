"""TensorRT through Torch-TensorRT: each graph becomes one engine."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from dcompile.backends.sizes import Profile, profiles_of
from dcompile.compat.versions import refit_without_weight_map
from dcompile.errors import BackendError
from dcompile.passes import Canonicalize

DEVICE_TYPE = "cuda"  # what TensorRT runs on
INSTALL = 'pip install "dcompile[tensorrt]"'


@dataclass(frozen=True)
class TensorRT:
    """``torch_tensorrt.dynamo.compile`` on each graph.

    Attributes:
        options: arguments of ``torch_tensorrt.dynamo.compile``. Where not given:

            - ``immutable_weights=False``, so that changed weights are refitted into an engine in
              seconds and not built into a new one in minutes;
            - ``require_full_compilation=True``: a graph is one engine, or an error. The alternative
              is to run what has no converter in PyTorch, between engines, and to say so in a log
              that nobody reads;
            - ``attn_bias_is_causal=False``: true, their default, replaces a square attention bias
              by a causal mask, whatever is in it;
            - explicit typing: the dtypes are the network's. Always so from 2.13 on, an argument
              before;
            - no engine cache. ``engine_cache_dir`` switches it on. Each graph gets a folder of its
              own in there: Torch-TensorRT's key covers operators and input sizes, but neither
              the operators' arguments nor what is connected to what.

    With ``dynamic``, an engine takes the requested ranges of sizes; without them, half to one and
    a half times the sizes seen. It is fastest at the size it was built at. A call outside builds a
    wider one.
    """

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = "tensorrt"
    folds_weights: bool = True
    needs_examples: bool = True
    records_cuda_graphs: bool = False
    prefers_channels_last: bool = False

    def __post_init__(self) -> None:
        known = _parameters(_torch_tensorrt().dynamo.compile) - _OURS
        for option in self.options:
            if option in _OURS:
                raise BackendError(f"TensorRT's option {option!r} is set by dcompile itself")
            if option not in known:  # compile() itself would swallow it
                close = difflib.get_close_matches(option, known, cutoff=0.5)
                hint = f"did you mean {', '.join(close)}? " if close else ""
                raise BackendError(
                    f"TensorRT has no option {option!r}; {hint}"
                    "`help(torch_tensorrt.dynamo.compile)` explains them"
                )

    def compile(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        trt = _torch_tensorrt()
        device = _device(graph_module, inputs)
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        dtypes = tuple(value.dtype for value in inputs)
        source = _Source(profiles_of(placeholders, inputs), dtypes, device)
        settings = self._settings(graph_module, device)
        exported = source.export(graph_module)
        try:
            compiled = trt.dynamo.compile(
                exported, arg_inputs=source.specifications(trt.Input), **settings
            )
        except AssertionError as error:
            if "require_full_compilation" not in str(error):
                raise
            raise BackendError(
                'an operator has no converter; options={"require_full_compilation": False} runs '
                "such operators in PyTorch, between engines"
            ) from error
        return Engine(compiled, source, settings["immutable_weights"])

    def _settings(self, graph_module: GraphModule, device: torch.device) -> dict[str, Any]:
        mixed = ("torch_executed_ops", "torch_executed_modules", "fallback_data_dependent_ops")
        settings: dict[str, Any] = {
            "device": device,
            "immutable_weights": False,
            "require_full_compilation": not any(self.options.get(option) for option in mixed),
            "attn_bias_is_causal": False,
            "use_explicit_typing": True,
        }
        settings = _accepted(_torch_tensorrt().dynamo.compile, settings)
        settings |= self.options
        directory = self.options.get("engine_cache_dir")
        if directory is not None:
            settings.setdefault("cache_built_engines", True)
            settings.setdefault("reuse_cached_engines", True)
            settings["engine_cache_dir"] = str(
                Path(directory).expanduser() / _fingerprint(graph_module)
            )
        return settings


class Engine:
    """A compiled graph. Owns its TensorRT engine, and in it a copy of the graph's weights."""

    def __init__(self, module: Any, source: _Source, immutable: bool) -> None:
        self._module = module
        self._source = source
        self._immutable = immutable

    def __call__(self, *inputs: Any) -> Any:
        device = self._source.device
        outputs = self._module(*[x if x.device == device else x.to(device) for x in inputs])
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs

    def accepts(self, inputs: Sequence[Any]) -> bool:
        """Whether the engine was built for such sizes. Needs only the first few inputs."""
        return all(
            all(
                low <= size <= high
                for low, size, high in zip(smallest, value.shape, largest, strict=True)
            )
            for value, (smallest, _, largest) in zip(inputs, self._source.profiles, strict=False)
        )

    def refit(self, graph_module: GraphModule) -> None:
        """Put the weights of ``graph_module`` into the engine, which keeps everything else.

        The old weights are gone then, and with them whatever was recorded of the engine: a copy
        would need the memory of a third set of weights.

        Raises:
            BackendError: the engine was built with ``immutable_weights=True``.
            Exception: Torch-TensorRT cannot refit; the engine must not be used any more.
        """
        if self._immutable:
            raise BackendError("the engine was built with immutable_weights=True")
        refit = _torch_tensorrt().dynamo.refit_module_weights
        exported = self._source.export(graph_module)
        self._module = refit(self._module, exported, in_place=True, **refit_without_weight_map())


@dataclass(frozen=True)
class _Source:
    """How to export a graph for its engine, at first and with other weights.

    Attributes:
        profiles: smallest, best and largest shape of each input; equal where it does not vary.
        dtypes: of each input.
        device: where the engine runs, and its inputs are. One from elsewhere, such as a timestep
            on the CPU, is moved there first: Torch-TensorRT warns at every such call.
    """

    profiles: list[Profile]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    def export(self, graph_module: GraphModule) -> ExportedProgram:
        """The graph as TensorRT wants it. Shares the weights' memory with the network."""
        _detach_weights(graph_module)
        examples = tuple(
            torch.zeros(best, dtype=dtype, device=self.device)
            for (_, best, _), dtype in zip(self.profiles, self.dtypes, strict=True)
        )
        # From the exported ranges, not from the inputs' specifications, Torch-TensorRT takes the
        # engine's profile. AUTO, because some sizes are bound to each other: a batch, say.
        ranges: tuple[Any, ...] = tuple(
            {
                axis: Dim.AUTO(min=low, max=high)
                for axis, (low, high) in enumerate(zip(smallest, largest, strict=True))
                if low != high
            }
            for smallest, _, largest in self.profiles
        )
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(
                graph_module,
                examples,
                dynamic_shapes=ranges if any(ranges) else None,
                strict=False,
            )
        Canonicalize()(exported.graph_module)  # exporting added assertions again
        # With examples, their module() would begin with a call that checks the inputs against
        # them: it has no converter, so PyTorch would run it before the engine at every step.
        exported.example_inputs = None
        return exported

    def specifications(self, specification: Callable[..., Any]) -> list[Any]:
        return [
            specification(shape=best, dtype=dtype)
            if smallest == largest
            else specification(min_shape=smallest, opt_shape=best, max_shape=largest, dtype=dtype)
            for (smallest, best, largest), dtype in zip(self.profiles, self.dtypes, strict=True)
        ]


def _torch_tensorrt() -> Any:
    """The package, imported when it is first needed.

    Raises:
        BackendError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise BackendError(f"backend 'tensorrt' needs Torch-TensorRT, not installed: {INSTALL}")
    try:
        package = importlib.import_module("torch_tensorrt")
        importlib.import_module("torch_tensorrt.dynamo")
    except Exception as error:  # without TensorRT's libraries it raises Exception itself
        raise BackendError(
            f"Torch-TensorRT is installed but cannot be imported: {type(error).__name__}: {error}. "
            f"It needs TensorRT's libraries: {INSTALL}"
        ) from error
    return package


_OURS = frozenset({"exported_program", "inputs", "arg_inputs", "kwarg_inputs"})


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    )


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that this version of the function has."""
    names = _parameters(function)
    return {name: value for name, value in arguments.items() if name in names}


def _device(graph_module: GraphModule, inputs: Sequence[Any]) -> torch.device:
    """Where the weights are."""
    tensors = [*graph_module.parameters(), *graph_module.buffers(), *inputs]
    for tensor in tensors:
        if tensor.device.type == DEVICE_TYPE:
            device: torch.device = tensor.device
            return device
    raise BackendError(
        f"TensorRT runs on {DEVICE_TYPE}, and the network is on "
        f"{tensors[0].device if tensors else 'no device'}: move it there first"
    )


def _detach_weights(graph_module: GraphModule) -> None:
    """Same memory, other tensor objects.

    Torch-TensorRT moves the parameters it is given to the CPU (``offload_module_to_cpu``), and
    these are the network's own.
    """
    for name, parameter in list(graph_module.named_parameters(recurse=False)):
        detached = nn.Parameter(parameter.detach(), requires_grad=False)
        setattr(graph_module, name, detached)
    for name, buffer in list(graph_module.named_buffers(recurse=False)):
        setattr(graph_module, name, buffer.detach())


def _fingerprint(graph_module: GraphModule) -> str:
    """Differs when any two graphs need different engines; the same in every process."""
    lines = [
        f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}"
        for node in graph_module.graph.nodes
    ]
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    lines += [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
