"""The training scripts' parts: a loop that may be killed at any point, captions without a font."""

from __future__ import annotations

import csv
import importlib
import math
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emoji_data import (
    GROUNDS,
    Captioned,
    captions,
    glyphs,
    is_held_out,
    may_mirror,
    on_ground,
    rgba_glyphs,
    subjects,
    with_ground,
)
from torch import nn
from training import Stage, learning_rate, read_checkpoint, replace_file, save_sheet

STEPS = 10
# Every picture in these blocks that has a name, whether or not some font draws it.
NAMES = [
    name.lower()
    for code_point in (*range(0x2600, 0x27C0), *range(0x1F300, 0x1F650), *range(0x1F680, 0x1FAFF))
    if (name := unicodedata.name(chr(code_point), ""))
]


class KilledError(Exception):
    pass


class Line:
    """Fits a line. It draws nothing at random, so that a run is the same however often it stops."""

    def __init__(self, killed_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        self.killed_at = killed_at
        self.weights: list[torch.Tensor] = []  # as each step found them

    def loss(self) -> torch.Tensor:
        if len(self.weights) == self.killed_at:
            raise KilledError
        self.weights.append(self.net.weight.detach().clone())
        points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
        return (self.net(points) - torch.tensor([[1.0], [2.0], [4.0]])).square().mean()

    def stage(
        self,
        settings: dict[str, object] | None = None,
        sheet: Callable[[nn.ModuleDict], torch.Tensor] | None = None,
    ) -> Stage:
        return Stage(
            "line",
            nn.ModuleDict({"net": self.net}),
            self.loss,
            STEPS,
            peak=0.5,
            settings={"width": 2} if settings is None else settings,
            sheet=sheet,
            average=0.9,
        )


def finished(line: Line, work: Path, **run: float) -> nn.Module:
    averaged = line.stage().run(work, **run)  # type: ignore[arg-type]
    assert averaged is not None
    return averaged["net"]


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_killed_stage_goes_on_from_its_checkpoint(tmp_path: Path, every: int) -> None:
    whole = Line()
    expected = finished(whole, tmp_path / "whole")
    killed, again = Line(killed_at=7), Line()
    with pytest.raises(KilledError):
        killed.stage().run(tmp_path / "killed", every=every)
    found = finished(again, tmp_path / "killed", every=every)
    assert len(again.weights) == STEPS - 7 // every * every
    assert torch.equal(again.net.weight, whole.net.weight)
    assert torch.equal(found.weight, expected.weight)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    line, again = Line(), Line()
    expected = finished(line, tmp_path)
    found = finished(again, tmp_path)
    assert again.weights == []
    assert torch.equal(found.weight, expected.weight)


def test_deadline_leaves_a_checkpoint_and_the_next_run_goes_on(tmp_path: Path) -> None:
    whole = finished(Line(), tmp_path / "whole")
    work = tmp_path / "stopped"
    for step in range(1, STEPS):
        line = Line()
        assert line.stage().run(work, deadline=time.monotonic()) is None
        assert len(line.weights) == 1
        assert torch.load(work / "line.pt", weights_only=True)["step"] == step
    last = finished(Line(), work, deadline=time.monotonic())  # done in time is done
    assert torch.equal(last.weight, whole.weight)


def test_averaged_weights_follow(tmp_path: Path) -> None:
    line = Line()
    averaged = finished(line, tmp_path)
    expected = line.weights[0]
    for step, weight in enumerate([*line.weights[1:], line.net.weight.detach()]):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (step + 1) / (step + 10)))
    assert torch.allclose(averaged.weight, expected, atol=1e-6)
    assert not torch.equal(averaged.weight, line.net.weight)
    assert not averaged.training
    assert not averaged.weight.requires_grad


def test_log_and_sheets(tmp_path: Path) -> None:
    drawn = []

    def sheet(averaged: nn.ModuleDict) -> torch.Tensor:
        drawn.append(averaged["net"].weight.clone())
        return torch.zeros(5, 3, 4, 4)

    Line().stage(sheet=sheet).run(tmp_path, every=4, sheet_every=6)
    rows = list(csv.reader((tmp_path / "line.csv").open()))
    assert [row[0] for row in rows] == ["4", "8", "10"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "line-000006.png",
        "line-000010.png",
    ]
    assert len(drawn) == 2


