"""``torch.compile(unet, backend="dcompile", options={"interval": 3})``.

Dynamo traces the network and hands over its graph: that becomes a module of its own here, with the
network's parameters, and ``cache_compile`` does the rest. Dynamo's guards stay in front of every
call, which ``dcompile.cache_compile(unet)`` itself goes without. As with any backend, a call that
may need gradients has them: it runs uncached, so sample under ``torch.no_grad()``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from dcompile.api import cache_compile
from dcompile.compat.dynamo import argument_name, example_value, is_of_module
from dcompile.errors import BackendError, CaptureError, TimestepError


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile`` calls, through the entry point group ``torch_dynamo_backends``.

    Args:
        graph_module: what Dynamo traced.
        example_inputs: its inputs.
        options: arguments of ``cache_compile``, by name; of these, ``backend`` compiles the graphs.
            ``sample`` and ``timestep`` name the arguments of the network's forward that are that,
            where it does not follow from names and shapes.
        mode: of ``torch.compile``; there are none here.

    Raises:
        TimestepError: no timestep is among the inputs as a tensor.
        CaptureError: no sample is, or ``mode`` is given.
        BackendError: an option that ``cache_compile`` does not have, and as there.
        ScheduleError, DepthError: see ``cache_compile``.
    """
    if mode not in (None, "default"):
        raise CaptureError(f"dcompile has no mode {mode!r}: use options={{'interval': 3, ...}}")
    settings = dict(options or {})
    names = settings.pop("sample", None), settings.pop("timestep", None)
    known = set(inspect.signature(cache_compile).parameters) - {"module"}
    unknown = ", ".join(map(repr, sorted(set(settings) - known)))
    if unknown:
        listed = ", ".join(sorted(known | {"sample", "timestep"}))
        raise BackendError(f"options: dcompile does not know {unknown}; it knows {listed}")
    traced = _Traced(graph_module, example_inputs, *names)
    cache_compile(traced, **{"verbose": False, **settings})
    return traced.call


class _Traced(nn.Module):
    """A traced graph as a network: sample and timestep first, parameters held."""

    def __init__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        sample: str | None,
        timestep: str | None,
    ) -> None:
        super().__init__()
        self.graph = graph_module
        nodes = graph_module.graph.find_nodes(op="placeholder")
        weights = {
            place: value
            for place, (node, value) in enumerate(zip(nodes, example_inputs, strict=True))
            if isinstance(value, nn.Parameter) or is_of_module(node)
        }
        given = [place for place in range(len(nodes)) if place not in weights]
        arguments = {argument_name(nodes[place]): place for place in given}
        self._timestep = _timestep_of(arguments, example_inputs, timestep)
        self._sample = _sample_of(arguments, example_inputs, graph_module, self._timestep, sample)
        first = (self._sample, self._timestep)
        self._others = [place for place in given if place not in first]
        self._weights = {place: f"weight_{place}" for place in weights}
        self._count = len(nodes)
        for place, name in self._weights.items():
            self._hold(name, weights[place])
        self.training = False

    def _hold(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def call(self, *inputs: Any) -> Any:
        """The graph's own way to be called."""
        if torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
        ):
            return self.graph(*inputs)
        for place, name in self._weights.items():
            if getattr(self, name) is not inputs[place]:  # the network's was replaced
                self._hold(name, inputs[place])
        others = [inputs[place] for place in self._others]
        return self(inputs[self._sample], inputs[self._timestep], *others)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *others: Any) -> Any:
        inputs: list[Any] = [None] * self._count
        inputs[self._sample], inputs[self._timestep] = sample, timestep
        for place, value in zip(self._others, others, strict=True):
            inputs[place] = value
        for place, name in self._weights.items():
            inputs[place] = getattr(self, name)
        return self.graph(*inputs)


def _timestep_of(arguments: Mapping[str, int], values: Sequence[Any], wanted: str | None) -> int:
    tensors = [name for name, place in arguments.items() if isinstance(values[place], torch.Tensor)]
    timed = [name for name in tensors if "time" in name.lower()]
    timed = timed or [name for name in tensors if name in ("t", "args[1]")]
    if wanted is not None:
        timed = [name for name in tensors if name == wanted]
    if not timed:
        raise TimestepError(
            f"no timestep among the graph's tensors {tensors}: pass it as a tensor, such as an "
            'element of scheduler.timesteps, and name it with options={"timestep": ...} if its '
            "name does not speak of time. If Dynamo broke the network into several graphs, "
            "fullgraph=True says where"
        )
    return arguments[timed[0]]


def _sample_of(
    arguments: Mapping[str, int],
    values: Sequence[Any],
    graph_module: GraphModule,
    timestep: int,
    wanted: str | None,
) -> int:
    """The argument named so, or that has the result's batch and image size."""
    if wanted is not None:
        if wanted not in arguments:
            raise CaptureError(f"sample: the graph has no input {wanted!r}, but {list(arguments)}")
        return arguments[wanted]
    output = next(iter(reversed(graph_module.graph.nodes)))
    results = [example_value(node) for node in output.all_input_nodes]
    fitting = [
        name
        for name, place in arguments.items()
        if place != timestep and any(_alike(values[place], result) for result in results)
    ]
    if not fitting:
        raise CaptureError(
            f"none of the graph's inputs {list(arguments)} looks like the sample: name it with "
            'options={"sample": ...}. If Dynamo broke the network into several graphs, '
            "fullgraph=True says where"
        )
    first = [name for name in fitting if name in ("sample", "args[0]")]
    return arguments[(first or fitting)[0]]


def _alike(value: Any, result: Any) -> bool:
    """Whether these are tensors of pictures, or the like, of one batch and size."""
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return (
        value.dim() == result.dim() > 2
        and value.shape[0] == result.shape[0]
        and value.shape[2:] == result.shape[2:]
    )
