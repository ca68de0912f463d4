"""Colour emoji as training data: glyphs of Noto Color Emoji, and captions that say what they show.

The font (SIL Open Font License 1.1) is in Debian's package ``fonts-noto-color-emoji``.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one pixel size at which this bitmap font has glyphs
CANVAS = 136

# Where emoji live. Skin-tone swatches and regional-indicator letters are no pictures.
_BLOCKS = (range(0x2000, 0x3300), range(0x1F000, 0x1FB00))
_NOT_PICTURES = frozenset(range(0x1F3FB, 0x1F400)) | frozenset(range(0x1F1E6, 0x1F200))


def rgba_glyphs(size: int, font_path: Path = FONT) -> tuple[list[str], torch.Tensor]:
    """Render every single-code-point glyph on a transparent ground.

    Returns:
        Unicode names in lower case, and a uint8 tensor of shape (glyphs, 4, size, size).

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
            image = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
            at = ((CANVAS - (right - left)) / 2 - left, (CANVAS - (bottom - top)) / 2 - top)
            ImageDraw.Draw(image).text(at, chr(code_point), font=font, embedded_color=True)
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            names.append(name.lower())
            images.append(pixels.view(size, size, 4).permute(2, 0, 1))
    return names, torch.stack(images)


def on_ground(rgba: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """Lay glyphs on plain grounds.

    Args:
        rgba: uint8, shape (n, 4, height, width).
        ground: RGB in 0..1, shape (n, 3) or (3,).

    Returns:
        float32 in -1..1, shape (n, 3, height, width).
    """
    colour, alpha = rgba[:, :3].float() / 255, rgba[:, 3:].float() / 255
    below = ground.to(colour).expand(len(rgba), 3)[..., None, None]
    return torch.lerp(below.expand_as(colour), colour, alpha) * 2 - 1


def glyphs(size: int, font_path: Path = FONT) -> tuple[list[str], torch.Tensor]:
    """Names and pictures on white: uint8, shape (glyphs, 3, size, size). Raises as rgba_glyphs."""
    names, rgba = rgba_glyphs(size, font_path)
    return names, ((on_ground(rgba, torch.ones(3)) + 1) * 127.5).round().to(torch.uint8)


# --- captions -------------------------------------------------------------------------------------

GROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.08, 0.08, 0.08),
    "grey": (0.6, 0.6, 0.6),
    "red": (0.86, 0.24, 0.22),
    "orange": (0.98, 0.62, 0.2),
    "yellow": (1.0, 0.92, 0.45),
    "green": (0.4, 0.76, 0.42),
    "blue": (0.3, 0.55, 0.9),
    "purple": (0.62, 0.42, 0.82),
    "pink": (1.0, 0.72, 0.82),
}

# Glyphs whose name no person would type, or that are characters more than pictures.
_NO_CAPTION = re.compile(r"unified ideograph|combining|katakana|^emoji component")