def test_sheets_are_about_as_wide_as_high(tmp_path: Path) -> None:
    from PIL import Image

    pictures = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    save_sheet(pictures, tmp_path / "sheet.png", zoom=2)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (3 * 8, 2 * 8)
        assert image.getpixel((0, 0)) == (0, 0, 0)
        assert image.getpixel((15, 15)) == (255, 255, 255)


def test_learning_rate_warms_up_stays_and_ends_near_zero() -> None:
    rates = [learning_rate(step, 1000, 0.5) for step in range(1000)]
    assert rates[0] == pytest.approx(0.5 / 200)
    assert rates[199:600] == pytest.approx([0.5] * 401)
    assert rates[:200] == sorted(rates[:200])
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert 0 < rates[-1] < 0.002


# --- checkpoints ----------------------------------------------------------------------------------


def truncated(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def noise(whole: bytes) -> bytes:
    return torch.randint(0, 256, (len(whole),), dtype=torch.uint8).numpy().tobytes()


def almost_whole(whole: bytes) -> bytes:
    return whole[:-1]


def nothing(whole: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, noise, almost_whole, nothing])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    finished(Line(), tmp_path)
    checkpoint = tmp_path / "line.pt"
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    line = Line()
    with pytest.raises(SystemExit) as stopped:
        line.stage().run(tmp_path)
    assert f"{checkpoint} is damaged" in str(stopped.value)
    assert "delete it to begin this stage again" in str(stopped.value)
    assert checkpoint.read_bytes() == damaged
    assert line.weights == []
    checkpoint.unlink()
    finished(line, tmp_path)


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2]], ids=type)
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "line.pt")
    with pytest.raises(SystemExit, match=r"line\.pt is damaged .* delete it"):
        read_checkpoint(tmp_path / "line.pt", {}, torch.device("cpu"))


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        Line(killed_at=5).stage({"width": 2}).run(tmp_path, every=2)
    with pytest.raises(SystemExit) as stopped:
        Line().stage({"width": 3}).run(tmp_path)
    message = str(stopped.value)
    assert (
        f"{tmp_path / 'line.pt'} was made with {{'width': 2}}, asked for {{'width': 3}}" in message
    )
    assert "delete it or choose another --work folder" in message


def test_replace_file_leaves_the_old_one_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    replace_file(path, lambda partial: partial.write_text("old") and None)
    assert path.read_text() == "old"

    def fail(partial: Path) -> None:
        partial.write_text("half of the n")
        raise KilledError

    with pytest.raises(KilledError):
        replace_file(path, fail)
    assert path.read_text() == "old"
    replace_file(path, lambda partial: partial.write_text("new") and None)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.pt", "new")]


# --- the font -------------------------------------------------------------------------------------


@pytest.mark.parametrize("render", [glyphs, rgba_glyphs, Captioned.render])
def test_a_missing_font_names_its_package(render: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no emoji font at .*fonts-noto-color-emoji"):
        render(32, tmp_path / "NotoColorEmoji.ttf")


@pytest.mark.parametrize("script", ["train_demo", "train_emoji_sd", "eval_emoji_sd"])
def test_scripts_end_with_that_message(script: str, tmp_path: Path) -> None:
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit, match="fonts-noto-color-emoji"):
        main(font=tmp_path / "NotoColorEmoji.ttf", out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- captions -------------------------------------------------------------------------------------


def test_held_out_captions_are_never_trained_on() -> None:
    training, held_out = zip(*map(captions, NAMES), strict=True)
    trained_on = {caption for every in training for caption in every}
    kept_back = {caption for every in held_out for caption in every}
    assert not trained_on & kept_back
    assert 0.05 < len(kept_back) / len(trained_on | kept_back) < 0.1  # plain names are not


def test_held_out_captions_are_the_same_everywhere() -> None:
    assert is_held_out("a picture of dog")
    assert not is_held_out("dog emoji")
    assert [captions(name) for name in NAMES] == [captions(name) for name in NAMES]
    assert captions("dog") == (
        ["dog", "dog emoji", "an emoji of dog", "a drawing of dog", "dog icon"],
        ["a picture of dog"],
    )


def test_every_glyph_is_trained_on_by_its_plain_name() -> None:
    for name in NAMES:
        training, held_out = captions(name)
        assert training[0] == subjects(name)[0]
        assert len(set(training + held_out)) == len(training + held_out)
        assert all(caption.strip() == caption != "" for caption in training + held_out)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("heavy black heart", {"red heart"}),
        ("slice of pizza", {"pizza", "slice of pizza"}),
        ("thumbs up sign", {"thumbs up"}),
        ("blue heart", {"blue heart", "heart, blue"}),
        ("rabbit face", {"rabbit face", "bunny face"}),
        ("man and woman holding hands", {"woman holding hands and man"}),
    ],
)
def test_subjects(name: str, called: set[str]) -> None:
    assert called <= set(subjects(name))


