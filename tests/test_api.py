"""cache_compile and handle as a user meets them: in place, restorable, clear when refused."""

import copy
import importlib
import importlib.metadata
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heard import noticed, silent
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn

import dcompile
from dcompile import handle


def uncached(steps: int = 7) -> torch.Tensor:
    return sampled(plain(), picture(), timesteps(steps))


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import dcompile;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    foreign = set(loaded.stdout.split()) - set(sys.stdlib_module_names)
    assert foreign <= {"dcompile", "torch"}


@pytest.mark.parametrize("package", ["dcompile", "dcompile.passes"])
def test_public_means_listed(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert name == "__version__" or getattr(module, name).__doc__
    assert list(module.__all__) == sorted(module.__all__)


def test_passes_do_not_know_dcompile() -> None:
    code = "import sys, passes; print(any(m.split('.')[0] == 'dcompile' for m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_version_matches_the_package() -> None:
    assert importlib.metadata.version("dcompile") == dcompile.__version__


def test_in_place_and_still_itself() -> None:
    network = plain()
    state = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    assert dcompile.cache_compile(network, interval=3, backend="eager", verbose=False) is network
    assert isinstance(network, Plain)
    sampled(network, picture(), timesteps())
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == state


def test_interval_one_changes_nothing() -> None:
    network = compiled(interval=1)
    assert torch.equal(sampled(network, picture(), timesteps()), uncached())
    assert handle(network).stats.reuse_steps == 0


def test_refresh_steps_are_exact() -> None:
    network = compiled(schedule=dcompile.Steps([0, 2]))
    ts = timesteps(4)
    with torch.no_grad():
        for step, t in enumerate(ts):
            x = picture(step)
            same = torch.equal(network(x, t)[0], plain()(x, t)[0])
            assert same == (step in (0, 2))


def test_default_is_every_third_step() -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    sampled(network, picture(), timesteps(7))
    assert handle(network).stats.refresh_steps == 3


def test_returns_what_the_module_returns() -> None:
    network, t = compiled(), timesteps()[0]
    with torch.no_grad():
        found = network(picture(), t, return_dict=True)
        assert isinstance(found, dict)
        assert torch.equal(found["sample"], plain()(picture(), t)[0])
        assert isinstance(network(picture(), timestep=t), tuple)


def test_calling_again_replaces_the_settings_and_keeps_the_capture() -> None:
    network = compiled(interval=3)
    sampled(network, picture(), timesteps())
    assert handle(network).stats.captures == 1
    dcompile.cache_compile(network, interval=2, depth=1, backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    stats = handle(network).stats
    assert (stats.captures, stats.refresh_steps) == (0, 4)
    again = compiled(interval=2, depth=1)
    assert torch.equal(
        sampled(network, picture(), timesteps()), sampled(again, picture(), timesteps())
    )


def test_disable_enable_remove() -> None:
    network = compiled()
    cached = sampled(network, picture(), timesteps())
    handle(network).disable()
    assert torch.equal(sampled(network, picture(), timesteps()), uncached())
    handle(network).enable()
    assert torch.equal(sampled(network, picture(), timesteps()), cached)
    before = set(plain().__dict__)
    handle(network).remove()
    assert set(network.__dict__) == before
    assert torch.equal(sampled(network, picture(), timesteps()), uncached())
    with pytest.raises(dcompile.NotCompiledError, match=r"call dcompile\.cache_compile first"):
        handle(network)


def test_remove_gives_back_a_forward_that_was_already_replaced() -> None:
    network = plain()
    own = network.forward

    def louder(sample: torch.Tensor, timestep: torch.Tensor, condition: object = None) -> object:
        return (own(sample, timestep)[0] * 2,)

    network.forward = louder  # type: ignore[method-assign, assignment]
    dcompile.cache_compile(network, interval=1, backend="eager", verbose=False)
    t = timesteps()[0]
    with torch.no_grad():
        assert torch.equal(network(picture(), t)[0], plain()(picture(), t)[0] * 2)
    handle(network).remove()
    assert network.forward is louder


def test_torch_compiled_modules_are_unwrapped() -> None:
    network = plain()
    wrapped = torch.compile(network)
    assert dcompile.cache_compile(wrapped, interval=1, backend="eager", verbose=False) is network
    assert handle(wrapped).module is network
    assert torch.equal(sampled(network, picture(), timesteps()), uncached())
    in_place = plain()
    in_place.compile()
    call = in_place._compiled_call_impl
    dcompile.cache_compile(in_place, interval=1, backend="eager", verbose=False)
    assert torch.equal(sampled(in_place, picture(), timesteps()), uncached())
    assert handle(in_place).stats.refresh_steps == 7
    handle(in_place).remove()
    assert in_place._compiled_call_impl is call


def test_inside_export_it_is_the_plain_module() -> None:
    network = compiled()
    with torch.no_grad():
        exported = torch.export.export(network, (picture(), timesteps()[0]), strict=False)
        found = exported.module()(picture(), timesteps()[0])[0]
        assert torch.equal(found, plain()(picture(), timesteps()[0])[0])


def test_a_copy_is_uncached() -> None:
    network = compiled()
    sampled(network, picture(), timesteps())
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.leave.weight.zero_()
    assert not torch.equal(twin.leave.weight, network.leave.weight)
    assert torch.equal(sampled(twin, picture(), timesteps())[0, 0, 0, 0], twin_pixel(twin))
    with pytest.raises(dcompile.NotCompiledError):
        handle(twin)


def twin_pixel(twin: Plain) -> torch.Tensor:
    reference = plain()
    reference.load_state_dict(twin.state_dict())
    return sampled(reference, picture(), timesteps())[0, 0, 0, 0]


def test_pickling_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled.*handle\(module\).remove\(\)"):
        pickle.dumps(compiled())


def test_training_and_gradients_run_uncached_and_warn_once() -> None:
    network = compiled().train()
    with noticed("training mode"):
        network(picture(), timesteps()[0])
    network.eval()
    x = picture().requires_grad_()
    with noticed("requires grad"):
        result = network(x, timesteps()[0])[0]
    result.sum().backward()
    assert x.grad is not None
    with silent():
        network(x, timesteps()[0])
    assert handle(network).stats.uncached_calls == 3


def test_results_need_no_grad_even_where_grad_is_on() -> None:
    assert not compiled()(picture(), timesteps()[0])[0].requires_grad


def test_inference_mode_and_autocast() -> None:
    network, ts = compiled(interval=1), timesteps(3)
    with torch.inference_mode():
        for t in ts:
            assert torch.equal(network(picture(), t)[0], plain()(picture(), t)[0])
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(picture(), ts[0])[0], plain()(picture(), ts[0])[0])
    assert handle(network).stats.captures == 2  # autocast makes another program


def test_another_dtype_is_another_program() -> None:
    network, expected = compiled(interval=1), plain()
    for module in (network, expected):
        module.to(torch.float64)
    ts = timesteps(3).double()
    for t in ts:
        with torch.no_grad():
            found = network(picture().double(), t)[0]
            assert torch.equal(found, expected(picture().double(), t)[0])


def test_constants_and_shapes_are_part_of_the_signature() -> None:
    network, ts, condition = compiled(interval=1), timesteps(2), torch.ones(2, 4)
    for scale in (1.0, 2.0, 1.0):
        for size in ((8, 8), (8, 12), (9, 7)):
            x = picture(size=size)
            with torch.no_grad():
                found = network(x, ts[0], condition, scale=scale)[0]
                assert torch.equal(found, plain()(x, ts[0], condition, scale=scale)[0])
    assert handle(network).stats.captures == 6


def test_channels_last_input() -> None:
    network = compiled(interval=1)
    x = picture().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(network(x, timesteps()[0])[0], plain()(x, timesteps()[0])[0])


def test_explain_and_stats() -> None:
    network = compiled()
    with pytest.raises(dcompile.NotCompiledError, match="call the network"):
        handle(network).explain()
    table = handle(network).explain(picture(), timesteps()[0])
    sampled(network, picture(), timesteps())
    assert handle(network).explain() == table
    assert [row.depth for row in table.depths] == [0, 1]
    assert table.as_dict()["depths"][0]["module_path"] == "leave"
    # By hand: multiply-adds of the convolutions a reuse step runs, and of all layers.
    shallow = 64 * 9 * (3 * 8 + 16 * 3) + 8
    full = shallow + 16 * 9 * (8 * 8 + 16 * 8) + 4 * 9 * 64
    assert table.depths[0].ratio == pytest.approx((2 * shallow - 8) / (2 * full - 8), rel=1e-3)
    assert table.depths[0].boundary_shapes == ((2, 8, 8, 8),)
    assert table.depths[0].cache_bytes == 2 * 8 * 8 * 8 * 4
    ratio = table.depths[0].ratio
    assert table.depths[0].speed_limits[3] == pytest.approx(3 / (1 + 2 * ratio))
    assert "N=10" in str(table)
    stats = handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.runs) == (3, 4, 1)
    assert stats.compile_seconds > 0


