"""One canary for each private part of torch, diffusers and accelerate that dcompile uses.

Each fails with a sentence that says what a new version has changed, and what breaks with it.
"""

from __future__ import annotations

import gc
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import plain
from torch import fx, nn
from torch.fx.experimental import proxy_tensor

from dcompile.compat import (
    cuda,
    dynamo,
    export,
    functorch,
    hooks,
    inductor,
    sources,
    storages,
    tensors,
)
from dcompile.compat.fx import source_of


def test_storage_identity() -> None:
    timesteps = torch.arange(10)
    first, second = timesteps[3], timesteps[4]
    assert storages.storage_of(first) is storages.storage_of(second), (
        "views of one tensor no longer share one storage object: step tracking would take every "
        "step for a run of its own"
    )
    freed: list[Any] = []
    reference = storages.weak_storage(first, freed.append)
    del first, second
    gc.collect()
    assert reference() is storages.storage_of(timesteps), (
        "a storage object dies while a tensor still uses it: runs would be forgotten midway"
    )
    del timesteps
    gc.collect()
    assert reference() is None, "a storage outlives its last tensor: runs would never be freed"
    assert freed == [reference], (
        "the callback of a storage's weak reference is not called: ended runs would keep caches"
    )


def test_versions_count_writes() -> None:
    tensor = torch.zeros(2)
    before = tensors.version_of(tensor)
    tensor.add_(1)
    assert tensors.version_of(tensor) != before, (
        "Tensor._version does not change with a write: changed arguments would go unnoticed"
    )
    with torch.inference_mode():
        assert tensors.version_of(torch.zeros(2)) is None, "inference tensors have versions now"


def test_properties_of_many_tensors() -> None:
    held = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    before = tensors.TensorProperties(held)
    assert before.same(held), "Dynamo's TensorGuards refuse what they were made of"
    for other in (torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3).half()):
        own = held[1].data
        held[1].data = other
        assert not before.same(held), "TensorGuards no longer see another shape, layout or dtype"
        held[1].data = own
    assert before.same(held)
    assert not before.same(held[:2])


def test_source_text_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT", 0)
    with sources.forgotten_later():
        made = fx.symbolic_trace(nn.Linear(2, 2))
    key = made.forward.__func__.__code__.co_filename
    assert key not in fx.graph_module._loader.eval_cache, (
        "torch.fx keeps the source text of generated code elsewhere: each capture leaves some"
    )
    assert torch.equal(made(torch.ones(2)), made(torch.ones(2)))


def test_wrapper_subclass() -> None:
    called = []

    class Lazy(torch.Tensor):
        __torch_function__ = tensors.no_torch_function

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> torch.Tensor:
            called.append(func)
            return torch.zeros(4, 3)

    like = torch.empty(3, 4).t()
    made = tensors.wrapper_subclass(Lazy, like)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype), (
        "a wrapper subclass no longer has the layout it is given: lazy outputs would lie"
    )
    _ = made + 1
    assert called == [torch.ops.aten.add.Tensor], (
        "__torch_dispatch__ of a wrapper subclass is not called: lazy outputs would not be computed"
    )