@pytest.mark.parametrize(
    "name",
    [
        "leftwards black arrow",
        "right-facing fist",
        "clock face one oclock",
        "regional indicator symbol letter a",
        "input symbol for latin small letters",
        "earth globe europe-africa",
        "waxing crescent moon symbol",
        "exclamation question mark",
        "flag in hole",
        "on with exclamation mark with left right arrow above",
        "banknote with dollar sign",
    ],
)
def test_what_has_a_direction_is_not_mirrored(name: str) -> None:
    assert not may_mirror(name)


@pytest.mark.parametrize("name", ["red apple", "dog face", "rocket", "grinning face", "penguin"])
def test_what_has_none_may_be(name: str) -> None:
    assert may_mirror(name)


@pytest.mark.parametrize("ground", GROUNDS)
def test_with_ground_names_the_colour(ground: str) -> None:
    captions = {with_ground("dog", ground, frame) for frame in range(6)}
    assert len(captions) == 3
    assert all("dog" in caption and ground in caption for caption in captions)


# --- pictures -------------------------------------------------------------------------------------


def test_glyphs_lie_on_their_ground() -> None:
    rgba = torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    rgba[1, 0], rgba[1, 3] = 255, 255  # the second is red and opaque
    pictures = on_ground(rgba, torch.tensor([0.5, 0.5, 1.0]))
    assert pictures.shape == (2, 3, 3, 3)
    assert torch.allclose(pictures[0, :, 0, 0], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(pictures[1, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def drawn_half(name: str) -> Captioned:
    """A glyph, opaque and black on its left half, nothing on its right."""
    rgba = torch.zeros(1, 4, 32, 32, dtype=torch.uint8)
    rgba[:, 3, :, :16] = 255
    return Captioned([name], rgba)


@pytest.mark.parametrize(("name", "mirrored"), [("dog", True), ("leftwards arrow", False)])
def test_augmented_pictures_stay_near_the_glyph(name: str, mirrored: bool) -> None:
    data, which = drawn_half(name), torch.zeros(64, dtype=torch.long)
    white = torch.zeros(64, dtype=torch.long)
    plain = data.pictures(which, white, moved=0.0)
    assert torch.equal(plain[0, 0, 0], torch.tensor([-1.0] * 16 + [1.0] * 16))
    pictures = data.pictures(which, white, moved=0.5)
    moved = data.pictures(which, white, moved=1.0)
    assert pictures.shape == plain.shape
    assert float(pictures.abs().max()) < 1 + 1e-5
    left, right = (half.mean((1, 2, 3)) for half in (moved[..., :16], moved[..., 16:]))
    mirrors = int((left > right).sum())
    assert (0 < mirrors < 20) if mirrored else mirrors == 0
    unchanged = int(((pictures - plain).abs().amax((1, 2, 3)) < 1e-3).sum())
    assert 16 < unchanged < 48


def test_standardized_latents_decode_to_the_same() -> None:
    script = importlib.import_module("train_emoji_sd")
    vae = script.build_autoencoder((16, 16, 16)).eval()
    with torch.no_grad():
        pictures = torch.rand(4, 3, 32, 32) * 2 - 1
        before = vae.encode(pictures).latent_dist
        expected = vae.decode(before.mean).sample
        script.standardize(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        found = vae.decode(after.mean).sample
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(after.std / before.std, (1 / before.mean.std((0, 2, 3))).view(4, 1, 1))
    assert torch.allclose(found, expected, atol=1e-4)
    assert math.isfinite(float(found.sum()))


def test_tokens_are_read_as_patches() -> None:
    """Token k of the last sixteen tells patch k, row by row, all of its channels."""
    script = importlib.import_module("train_emoji_sd")
    reading = script.Reading(width=16, side=8)
    with torch.no_grad():
        reading.head.weight.copy_(torch.eye(16))
        reading.head.bias.zero_()
        tokens = torch.randn(2, script.TOKENS, 16)
        latents = reading(tokens)
    assert latents.shape == (2, 4, 8, 8)
    for number in range(16):
        row, column = divmod(number, 4)
        patch = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patch.flatten(1), tokens[:, script.TOKENS - 16 + number])
