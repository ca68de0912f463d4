"""Saved programs: what comes back is what was saved, and nothing wrong is ever run."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import seam
import torch
from plain import Plain, picture, plain, sampled, timesteps
from torch import nn

import dcompile
from dcompile import ArtifactError, DcompileError, NotCompiledError, ScheduleError
from dcompile.storage import folder as folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = dcompile.cache_compile(plain(), interval=2, depth=1, backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    sampled(network, picture(size=(12, 8)), timesteps(), torch.ones(2, 4))
    return dcompile.handle(network).save(tmp_path_factory.mktemp("saved") / "plain")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "plain"))


def loaded(folder: Path, **arguments: Any) -> Plain:
    return dcompile.load(plain(), folder, verbose=False, **arguments)


def data_of(folder: Path) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["data"]


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as somebody would who knows how it is sealed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    edit(manifest)
    (folder / "manifest.json").write_bytes(folders.sealed(manifest))


def test_nothing_is_captured_or_compiled_after_loading(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(dcompile.compiler.observed_capture, "capture", never)
    monkeypatch.setattr(dcompile.compiler.program_cache, "build", never)
    network = loaded(saved)
    expected = dcompile.handle(network)
    reference = plain()
    with torch.no_grad():
        for size, condition in (((8, 8), None), ((12, 8), torch.ones(2, 4))):
            x, t = picture(3, size=size), timesteps()[0]
            assert torch.equal(network(x, t, condition)[0], reference(x, t, condition)[0])
    assert expected.stats.captures == 0


def test_the_run_is_the_one_that_was_saved(saved: Path) -> None:
    settings = {"interval": 2, "depth": 1, "backend": "eager", "verbose": False}
    expected = sampled(dcompile.cache_compile(plain(), **settings), picture(5), timesteps())
    network = loaded(saved)
    assert torch.equal(sampled(network, picture(5), timesteps()), expected)
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (4, 3)


def test_explain_works_after_loading(saved: Path) -> None:
    network = dcompile.cache_compile(plain(), interval=2, depth=1, backend="eager", verbose=False)
    expected = dcompile.handle(network).explain(picture(), timesteps()[0], None)
    assert dcompile.handle(loaded(saved)).explain() == expected


def test_other_weights_are_used(saved: Path) -> None:
    network = dcompile.load(plain(seed=7), saved, verbose=False)
    with torch.no_grad():
        x, t = picture(), timesteps()[0]
        assert torch.equal(network(x, t, None)[0], plain(seed=7)(x, t)[0])
    assert dcompile.handle(network).stats.captures == 0


def test_another_schedule_may_be_given(saved: Path) -> None:
    network = loaded(saved, interval=7)
    sampled(network, picture(), timesteps())
    assert dcompile.handle(network).stats.refresh_steps == 1
    with pytest.raises(ScheduleError, match="give one of interval, speedup, psnr and schedule"):
        loaded(saved, interval=3, schedule=dcompile.Uniform(3))


def test_a_call_that_was_not_saved_is_captured(saved: Path) -> None:
    network = loaded(saved)
    x, t = picture(size=(6, 6)), timesteps()[0]
    with torch.no_grad():
        assert torch.equal(network(x, t)[0], plain()(x, t)[0])
    assert dcompile.handle(network).stats.captures == 1


def test_a_changed_module_does_not_run_the_loaded_code(saved: Path) -> None:
    network, reference = loaded(saved), plain()
    for each in (network, reference):
        each.deep[2] = nn.Identity()
    x, t = picture(), timesteps()[0]
    with torch.no_grad():
        assert torch.equal(network(x, t)[0], reference(x, t)[0])
    assert dcompile.handle(network).stats.captures == 1


def test_another_depth_does_not_run_the_loaded_code(saved: Path) -> None:
    network = loaded(saved)
    dcompile.cache_compile(network, depth=0, backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    assert dcompile.handle(network).stats.captures == 1


def test_saving_again_keeps_what_was_loaded_and_adds(folder: Path) -> None:
    network = loaded(folder)
    sampled(network, picture(size=(6, 6)), timesteps())
    dcompile.handle(network).save(folder)
    assert len(json.loads((folder / "manifest.json").read_text())["programs"]) == 3
    assert len([item for item in folder.iterdir() if item.name.startswith("data-")]) == 1
    again = loaded(folder)
    for size in ((8, 8), (6, 6)):
        sampled(again, picture(size=size), timesteps())
    assert dcompile.handle(again).stats.captures == 0


def test_it_holds_no_weights(tmp_path: Path) -> None:
    network = dcompile.cache_compile(plain(width=64), backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    folder = dcompile.handle(network).save(tmp_path / "a")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 100_000 < sum(p.nbytes for p in network.parameters())


class WithConstants(Plain):
    """An attribute that is no buffer, and a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((1,), 0.5)

    def forward(self, sample: Any, timestep: Any) -> Any:  # type: ignore[override]
        return super().forward(sample * self.scale + torch.tensor([0.25]), timestep)