# Names that say another thing than the picture shows; the first is what the picture is called.
_CALLED = {
    "heavy black heart": ["red heart", "heart"],
    "black heart suit": ["heart suit of cards"],
    "black diamond suit": ["diamond suit of cards"],
    "black sun with rays": ["sun", "sun with rays"],
    "black telephone": ["telephone", "red telephone"],
    "black scissors": ["scissors"],
    "black nib": ["fountain pen nib"],
    "white medium star": ["star", "yellow star"],
    "white heavy check mark": ["white check mark on green"],
    "white smiling face": ["smiling face"],
    "white frowning face": ["frowning face"],
    "automobile": ["car", "red car", "automobile"],
    "slice of pizza": ["pizza", "slice of pizza"],
    "extraterrestrial alien": ["alien"],
    "electric light bulb": ["light bulb"],
    "aubergine": ["aubergine", "eggplant"],
    "personal computer": ["laptop", "personal computer"],
    "sauropod": ["sauropod", "dinosaur"],
    "honeybee": ["honeybee", "bee"],
    "lady beetle": ["ladybug", "lady beetle"],
    "pile of poo": ["pile of poo", "poo"],
    "father christmas": ["santa claus", "father christmas"],
    "jack-o-lantern": ["jack-o-lantern", "halloween pumpkin"],
    "french fries": ["french fries", "fries"],
    "hamburger": ["hamburger", "burger"],
    "doughnut": ["doughnut", "donut"],
    "american football": ["american football"],
    "wrapped present": ["present", "gift", "wrapped present"],
    "face with tears of joy": ["face with tears of joy", "laughing face crying"],
    "thumbs up sign": ["thumbs up"],
    "thumbs down sign": ["thumbs down"],
    "hundred points symbol": ["hundred points", "one hundred"],
    "cyclone": ["cyclone", "spiral"],
    "water wave": ["wave", "water wave"],
    "evergreen tree": ["evergreen tree", "pine tree"],
    "deciduous tree": ["deciduous tree", "tree"],
    "house building": ["house", "house building"],
    "horse racing": ["horse racing", "jockey on a horse"],
    "beer mug": ["beer mug", "beer"],
    "hot beverage": ["hot beverage", "coffee", "cup of coffee"],
    "cat face": ["cat face", "face of a cat"],
    "dog face": ["dog face", "face of a dog"],
}

_SYNONYMS = {
    "smiling": "happy",
    "crying": "weeping",
    "angry": "mad",
    "rabbit": "bunny",
    "ship": "boat",
    "airplane": "plane",
    "television": "tv",
    "mobile phone": "smartphone",
    "spectacles": "glasses",
    "gem stone": "diamond gem",
    "trophy": "cup trophy",
    "mountain": "peak",
    "woman": "lady",
    "child": "kid",
    "bicycle": "bike",
    "chequered": "checkered",
    "optical disc": "compact disc",
    "camera": "photo camera",
    "clock face": "clock",
    "moon": "moon in the sky",
    "open mouth": "mouth open",
    "stuck-out tongue": "tongue out",
    "extraterrestrial": "alien",
    "lock": "padlock",
    "hammer": "mallet",
    "book": "closed book",
    "fish": "fish animal",
}
_COLOURS = "red|orange|yellow|green|blue|purple|brown|black|white|pink"
_FRAMES = ("{}", "a picture of {}", "{} emoji", "an emoji of {}", "a drawing of {}", "{} icon")
_GROUND_FRAMES = ("{} on a {ground} background", "{}, {ground} background", "{ground} ground, {}")
# What a mirror would turn into something else: directions, text, clocks, maps, flags.
_ONE_WAY = re.compile(
    r"left|right|clock|\b(letter|latin|squared|circled|ideograph|input|keycap|arrows?|flags?|maps?|"
    r"globe|europe|americas|asia|japan|quarter|crescent|gibbous|mark|points|number|north|south|"
    r"east|west|sign|symbol|symbols|calendar|dollar|yen|euro|pound|index|medal|back|end|on|soon|"
    r"top|ten|aries|taurus|gemini|cancer|leo|virgo|libra|scorpius|sagittarius|capricorn|aquarius|"
    r"pisces|ophiuchus|chart|note|score|card|cards|suit|dvd|newspaper|exclamation)\b"
)


def subjects(name: str) -> list[str]:
    """What people may call the glyph of this Unicode name; the first is its plainest name."""
    called = list(_CALLED.get(name, ()))
    if not called:
        called.append(re.sub(r" (symbol|sign)$", "", name))
    plain = called[0]
    for word, other in _SYNONYMS.items():
        changed = re.sub(rf"\b{word}\b", other, plain)
        if changed != plain:
            called.append(changed)
    if match := re.fullmatch(rf"({_COLOURS}) (\w+)", plain):
        called.append(f"{match[2]}, {match[1]}")
    if match := re.fullmatch(r"(.+) and (.+)", plain):
        called.append(f"{match[2]} and {match[1]}")
    elif match := re.fullmatch(r"(\w+) with (.+)", plain):
        called.append(f"{match[2]}, {match[1]}")
    elif match := re.fullmatch(r"(\w+) of (.+)", plain):
        called.append(f"{match[2]} {match[1]}")
    return list(dict.fromkeys(called))


