"""The sprites of the embedded benchmark: figures above a bar, as pictures of opacity in an atlas.

Digits and letters are drawn from the fonts that come with matplotlib, shapes from formulas, and
the handwritten digits are scikit-learn's real ones. Real digits and fonts are divided among the
splits here, before any image is drawn.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = [
    "CELL",
    "DIGITS",
    "LETTERS",
    "PRETRAINING_GLYPHS",
    "PRETRAINING_SHAPES",
    "SHAPES",
    "SPRITES",
    "SPRITE_TEXELS",
    "Sprites",
]

CELL = 64  # texels of a sprite's square in its atlas
SPRITE_TEXELS = 52  # of which the sprite with its bar is so high

# --- Shapes -------------------------------------------------------------------------------------

_Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Says where a shape is, given x to the right and y up, both from -1 to 1."""


def _star(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    sector = 2 * np.pi / points
    angle = np.abs((np.arctan2(x, y) + sector / 2) % sector - sector / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip_x, tip_y = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
    return across * (1 - tip_x) <= tip_y * (1 - along)


_FIGURES: dict[str, _Inside] = {
    "disc": lambda x, y: np.hypot(x, y) < 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.77) < 0.23,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1.1,
    "triangle": lambda x, y: abs(x) < (1 - y) / 2,
    "star": lambda x, y: _star(x, y, 5, 0.42),
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) < 0.3,
    "crescent": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y) > 0.75),
    "heart": lambda x, y: (
        (1.15 * x) ** 2 + (1.2 * (y + 0.15) - 0.75 * np.sqrt(abs(1.15 * x))) ** 2 < 0.95
    ),
    "arrow": lambda x, y: np.where(y > 0, abs(x) < 1 - y, abs(x) < 0.28),
    "hourglass": lambda x, y: abs(x) < abs(y) * 0.9 + 0.08,
}
_PRETRAINING_FIGURES: dict[str, _Inside] = {
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "half disc": lambda x, y: np.hypot(x, (y + 1) / 2) < 1,
    "corner": lambda x, y: np.minimum(x, y) < -0.4,
    "chevron": lambda x, y: abs(y + abs(x) - 0.35) < 0.35,
    "four-pointed star": lambda x, y: _star(x, y, 4, 0.35),
    "house": lambda x, y: np.where(y > 0, abs(x) < 1 - y, abs(x) < 0.7),
    "frame": lambda x, y: np.maximum(abs(x), abs(y)) > 0.6,
    "steps": lambda x, y: np.floor(1.5 * (x + 1)) < np.floor(1.5 * (1 - y)) + 0.5,
    "two discs": lambda x, y: np.hypot(abs(x) - 0.5, y) < 0.45,
    "three bars": lambda x, y: abs((1.5 * (y + 1)) % 1 - 0.5) < 0.3,
    "pie": lambda x, y: (np.hypot(x, y) < 1) & ((x < 0) | (y < 0)),
    "bow": lambda x, y: abs(y) < abs(x) * 0.9 + 0.08,
}

# --- Sprites ------------------------------------------------------------------------------------

DIGITS = tuple("0123456789")
LETTERS = tuple("ABFGHKRSTX")
SHAPES = tuple(_FIGURES)
PRETRAINING_GLYPHS = tuple("adehmnrty" + "ΓΔΛΞΠΣΦΨΩαεζηλμξπφψ" + "БДЖИЛЦШЭЮЯ" + "&?!%#@∞√∫")
PRETRAINING_SHAPES = tuple(_PRETRAINING_FIGURES)


class Sprites(NamedTuple):
    """All sprites of one kind, each with what it shows and the split that may draw it."""

    atlas: np.ndarray  # uint8 [sprites, CELL, CELL], opacity
    identity: np.ndarray  # int32 [sprites]
    split: np.ndarray  # int32 [sprites], 0 train, 1 validation, 2 test, -1 all of them


_FONTS = tuple(  # of train, of validation, of test
    tuple(fonts.split())
    for fonts in (
        "DejaVuSans DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Oblique "
        "DejaVuSerif DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBolIta cmr10 cmtt10",
        "DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneralItalic cmb10",
        "DejaVuSansMono-Bold DejaVuSerif-Bold STIXGeneralBol cmss10",
    )
)
_PRETRAINING_FONTS = _FONTS[0][:4] + _FONTS[0][5:7]


