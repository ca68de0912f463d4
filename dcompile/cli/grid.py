"""The demo's picture: a grid of samples, one block for each run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcompile.cli.demo import DemoResult, Run, one_line

if TYPE_CHECKING:
    from PIL import Image, ImageFont

# Pillow's built-in font has no ×, – or ∞: captions do without.

PAD, GAP, CAPTION_WIDTH, HEADER = 36, 10, 236, 92
PICTURES_WIDTH, MOST_COLUMNS, LARGEST_TILE = 1100, 8, 256
LINE = 26
LABEL = 26  # height of the prompt below its picture
CAPTION_HEIGHT = 4 * LINE
INK, GREY, BLUE, RULE = "#0f172a", "#64748b", "#1d4ed8", "#e2e8f0"


@dataclass(frozen=True)
class GridLayout:
    """Sizes in pixels of a grid of pictures, one block for each run.

    Attributes:
        columns: number of pictures in a row.
        rows: number of rows in a block.
        tile: width and height of a picture.
        pitch: distance of the upper edges of two rows.
        block: height of a block.
        size: width and height of the whole grid.
    """

    columns: int
    rows: int
    tile: tuple[int, int]
    pitch: int
    block: int
    size: tuple[int, int]

    @classmethod
    def of(
        cls, runs: int, count: int, height: int, width: int, labelled: bool = False
    ) -> GridLayout:
        """Small pictures are enlarged by an integer factor, large ones reduced to fit."""
        columns = min(count, MOST_COLUMNS)
        rows = math.ceil(count / columns)
        most = min(LARGEST_TILE, (PICTURES_WIDTH + GAP) // columns - GAP)
        side = max(height, width)
        scale = most // side if side <= most else most / side
        tile = (max(1, round(width * scale)), max(1, round(height * scale)))
        pitch = tile[1] + (LABEL if labelled else 0) + GAP
        block = max(rows * pitch - GAP, CAPTION_HEIGHT)
        # The title needs this width, also over a single picture.
        pictures = max(columns * (tile[0] + GAP) - GAP, 560)
        return cls(
            columns,
            rows,
            tile,
            pitch,
            block,
            (
                2 * PAD + CAPTION_WIDTH + pictures,
                2 * PAD + HEADER + runs * block + (runs - 1) * PAD,
            ),
        )


def picture_grid(result: DemoResult) -> Image.Image:
    """One image: a block of pictures for each run, with its time and fidelity next to it.

    Pictures are labelled with their prompts if these differ.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = result.runs[0].pictures.shape
    labelled = len(set(result.prompts)) > 1
    layout = GridLayout.of(len(result.runs), count, height, width, labelled)
    grid = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(grid)
    fonts = {size: ImageFont.load_default(size=size) for size in (15, 16, 17, 20, 22, 30)}
    title = _fitted(result.title, fonts[30], layout.size[0] - 2 * PAD)
    draw.text((PAD, PAD - 6), title, INK, fonts[30])
    draw.text((PAD, PAD + 36), result.subtitle, GREY, fonts[16])
    enlarge = layout.tile[0] >= width
    resampling = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    y = PAD + HEADER
    for index, run in enumerate(result.runs):
        if index:
            middle = y - PAD // 2
            draw.line((PAD, middle, layout.size[0] - PAD, middle), RULE)
        draw.text((PAD, y + 18), run.method, INK, fonts[22], anchor="ls")
        for line, (text, colour, font) in enumerate(_caption(run), start=1):
            draw.text((PAD, y + 20 + line * LINE), text, colour, fonts[font], anchor="ls")
        for position, picture in enumerate(run.pictures):
            row, column = divmod(position, layout.columns)
            corner = (
                PAD + CAPTION_WIDTH + column * (layout.tile[0] + GAP),
                y + row * layout.pitch,
            )
            grid.paste(_image(picture).resize(layout.tile, resampling), corner)
            if labelled:
                label = _fitted(one_line(result.prompts[position]), fonts[15], layout.tile[0])
                below = (corner[0] + layout.tile[0] / 2, corner[1] + layout.tile[1] + LABEL / 2)
                draw.text(below, label, GREY, fonts[15], anchor="mm")
        y += layout.block + PAD
    return grid


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or the beginning of it that fits into the width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _caption(run: Run) -> list[tuple[str, str, int]]:
    """Lines with their colours and font sizes."""
    seconds = (f"{run.seconds:.2f} s", GREY, 17)
    if run.interval is None:
        return [seconds]
    psnr = "identical" if math.isinf(run.psnr) else f"PSNR {run.psnr:.1f} dB"
    return [(f"{run.speed_up:.2f}x as fast", BLUE, 20), seconds, (psnr, GREY, 17)]


def _image(picture: torch.Tensor) -> Image.Image:
    from PIL import Image

    pixels = (picture.expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
