"""Colour emoji as training data: every single-code-point glyph of Noto Color Emoji, on white.

The font (SIL Open Font License 1.1) is in Debian's package ``fonts-noto-color-emoji``.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one pixel size at which this bitmap font has glyphs
CANVAS = 136

# Where emoji live. Skin-tone swatches and regional-indicator letters are no pictures.
_BLOCKS = (range(0x2000, 0x3300), range(0x1F000, 0x1FB00))
_NOT_PICTURES = frozenset(range(0x1F3FB, 0x1F400)) | frozenset(range(0x1F1E6, 0x1F200))


def glyphs(size: int, font_path: Path = FONT) -> tuple[list[str], torch.Tensor]:
    """Render all glyphs.

    Returns:
        Unicode names, and a uint8 tensor of shape (glyphs, 3, size, size).

    Raises:
        FileNotFoundError: the font is missing; the message names the package to install.
    """
    if not font_path.is_file():
        raise FileNotFoundError(
            f"no emoji font at {font_path}: run `apt-get install fonts-noto-color-emoji` "
            "or pass the path of NotoColorEmoji.ttf"
        )
    font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    names: list[str] = []
    images: list[torch.Tensor] = []
    for block in _BLOCKS:
        for code_point in block:
            name = unicodedata.name(chr(code_point), "")
            if not name or code_point in _NOT_PICTURES:
                continue
            left, top, right, bottom = font.getbbox(chr(code_point))
            if right <= left or bottom <= top:
                continue
            image = Image.new("RGB", (CANVAS, CANVAS), "white")
            at = ((CANVAS - (right - left)) / 2 - left, (CANVAS - (bottom - top)) / 2 - top)
            ImageDraw.Draw(image).text(at, chr(code_point), font=font, embedded_color=True)
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            names.append(name.lower())
            images.append(pixels.view(size, size, 3).permute(2, 0, 1))
    return names, torch.stack(images)