def _on_bar(figure: Image.Image) -> np.ndarray:
    """Fits a grey picture above a bar, uint8 `[CELL, CELL]`, blurred against aliasing.

    The bar gives every sprite a foot: a disc can be tilted, and 6 is no 9 upside down.
    """
    width, height, gap, bar = 46, 41, 4, 7
    margin = (CELL - height - gap - bar) // 2
    scale = min(width / figure.width, height / figure.height)
    size = max(4, round(figure.width * scale)), max(4, round(figure.height * scale))
    cell = Image.new("L", (CELL, CELL))
    cell.paste(
        figure.resize(size, Image.Resampling.BICUBIC),
        ((CELL - size[0]) // 2, margin + (height - size[1]) // 2),
    )
    top, left = margin + height + gap, (CELL - width) // 2
    ImageDraw.Draw(cell).rectangle((left, top, left + width - 1, top + bar - 1), fill=255)
    opacity = np.asarray(cell.filter(ImageFilter.GaussianBlur(1.3))).copy()
    opacity[[0, -1]] = opacity[:, [0, -1]] = 0
    return opacity


def _glyph(character: str, font: str) -> Image.Image:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(file), 96)
    left, top, right, bottom = (round(edge) for edge in drawn.getbbox(character))
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), character, fill=255, font=drawn)
    return picture.crop(picture.getbbox())


def _shape(inside: _Inside) -> Image.Image:
    x, y = np.meshgrid(np.linspace(-1, 1, 160), np.linspace(1, -1, 160))
    return Image.fromarray(np.where(inside(x, y), 255, 0).astype(np.uint8))


@functools.cache
def _font_sprites(characters: tuple[str, ...]) -> Sprites:
    rows = [
        (_on_bar(_glyph(character, font)), identity, split)
        for split, fonts in enumerate(_FONTS)
        for font in fonts
        for identity, character in enumerate(characters)
    ]
    return _sprites(rows)


@functools.cache
def _shape_sprites() -> Sprites:
    rows = [
        (_on_bar(_shape(inside)), identity, split)
        for identity, inside in enumerate(_FIGURES.values())
        for split in range(3)
    ]
    return _sprites(rows)


@functools.cache
def _handwritten_sprites() -> Sprites:
    """Scikit-learn's 1,797 digits of 8×8: two thirds for training, a sixth each for the others."""
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    pixels, target = load_digits(return_X_y=True)
    split = np.empty(len(target), np.int32)
    rng = np.random.default_rng(1797)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(target == label))
        split[members] = np.searchsorted(
            [2 / 3, 5 / 6], np.arange(len(members)) / len(members), "right"
        )
    rows = []
    for picture, identity, part in zip(pixels.reshape(-1, 8, 8), target, split, strict=True):
        grey = Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8))
        grey = grey.crop(grey.getbbox()).resize(
            (46 * grey.width // 8, 46), Image.Resampling.BICUBIC
        )
        grey = grey.point([min(255, max(0, round((level - 60) * 2))) for level in range(256)])
        rows.append((_on_bar(grey), int(identity), int(part)))
    return _sprites(rows)


@functools.cache
def _pretraining_sprites() -> Sprites:
    pictures = [
        [_glyph(character, font) for font in _PRETRAINING_FONTS] for character in PRETRAINING_GLYPHS
    ] + [[_shape(inside)] * len(_PRETRAINING_FONTS) for inside in _PRETRAINING_FIGURES.values()]
    return _sprites(
        [(_on_bar(p), identity, -1) for identity, group in enumerate(pictures) for p in group]
    )


def _sprites(rows: list[tuple[np.ndarray, int, int]]) -> Sprites:
    pictures, identity, split = zip(*rows, strict=True)
    return Sprites(np.stack(pictures), np.array(identity, np.int32), np.array(split, np.int32))


SPRITES: dict[str, Callable[[], Sprites]] = {
    "handwritten": _handwritten_sprites,
    "digits": lambda: _font_sprites(DIGITS),
    "letters": lambda: _font_sprites(LETTERS),
    "shapes": _shape_sprites,
    "pretraining": _pretraining_sprites,
}
