"""One program for many sizes, programs compiled ahead of traffic, and weights that change."""

import functools
from collections.abc import Callable
from typing import Any

import builders
import networks
import pytest
import seam
import torch
from heard import noticed, silent
from plain import Plain, compiled, picture, plain, sampled, timesteps

import dcompile
from dcompile import CaptureError

RANGES = {"batch": (2, 4), "height": (8, 16), "width": (8, 16)}


def captures(network: Any) -> int:
    return dcompile.handle(network).stats.captures


def check(network: Plain, *calls: tuple[int, tuple[int, int]]) -> None:
    """Whole runs equal those of a network captured for each size."""
    for batch, size in calls:
        x = picture(batch=batch, size=size)
        expected = sampled(compiled(), x, timesteps())
        assert torch.equal(sampled(network, x, timesteps()), expected), (batch, size)


def test_sizes_in_range_share_one_program() -> None:
    network = compiled(dynamic=RANGES)
    check(network, (2, (8, 8)), (4, (16, 8)), (3, (9, 13)), (2, (16, 16)))
    assert captures(network) == 1


def test_sizes_out_of_range_get_their_own_program() -> None:
    network = compiled(dynamic=RANGES)
    check(network, (2, (8, 8)), (5, (8, 8)), (2, (20, 8)), (3, (12, 12)), (2, (6, 8)))
    assert captures(network) == 4


def test_the_first_call_may_be_out_of_range() -> None:
    network = compiled(dynamic=RANGES)
    check(network, (6, (8, 8)), (2, (8, 8)), (3, (10, 8)))
    assert captures(network) == 2


def test_batch_one_is_a_program_of_its_own() -> None:
    network = compiled(dynamic={"batch": (1, 8)})
    check(network, (1, (8, 8)), (2, (8, 8)), (7, (8, 8)), (1, (8, 8)))
    assert captures(network) == 2


def test_sizes_left_out_are_fixed() -> None:
    network = compiled(dynamic={"batch": (2, 4)})
    check(network, (2, (8, 8)), (3, (8, 8)), (2, (16, 8)), (4, (16, 8)))
    assert captures(network) == 2


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({}, "expected True, False or sizes such as"),
        ("yes", "expected True, False or sizes such as"),
        ({"depth": (2, 4)}, "unknown size 'depth'"),
        ({"batch": (4, 2)}, r"two ascending ints of at least 1, got \(4, 2\)"),
        ({"batch": 4}, "two ascending ints"),
        ({"batch": (0, 2)}, "two ascending ints"),
        ({"batch": (2.0, 4)}, "two ascending ints"),
    ],
)
def test_bad_ranges(dynamic: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        compiled(dynamic=dynamic)


def test_autocast_is_part_of_what_a_dynamic_program_is_for() -> None:
    network = compiled(dynamic={"height": (8, 32)})
    t = timesteps()[0]
    with torch.no_grad():
        assert network(picture(), t)[0].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert network(picture(size=(12, 8)), t)[0].dtype == torch.bfloat16
        assert network(picture(size=(16, 8)), t)[0].dtype == torch.float32
    assert captures(network) == 2


class Adaptive(Plain):
    """Inductor takes sizes for granted where it lowers adaptive pooling."""

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:  # type: ignore[override]
        pooled = torch.nn.functional.adaptive_avg_pool2d(sample, (2, 2))
        sample = sample + torch.nn.functional.interpolate(pooled, size=sample.shape[-2:])
        return super().forward(sample, timestep, condition)


def test_sizes_that_a_compiler_takes_for_granted_are_guarded() -> None:
    torch.manual_seed(0)
    reference = Adaptive().eval()
    network = Adaptive().eval()
    network.load_state_dict(reference.state_dict())
    dynamic = {"batch": (2, 8), "height": (8, 40), "width": (8, 40)}
    dcompile.cache_compile(network, dynamic=dynamic, verbose=False)
    t = timesteps()[0]
    with torch.no_grad():
        for size in ((16, 16), (24, 16)):
            x = picture(size=size)
            torch.testing.assert_close(network(x, t)[0], reference(x, t)[0], rtol=1e-4, atol=1e-5)


class Ceiling(Plain):
    """Inductor takes sizes for granted here, too."""

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:  # type: ignore[override]
        pooled = torch.nn.functional.max_pool2d(sample, 3, 2, ceil_mode=True)
        sample = sample + torch.nn.functional.interpolate(pooled, size=sample.shape[-2:])
        return super().forward(sample, timestep, condition)


@pytest.mark.full
def test_a_size_taken_for_granted_holds_in_a_second_compilation_too() -> None:
    """Where the compiler finds in its cache what it compiled before, it says nothing of sizes."""
    t = timesteps()[0]
    for seed in range(2):
        torch.manual_seed(seed)
        reference, network = Ceiling().eval(), Ceiling().eval()
        network.load_state_dict(reference.state_dict())
        dcompile.cache_compile(network, dynamic={"height": (8, 40)}, verbose=False)
        with torch.no_grad():
            for size in ((17, 16), (24, 16)):
                x = picture(size=size)
                found, expected = network(x, t)[0], reference(x, t)[0]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_backend_that_needs_fixed_sizes_gets_them() -> None:
    def fixed_only(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph_module.graph.find_nodes(op="placeholder"):
            if any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape):
                raise RuntimeError("no symbols, please")
        return graph_module

    network = compiled(backend=fixed_only, dynamic=RANGES)
    with noticed(r"no symbols, please; compiled for each size separately"):
        check(network, (2, (8, 8)))
    with silent():
        check(network, (4, (16, 8)), (2, (8, 8)))
    assert captures(network) == 3  # the open one, and one for each size


@pytest.mark.full
def test_a_diffusers_network_stays_exact_at_other_sizes() -> None:
    ranges = {"batch": (2, 4), "height": (8, 32), "width": (8, 32)}
    network = dcompile.cache_compile(
        builders.stable_diffusion().eval(), backend="eager", dynamic=ranges, verbose=False
    )
    handle, ts = dcompile.handle(network), timesteps()
    with torch.no_grad():
        for batch, height, width in ((2, 16, 16), (4, 32, 8), (3, 8, 24)):
            x, text = torch.randn(batch, 4, height, width), networks.text(batch=batch)
            result = network(x, ts[0], return_dict=False, **text)[0]
            handle.disable()
            assert torch.equal(network(x, ts[0], return_dict=False, **text)[0], result)
            handle.enable()
    assert captures(network) == 1


# Warm-up ------------------------------------------------------------------------------------------


def test_one_call_written_in_many_ways_is_one_program() -> None:
    network, reference = compiled(), plain()
    x, t, c = picture(), timesteps()[0], torch.ones(2, 4)
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, t, c), {}),
        ((x, t), {"condition": c}),
        ((x,), {"timestep": t, "condition": c, "scale": 1.0}),
        ((), {"return_dict": False, "condition": c, "timestep": t, "sample": x}),
        ((x, t, c, 1.0, False), {}),
    ]
    dcompile.handle(network).warmup(ways[-1])
    with torch.no_grad():
        for args, kwargs in ways:
            assert torch.equal(network(*args, **kwargs)[0], reference(*args, **kwargs)[0])
        assert captures(network) == 1
        assert torch.equal(network(x, t, c, 2.0)[0], reference(x, t, c, 2.0)[0])
        assert network(x, t, return_dict=True).keys() == {"sample"}
    assert captures(network) == 3
    assert len(dcompile.handle(network).signatures) == 3