def with_constants() -> WithConstants:
    torch.manual_seed(0)
    return WithConstants().eval()


def test_constants_come_back(tmp_path: Path) -> None:
    network = dcompile.cache_compile(with_constants(), backend="eager", verbose=False)
    sampled_once = network(picture(), timesteps()[0])[0]
    folder = dcompile.handle(network).save(tmp_path / "a")
    again = dcompile.load(with_constants(), folder, verbose=False)
    with torch.no_grad():
        assert torch.equal(again(picture(), timesteps()[0])[0], sampled_once)
    assert dcompile.handle(again).stats.captures == 0
    other = with_constants()
    other.scale.fill_(2)
    with pytest.raises(ArtifactError, match=r"values of scale, a constant of the graph, differ"):
        dcompile.load(other, folder, verbose=False)


def test_dynamic_programs_come_back(tmp_path: Path) -> None:
    sizes = {"batch": (2, 4), "height": (8, 16), "width": (8, 16)}
    network = dcompile.cache_compile(plain(), backend="eager", dynamic=sizes, verbose=False)
    sampled(network, picture(), timesteps())
    folder = dcompile.handle(network).save(tmp_path / "a")
    again, t = loaded(folder), timesteps()[0]
    for batch, size in ((2, (8, 8)), (4, (12, 16)), (3, (16, 8))):
        x = picture(batch=batch, size=size)
        with torch.no_grad():
            assert torch.equal(again(x, t, None)[0], plain()(x, t)[0])
    assert dcompile.handle(again).stats.captures == 0
    x = picture(batch=5)
    with torch.no_grad():
        assert torch.equal(again(x, t, None)[0], plain()(x, t)[0])
    assert dcompile.handle(again).stats.captures == 1


# Damage -------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_file_is_noticed(saved: Path, tmp_path: Path) -> None:
    names = [f.relative_to(saved) for f in sorted(saved.rglob("*")) if f.is_file()]
    checked = [name for name in names if name.name != ".lock"]
    assert len(checked) >= 5
    for name in checked:
        content = (saved / name).read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            copy = Path(shutil.copytree(saved, tmp_path / "copy"))
            flipped = bytearray(content)
            flipped[place] ^= 0x04
            (copy / name).write_bytes(flipped)
            module = plain()
            with pytest.raises(ArtifactError):
                dcompile.load(module, copy, verbose=False)
            assert "forward" not in module.__dict__, "the module still works uncached"
            shutil.rmtree(copy)