def test_nobody_is_disturbed_while_exporting(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.mean() > 0 else -x

    torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    trace: Any = sys.modules.get("torch.export._trace")
    name = export.considerate_trace.KERNELS
    assert hasattr(trace, name), (
        "torch.export._trace has no _ignore_backend_decomps any more: if export still turns oneDNN "
        "off, other threads compute by other kernels while one captures"
    )
    tracer: Any = proxy_tensor._ModuleStackTracer
    assert all(name in vars(tracer) for name in ("getattr", "trace")), (
        "the tracer of torch.export is another class now: it would follow other threads' modules"
    )
    before = dict(vars(trace)), dict(vars(tracer))
    with export.considerate_trace():
        assert getattr(trace, name) is not before[0][name]
        with pytest.raises(RuntimeError):
            torch.export.export(Branching(), (torch.zeros(2),), strict=False)
    assert (dict(vars(trace)), dict(vars(tracer))) == before
    assert "def forward" not in "".join(capfd.readouterr()), (
        "torch.export prints a graph that it could not finish, in another way than before"
    )


def test_transformations_of_torch_func() -> None:
    seen = []

    def square(x: torch.Tensor) -> torch.Tensor:
        seen.append(functorch.what_transforms() == functorch.UNDER_TORCH_FUNC)
        return (x * x).sum()

    x = torch.ones(2, 3)
    square(x)
    torch.func.vmap(square)(x)
    torch.func.grad(square)(x)
    torch.func.jvp(square, (x,), (x,))
    assert seen == [False, True, True, True], (
        "torch.func's transformations are not noticed any more: a network called under one would "
        "be taken for one of its ordinary calls"
    )


def test_symbolic_sizes() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0] // 2, 2, -1) if x.shape[0] % 2 == 0 else x

    exported = torch.export.export(
        Halves(), (torch.zeros(8, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: None},)
    )
    (node,) = exported.graph.find_nodes(op="placeholder")
    value = node.meta["val"]
    assert export.fake_mode_of([value]), "metadata of an exported graph is no FakeTensor any more"
    size = value.shape[0]
    assert isinstance(size, torch.SymInt), "Dim.AUTO does not leave a size open any more"
    symbol, shape_env = export.expression_of(size), export.shape_env_of(size)
    assert symbol.is_symbol, "a symbolic size is no sympy symbol any more"
    assert export.traced_size(shape_env, symbol) == 8, "ShapeEnv does not know the traced size"
    assert symbol in export.traced_sizes(shape_env)
    low, high = export.bounds_of(shape_env, symbol)
    assert low <= 8 <= high, "ShapeEnv.var_to_range has no bounds of a symbol any more"
    assert export.guards_of(shape_env), "ShapeEnv records no guards: sizes would not be checked"
    text = export.conditions_of(shape_env, [value])
    assert text is not None
    assert "L['t0'].size()[0] % 2" in text, (
        f"conditions on sizes are printed in another way: {text}; compiler/guards.py parses them"
    )
    assert export.fake_mode_of([value]) is value.fake_mode


def test_inductor_artifacts(tmp_path: Path) -> None:
    assert "freezing" in inductor.known_options(), "Inductor's settings cannot be listed any more"
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    inputs = [torch.ones(2, 2), torch.zeros(2), torch.ones(1, 2)]
    artifact = inductor.compile_standalone(exported.graph_module, inputs, {})
    run = inductor.callable_of(artifact)
    assert run is not artifact, (
        "CompiledArtifact has no _compiled_fn any more: every step pays its own __call__"
    )
    (result,) = run(*inputs)
    assert torch.equal(result, torch.full((1, 2), 2.0))
    saveable = inductor.saveable_part(artifact)
    assert saveable is not None, "CompiledArtifact stores no _artifacts: nothing can be saved"
    file = tmp_path / "graph"
    saveable.save(path=str(file))
    loaded = inductor.callable_of(inductor.load_artifact(file))
    assert torch.equal(loaded(*inputs)[0], result), "a loaded artefact computes something else"
    assert isinstance(inductor.kernels_loaded_by(file), dict)


def test_source_of_a_graph() -> None:
    graph = fx.Graph()
    noise = graph.call_function(torch.ops.aten.randn.default, ([3],))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"), noise)),))
    names: dict[str, Any] = {}
    exec(source_of(fx.GraphModule({}, graph)), names)
    found = [names["forward"](None, torch.zeros(3))[0] for _ in range(2)]
    assert not torch.equal(*found), "a graph's source computes its constants once and for all"