def test_parameters_by_keyword_only() -> None:
    class KeywordOnly(Plain):
        def forward(self, *, sample: Any, timestep: Any) -> Any:  # type: ignore[override]
            return super().forward(sample, timestep)

    network = dcompile.cache_compile(KeywordOnly().eval(), backend="eager", verbose=False)
    with torch.no_grad():
        network(sample=picture(), timestep=timesteps()[0])
    assert captures(network) == 1


def test_how_an_argument_is_given_may_matter_to_a_decorator() -> None:
    class Decorated(Plain):
        @functools.wraps(Plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = Plain.forward(self, *args, **kwargs)
            louder = 2 if "condition" in kwargs else 3 if "scale" in kwargs else 1
            return (result[0] * louder,)  # type: ignore[index]

    torch.manual_seed(0)
    network, reference = Decorated().eval(), Decorated().eval()
    network.load_state_dict(reference.state_dict())
    dcompile.cache_compile(network, backend="eager", verbose=False)
    x, t, c = picture(), timesteps()[0], torch.ones(2, 4)
    with torch.no_grad():
        given: Any
        for given in (((x, t, c), {}), ((x, t), {"condition": c}), ((x, t, c), {"scale": 1.0})):
            args, kwargs = given
            assert torch.equal(network(*args, **kwargs)[0], reference(*args, **kwargs)[0])
    assert captures(network) == 3


def test_one_tensor_for_two_arguments() -> None:
    class Twice(Plain):
        def forward(self, sample: Any, timestep: Any, other: Any) -> Any:  # type: ignore[override]
            return (super().forward(sample, timestep)[0] + other,)  # type: ignore[index]

    torch.manual_seed(0)
    network, reference = Twice().eval(), Twice().eval()
    network.load_state_dict(reference.state_dict())
    dcompile.cache_compile(network, backend="eager", verbose=False)
    x, t = picture(), timesteps()[0]
    with torch.no_grad():
        for other in (x, picture(1)):
            assert torch.equal(network(x, t, other)[0], reference(x, t, other)[0])
    assert captures(network) == 1


@pytest.mark.parametrize(
    "call",
    [
        (picture(), timesteps()[0], None),
        {"sample": picture(), "timestep": 999, "condition": None},
        ((picture(), timesteps()[0]), {"condition": None}),
    ],
)
def test_a_warm_network_neither_captures_nor_compiles(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = compiled()
    dcompile.handle(network).warmup(call)
    stats = dcompile.handle(network).stats
    assert (stats.captures, stats.runs, stats.refresh_steps) == (1, 0, 0)
    assert stats.cache_bytes == 0
    if isinstance(call, tuple) and len(call) == 3:
        monkeypatch.setattr(dcompile.compiler.observed_capture, "capture", None)
        monkeypatch.setattr(dcompile.compiler.program_cache, "build", None)
        x = picture()
        assert sampled(network, x, timesteps()).isfinite().all()


def test_several_signatures_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcompile.progress, "SHOWN_FROM", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    network = compiled(verbose=True)
    calls = [(picture(size=(s, s)), timesteps()[0], None) for s in (6, 8, 12)]
    dcompile.handle(network).warmup(*calls)
    assert captures(network) == 3
    assert "call 3 of 3" in capsys.readouterr().err
    for x, _, _ in calls:
        sampled(network, x, timesteps())
    assert captures(network) == 3


def test_signatures_warm_up_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    network = compiled()
    conditions = (None, torch.ones(2, 4))
    for condition in conditions:
        sampled(network, picture(), timesteps(), condition)
    with torch.autocast("cpu", torch.bfloat16):
        sampled(network, picture(size=(6, 6)), timesteps())
    narrow = picture(size=(8, 16))[..., ::2]
    with torch.no_grad():
        network(narrow, 3.5, None, 2.0)
    signatures = dcompile.handle(network).signatures
    assert len(signatures) == 4
    other = compiled()
    dcompile.handle(other).warmup(*signatures)
    assert dcompile.handle(other).signatures == signatures
    monkeypatch.setattr(dcompile.compiler.observed_capture, "capture", None)
    monkeypatch.setattr(dcompile.compiler.program_cache, "build", None)
    for condition in conditions:
        sampled(other, picture(), timesteps(), condition)
    with torch.autocast("cpu", torch.bfloat16):
        sampled(other, picture(size=(6, 6)), timesteps())
    with torch.no_grad():
        assert torch.equal(other(narrow, 3.5, None, 2.0)[0], plain()(narrow, 3.5, None, 2.0)[0])


def test_warmup_in_the_middle_of_a_run_changes_nothing() -> None:
    network, ts = compiled(), timesteps()
    x = sampled(network, picture(), ts[:2])
    dcompile.handle(network).warmup((picture(9), ts[4], None), (picture(9, batch=3), ts[4], None))
    assert torch.equal(sampled(network, x, ts[2:]), sampled(compiled(), picture(), timesteps()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (5, "expected .sample, timestep, ...., a dict or one of handle.signatures, got int"),
        ("[1, 2]", "not a call signature"),
        ("unet", "not a call signature"),
        ((), "a call with a sample and a timestep"),
        (("noise", 3), "a call with a sample and a timestep"),
        ((picture(),), "a call with a sample and a timestep"),
    ],
)
def test_a_call_that_would_run_uncached_is_refused(call: Any, message: str) -> None:
    network = compiled()
    with pytest.raises(CaptureError, match=message):
        dcompile.handle(network).warmup(call)
    sampled(network, picture(), timesteps())


# Weights that change ------------------------------------------------------------------------------


def _doubled(network: Plain) -> None:
    with torch.no_grad():
        network.enter.weight.mul_(2)


def _loaded(network: Plain) -> None:
    network.load_state_dict(plain(seed=3).state_dict())


def _through_data(network: Plain) -> None:
    network.up.weight.data = network.up.weight.data.neg()


def _new_parameter(network: Plain) -> None:
    network.up.weight = torch.nn.Parameter(network.up.weight.detach() * 3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", [_doubled, _loaded, _through_data, _new_parameter])
def test_the_next_generation_sees_changed_weights_without_compiling(
    backend: str, change: Callable[[Plain], None], graphs: str
) -> None:
    network = compiled(backend=backend)
    reference = compiled(backend=backend, cuda_graphs=False)
    sampled(network, picture(), timesteps())
    change(network)
    change(reference)
    result = sampled(network, picture(), timesteps())
    assert torch.equal(result, sampled(reference, picture(), timesteps()))
    assert captures(network) == 1
    assert len(seam.programs_of(network)) == 1


def test_another_dtype_is_another_program_and_back_again() -> None:
    network = compiled()
    first = sampled(network, picture(), timesteps())
    network.double()
    double = sampled(network, picture().double(), timesteps())
    assert torch.equal(double, sampled(compiled().double(), picture().double(), timesteps()))
    network.float()
    with silent():
        assert torch.equal(sampled(network, picture(), timesteps()), first)
    assert captures(network) == 2