@pytest.mark.parametrize("where", ["manifest.json", "structure.json.zip", "0-shallow"])
def test_a_missing_or_empty_file_is_named(folder: Path, where: str) -> None:
    file = folder / where if where == "manifest.json" else data_of(folder) / where
    file.write_bytes(b"")
    with pytest.raises(ArtifactError, match=where.split(".")[0]):
        loaded(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=where.split(".")[0]):
        loaded(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no saved programs.*save\(folder\)"):
        loaded(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value"),
    [("torch", "2.0.0"), ("device", "cuda"), ("platform", "riscv"), ("capability", "none")],
)
def test_made_for_another_machine(folder: Path, name: str, value: str) -> None:
    change(folder, lambda manifest: manifest["machine"].update({name: value}))
    with pytest.raises(
        ArtifactError, match=rf"another machine: {name} is .* here, '{value}' there"
    ):
        loaded(folder)


def test_another_format(folder: Path) -> None:
    change(folder, lambda manifest: manifest.update(format=99))
    with pytest.raises(ArtifactError, match="has format 99"):
        loaded(folder)


class Wider(Plain):
    pass


def _without_dropout(network: Plain) -> Plain:
    network.deep[1] = nn.Identity()
    return network


def _with_hook(network: Plain) -> Plain:
    network.up.register_forward_hook(lambda module, args, result: result * 2)
    return network


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: plain(width=16), r"weight of time is \[\[16, 1\], .* here, \[\[8, 1\]"),
        (lambda: plain().half(), "torch.float16"),
        (lambda: Wider().eval(), r"class of the network itself is .*Wider"),
        (lambda: _without_dropout(plain()), r"class of deep\.1"),
        (lambda: _with_hook(plain()), "_forward_hooks of up"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "another module"),
        (lambda: plain().train(), "training of the network itself is true here, false there"),
    ],
)
def test_made_for_another_module(
    saved: Path, module: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        dcompile.load(module(), saved, verbose=False)


def test_a_missing_parameter_is_named(saved: Path) -> None:
    network = plain()
    del network.condition
    with pytest.raises(ArtifactError, match="only the saved one has condition"):
        dcompile.load(network, saved, verbose=False)


# Writing ------------------------------------------------------------------------------------------


def test_nothing_compiled_yet(tmp_path: Path) -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    with pytest.raises(NotCompiledError, match="nothing is compiled yet"):
        dcompile.handle(network).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_backend_without_saving(tmp_path: Path) -> None:
    network = dcompile.cache_compile(plain(), backend=lambda graph, _: graph.forward, verbose=False)
    sampled(network, picture(), timesteps())
    with pytest.raises(ArtifactError, match="cannot be saved; those of 'inductor' and 'eager' can"):
        dcompile.handle(network).save(tmp_path / "a")


def test_an_unwritable_place(tmp_path: Path) -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        dcompile.handle(network).save(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds other files \(letter\.txt"):
        dcompile.handle(network).save(tmp_path / "full")
    assert [item.name for item in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("manifest", ['{"data": "train"}', '{"data": "../else"}', '{"data": ""}'])
def test_somebody_elses_manifest_is_left_alone(tmp_path: Path, manifest: str) -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    for name in ("mine/train", "else"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "precious").write_text("data")
    (tmp_path / "mine/manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="holds other files"):
        dcompile.handle(network).save(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine/train")
    with pytest.raises(ArtifactError, match=r"holds other files \(manifest\.json"):
        dcompile.handle(network).save(tmp_path / "mine")
    assert (tmp_path / "else/precious").read_text() == "data"


def test_a_damaged_folder_can_be_saved_to_again(folder: Path) -> None:
    network = loaded(folder)
    (folder / "manifest.json").write_bytes(b"{")
    dcompile.handle(network).save(folder)
    loaded(folder)


class WithLiteral(Plain):
    def forward(self, sample: Any, timestep: Any) -> Any:  # type: ignore[override]
        return super().forward(sample + torch.tensor([float(sample.shape[-1])]), timestep)


def test_literals_of_several_captures_are_kept_apart(tmp_path: Path) -> None:
    network = dcompile.cache_compile(WithLiteral().eval(), backend="eager", verbose=False)
    state = network.state_dict()
    expected = {}
    with torch.no_grad():
        for size in (6, 8):
            expected[size] = network(picture(size=(size, size)), timesteps()[0])[0]
    folder = dcompile.handle(network).save(tmp_path / "a")
    again = WithLiteral().eval()
    again.load_state_dict(state)
    dcompile.load(again, folder, verbose=False)
    with torch.no_grad():
        for size, result in expected.items():
            assert torch.equal(again(picture(size=(size, size)), timesteps()[0])[0], result)
    assert dcompile.handle(again).stats.captures == 0


def test_loading_into_a_compiled_module(saved: Path) -> None:
    network = plain()
    wrapped = torch.compile(network, backend="eager")
    assert dcompile.load(wrapped, saved, verbose=False) is network
    sampled(network, picture(), timesteps())
    assert dcompile.handle(network).stats.captures == 0


@pytest.mark.parametrize("at", range(1, 6))
def test_a_crash_while_writing_leaves_the_old_one(
    folder: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = loaded(folder)
    sampled(network, picture(size=(6, 6)), timesteps())
    calls = 0

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "replace", crashing(os.replace))
    monkeypatch.setattr(Path, "write_bytes", crashing(Path.write_bytes))
    with pytest.raises(KeyboardInterrupt):
        dcompile.handle(network).save(folder)
    monkeypatch.undo()
    again = loaded(folder)
    sampled(again, picture(), timesteps())
    assert dcompile.handle(again).stats.captures == 0


def _save_again(folder: Path, size: int) -> None:
    network = dcompile.cache_compile(plain(), backend="eager", verbose=False)
    sampled(network, picture(size=(size, size)), timesteps())
    for _ in range(5):
        dcompile.handle(network).save(folder)
        loaded(folder)


def test_two_processes_writing_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_again, args=(tmp_path / "a", size)) for size in (8, 6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len([item for item in (tmp_path / "a").iterdir() if "data-" in item.name]) == 1
    loaded(tmp_path / "a")


def test_a_schedule_of_ones_own_has_to_be_given_again(tmp_path: Path) -> None:
    class Mine:
        def refresh(self, step: int, steps: int | None) -> bool:
            return step < 2

    network = dcompile.cache_compile(plain(), schedule=Mine(), backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    folder = dcompile.handle(network).save(tmp_path / "a")
    with pytest.raises(ScheduleError, match="class of your own"):
        loaded(folder)
    again = loaded(folder, schedule=Mine())
    sampled(again, picture(), timesteps())
    assert dcompile.handle(again).stats.refresh_steps == 2


@pytest.mark.parametrize(
    "schedule", [dcompile.Uniform(4), dcompile.Steps([0, 2, 5]), dcompile.NonUniform(3, 2, 1.2)]
)
def test_schedules_come_back(tmp_path: Path, schedule: dcompile.Schedule) -> None:
    network = dcompile.cache_compile(plain(), schedule=schedule, backend="eager", verbose=False)
    sampled(network, picture(), timesteps())
    again = loaded(dcompile.handle(network).save(tmp_path / "a"))
    assert seam.settings_of(again).schedule == schedule


def test_not_a_module(saved: Path) -> None:
    with pytest.raises(
        DcompileError, match=r"expected a torch\.nn\.Module or a diffusers pipeline"
    ):
        dcompile.load("unet", saved)


INDUCTOR = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from plain import picture, plain, sampled, timesteps
import dcompile
torch.set_num_threads(1)
if {save}:
    network = dcompile.cache_compile(plain(), verbose=False)
else:
    network = dcompile.load(plain(), {folder!r}, verbose=False)
result = sampled(network, picture(), timesteps())
if {save}:
    dcompile.handle(network).save({folder!r})
    torch.save(result, {result!r})
else:
    assert torch.equal(result, torch.load({result!r}))
    assert dcompile.handle(network).stats.captures == 0
"""


BROKEN_COMPILER = """#!/bin/sh
case "$*" in *version*) exec g++-real "$@";; esac
exit 1
"""


@pytest.mark.full
def test_inductor_in_a_fresh_process_without_a_compiler(tmp_path: Path) -> None:
    """The second process has an empty code cache and no C++ compiler that works."""
    paths = {"folder": str(tmp_path / "a"), "result": str(tmp_path / "result.pt")}
    for save in (True, False):
        environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / f"cache-{save}"))
        if not save:
            broken = tmp_path / "g++"
            broken.write_text(
                '#!/bin/sh\ncase "$*" in *version*) exec g++-real "$@";; esac\nexit 1\n'
            )
            broken.chmod(0o755)
            real = shutil.which("g++")
            assert real is not None
            (tmp_path / "g++-real").symlink_to(real)
            environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
            environment["CXX"] = str(broken)
        script = INDUCTOR.format(
            tests=str(Path(__file__).parents[1] / "support"), save=save, **paths
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert size < 2_000_000


class Noisy(Plain):
    """Draws noise that depends on no input."""

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:  # type: ignore[override]
        return super().forward(sample + torch.randn(()), timestep, condition)


def test_what_depends_on_no_input_is_computed_at_each_call(tmp_path: Path) -> None:
    def run(network: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        return sampled(network, picture(), timesteps())

    network = Noisy().eval()
    expected = run(network)
    dcompile.cache_compile(network, interval=1, backend="eager", verbose=False)
    assert torch.equal(run(network), expected)
    dcompile.handle(network).save(tmp_path / "a")
    again = Noisy().eval()
    again.load_state_dict(network.state_dict())
    dcompile.load(again, tmp_path / "a", verbose=False)
    assert torch.equal(run(again), expected)
    assert dcompile.handle(again).stats.captures == 0


def test_saved_again(saved: Path, tmp_path: Path) -> None:
    """Programs that were loaded, and one that was not."""
    network = loaded(saved)
    expected = sampled(network, picture(size=(8, 12)), timesteps())
    assert dcompile.handle(network).stats.captures == 1
    folder = dcompile.handle(network).save(tmp_path / "more")
    again = loaded(folder)
    assert torch.equal(sampled(again, picture(size=(8, 12)), timesteps()), expected)
    sampled(again, picture(), timesteps())
    assert dcompile.handle(again).stats.captures == 0


def test_new_calls_uncached(saved: Path) -> None:
    network = loaded(saved, new_calls="uncached")
    alone = plain()
    for size, uncached in ((None, 0), ((8, 12), 6)):
        sample = picture() if size is None else picture(size=size)
        found = sampled(network, sample, timesteps())
        stats = dcompile.handle(network).stats
        assert stats.captures == 0
        assert stats.uncached_calls == (len(timesteps()) if uncached else 0)
        if uncached:
            assert torch.equal(found, sampled(alone, sample, timesteps()))
            (reason,) = stats.uncached_reasons
            assert "no saved program serves a call with a sample of shape" in reason
    with pytest.raises(DcompileError, match="new_calls: expected"):
        loaded(saved, new_calls="never")


# What a loaded program could not find ----------------------------------------------------------


class Loose(Plain):
    """Keeps what it computes with where nobody finds it by name."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:  # type: ignore[override]
        if isinstance(self.kept, torch.Tensor):
            sample = sample * self.kept
        elif isinstance(self.kept, dict):
            sample = sample * self.kept["scale"]
        elif isinstance(self.kept, SimpleNamespace):
            sample = sample * self.kept.scale
        else:
            sample = self.kept[0](sample)
        return super().forward(sample, timestep, condition)


@pytest.mark.parametrize(
    ("kept", "where"),
    [
        ({"scale": torch.full((1,), 2.0)}, r"kept\['scale'\]"),
        (SimpleNamespace(scale=torch.full((1,), 2.0)), r"kept\.scale"),
        ([nn.Conv2d(3, 3, 1)], r"kept\[0\]\.(weight|bias)"),
    ],
)
def test_tensors_without_a_name_are_refused(kept: Any, where: str, tmp_path: Path) -> None:
    network = dcompile.cache_compile(Loose(kept).eval(), backend="eager", verbose=False)
    with torch.no_grad():
        network(picture(), timesteps()[0])
    with pytest.raises(ArtifactError, match=f"the network reads {where}, a tensor"):
        dcompile.handle(network).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_tensor_attribute_is_found_by_its_name(tmp_path: Path) -> None:
    scale = torch.full((1,), 2.0)
    network = Loose(scale).eval()
    reference = Loose(scale).eval()
    reference.load_state_dict(network.state_dict())
    dcompile.cache_compile(network, backend="eager", verbose=False)
    x, t = picture(), timesteps()[0]
    with torch.no_grad():
        network(x, t)
        folder = dcompile.handle(network).save(tmp_path / "saved")
        fresh = dcompile.load(Loose(scale.clone()).eval(), folder, verbose=False)
        fresh.load_state_dict(reference.state_dict())
        assert torch.equal(fresh(x, t)[0], reference(x, t)[0])


def of_another_version(scale: float) -> Plain:
    class Helped(Plain):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:  # type: ignore[override]
            return (self.helper(super().forward(sample, timestep, condition)[0]),)  # type: ignore[index]

        if scale == 1:

            def helper(self, x: torch.Tensor) -> torch.Tensor:
                return x

        else:

            def helper(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

    return Helped().eval()


def test_code_of_other_methods_counts(tmp_path: Path) -> None:
    network = dcompile.cache_compile(of_another_version(1), backend="eager", verbose=False)
    with torch.no_grad():
        network(picture(), timesteps()[0])
    folder = dcompile.handle(network).save(tmp_path / "saved")
    dcompile.load(of_another_version(1), folder, verbose=False)
    with pytest.raises(ArtifactError, match="saved for another module: class of the network"):
        dcompile.load(of_another_version(2), folder, verbose=False)


@pytest.mark.parametrize("table", [{"_scale": 2.0}, {"a": {"b": {"c": {"d": {"e": 2.0}}}}}])
def test_private_and_deeply_nested_attributes_count(table: Any, tmp_path: Path) -> None:
    network, other = plain(), plain()
    network.table = {"_scale": 1.0} if "_scale" in table else {"a": {"b": {"c": {"d": {"e": 1.0}}}}}
    other.table = table
    dcompile.cache_compile(network, backend="eager", verbose=False)
    with torch.no_grad():
        network(picture(), timesteps()[0])
    folder = dcompile.handle(network).save(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="saved for another module: table of"):
        dcompile.load(other, folder, verbose=False)


def test_a_dynamic_program_is_saved_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"backend": "eager", "verbose": False}
    network = dcompile.cache_compile(plain(), dynamic={"height": (8, 32)}, **settings)
    for height in (8, 12, 24):
        sampled(network, picture(size=(height, 8)), timesteps())
    folder = dcompile.handle(network).save(tmp_path / "saved")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [len(entry["calls"]) for entry in manifest["programs"]] == [3]
    fresh = loaded(folder)
    assert dcompile.handle(fresh).signatures == dcompile.handle(network).signatures
    for height in (12, 20):
        x = picture(size=(height, 8))
        expected = sampled(dcompile.cache_compile(plain(), **settings), x, timesteps())
        assert torch.equal(sampled(fresh, x, timesteps()), expected)
    assert dcompile.handle(fresh).stats.captures == 0