def test_cuda_names() -> None:
    assert hasattr(torch._C, "_cuda_clearCublasWorkspaces") or not torch.backends.cuda.is_built(), (
        "torch._C._cuda_clearCublasWorkspaces is gone: a CUDA graph may use a freed workspace"
    )
    names = {"_cuda_endAllocateToPool", "_cuda_releasePool"}
    assert names <= vars(torch._C).keys() or not torch.backends.cuda.is_built(), (
        f"torch._C lacks one of {names}: the pool of a failed capture would never be free again"
    )
    target = [torch.zeros(2)]
    cuda.copy_all(target, [torch.ones(2)])
    assert torch.equal(target[0], torch.ones(2)), "torch._foreach_copy_ copies no more"


def test_dynamo_names_inputs() -> None:
    found: dict[str, bool] = {}

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph_module.graph.find_nodes(op="placeholder"):
            found[dynamo.argument_name(node)] = dynamo.is_of_module(node)
        output = next(iter(reversed(graph_module.graph.nodes)))
        assert all(dynamo.example_value(node) is not None for node in output.all_input_nodes)
        return graph_module.forward

    torch.compiler.reset()
    torch.compile(plain(), backend=backend)(torch.zeros(1, 3, 8, 8), torch.tensor(1))
    assert {"sample", "timestep"} <= found.keys(), (
        f"Dynamo names its inputs in another way: {sorted(found)}; "
        'torch.compile(backend="dcompile") would not find sample and timestep'
    )
    assert not found["sample"]
    assert any(found.values()), "Dynamo does not say which inputs are the module's weights"
    assert callable(dynamo.lookup_backend("eager"))


def test_accelerate_hooks() -> None:
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    network = plain()
    assert not hooks.is_offloaded(network)
    assert hooks.forward_slot(network) == "forward"
    accelerate_hooks.add_hook_to_module(network, accelerate_hooks.ModelHook())
    assert hooks.is_offloaded(network), "accelerate marks hooked modules in another way"
    assert hooks.forward_slot(network) == "_old_forward", (
        "accelerate moves a module's forward elsewhere: dcompile would sit above its hooks"
    )
    assert set(hooks.forward_slots) == {"forward", "_old_forward"}


def test_diffusers_hooks() -> None:
    diffusers_hooks = pytest.importorskip("diffusers.hooks")
    network = plain()
    diffusers_hooks.apply_layerwise_casting(
        network, storage_dtype=torch.float16, compute_dtype=torch.float32
    )
    registries = [getattr(part, "_diffusers_hook", None) for part in network.modules()]
    found = [hook for registry in registries if registry for hook in registry.hooks.values()]
    assert found, "diffusers keeps its hooks elsewhere: layerwise casting cannot be captured"
    assert all(hasattr(hook, "fn_ref") for hook in found), "hooks of diffusers have no fn_ref"
    with hooks.casts_in_graph(network):
        network(torch.zeros(1, 3, 8, 8), torch.tensor(1))
    source = inspect.getsource(diffusers_hooks.apply_group_offloading)
    assert "offload" in source
    assert hooks.offload_hooks(network) == []


def test_compiled_modules() -> None:
    network = plain()
    assert hooks.without_torch_compile(torch.compile(network)) is network, (
        "torch.compile's wrapper keeps its module elsewhere than in _orig_mod"
    )
    before = dict(network.__dict__)
    assert hooks.take_compiled_call(network) is None
    assert network.__dict__ == before, "looking for Module.compile()'s attribute left a trace"
    network.compile()
    installed = hooks.take_compiled_call(network)
    assert installed is not None, "Module.compile() installs elsewhere than in _compiled_call_impl"
    hooks.give_compiled_call(network, installed)
    assert network._compiled_call_impl is installed


def test_spread_parameters() -> None:
    network = plain()
    assert hooks.spread_parameter(network) is None
    name, parameter = next(iter(network.named_parameters()))
    parameter.ds_id = 0  # type: ignore[attr-defined]
    assert hooks.spread_parameter(network) == name
    assert hooks.spread_parameter(SimpleNamespace(named_parameters=list)) is None  # type: ignore[arg-type]
