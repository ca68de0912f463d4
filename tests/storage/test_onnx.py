"""handle.export_onnx: ONNX Runtime computes what eager does, step by step and over a whole run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seam
import torch
from builders import stable_diffusion as build_stable_diffusion
from diffusers import DDIMScheduler, UNet2DConditionModel
from networks import text
from plain import Plain, compiled, picture, plain, timesteps
from torch import nn

import dcompile
import dcompile.storage.onnx
from dcompile import ExportError, NotCompiledError, handle

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Arrays = dict[str, Any]


class Sessions:
    """An export, driven by nothing but its manifest and ONNX Runtime."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self._full, self._shallow = (
            onnxruntime.InferenceSession(folder / self.manifest[graph]["file"])
            for graph in ("full", "shallow")
        )
        self._cache: Arrays = {}
        self._hoisted: Arrays = {}

    def prologue(self, folder: Path, inputs: Arrays) -> None:
        """Once for a picture."""
        session = onnxruntime.InferenceSession(folder / self.manifest["prologue"]["file"])
        self._hoisted = self._run("prologue", session, inputs)

    def full(self, inputs: Arrays) -> Any:
        outputs = self._run("full", self._full, {**inputs, **self._hoisted})
        boundary = self.manifest["boundary"]
        self._cache = {edge["input"]: outputs[edge["output"]] for edge in boundary}
        return outputs[self.manifest["results"][0]]

    def shallow(self, inputs: Arrays) -> Any:
        outputs = self._run("shallow", self._shallow, {**inputs, **self._hoisted, **self._cache})
        return outputs[self.manifest["results"][0]]

    def _run(self, graph: str, session: Any, inputs: Arrays) -> Arrays:
        described = self.manifest[graph]
        for value in described["inputs"]:
            assert inputs[value["name"]].dtype == value["dtype"]
        feed = {value["name"]: inputs[value["name"]] for value in described["inputs"]}
        names = [value["name"] for value in described["outputs"]]
        return dict(zip(names, session.run(names, feed), strict=True))


def arrays(**tensors: torch.Tensor) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def initializers(path: Path) -> dict[str, Any]:
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: tensor for tensor in graph.initializer}


