"""The command line as a user meets it: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL
from xml.etree import ElementTree

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner, Result

import dcompile
from dcompile import models
from dcompile.cli.app import app
from dcompile.cli.demo import fidelity, run_demo
from dcompile.cli.grid import GridLayout, picture_grid
from dcompile.cli.settings import DemoSettings

TEXT_WIDTH = 16


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DDPM of 16x16 pictures with four skip connections."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-ddpm"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion that draws 16x16 pictures and reads letters."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("models")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (base / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (base / "merges.txt").write_text("#version: 0.2\n")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=TEXT_WIDTH,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=CLIPTokenizer(
            str(base / "vocab.json"), str(base / "merges.txt"), model_max_length=77
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=TEXT_WIDTH,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = base / "tiny-sd"
    pipeline.save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The message of a call that has to end with exit code 2 and without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def row(output: str, method: str) -> list[str]:
    """The cells of one method in the demo's table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(method))
    return line.split(method)[1].split()


def test_demo_compares_methods_and_writes_a_grid(ddpm: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    result = run("demo", "--model", ddpm, "--steps", 7, "--count", 3, "--interval", 2, "--out", out)
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        assert image.size == GridLayout.of(runs=2, count=3, height=16, width=16).size
    assert row(result.output, "uncached")[1:] == ["1.00×", *"––––––"]
    seconds, speed_up, limit, reached, psnr, _ssim, refresh, reuse = row(
        result.output, "interval 2"
    )
    assert (refresh, reuse) == ("4", "3")
    assert float(seconds) >= 0
    assert 0 < float(psnr) < 60
    assert 1 < float(limit.rstrip("×")) < 2
    assert float(speed_up.rstrip("×")) > 0
    assert reached.endswith("%")


def test_demo_at_interval_1_is_identical(ddpm: Path, tmp_path: Path) -> None:
    result = run(
        *("demo", "--model", ddpm, "--steps", 3, "--count", 1, "--size", 24, "--repeat", 2),
        *("--interval", 1, "--interval", 3, "--depth", 1, "--out", tmp_path / "grid.png"),
    )
    assert result.exit_code == 0, result.output
    assert row(result.output, "interval 1")[2:] == [
        *("1.00×", row(result.output, "interval 1")[3], "∞", "1.000", "3", "0")
    ]
    assert row(result.output, "interval 3")[-2:] == ["1", "2"]


def test_demo_of_a_text_to_image_pipeline(stable_diffusion: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    result = run(
        *("demo", "--model", stable_diffusion, "--prompt", "a cat", "--guidance", 5),
        *("--steps", 4, "--count", 2, "--size", 16, "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert row(result.output, "interval 3")[-2:] == ["2", "2"]
    assert row(result.output, "interval 5")[-2:] == ["1", "3"]
    with Image.open(out) as image:
        assert image.size == GridLayout.of(runs=3, count=2, height=16, width=16).size


def test_demo_draws_prompts_in_turn(stable_diffusion: Path) -> None:
    given = ("a cat", "a dog of some length, and then much more", "")
    settings = DemoSettings(
        str(stable_diffusion), given, steps=2, intervals=(), count=4, size=16, device="cpu"
    )
    result = run_demo(settings)
    assert result.prompts == (*given, "a cat")
    assert picture_grid(result).size == GridLayout.of(1, 4, 16, 16, labelled=True).size
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    for seed, (prompt, picture) in enumerate(
        zip(result.prompts, result.runs[0].pictures, strict=True)
    ):
        alone = pipeline(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="pt",
        ).images[0]
        assert torch.allclose(picture, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "count", "pictures"),
    [((), None, 8), (("a",), None, 8), (("a", "b"), None, 2), (("a",), 3, 3), (("a", "b"), 5, 5)],
)
def test_count_of_pictures(prompts: tuple[str, ...], count: int | None, pictures: int) -> None:
    assert DemoSettings(prompts=prompts, count=count).pictures == pictures


def test_demo_names_the_prompts(stable_diffusion: Path, tmp_path: Path) -> None:
    arguments = ("demo", "--model", stable_diffusion, "--steps", 1, "--interval", 1)
    arguments = (*arguments, "--size", 16, "--out", tmp_path / "grid.png")
    one = run(*arguments, "--prompt", "a  cat", "--count", 2)
    assert 'tiny-sd: 2 pictures, 1 step, "a cat"' in one.output
    several = run(*arguments, "--prompt", "a cat", "--prompt", "a dog")
    assert "tiny-sd: 2 pictures, 1 step\n" in re.sub(" +\n", "\n", several.output)
    with Image.open(tmp_path / "grid.png") as image:
        layout = GridLayout.of(runs=2, count=2, height=16, width=16, labelled=True)
        assert image.size == layout.size
    message = refused(*arguments, "--prompt", "a cat", "--prompt", "a dog", "--count", 1)
    assert "count: expected at least 2, a picture for each prompt, got 1" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", 0], "interval: expected an int of at least 1, got 0"),
        (["--depth", -1], "depth: expected an int of at least 0, got -1"),
        (["--depth", 4, "--steps", 2], "depth 4 is out of range"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--device", "nonsense"], "unknown device 'nonsense': expected auto, cpu"),
        (["--prompt", "a cat"], "takes no prompt"),
        (["--size", 17], "size: expected a multiple of 2 for this network, got 17"),
        (["--count", 0], "--count"),
    ],
)
def test_demo_refuses(ddpm: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    assert message in refused("demo", "--model", ddpm, "--out", tmp_path / "x.png", *arguments)
    assert not (tmp_path / "x.png").exists()


def test_demo_passes_on_what_a_pipeline_dislikes(stable_diffusion: Path, tmp_path: Path) -> None:
    message = refused(
        "demo", "--model", stable_diffusion, "--size", 15, "--out", tmp_path / "x.png"
    )
    assert "StableDiffusionPipeline: `height` and `width` have to be divisible by 8" in message


def test_demo_says_what_to_install(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    message = refused("demo", "--model", ddpm, "--out", tmp_path / "x.png")
    assert 'pip install "dcompile[demo]"' in message


def test_models_that_need_transformers_say_so(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    wanted = 'needs transformers: pip install "dcompile[demo]"'
    assert wanted in refused("demo", "--model", stable_diffusion, "--out", tmp_path / "x.png")
    assert wanted in refused("explain", stable_diffusion)
    of_the_hub = refused("explain", "no-such/model")
    assert "cannot load no-such/model" in of_the_hub
    assert 'without transformers: pip install "dcompile[demo]"' in of_the_hub


def test_demo_looks_at_the_output_path_first(ddpm: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refused("demo", "--out", tmp_path / "no" / "x.png")
    assert "is a folder" in refused("demo", "--out", tmp_path)


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_models_that_are_none(command: str, tmp_path: Path) -> None:
    def message(model: object) -> str:
        return refused(command, *(["--model"] if command == "demo" else []), model)

    assert "unknown model 'nonsense'" in message("nonsense")
    assert f"there is no folder {tmp_path}/none" in message(tmp_path / "none")
    assert "is not a diffusers model: expected a model_index.json" in message(tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in message(tmp_path / "file")
    assert "cannot load no-such/model, no folder here, from the Hugging Face hub" in message(
        "no-such/model"
    )
    (tmp_path / "model_index.json").write_text("{")
    assert f"cannot load {tmp_path}" in message(tmp_path)


def test_explain_prints_every_depth(ddpm: Path) -> None:
    result = run("explain", ddpm, "--depth", 2)
    assert result.exit_code == 0, result.output
    for depth in ("0", "1", "▸2", "3"):
        assert re.search(rf"│ +{depth} │ up_blocks\.", result.output)


@pytest.mark.parametrize("fixture", ["ddpm", "stable_diffusion"])
def test_explain_of_a_bare_network_needs_no_weights(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipeline: Path = request.getfixturevalue(fixture)
    (tmp_path / "config.json").write_text((pipeline / "unet" / "config.json").read_text())
    of_network = json.loads(run("explain", tmp_path, "--json").stdout)
    of_pipeline = json.loads(run("explain", pipeline, "--json").stdout)
    assert [row["module_path"] for row in of_network["depths"]] == [
        row["module_path"] for row in of_pipeline["depths"]
    ]
    assert [row["ratio"] for row in of_network["depths"]] == pytest.approx(
        [row["ratio"] for row in of_pipeline["depths"]], rel=0.01
    )


def test_explain_writes_a_drawing(stable_diffusion: Path, tmp_path: Path) -> None:
    svg = tmp_path / "net.svg"
    result = run("explain", stable_diffusion, "--size", 32, "--svg", svg, "--json")
    assert result.exit_code == 0, result.output
    explanation = json.loads(result.stdout)
    texts = [element.text for element in ElementTree.parse(svg).iter() if element.text]
    assert explanation["depths"][0]["boundary_shapes"] == [[2, 8, 16, 16]]
    for report in explanation["depths"]:
        assert str(report["depth"]) in texts
        assert report["module_path"] in texts


def test_explain_refuses(ddpm: Path, tmp_path: Path) -> None:
    assert "depth 4 is out of range: UNet2DModel has depths 0 to 3" in refused(
        "explain", ddpm, "--depth", 4
    )
    assert "got -1" in refused("explain", ddpm, "--depth", -1)
    assert "there is no folder" in refused("explain", ddpm, "--svg", tmp_path / "no" / "x.svg")
    assert "multiple of 2" in refused("explain", ddpm, "--size", 17)
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchNetwork"}')
    assert "cannot build a network from" in refused("explain", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    assert "give the folder of a pipeline" in refused("explain", tmp_path)
    config = json.loads((ddpm / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": None}))
    assert "try --size" in refused("explain", tmp_path)
    assert run("explain", tmp_path, "--size", 16).exit_code == 0


def test_demo_needs_a_pipeline(ddpm: Path, tmp_path: Path) -> None:
    message = refused("demo", "--model", ddpm / "unet", "--out", tmp_path / "x.png")
    assert "is a network, not a pipeline" in message


def test_version() -> None:
    assert run("--version").output.strip() == f"dcompile {dcompile.__version__}"


def test_python_m_dcompile() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dcompile", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in result.stdout
    assert "explain" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom dcompile.cli.app import app\n"
        f"try: app({arguments!r})\n"
        "finally: print('IMPORTED', *{name.split('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = set(result.stdout.partition("IMPORTED")[2].split())
    assert "dcompile" in imported
    heavy = {"PIL", "diffusers", "matplotlib", "numpy", "torch", "torchmetrics", "transformers"}
    assert not heavy & imported


def test_help_takes_under_half_a_second() -> None:
    """Of processor time, the best of three: other processes may keep this one waiting."""

    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "dcompile", "--help"], check=True, stdout=DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(spent() for _ in range(3)) < 0.5


def test_bundled_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    with pytest.raises(dcompile.ModelError, match=r"no bundled model 'a'; bundled are: none"):
        models.path("a")
    for name in ("ddpm-emoji", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").touch()
    assert models.names() == ["another", "ddpm-emoji"]
    assert models.path("another") == tmp_path / "another"
    with pytest.raises(dcompile.ModelError, match=r"bundled are: another, ddpm-emoji"):
        models.path("ddpm")


def test_defaults_of_models() -> None:
    bundled = models.defaults("emoji-sd")
    assert bundled.guidance == 5.0
    assert len(set(bundled.prompts)) == len(bundled.prompts) == 8
    assert models.defaults("owner/name") == models.Defaults()
    assert len(models.Defaults().prompts) == 1
    assert models.Defaults().guidance is None
    assert set(models.ALIASES.values()) <= set(models.names())
    assert DemoSettings().model == models.DEFAULT


def test_fidelity() -> None:
    pictures = torch.rand(2, 3, 16, 16)
    assert fidelity(pictures, pictures) == (float("inf"), pytest.approx(1.0))
    psnr, _ = fidelity(torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.5))
    assert psnr == pytest.approx(20.0, abs=1e-3)
    _, ssim = fidelity(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    assert ssim != ssim


@pytest.mark.parametrize(
    ("count", "height", "width", "columns", "rows", "tile"),
    [
        (8, 32, 32, 8, 1, (128, 128)),
        (1, 32, 32, 1, 1, (256, 256)),
        (12, 32, 32, 8, 2, (128, 128)),
        (4, 512, 512, 4, 1, (256, 256)),
        (4, 512, 256, 4, 1, (128, 256)),
        (3, 300, 300, 3, 1, (256, 256)),
    ],
)
def test_grid_layout(
    count: int, height: int, width: int, columns: int, rows: int, tile: tuple[int, int]
) -> None:
    layout = GridLayout.of(runs=3, count=count, height=height, width=width)
    assert (layout.columns, layout.rows, layout.tile) == (columns, rows, tile)
    labelled = GridLayout.of(runs=3, count=count, height=height, width=width, labelled=True)
    assert labelled.tile == layout.tile
    assert labelled.size[0] == layout.size[0]
    assert labelled.size[1] == layout.size[1] + 3 * (labelled.block - layout.block)
    assert labelled.pitch > layout.pitch


# profile and tune


def test_profile(ddpm: Path, tmp_path: Path) -> None:
    drawn, data = tmp_path / "p.png", tmp_path / "p.json"
    result = run("profile", ddpm, "--steps", 6, "--count", 2, "--out", drawn, "--json", data)
    assert result.exit_code == 0, result.output
    assert "change of deep features in 6 steps" in result.output
    assert f"wrote {drawn}" in result.output
    with Image.open(drawn) as image:
        assert image.format == "PNG"
    content = json.loads(data.read_text())
    assert [depth["depth"] for depth in content["depths"]] == [0, 1, 2, 3]
    assert len(content["gains"]) == content["steps"] == 6


def test_profile_of_one_depth_of_a_text_to_image_model(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    arguments = ("--prompt", "a cat", "--size", 16, "--depth", 1, "--out", tmp_path / "p.png")
    result = run("profile", stable_diffusion, "--steps", 4, "--count", 1, *arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"^ +1 +0\.\d+ ", result.output, re.MULTILINE)


def test_tune(ddpm: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    result = run("tune", ddpm, "--steps", 8, "--speedup", 1.3, "--trials", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output
    assert "DeepCache, N=3" in result.output
    tuned = dcompile.Tuned.load(out)
    assert tuned.steps == 8
    assert tuned.speedup >= 1.3 - 1e-9
    with Image.open(tmp_path / "mine.png") as image:
        assert image.format == "PNG"


def test_tune_for_fidelity(ddpm: Path, tmp_path: Path) -> None:
    arguments = ("--steps", 6, "--trials", 3, "--depth", 0, "--forecast", "reuse", "--interval", 2)
    out = tmp_path / "mine.json"
    result = run("tune", ddpm, "--psnr", 30, *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert dcompile.Tuned.load(out).psnr >= 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speedup", 2, "--psnr", 30], "give speedup or psnr"),
        (["--speedup", 0.5], "speedup"),
        (["--speedup", 50], "beyond this network"),
        (["--forecast", "cubic"], "forecast: expected"),
        (["--depth", 9], "depth 9 is out of range"),
        (["--interval", 0], "interval: expected an int of at least 1"),
        (["--steps", 1], "--steps"),
        (["--prompt", "a cat"], "takes no prompt"),
        (["--device", "nonsense"], "unknown device"),
    ],
)
def test_tune_refuses(ddpm: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    given = ["--steps", 4, "--count", 1, "--trials", 1, *arguments]
    assert message in refused("tune", ddpm, "--out", tmp_path / "x.json", *given)
    assert not (tmp_path / "x.json").exists()


def test_plots_say_what_to_install_first(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("profile", "tune"):
        assert 'pip install "dcompile[plots]"' in refused(
            command, ddpm, "--out", tmp_path / "x.json"
        )


def test_tune_looks_at_the_output_paths_first(ddpm: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refused("tune", ddpm, "--out", tmp_path / "no" / "x.json")
    assert "there is no folder" in refused("tune", ddpm, "--plot", tmp_path / "no" / "x.png")
    assert "is the schedule's file" in refused("tune", ddpm, "--out", tmp_path / "x.png")