def test_progress_is_shown_on_terminals_and_can_be_silenced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    network = dcompile.cache_compile(plain(), interval=3, backend=slow_backend)
    sampled(network, picture(), timesteps())
    shown = capsys.readouterr().err
    assert "compiling the full graph" in shown
    assert "compiling the shallow graph" in shown
    assert " s" in shown
    sampled(compiled(backend=slow_backend), picture(), timesteps())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verbose", [True, False])
def test_progress_is_logged_where_no_terminal_watches(
    verbose: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "dcompile"):
        sampled(compiled(verbose=verbose), picture(), timesteps())
    (record,) = [r for r in caplog.records if r.getMessage().startswith("Plain: capturing ")]
    assert record.levelno == (logging.INFO if verbose else logging.DEBUG)
    assert capsys.readouterr().err == ""


def test_torch_logs_shows_everything() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from plain import compiled, picture, sampled, timesteps;"
        "sampled(compiled(), picture(), timesteps())"
    )
    support = str(Path(__file__).parent / "support")
    environment = {**os.environ, "TORCH_LOGS": "+dcompile"}
    shown = subprocess.run(
        [sys.executable, "-c", code, support],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stderr
    assert "Plain: capturing " in shown


def slow_backend(graph_module: nn.Module, inputs: list[torch.Tensor]) -> object:
    import time

    time.sleep(0.06)
    return graph_module.forward


def test_calls_that_differ_in_nesting_only_are_distinguished() -> None:
    class Nested(Plain):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, a: object, b: object
        ) -> object:  # type: ignore[override]
            scale = 2.0 if isinstance(a, list) else 3.0
            return (super().forward(sample, timestep)[0] * scale,)

    network = dcompile.cache_compile(Nested().eval(), interval=1, backend="eager", verbose=False)
    x, t, one = picture(), timesteps()[0], torch.ones(1)
    with torch.no_grad():
        assert torch.allclose(network(x, t, [one], one)[0] * 1.5, network(x, t, one, [one])[0])