def is_held_out(caption: str) -> bool:
    """One caption in ten is never trained on: the same ones everywhere, chosen by their hash."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def captions(name: str) -> tuple[list[str], list[str]]:
    """All captions of a glyph on white that name no ground: (for training, held out).

    The plain name itself is always trained on.
    """
    every = [frame.format(subject) for subject in subjects(name) for frame in _FRAMES]
    plain = every[0]
    return (
        [c for c in every if c == plain or not is_held_out(c)],
        [c for c in every if c != plain and is_held_out(c)],
    )


def with_ground(caption: str, ground: str, frame: int) -> str:
    """The caption with the colour of the ground in it, in one of three ways."""
    return _GROUND_FRAMES[frame % len(_GROUND_FRAMES)].format(caption, ground=ground)


# How far pictures are moved, so that different noise can become different pictures of one prompt.
SHIFT = 5  # pixels of 64
SHRINK = 0.22
TILT = 12  # degrees
MIRRORED = 0.1  # half and half, a network draws both at once


def may_mirror(name: str) -> bool:
    """Whether the mirrored picture still is what its name says."""
    return _ONE_WAY.search(name) is None


@dataclass(frozen=True)
class Captioned:
    """Glyphs that have captions.

    Attributes:
        names: Unicode names.
        rgba: uint8, shape (glyphs, 4, size, size).
    """

    names: list[str]
    rgba: torch.Tensor

    @classmethod
    def render(cls, size: int, font_path: Path = FONT) -> Captioned:
        """Render them. Raises as rgba_glyphs."""
        names, rgba = rgba_glyphs(size, font_path)
        keep = [i for i, name in enumerate(names) if not _NO_CAPTION.search(name)]
        return cls([names[i] for i in keep], rgba[keep])

    def pictures(self, which: torch.Tensor, ground: torch.Tensor, *, moved: float) -> torch.Tensor:
        """Glyphs on grounds, as the font draws them or moved.

        Args:
            which: glyph numbers, shape (n,).
            ground: numbers into GROUNDS, shape (n,).
            moved: the share of them that is shifted by up to SHIFT pixels, shrunk by up to SHRINK,
                tilted by up to TILT degrees, and with a chance of MIRRORED mirrored where its name
                allows.

        Returns:
            float32 in -1..1, shape (n, 3, size, size).
        """
        rgba = self.rgba[which].float()
        if moved:
            n, size = len(which), rgba.shape[-1]
            chosen = (torch.rand(n) < moved).float()
            scale = 1 + chosen * torch.rand(n) * SHRINK / (1 - SHRINK)
            may = torch.tensor([may_mirror(self.names[i]) for i in which.tolist()])
            mirror = torch.where(may & (torch.rand(n) < chosen * MIRRORED), -1.0, 1.0)
            tilt = chosen * (torch.rand(n) * 2 - 1) * math.radians(TILT)
            theta = torch.zeros(n, 2, 3)
            theta[:, 0, 0], theta[:, 0, 1] = scale * mirror * tilt.cos(), -scale * tilt.sin()
            theta[:, 1, 0], theta[:, 1, 1] = scale * mirror * tilt.sin(), scale * tilt.cos()
            theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (2 * SHIFT / size) * chosen[:, None]
            grid = F.affine_grid(theta, [n, 4, size, size], align_corners=False)
            # The transparent surroundings are white, so edges blend into white, not into black.
            rgba = F.grid_sample(rgba - 255, grid, align_corners=False) + 255
            outside = F.grid_sample(self.rgba[which][:, 3:].float(), grid, align_corners=False)
            rgba = torch.cat([rgba[:, :3], outside], dim=1)
        grounds = torch.tensor(list(GROUNDS.values()))
        return on_ground(rgba, grounds[ground])