def place(tensor: Any) -> tuple[str, str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["location"] == "weights.data"
    return entries["offset"], entries["length"]


def assert_close(actual: Any, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet2DConditionModel]:
    torch.manual_seed(0)
    unet = build_stable_diffusion(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    dcompile.cache_compile(unet, interval=3, backend="eager", verbose=False)
    folder = tmp_path_factory.mktemp("onnx") / "unet"
    kwargs = {**text(), "return_dict": False}
    handle(unet).export_onnx(folder, torch.randn(2, 4, 8, 8), torch.tensor(500), **kwargs)
    return folder, unet


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captured while autocast is on, which is no part of the graphs."""
    folder = tmp_path_factory.mktemp("onnx") / "plain"
    network = compiled()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network(picture(), timesteps()[0], condition=torch.randn(2, 4))
    return handle(network).export_onnx(folder)


@pytest.fixture
def written(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Export for tests of the folder only: translating is replaced by what was translated once."""
    import onnx_ir

    def translated(label: str, *_: object) -> Any:
        model = onnx_ir.load(exported / f"{label}.onnx")
        return dcompile.storage.onnx._Translated(model, tuple(model.graph.outputs))

    monkeypatch.setattr(dcompile.storage.onnx, "_translated", translated)
    return lambda folder: handle(compiled()).export_onnx(folder, picture(), timesteps()[0])


@torch.no_grad()
def test_both_graphs_equal_eager(stable_diffusion: tuple[Path, UNet2DConditionModel]) -> None:
    folder, unet = stable_diffusion
    sessions = Sessions(folder)
    sample, timestep, prompt = torch.randn(2, 4, 8, 8), torch.tensor(321), text()
    inputs = arrays(sample=sample, timestep=timestep, **prompt)
    expected = seam.original_of(unet)(sample, timestep, **prompt).sample
    assert_close(sessions.full(inputs), expected)
    assert_close(sessions.shallow(inputs), expected)


@torch.no_grad()
def test_a_whole_run(stable_diffusion: tuple[Path, UNet2DConditionModel]) -> None:
    folder, unet = stable_diffusion
    sessions, prompt = Sessions(folder), text()
    interval = sessions.manifest["schedule"]["fields"]["interval"]

    def run(predict: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for step, t in enumerate(scheduler.timesteps):
            x = scheduler.step(predict(step, x, t), t, x).prev_sample
        return x

    def in_onnx_runtime(step: int, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        graph = sessions.full if step % interval == 0 else sessions.shallow
        return torch.from_numpy(graph(arrays(sample=x, timestep=t, **prompt)))

    cached = run(lambda _, x, t: unet(x, t, **prompt, return_dict=False)[0])
    stats = handle(unet).stats
    assert (stats.refresh_steps, stats.reuse_steps) == (4, 6)
    torch.testing.assert_close(run(in_onnx_runtime), cached, rtol=0, atol=1e-3)


@pytest.mark.full
@torch.no_grad()
def test_what_is_the_same_at_every_step_in_a_graph_of_its_own(
    stable_diffusion: tuple[Path, UNet2DConditionModel], tmp_path: Path
) -> None:
    unet, folder = stable_diffusion[1], tmp_path / "unet"
    kwargs = {**text(), "return_dict": False}
    example = (torch.randn(2, 4, 8, 8), torch.tensor(500))
    handle(unet).export_onnx(folder, *example, prologue=True, **kwargs)
    sessions = Sessions(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("full.onnx", "shallow.onnx", "prologue.onnx", "weights.data", "manifest.json")
    }
    (given,) = sessions.manifest["prologue"]["inputs"]
    assert given["name"] == "encoder_hidden_states"
    for graph in ("full", "shallow"):  # nothing else reads the text
        names = [value["name"] for value in sessions.manifest[graph]["inputs"]]
        assert given["name"] not in names
        assert any(name.startswith("hoisted_") for name in names)
    sessions.prologue(folder, arrays(encoder_hidden_states=kwargs["encoder_hidden_states"]))
    with torch.no_grad():
        expected = seam.original_of(unet)(*example, **kwargs)[0]
    given = arrays(sample=example[0], timestep=example[1])
    assert_close(sessions.full(given), expected)
    assert_close(sessions.shallow(given), expected)
    handle(unet).export_onnx(folder, *example, **kwargs)  # replaced, without a third graph
    assert not (folder / "prologue.onnx").exists()


def test_no_third_graph_where_nothing_is_the_same(tmp_path: Path) -> None:
    network = compiled()
    folder = handle(network).export_onnx(tmp_path, picture(), timesteps()[0], prologue=True)
    assert "prologue" not in json.loads((folder / "manifest.json").read_text())


def test_a_plain_network(exported: Path) -> None:
    sessions = Sessions(exported)
    sample, timestep, condition = picture(3), timesteps()[2], torch.randn(2, 4)
    inputs = arrays(sample=sample, timestep=timestep, condition=condition)
    expected = plain()(sample, timestep, condition)[0]
    assert_close(sessions.full(inputs), expected)
    assert_close(sessions.shallow(inputs), expected)


def test_manifest(stable_diffusion: tuple[Path, UNet2DConditionModel]) -> None:
    folder, unet = stable_diffusion
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = (folder / "weights.data").read_bytes()
    sample = {"name": "sample", "dtype": "float32", "shape": [2, 4, 8, 8]}
    timestep = {"name": "timestep", "dtype": "int64", "shape": []}
    prompt = {"name": "encoder_hidden_states", "dtype": "float32", "shape": [2, 5, 16]}
    boundary = {"name": "boundary_0", "dtype": "float32", "shape": [2, 16, 8, 8]}
    result = {**sample, "name": "out_0"}
    opset = onnx.load(folder / "full.onnx", load_external_data=False).opset_import[0].version
    assert manifest == {
        "format": "dcompile-onnx",
        "format_version": 1,
        "dcompile": dcompile.__version__,
        "torch": torch.__version__,
        "opset": opset,
        "network": "UNet2DConditionModel",
        "depth": 0,
        "cut_at": handle(unet).explain().depths[0].module_path,
        "sample": "sample",
        "results": ["out_0"],
        "boundary": [{"output": "boundary_0", "input": "boundary_0"}],
        "schedule": {
            "class": "Uniform",
            "fields": {"interval": 3},
            "repr": "Uniform(interval=3)",
        },
        "weights": {
            "file": "weights.data",
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
        "full": {
            "file": "full.onnx",
            "inputs": [sample, timestep, prompt],
            "outputs": [result, boundary],
        },
        "shallow": {
            "file": "shallow.onnx",
            "inputs": [sample, timestep, prompt, boundary],
            "outputs": [result],
        },
    }


def test_every_weight_once_by_its_own_name(
    stable_diffusion: tuple[Path, UNet2DConditionModel],
) -> None:
    folder, unet = stable_diffusion
    assert sorted(path.name for path in folder.iterdir()) == [
        "full.onnx",
        "manifest.json",
        "shallow.onnx",
        "weights.data",
    ]
    weights = dict(unet.named_parameters())
    full, shallow = initializers(folder / "full.onnx"), initializers(folder / "shallow.onnx")
    assert weights.keys() <= full.keys()
    assert 0 < len(weights.keys() & shallow.keys()) < len(weights)
    for name in weights.keys() & shallow.keys():
        assert place(shallow[name]) == place(full[name])
    stored = onnx.load(folder / "full.onnx").graph.initializer
    for tensor in stored:
        if tensor.name in weights:
            actual = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            assert torch.equal(actual, weights[tensor.name])
    size = sum(weight.nbytes for weight in weights.values())
    distinct = len({place(full[name]) for name in weights})
    assert distinct < len(weights)  # biases that are still zero
    assert (folder / "weights.data").stat().st_size <= size + 64 * distinct
    assert all(
        (folder / f"{graph}.onnx").stat().st_size < size / 5 for graph in ("full", "shallow")
    )


def test_half_precision(tmp_path: Path) -> None:
    network = plain(width=64).half()
    dcompile.cache_compile(network, backend="eager", verbose=False)
    handle(network).export_onnx(tmp_path / "out", picture().half(), timesteps()[0])
    read = {name: w for name, w in network.named_parameters() if "condition" not in name}
    size = sum(weight.nbytes for weight in read.values())
    assert abs((tmp_path / "out" / "weights.data").stat().st_size - size) < 2048
    sessions = Sessions(tmp_path / "out")
    inputs = arrays(sample=picture().half(), timestep=timesteps()[0])
    with torch.no_grad():
        expected = plain(width=64)(picture(), timesteps()[0])[0]
    full = sessions.full(inputs)
    assert full.dtype == np.float16
    assert_close(full.astype(np.float32), expected, 5e-3)
    assert_close(sessions.shallow(inputs).astype(np.float32), expected, 5e-3)


class Awkward(Plain):
    """Concatenates dtypes, ties weights, returns nothing beside its result, and nests arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(8, 8, 1)
        self.twin.weight = nn.Parameter(torch.eye(8)[:, :, None, None])
        self.other = nn.Conv2d(8, 8, 1, bias=False)
        self.other.weight = self.twin.weight
        self.register_buffer("sample", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Any, t: Any, *more: Any, add: Any) -> Any:  # type: ignore[override]
        mixed = torch.concat([add["first"].half(), more[0], add["second"][0]], 1)
        bias = self.condition(mixed) + self.time(t.to(x.dtype).reshape(-1, 1)) + self.sample
        outer = self.enter(x) + bias[:, :, None, None]
        inner = self.other(self.down(outer)).relu()
        deep = nn.functional.interpolate(self.deep(inner), size=inner.shape[-2:])
        up = self.twin(self.up(torch.cat([deep, inner], 1))).relu()
        up = nn.functional.interpolate(up, size=outer.shape[-2:])
        result = self.leave(torch.cat([up, outer], 1))
        return {"sample": result, "none": None, "again": [result, up]}


@torch.no_grad()
def test_awkward_networks_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = Awkward().eval()
    dcompile.cache_compile(network, schedule=dcompile.Steps([0, 2]), backend="eager", verbose=False)
    x, t = picture(), timesteps()[1]
    more, first, second = torch.randn(2, 1), torch.rand(2, 1), torch.rand(2, 2)
    add = {"first": first, "second": (second,)}
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle(network).export_onnx(tmp_path / "out", x, t, more, add=add)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    sessions = Sessions(tmp_path / "out")
    full = sessions.manifest["full"]
    inputs = {"x": x, "t": t, "more.0": more, "add.first": first, "add.second.0": second}
    assert {value["name"] for value in full["inputs"]} == set(inputs)
    assert sessions.manifest["results"] == ["out_sample", "out_again.0", "out_again.1"]
    assert len(full["outputs"]) == 4
    assert sessions.manifest["schedule"]["fields"] == {"refresh_steps": [0, 2]}
    expected = seam.original_of(network)(x, t, more, add=add)["sample"]
    assert_close(sessions.full(arrays(**inputs)), expected)
    assert_close(sessions.shallow(arrays(**inputs)), expected)


@pytest.mark.full
@torch.no_grad()
def test_deeper_cut_of_changed_weights(tmp_path: Path) -> None:
    network = compiled(depth=1)
    sample, timestep = picture(), timesteps()[0]
    network(sample, timestep)
    network.leave.bias.fill_(2.0)
    handle(network).export_onnx(tmp_path / "out")
    sessions = Sessions(tmp_path / "out")
    assert sessions.manifest["depth"] == 1
    assert sessions.manifest["full"]["outputs"][1]["shape"] == [2, 8, 4, 4]
    inputs = arrays(sample=sample, timestep=timestep)
    expected = seam.original_of(network)(sample, timestep)[0]
    assert_close(sessions.full(inputs), expected)
    assert_close(sessions.shallow(inputs), expected)


@torch.no_grad()
def test_dynamic_sizes(tmp_path: Path) -> None:
    network = compiled(dynamic=True)
    example = picture(size=(16, 8)), timesteps()[0], torch.randn(2, 4)
    handle(network).export_onnx(tmp_path / "out", *example)
    sessions = Sessions(tmp_path / "out")
    shapes = [value["shape"] for value in sessions.manifest["shallow"]["inputs"]]
    open_sizes = ["sample_0", 3, "sample_2", "sample_3"]
    assert shapes == [open_sizes, [], ["sample_0", 4], ["sample_0", 8, "sample_2", "sample_3"]]
    for batch, size in ((3, (8, 8)), (2, (12, 20))):
        sample, timestep, condition = picture(5, batch, size), timesteps()[3], torch.randn(batch, 4)
        inputs = arrays(sample=sample, timestep=timestep, condition=condition)
        expected = plain()(sample, timestep, condition)[0]
        assert_close(sessions.full(inputs), expected)
        assert_close(sessions.shallow(inputs), expected)


def test_folder_is_replaced_whole(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written(tmp_path / "new" / "unet")
    assert folder == (tmp_path / "new" / "unet").resolve()
    assert folder.stat().st_mode & stat.S_IROTH == (tmp_path / "new").stat().st_mode & stat.S_IROTH
    before = (folder / "weights.data").stat().st_ino
    (folder / "full.onnx").write_text("damaged")
    written(folder)
    assert (folder / "weights.data").stat().st_ino != before
    assert initializers(folder / "full.onnx")
    assert [path.name for path in folder.parent.iterdir()] == ["unet"]
    (tmp_path / "empty").mkdir()
    assert written(tmp_path / "empty").name == "empty"


@pytest.mark.parametrize("file", ["notes.txt", "full.engine", "manifest.json"])
def test_other_files_are_never_lost(
    file: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if file == "full.engine":
        written(folder)
    else:
        folder.mkdir()
    (folder / file).write_text('{"format": "of another kind"}')
    with pytest.raises(ExportError, match=rf"{file}.* would be lost: move them away or choose"):
        written(folder)
    assert (folder / file).exists()


def test_a_file_in_the_way(written: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="is a file: give the name of a folder"):
        written(tmp_path / "out")
    with pytest.raises(ExportError, match="cannot"):
        written(tmp_path / "out" / "inner")


def test_a_failed_export_leaves_the_old_one(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcompile.storage.onnx_folder.WeightsFile, "add", full_disk)
    with pytest.raises(ExportError, match="No space left on device; free some space or choose"):
        written(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # as root, no permission is denied
    with pytest.raises(ExportError, match=r"cannot write the export to .*out: Permission denied"):
        written(tmp_path / "out")


def test_nothing_captured(tmp_path: Path) -> None:
    network = compiled()
    with pytest.raises(NotCompiledError, match=r"export_onnx\(folder, sample, timestep"):
        handle(network).export_onnx(tmp_path / "out")
    network(picture(), timesteps()[0])
    network.up = nn.Sequential(network.up)
    with pytest.raises(NotCompiledError, match="as it is now"):
        handle(network).export_onnx(tmp_path / "out")


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without_onnxscript(name: str, *args: Any) -> Any:
        return None if name == "onnxscript" else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_onnxscript)
    expected = r'export_onnx needs onnxscript: pip install "dcompile\[onnx\]"'
    with pytest.raises(ExportError, match=expected):
        handle(compiled()).export_onnx(tmp_path / "out", picture(), timesteps()[0])


def test_training_mode_and_missing_values(tmp_path: Path) -> None:
    network = compiled()
    network.train()
    with pytest.raises(ExportError, match=r"call \.eval\(\)"):
        handle(network).export_onnx(tmp_path / "out", picture(), timesteps()[0])
    network = compiled()
    network.to("meta")
    with pytest.raises(ExportError, match=r"\.weight is on the meta device.*export before"):
        handle(network).export_onnx(tmp_path / "out", picture().to("meta"), torch.tensor(3))


def test_an_operator_without_onnx_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        try:
            raise KeyError("aten.new_operator")
        except KeyError as error:
            raise RuntimeError("Failed to convert. This is step 3/3 of 1,000 lines") from error

    monkeypatch.setattr(torch.onnx, "export", unknown)
    message = r"the full graph has no ONNX form: KeyError: 'aten.new_operator'\nA newer torch"
    with pytest.raises(ExportError, match=message):
        handle(compiled()).export_onnx(tmp_path / "out", picture(), timesteps()[0])
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Halves:
    first: tuple[int, ...] = (0, 4)
    rule: object = len

    def refresh(self, step: int, steps: int | None) -> bool:
        return step in self.first


class Always:
    def refresh(self, step: int, steps: int | None) -> bool:
        return True

    def __repr__(self) -> str:
        return "Always()"


@pytest.mark.parametrize(
    ("schedule", "fields"),
    [
        (dcompile.NonUniform(5, center=10), {"count": 5, "center": 10, "power": 1.4}),
        (Halves(), {"first": [0, 4], "rule": "<built-in function len>"}),
        (Always(), {}),
    ],
)
def test_schedule_in_the_manifest(schedule: Any, fields: Arrays) -> None:
    described = dcompile.storage.onnx._described_schedule(schedule)
    assert described["class"] == type(schedule).__name__
    assert described["fields"] == fields
    assert described["repr"] == repr(schedule)
    json.dumps(described)


def test_large_tensors_can_be_mapped(tmp_path: Path) -> None:
    with dcompile.storage.onnx_folder.WeightsFile(tmp_path / "weights.data") as stored:
        offsets = [stored.add(bytes(3)), stored.add(b"x" * (1 << 20)), stored.add(bytes(3))]
    assert offsets == [0, 1 << 16, 0]
    content = (tmp_path / "weights.data").read_bytes()
    assert len(content) == stored.size == (1 << 16) + (1 << 20)
    assert hashlib.sha256(content).hexdigest() == stored.sha256