def test_capture_leaves_the_modules_modes_alone() -> None:
    network = compiled()
    network.deep.train()
    network(picture(), timesteps()[0])
    assert network.deep.training


def test_a_call_the_network_refuses_raises_its_own_error_and_changes_nothing() -> None:
    network = compiled()
    with pytest.raises(RuntimeError, match="channels") as error:
        network(torch.randn(2, 5, 8, 8), timesteps()[0])
    assert not isinstance(error.value, dcompile.DcompileError)
    with noticed("sample is empty"):
        network(torch.randn(0, 3, 8, 8), timesteps()[0])
    sampled(network, picture(), timesteps())
    assert handle(network).stats.reuse_steps == 4


def test_a_copy_beneath_a_hook() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    network = compiled()
    add_hook_to_module(network, ModelHook())
    twin = copy.deepcopy(network)
    assert torch.equal(sampled(twin, picture(), timesteps())[0], uncached()[0])


class TestRefusals:
    @pytest.mark.parametrize("interval", [0, -2, 1.5, "3", True])
    def test_interval(self, interval: object) -> None:
        with pytest.raises(dcompile.ScheduleError, match="interval: expected an int"):
            compiled(interval=interval)

    def test_interval_and_schedule(self) -> None:
        with pytest.raises(dcompile.ScheduleError, match="give one of interval, speedup"):
            compiled(interval=3, schedule=dcompile.Uniform(2))

    def test_schedule_without_refresh(self) -> None:
        with pytest.raises(dcompile.ScheduleError, match="refresh"):
            compiled(schedule=[0, 3])

    def test_schedule_with_another_refresh(self) -> None:
        class Bad:
            def refresh(self, step: int) -> bool:
                return True

        with pytest.raises(dcompile.ScheduleError, match=r"must have refresh\(step, steps\)"):
            compiled(schedule=Bad())

    def test_negative_depth(self) -> None:
        with pytest.raises(dcompile.DepthError, match="at least 0, got -1"):
            compiled(depth=-1)

    def test_depth_out_of_range_lists_the_depths_and_runs_uncached(self) -> None:
        network = compiled(depth=7)
        with pytest.raises(dcompile.DepthError, match=r"(?s)depth 7.*0  leave.*1  up.*saves"):
            network(picture(), timesteps()[0])
        assert torch.equal(sampled(network, picture(), timesteps()), uncached())

    def test_steps_beyond_the_run(self) -> None:
        network = compiled(schedule=dcompile.Steps([0, 9]))
        with pytest.raises(dcompile.ScheduleError, match="beyond this run of 7 steps"):
            sampled(network, picture(), timesteps(7))

    def test_no_skip_connection(self) -> None:
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                return self.conv(torch.cat([sample, timestep * torch.ones_like(sample)], 1)[:, :3])

        network = dcompile.cache_compile(Chain().eval(), backend="eager", verbose=False)
        with pytest.raises(dcompile.NoCutError, match="found nowhere to cut"):
            network(picture(), timesteps()[0])
        with torch.no_grad():
            assert network(picture(), timesteps()[0]).shape == picture().shape

    def test_code_that_cannot_be_captured(self) -> None:
        class Undecided(Plain):
            def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:  # type: ignore[override]
                if sample.sum() > 0:
                    return super().forward(sample, timestep)
                return super().forward(-sample, timestep)

        message = r"(?s)test_api.py:\d+, in forward: if sample.sum\(\) > 0"
        network = dcompile.cache_compile(Undecided().eval(), backend="eager", verbose=False)
        with noticed(message):
            assert network(picture(), timesteps()[0])[0].shape == picture().shape
        assert handle(network).stats.uncached_calls == 1
        dcompile.cache_compile(network, backend="eager", on_error="raise", verbose=False)
        for _ in range(2):
            with pytest.raises(dcompile.CaptureError, match=message):
                network(picture(), timesteps()[0])

    def test_a_network_that_writes_to_itself(self) -> None:
        class Counting(Plain):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:  # type: ignore[override]
                self.calls += 1
                return super().forward(sample, timestep)

        network = dcompile.cache_compile(Counting().eval(), backend="eager", verbose=False)
        with torch.no_grad(), noticed("writes to calls"):
            network(picture(), timesteps()[0])
        assert network.calls == 1

    def test_no_timestep(self) -> None:
        with pytest.raises(dcompile.TimestepError, match="takes no timestep"):
            dcompile.cache_compile(nn.Conv2d(3, 3, 3))

    def test_unknown_backend(self) -> None:
        with pytest.raises(dcompile.BackendError, match=r"unknown backend .indctor.*aot_eager"):
            compiled(backend="indctor")

    def test_unknown_option(self) -> None:
        with pytest.raises(dcompile.BackendError, match="no option 'freezng'"):
            compiled(backend="inductor", options={"freezng": True})
        with pytest.raises(dcompile.BackendError, match="takes none"):
            compiled(backend="eager", options={"freezing": True})

    def test_backend_that_fails_or_returns_nothing(self) -> None:
        def fails(graph_module: nn.Module, inputs: list[object]) -> object:
            raise ZeroDivisionError("compiler bug")

        network = compiled(backend=fails, on_error="raise")
        with pytest.raises(dcompile.BackendError, match="ZeroDivisionError: compiler bug") as error:
            network(picture(), timesteps()[0])
        assert isinstance(error.value.__cause__, ZeroDivisionError)
        network = compiled(backend=fails)
        with noticed("ZeroDivisionError: compiler bug"):
            assert torch.equal(sampled(network, picture(), timesteps()), uncached())
        with noticed("expected a callable"):
            compiled(backend=lambda graph_module, inputs: None)(picture(), timesteps()[0])

    def test_what_to_do_on_an_error(self) -> None:
        with pytest.raises(dcompile.DcompileError, match='"uncached" or "raise", got \'stop\''):
            compiled(on_error="stop")

    def test_plain_module_and_other_objects(self) -> None:
        with pytest.raises(dcompile.NotCompiledError):
            handle(plain())
        with pytest.raises(dcompile.NotCompiledError):
            handle(3)
        with pytest.raises(dcompile.DcompileError, match="got int"):
            dcompile.cache_compile(3)

    def test_missing_arguments_raise_the_modules_own_error(self) -> None:
        with (
            noticed("none the timestep"),
            pytest.raises(TypeError, match="timestep"),
        ):
            compiled()(picture())

    def test_every_error_is_a_dcompile_error(self) -> None:
        for name in dcompile.__all__:
            if name.endswith("Error"):
                assert issubclass(getattr(dcompile, name), dcompile.DcompileError)


class TopHeavy(Plain):
    """Nearly all of its compute is at full resolution, outside of any cut."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.leave = nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.Conv2d(256, 3, 1))


def test_a_network_that_gains_nothing_is_told_so_once() -> None:
    network = TopHeavy().eval()
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    with noticed("caching will not make this network faster"):
        sampled(network, picture(), timesteps())
    with silent():
        sampled(network, picture(batch=3), timesteps())
    assert handle(network).stats.reuse_steps > 0
    assert "will not make this faster" in " ".join(str(handle(network).explain()).split())
