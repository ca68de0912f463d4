"""Counting kernels: reading generated code, the page, and, where torch has Triton, all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import count_kernels
import pytest
import torch
import typer
from count_kernels import ATTENTION, FLASH_ATTENTION, Recorder, on_the_card
from generated_code import Counts, counted
from kernels_page import BARS, GRAPHS, LAYOUTS, NOT_YET, key, page
from shapes import UNETS
from typer.testing import CliRunner, Result

needs_triton = pytest.mark.skipif(
    bool(count_kernels.reason_to_skip()), reason=count_kernels.reason_to_skip()
)

# --- reading generated code -----------------------------------------------------------------------


def code(*lines: str) -> str:
    """A module as Inductor writes it, of a graph with a sample, two weights and a bias."""
    body = "\n".join(f"            {line}" for line in lines)
    return f'''
triton_poi_fused_0 = async_compile.triton("triton_poi_fused_0", """
def call(): extern_kernels.not_counted()
""")

class Runner:
    def call(self, args):
        weight, sample, other, bias = args
        args.clear()
        assert_size_stride(weight, (16, 4, 3, 3), (36, 9, 3, 1))
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            stream0 = get_raw_stream(0)
{body}
        return (buf9, )

def get_args():
    weight = rand_strided((16, 4, 3, 3), (36, 9, 3, 1), device="cuda:0", dtype=torch.float16)
    sample = rand_strided((2, 4, 8, 8), (256, 64, 8, 1), device="cuda:0", dtype=torch.float16)
    other = rand_strided((8, 4, 3, 1, 1), (12, 3, 1, 1, 1), device="cuda:0", dtype=torch.float32)
    bias = rand_strided((16, ), (1, ), device="cuda:0", dtype=torch.float16)
'''


COPY_OF_WEIGHT = (
    "buf1 = empty_strided_cuda((16, 4, 3, 3), (36, 1, 12, 4), torch.float16)",
    "triton_poi_fused_1.run(weight, buf1, 64, 9, stream=stream0)",
)


def test_launches_and_calls_are_counted() -> None:
    found = counted(
        code(
            "triton_poi_fused_0.run(sample, buf0, 8, 64, stream=stream0)",
            "buf2 = buf0; del buf0  # reuse",
            "triton_poi_fused_0.run(buf2, buf3, 8, 64, stream=stream0)",
            "triton_red_fused_1.run(buf3, bias, buf4, 8, 64, stream=stream0)",
            "extern_kernels.addmm(bias, buf4, reinterpret_tensor(buf5, (4, 4), (1, 4)), out=buf6)",
            "buf7 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf6, buf6, buf6)",
            "buf8 = buf7[0]",
            "assert_size_stride(buf8, (2, 4), (4, 1), 'torch.ops.aten.mm.default')",
            "extern_kernels.addmm(bias, buf8, buf8, out=buf9)",
        )
    )
    library = {"addmm": 2, "_scaled_dot_product_flash_attention": 1}
    assert found == Counts(3, 2, library, transposes=0, transposed_bytes=0)
    assert (found.library_calls, found.all) == (3, 6)


def test_a_weight_that_is_copied_for_a_convolution_is_a_transpose() -> None:
    found = counted(
        code(
            "triton_poi_fused_0.run(sample, buf0, 8, 64, stream=stream0)",  # no weight: not counted
            *COPY_OF_WEIGHT,
            "buf2 = extern_kernels.convolution(buf0, buf1, stride=(1, 1), bias=None)",
            "buf3 = buf1; del buf1  # reuse",
            "triton_poi_fused_2.run(other, buf3, 64, 9, stream=stream0)",
            "view = extern_kernels.convolution(buf2, reinterpret_tensor(buf3, (8, 4, 3, 1, 1), "
            "(12, 1, 4, 4, 4), 0), stride=(1, 1, 1), bias=None)",
        )
    )
    assert found.transposes == 2
    # Read and written: 576 numbers of two bytes, 96 of four.
    assert found.transposed_bytes == 2 * (576 * 2 + 96 * 4)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(
            ("buf2 = extern_kernels.convolution(sample, weight, stride=(1, 1), bias=None)",),
            id="as it is",
        ),
        pytest.param(
            (
                "triton_poi_fused_1.run(weight, other, buf1, 64, 9, stream=stream0)",
                "buf2 = extern_kernels.convolution(sample, buf1, stride=(1, 1), bias=None)",
            ),
            id="computed from two inputs",
        ),
        pytest.param(
            (
                *COPY_OF_WEIGHT,
                "extern_kernels.mm(buf0, buf1, out=buf2)",
            ),
            id="not for a convolution",
        ),
        pytest.param(
            (
                *COPY_OF_WEIGHT,
                "buf2 = buf1; del buf1  # reuse",
                "triton_poi_fused_2.run(bias, buf2, 64, stream=stream0)",
                "buf3 = extern_kernels.convolution(sample, buf2, stride=(1, 1), bias=None)",
            ),
            id="in memory that held a copy before",
        ),
    ],
)
def test_other_operands_are_no_transposes(lines: tuple[str, ...]) -> None:
    found = counted(code(*lines))
    assert (found.transposes, found.transposed_bytes) == (0, 0)


def test_nothing_is_left_out_unseen() -> None:
    with pytest.raises(ValueError, match=r"does buf0\.copy_ launch something\?"):
        counted(code("buf0.copy_(sample, False)"))
    with pytest.raises(ValueError, match="one function `call`, got 0"):
        counted("x = 1")


# --- graphs ---------------------------------------------------------------------------------------


def test_graphs_are_moved_to_the_card() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, device="meta")
    zeros = graph.call_function(torch.ops.aten.zeros.default, ([2, 2],), {"device": "meta"})
    attention = graph.call_function(ATTENTION, (x, x, zeros), {"scale": 0.5})
    graph.output((attention,))
    module = torch.fx.GraphModule({}, graph)
    moved = on_the_card(module)
    assert str(moved.graph.find_nodes(op="placeholder")[0].meta) == "{}"
    (made,) = moved.graph.find_nodes(op="call_function", target=torch.ops.aten.zeros.default)
    assert made.kwargs == {"device": torch.device("cuda", 0)}
    (flash,) = moved.graph.find_nodes(op="call_function", target=FLASH_ATTENTION)
    assert flash.kwargs == {"scale": 0.5}
    assert not moved.graph.find_nodes(op="call_function", target=ATTENTION)
    assert module.graph.find_nodes(op="call_function", target=ATTENTION)  # it is a copy

    attention.kwargs = {"attn_mask": x}
    with pytest.raises(ValueError, match="flash attention takes no mask"):
        on_the_card(module)


@pytest.mark.full
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", list(UNETS))
def test_dcompile_cuts_networks_without_weights(
    shape: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(recorder: Recorder, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        recorder.graphs.append(count_kernels.Graph(module, inputs))
        (outputs,) = module.graph.output_node().args
        made = [torch.empty_like(node.meta["val"], device="meta") for node in outputs]
        return lambda *_: made

    monkeypatch.setattr(Recorder, "__call__", recorded)  # the card takes Triton, even a pretended
    graphs = count_kernels.graphs_of(UNETS[shape], True, channels_last)
    assert list(graphs) == ["full", "shallow"]
    full, shallow = (len(graph.module.graph.nodes) for graph in graphs.values())
    assert full > 2 * shallow
    weights = [x for x in graphs[count_kernels.GraphName.FULL].inputs if x.dim() == 4]
    spatial = [weight for weight in weights if weight.shape[-1] == 3]  # not the sample
    assert len(spatial) > 10
    for weight in spatial:
        assert weight.device.type == "meta"
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


# --- results --------------------------------------------------------------------------------------

IDENTITY = {
    "card": "NVIDIA H100 80GB HBM3",
    "dtype": "float16",
    "tiny": False,
    "code": "0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "diffusers": "0.40",
}
COUNTS = Counts(30, 20, {"addmm": 5, "_scaled_dot_product_flash_attention": 3}, 0, 0)


def test_the_bars_are_judged() -> None:
    names = [key(shape, graph, True) for shape in UNETS for graph in GRAPHS]
    rows: dict[str, Any] = {name: asdict(COUNTS) for name in names}
    reached = [bar.line(rows) for bar in BARS]
    assert [line.rsplit(" | ", 2)[1:] for line in reached] == [
        ["0 bytes", "reached |"],
        ["38 launches", "reached |"],
        ["38 launches", "reached |"],
    ]
    rows[key("svd", "full", True)] = asdict(replace(COUNTS, transposes=1, transposed_bytes=12))
    rows[key("sd15", "shallow", True)] = asdict(replace(COUNTS, launches=31))
    missed = [bar.line(rows) for bar in BARS]
    assert missed[0].endswith("| 12 bytes | **missed** |")
    assert missed[1].endswith("| 39 launches | **missed** |")
    assert missed[2] == reached[2]


def test_without_counts_nothing_is_claimed() -> None:
    text = page({"made_with": IDENTITY, "rows": {}})
    assert "reached" not in text
    assert "missed" not in text
    assert text.count(NOT_YET) == len(BARS) + len(UNETS) * len(GRAPHS) * len(LAYOUTS)


def test_counts_of_the_same_code_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    first, second = key("sd15", "full", True), key("sd15", "full", False)
    count_kernels.Record(file, IDENTITY).put(first, COUNTS)
    count_kernels.Record(file, IDENTITY).put(second, COUNTS)
    found = json.loads(file.read_text())
    assert found == {"made_with": IDENTITY, "rows": dict.fromkeys((first, second), asdict(COUNTS))}
    assert "5 addmm, 3 scaled_dot_product_flash_attention" in (tmp_path / "kernels.md").read_text()
    count_kernels.Record(file, {**IDENTITY, "torch": "2.12.0"}).put(second, COUNTS)
    assert list(json.loads(file.read_text())["rows"]) == [second]


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    results = count_kernels.RESULTS
    assert results.with_suffix(".md").read_text() == page(json.loads(results.read_text()))
    file = tmp_path / "kernels.json"
    file.write_text(results.read_text())
    assert command("--page", "--json", str(file)).exit_code == 0
    assert file.with_suffix(".md").read_text() == results.with_suffix(".md").read_text()


# --- the command ----------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(count_kernels.main)
    return CliRunner().invoke(app, list(arguments))


def test_unknown_shapes_are_refused() -> None:
    found = command("--shape", "sd16")
    assert found.exit_code == 2
    assert "expected some of sd15, sdxl, svd" in " ".join(found.output.replace("│", " ").split())


def test_it_says_why_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    found = command("--json", str(tmp_path / "kernels.json"))
    assert found.exit_code == 0
    assert found.output == (
        "Skipped: torch 2.13.0+cpu is no CUDA build, so Inductor generates no code for CUDA.\n"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command("--tiny").output == (
        "Skipped: Triton is not installed, and Inductor generates code for it.\n"
    )
    assert not list(tmp_path.iterdir())


@needs_triton
def test_the_card_is_pretended_no_longer_than_asked_for() -> None:
    from pretended_gpu import pretended_h100, replacements

    parts = [(part.owner, part.name) for part in replacements()]
    before = [vars(owner)[name] for owner, name in parts]
    with pretended_h100():
        assert torch.cuda.get_device_properties(0).major == 9
        during = [vars(owner)[name] for owner, name in parts]
    assert not any(one is other for one, other in zip(before, during, strict=True))
    assert all(one is vars(owner)[name] for one, (owner, name) in zip(before, parts, strict=True))
    assert all(part.reason for part in replacements())


@pytest.mark.full
@needs_triton
def test_kernels_of_a_tiny_network_are_counted(tmp_path: Path) -> None:
    """In a process of its own, for torch remembers the card's properties."""
    file = tmp_path / "kernels.json"
    arguments = ["--tiny", "--shape", "sd15", "--json", str(file)]
    found = subprocess.run(
        [sys.executable, count_kernels.__file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads(file.read_text())
    assert results["made_with"]["tiny"]
    rows = results["rows"]
    assert set(rows) == {key("sd15", graph, layout) for graph in GRAPHS for layout in LAYOUTS}
    for graph in GRAPHS:
        copying, laid_out = (rows[key("sd15", graph, layout)] for layout in (False, True))
        assert copying["transposes"] > 0
        assert copying["transposed_bytes"] > 0
        assert laid_out["transposes"] == laid_out["transposed_bytes"] == 0
        # A launch for each weight, and nothing else has changed.
        assert copying["launches"] - laid_out["launches"] == copying["transposes"]
        assert copying["library"] == laid_out["library"]
    full, shallow = (rows[key("sd15", graph, True)] for graph in ("full", "shallow"))
    assert full["launches"] > 2 * shallow["launches"] > 0
    assert "tiny networks" in file.with_suffix(".md").read_text()
