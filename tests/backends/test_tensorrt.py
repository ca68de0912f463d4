"""The TensorRT backend, as far as it can be checked without TensorRT.

What it asks of Torch-TensorRT is checked with a stand-in that records it and runs the graph in
PyTorch; whether Torch-TensorRT would do it, against Torch-TensorRT's own source.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from heard import noticed
from plain import picture, plain, sampled, timesteps
from tensorrt_source import NotAvailableError, Source
from torch import nn
from torch.export import ExportedProgram

import dcompile
from dcompile.backends import resolve, tensorrt
from dcompile.backends.tensorrt import Engine, TensorRT
from dcompile.compat.versions import torch_version
from dcompile.compiler.build import choose_cut, with_weights
from dcompile.compiler.call import CallForms
from dcompile.compiler.capture import capture
from dcompile.compiler.program import weights_of
from dcompile.errors import BackendError
from dcompile.passes import split_at


class Compiled(nn.Module):
    """What the stand-in compiles to: the program with a copy of its weights, as an engine has."""

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__()
        self.bake(exported)

    def bake(self, exported: ExportedProgram) -> None:
        self.program = copy.deepcopy(exported.module())

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.program(*inputs)


class Recorded:
    """A ``torch_tensorrt`` that writes down what it is asked."""

    def __init__(self) -> None:
        self.programs: list[ExportedProgram] = []
        self.calls: list[dict[str, Any]] = []
        self.refits: list[dict[str, Any]] = []
        self.refit_error: Exception | None = None
        self.package = ModuleType("torch_tensorrt")
        self.package.__spec__ = importlib.machinery.ModuleSpec("torch_tensorrt", None)
        self.package.Input = lambda **given: given  # type: ignore[attr-defined]
        self.dynamo = ModuleType("torch_tensorrt.dynamo")
        self.dynamo.compile = self._compile  # type: ignore[attr-defined]
        self.dynamo.refit_module_weights = self._refit  # type: ignore[attr-defined]
        self.package.dynamo = self.dynamo  # type: ignore[attr-defined]

    def _compile(
        self,
        exported_program: ExportedProgram,
        inputs: Any = None,
        *,
        arg_inputs: Any = None,
        kwarg_inputs: Any = None,
        device: Any = None,
        workspace_size: int = 0,
        immutable_weights: bool = True,
        require_full_compilation: bool = False,
        torch_executed_ops: Any = None,
        attn_bias_is_causal: bool = True,
        engine_cache_dir: str = "",
        cache_built_engines: bool = False,
        reuse_cached_engines: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        assert inputs is None
        assert kwarg_inputs is None
        assert not kwargs, "torch_tensorrt would ignore these"
        self.programs.append(exported_program)
        self.calls.append(
            {
                "arg_inputs": arg_inputs,
                "device": device,
                "workspace_size": workspace_size,
                "immutable_weights": immutable_weights,
                "require_full_compilation": require_full_compilation,
                "attn_bias_is_causal": attn_bias_is_causal,
                "engine_cache_dir": engine_cache_dir,
                "caches": (cache_built_engines, reuse_cached_engines),
            }
        )
        return Compiled(exported_program)

    def _refit(
        self, compiled_module: Compiled, new_weight_module: ExportedProgram, **kwargs: Any
    ) -> Compiled:
        self.refits.append(kwargs)
        if self.refit_error is not None:
            raise self.refit_error
        compiled_module.bake(new_weight_module)
        return compiled_module


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    # Its first import looks for torch_tensorrt's spec, which the recorded one does not have.
    importlib.import_module("torch.export._trace")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", recorded.package)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", recorded.dynamo)
    monkeypatch.setattr(tensorrt, "DEVICE_TYPE", "cpu")
    return recorded


def compiled(network: nn.Module | None = None, **options: Any) -> nn.Module:
    dynamic = options.pop("dynamic", False)  # torch_tensorrt has no argument of that name
    return dcompile.cache_compile(
        plain() if network is None else network,
        interval=3,
        backend="tensorrt",
        dynamic=dynamic,
        options=options,
        verbose=False,
    )


def check_like_eager(network: nn.Module, eager: nn.Module, **size: Any) -> None:
    x = picture(**size)
    torch.testing.assert_close(sampled(network, x, timesteps()), sampled(eager, x, timesteps()))


def eager() -> nn.Module:
    return dcompile.cache_compile(plain(), interval=3, backend="eager", verbose=False)


def test_both_graphs_are_compiled_with_fitting_settings(trt: Recorded) -> None:
    network = compiled()
    check_like_eager(network, eager())
    assert dcompile.handle(network).stats.reuse_steps == 4
    full, shallow = trt.calls
    for call in (full, shallow):
        assert call["device"] == torch.device("cpu")
        assert not call["immutable_weights"]
        assert call["require_full_compilation"]
        assert not call["attn_bias_is_causal"]
        assert call["caches"] == (False, False)
    assert full["arg_inputs"] == [
        {"shape": (2, 3, 8, 8), "dtype": torch.float32},
        {"shape": (), "dtype": torch.int64},
    ]
    assert [given["shape"] for given in shallow["arg_inputs"]] == [
        *[given["shape"] for given in full["arg_inputs"]],
        (2, 8, 8, 8),
    ]


def test_the_engine_gets_nothing_but_the_graph(trt: Recorded) -> None:
    network = compiled()
    sampled(network, picture(), timesteps())
    weights = {id(parameter): parameter for parameter in network.parameters()}
    addresses = {parameter.data_ptr() for parameter in network.parameters()}
    for program in trt.programs:
        assert not program.graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
        )
        assert not [n for n in program.module().graph.nodes if n.op == "call_module"]
        for parameter in program.state_dict.values():
            assert parameter.data_ptr() in addresses  # no copy,
            assert id(parameter) not in weights  # but .to() on it leaves the network alone


def test_options_reach_torch_tensorrt(trt: Recorded) -> None:
    sampled(compiled(workspace_size=1 << 30), picture(), timesteps())
    assert {call["workspace_size"] for call in trt.calls} == {1 << 30}
    trt.calls.clear()
    mixed = compiled(torch_executed_ops={torch.ops.aten.silu.default}, attn_bias_is_causal=True)
    sampled(mixed, picture(), timesteps())
    assert not any(call["require_full_compilation"] for call in trt.calls)
    assert all(call["attn_bias_is_causal"] for call in trt.calls)


def test_engines_of_different_graphs_never_share_a_cache_folder(
    trt: Recorded, tmp_path: Path
) -> None:
    def folders(network: nn.Module, **options: Any) -> list[str]:
        trt.calls.clear()
        compiled(network, engine_cache_dir=tmp_path, **options)
        sampled(network, picture(), timesteps())
        assert {call["caches"] for call in trt.calls} == {
            (options.get("cache_built_engines", True), True)
        }
        return [call["engine_cache_dir"] for call in trt.calls]

    first = folders(plain())
    assert len(set(first)) == 2
    assert all(Path(folder).parent == tmp_path for folder in first)
    assert folders(plain(seed=1)) == first  # other weights are refitted into the same engines
    slower = plain()
    slower.down.stride = (2, 1)  # an argument, which Torch-TensorRT's own key does not cover
    assert folders(slower)[0] not in first
    folders(plain(), cache_built_engines=False)


def test_changed_weights_are_refitted(trt: Recorded) -> None:
    network, reference = compiled(), eager()
    for write in (lambda w: None, lambda w: w.mul_(1.5), lambda w: w.data.add_(0.1)):
        with torch.no_grad():
            write(network.enter.weight)
            write(reference.enter.weight)
        check_like_eager(network, reference)
    assert len(trt.calls) == 2
    assert len(trt.refits) == 4
    assert all(given["in_place"] for given in trt.refits)
    check_like_eager(network, reference)
    assert len(trt.refits) == 4  # nothing has changed


@pytest.mark.parametrize("reason", ["it fails", "immutable weights"])
def test_what_cannot_be_refitted_is_built_again(trt: Recorded, reason: str) -> None:
    network = compiled(immutable_weights=reason == "immutable weights")
    reference = eager()
    trt.refit_error = AssertionError("layer is not found in weight mapping")
    for _ in range(2):
        check_like_eager(network, reference)
        with torch.no_grad():
            network.leave.weight.mul_(0.5)
            reference.leave.weight.mul_(0.5)
    assert len(trt.calls) == 4
    assert len(trt.refits) == (1 if reason == "it fails" else 0)


def test_dynamic_sizes_become_a_profile(trt: Recorded) -> None:
    network, reference = compiled(dynamic=True), eager()
    check_like_eager(network, reference, batch=4, size=(16, 12))
    profile = trt.calls[0]["arg_inputs"][0]
    assert profile["min_shape"] == (2, 3, 8, 6)
    assert profile["opt_shape"] == (4, 3, 16, 12)
    assert profile["max_shape"] == (6, 3, 24, 18)
    boundary = trt.calls[1]["arg_inputs"][-1]
    assert boundary["max_shape"] == (6, 8, 24, 18)
    for program in trt.programs:  # where Torch-TensorRT looks
        ranges = {(r.lower, r.upper) for r in program.range_constraints.values()}
        assert {(2, 6), (8, 24), (6, 18)} == {(int(low), int(high)) for low, high in ranges}
    check_like_eager(network, reference, batch=3, size=(20, 8))
    with torch.no_grad():
        network.leave.weight.mul_(0.5)
        reference.leave.weight.mul_(0.5)
    check_like_eager(network, reference, batch=2, size=(20, 8))
    assert (len(trt.calls), len(trt.refits)) == (2, 2)
    check_like_eager(network, reference, batch=4, size=(40, 12))  # a larger engine, for both
    assert trt.calls[2]["arg_inputs"][0]["max_shape"] == (6, 3, 60, 18)
    check_like_eager(network, reference, batch=4, size=(16, 12))
    assert len(trt.calls) == 4
    assert dcompile.handle(network).stats.captures == 1


def test_requested_sizes_become_the_profile(trt: Recorded) -> None:
    sizes = {"batch": (1, 8), "height": (7, 33), "width": (8, 64)}
    network, reference = compiled(dynamic=sizes), eager()
    check_like_eager(network, reference, batch=4, size=(16, 12))
    for call in trt.calls:
        given = call["arg_inputs"][0]
        assert given["min_shape"] == (2, 3, 7, 8)
        assert given["opt_shape"] == (4, 3, 16, 12)
        assert given["max_shape"] == (8, 3, 33, 64)
    check_like_eager(network, reference, batch=8, size=(32, 64))
    assert len(trt.calls) == 2


@pytest.mark.full
def test_a_profile_ends_where_the_network_takes_the_size(trt: Recorded) -> None:
    class Quarters(type(plain())):  # type: ignore[misc]
        """As UNets that choose another path for sizes they cannot halve."""

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *rest: Any) -> Any:
            assert sample.shape[-1] % 4 == 0
            return super().forward(sample, timestep, *rest)

    network = compiled(Quarters().eval(), dynamic=True)
    sampled(network, picture(batch=4, size=(12, 12)), timesteps())
    given = trt.calls[0]["arg_inputs"][0]
    assert given["min_shape"] == (2, 3, 6, 8)
    assert given["max_shape"] == (6, 3, 18, 16)


def test_inputs_elsewhere_are_moved_to_the_engine(trt: Recorded) -> None:
    seen: list[torch.device] = []

    def module(*inputs: torch.Tensor) -> torch.Tensor:
        seen.extend(value.device for value in inputs)
        return inputs[0]

    source = SimpleNamespace(device=torch.device("meta"), profiles=[])
    engine = Engine(module, source, immutable=False)  # type: ignore[arg-type]
    outputs = engine(torch.empty(2, device="meta"), torch.tensor(1))
    assert isinstance(outputs, tuple)
    assert {device.type for device in seen} == {"meta"}


def test_errors_say_what_to_do(trt: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"no option 'workspace'; did you mean workspace_size"):
        resolve("tensorrt", {"workspace": 1})
    with pytest.raises(BackendError, match=r"'arg_inputs' is set by dcompile"):
        resolve("tensorrt", {"arg_inputs": ()})
    monkeypatch.setattr(tensorrt, "DEVICE_TYPE", "cuda")
    network = compiled()
    with noticed("TensorRT runs on cuda, and the network is on cpu"):
        sampled(network, picture(), timesteps())


def test_an_operator_without_converter(trt: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(
        program: ExportedProgram,
        *,
        arg_inputs: Any,
        immutable_weights: bool,
        require_full_compilation: bool,
    ) -> nn.Module:
        if require_full_compilation:
            raise AssertionError("require_full_compilation=True was specified, but ...")
        return Compiled(program)

    monkeypatch.setattr(trt.dynamo, "compile", refuse)
    with noticed(r'options=\{"require_full_compilation": False\}'):
        sampled(compiled(), picture(), timesteps())
    check_like_eager(compiled(require_full_compilation=False), eager())


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install = r'pip install "dcompile\[tensorrt\]"'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=rf"not installed: {install}"):
        resolve("tensorrt", None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Recorded().package)  # without a .dynamo
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BackendError, match=rf"cannot be imported: .*: {install}"):
        resolve("tensorrt", None)


# Against Torch-TensorRT's source


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    try:
        logging.disable(logging.WARNING)
        yield Source.read()
    except NotAvailableError as error:
        pytest.skip(str(error))
    finally:
        logging.disable(logging.NOTSET)


def test_every_argument_passed_exists(
    trt: Recorded, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch_version() < (2, 13):
        pytest.skip("an argument that torch-tensorrt 2.13, whose source is read, has no more")
    names = source.parameters("dynamo/_compiler.py", "compile")
    given: list[set[str]] = []

    def compile_(*programs: Any, **arguments: Any) -> nn.Module:
        given.append(set(arguments))
        return Compiled(*programs)

    kind = inspect.Parameter.KEYWORD_ONLY
    compile_.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    monkeypatch.setattr(trt.dynamo, "compile", compile_)
    network = compiled(engine_cache_dir="somewhere", optimization_level=5)
    sampled(network, picture(), timesteps())
    with torch.no_grad():
        network.enter.weight.mul_(2)
    sampled(network, picture(), timesteps())
    wanted = {"immutable_weights", "require_full_compilation", "attn_bias_is_causal", "device"}
    wanted |= {"arg_inputs", "cache_built_engines", "reuse_cached_engines"}
    for arguments in given:
        assert arguments <= set(names)
        assert arguments == wanted | {"engine_cache_dir", "optimization_level"}
    assert set(trt.refits[0]) <= set(source.parameters("dynamo/_refit.py", "refit_module_weights"))
    for name in names:  # every argument is reachable
        if name not in tensorrt._OURS:
            TensorRT({name: None})


def test_engines_are_explicitly_typed(source: Source) -> None:
    assert "use_explicit_typing" not in source.parameters("dynamo/_compiler.py", "compile")
    interpreter = (source.package / "dynamo/conversion/_TRTInterpreter.py").read_text()
    assert "flag |= STRONGLY_TYPED" in interpreter


Subject = tuple[nn.Module, dict[str, Any]]


def sd15() -> Subject:
    """In its real shape."""
    call = {"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 768)}
    return UNet2DConditionModel(cross_attention_dim=768), call


def sdxl() -> Subject:
    """Every kind of block at its real width, but one layer of each."""
    network = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return network, {
        "sample": (2, 4, 128, 128),
        "encoder_hidden_states": (2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
    }


def svd() -> Subject:
    """Every kind of block, but one of each."""
    network = UNetSpatioTemporalConditionModel(
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(5, 10),
        layers_per_block=1,
    )
    return network, {
        "sample": (2, 14, 8, 72, 128),
        "encoder_hidden_states": (2, 1, 1024),
        "added_time_ids": (2, 3),
    }


def on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: on_meta(inner) for name, inner in value.items()}
    return torch.empty(value, dtype=torch.float16, device="meta")


def check_one_engine(program: ExportedProgram, source: Source) -> None:
    lowered = source.lowered(program)
    kinds = {node.op for node in lowered.graph.nodes}
    assert kinds <= {"placeholder", "get_attr", "call_function", "output"}
    operators = [node for node in lowered.graph.nodes if node.op == "call_function"]
    missing = {str(node.target) for node in operators if node not in source.registry}
    assert not missing
    dtypes = {getattr(node.meta["val"], "dtype", None) for node in operators}
    assert torch.float64 not in dtypes


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Tracing makes many objects, and they stay: looking through them takes a sixth of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.full
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("subject", [sd15, sdxl, svd])
def test_every_operator_has_a_converter(
    subject: Any, trt: Recorded, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "DEVICE_TYPE", "meta")
    with torch.device("meta"):
        network, call = subject()
    network = network.to("meta", torch.float16).eval().requires_grad_(False)
    call = on_meta(call)
    # The timestep on the CPU, where one given as a number ends up.
    args = (call.pop("sample"), torch.tensor(1))
    leaves, form = CallForms(network.forward).flatten(args, {**call, "return_dict": False})
    assert form is not None
    captured = capture(network, network.forward, leaves, form.spec, form.samples)
    for graph in split_at(captured.graph_module, choose_cut(captured, 0)):
        graph_module = with_weights(graph, captured, weights_of(network))
        inputs = [
            leaves[captured.inputs[node.target]]
            if node.target in captured.inputs
            else on_meta(node.meta["val"].shape)  # the boundary
            for node in graph_module.graph.find_nodes(op="placeholder")
        ]
        TensorRT().compile(graph_module, inputs)
        check_one_engine(trt.programs[-1], source)


def test_dynamic_operators_have_converters_too(trt: Recorded, source: Source) -> None:
    sampled(compiled(dynamic=True), picture(size=(16, 8)), timesteps())
    for program in trt.programs:
        check_one_engine(program, source)


def test_forecasts_and_drifts_have_converters(trt: Recorded, source: Source) -> None:
    settings: dict[str, Any] = {"schedule": dcompile.Adaptive(0.05), "forecast": "taylor"}
    network = dcompile.cache_compile(plain(), backend="tensorrt", verbose=False, **settings)
    sampled(network, picture(size=(16, 8)), timesteps())
    stats = dcompile.handle(network).stats
    assert stats.refresh_steps
    assert stats.reuse_steps
    assert len(trt.programs) == 2
    for program in trt.programs:
        check_one_engine(program, source)


def exported(module: nn.Module) -> ExportedProgram:
    program = torch.export.export(module, (torch.ones(2),), strict=False)
    program.example_inputs = None  # as the backend does
    return program


def test_the_check_finds_what_has_no_converter(source: Source) -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = exported(Bessel())
    with pytest.raises(AssertionError, match="bessel_j0"):
        check_one_engine(program, source)


def test_full_like_and_assertions_are_lowered(source: Source) -> None:
    """The two that PyTorch's core decompositions leave in an SD 1.5 graph, without converters."""

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, 2) + x.to(torch.float16)

    program = exported(Both())
    left = [node for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    missing = {str(node.target) for node in left if node not in source.registry}
    assert missing == {"aten.full_like.default", "aten._assert_tensor_metadata.default"}
    check_one_engine(program, source)
