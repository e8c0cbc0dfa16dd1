"""`glyphs`: a few-shot character set drawn from the fonts that matplotlib ships; nothing is downloaded.

A class is a character: a Latin, Greek or Cyrillic letter, digit or symbol without accents. Its 20 images are its
renderings in the DejaVu, STIX and Computer Modern faces that have it, each with a small random rotation, scale, shear
and shift. Every glyph is centred and scaled to fill its 28x28 frame. Characters that differ in size only (c, C) are
therefore one class, and so are characters that look alike in several faces (Latin A, Greek Alpha, Cyrillic A); the one
with the lowest code point is kept. Train, val and test hold different characters. The bits depend on the versions of
matplotlib, pillow and FreeType only.
"""

import functools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from ray_dfml.data import cache, formats, splits
from ray_dfml.errors import ResourceError

VERSION = 1
"""Version of the images. It must be raised when a change here changes a bit of them."""
SIZE = 28
PER_CLASS = 20
MEAN: tuple[float, ...] = (0.8548,)
STD: tuple[float, ...] = (0.3174,)

_SEED = 20240611
_MIN_FACES = 8
_RANGES = (
    (0x0021, 0x007E),  # Latin, digits, punctuation
    (0x00A1, 0x024F),  # Latin-1, Latin Extended-A and -B
    (0x0250, 0x02AF),  # phonetic letters
    (0x0370, 0x03FF),  # Greek
    (0x0400, 0x052F),  # Cyrillic
    (0x20A0, 0x20BF),  # currency
    (0x2100, 0x214F),  # letter-like symbols
    (0x2190, 0x21FF),  # arrows
    (0x2200, 0x22FF),  # mathematical operators
    (0x25A0, 0x25FF),  # geometric shapes
    (0x2600, 0x26FF),  # chess, weather, zodiac, music
)
_FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
    "DejaVuSans-Bold",
    "STIXGeneralItalic",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Oblique",
    "STIXGeneralBol",
    "DejaVuSansMono-Bold",
    "DejaVuSans-BoldOblique",
    "STIXGeneralBolIta",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono-BoldOblique",
)
_REFERENCE_FACES = _FACES[:4]
# Computer Modern files have their own encodings: only these characters are where ASCII has them
_CM_FACES = ("cmr10", "cmss10", "cmtt10", "cmti10", "cmb10")
_CM_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")

_FONT_PIXELS = 64
_INK_BOX = 20.0
_MAX_SCALE = 0.9  # a full stop stays small: a capital letter has about half of this
_OVERSAMPLE = 3
# turn (radians), shear, zoom, right and down (pixels): least and most
_JITTER = ((-0.14, -0.12, 0.85, -1.5, -1.5), (0.14, 0.12, 1.10, 1.5, 1.5))
_INK_LEVEL = 96
_SAME_INK = 0.08  # squared distance of two blurred glyphs over the squared norm of the lighter
_SAME_SHAPE = 0.02  # share of a glyph's pixels that the other one, a pixel wider, leaves uncovered
_SAME_FACES = 2


def load_arrays() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 [n, 1, 28, 28], labels int64 [n], and sorted class names.

    The images have dark ink (0) on white (255). There are 20 per class, in the order of classes. They are cached across
    processes. Raises ResourceError if a font file is missing.
    """
    kept = _kept_characters()
    names = tuple(class_name(c) for c in kept)
    key = f"glyphs-{VERSION}-{_versions().replace(' ', '-')}"
    images = cache.array(key, (len(kept) * PER_CLASS, 1, SIZE, SIZE), lambda: _draw_all(kept))
    return images, np.repeat(np.arange(len(kept), dtype=np.int64), PER_CLASS), names


def class_name(character: str) -> str:
    """The class name of a character, such as "U+0041 LATIN CAPITAL LETTER A". Names sort by code point."""
    return f"U+{ord(character):04X} {unicodedata.name(character)}"


def class_splits(names: tuple[str, ...]) -> splits.ClassSplits:
    """64/16/20 percent of the characters, drawn with a fixed seed."""
    order = np.random.default_rng(_SEED).permutation(len(names))
    return splits.by_share([names[i] for i in order])


def source(images: np.ndarray, names: tuple[str, ...]) -> Mapping[str, str]:
    """Where the pixels come from, for reports."""
    return {
        "path": "embedded",
        "format": f"glyphs {VERSION} drawn with {_versions()}",
        "pixels_md5": formats.pixels_md5(images, np.array(names, dtype=np.str_)),
        "licence": "drawn with fonts of matplotlib: DejaVu (Bitstream Vera), STIX (OFL 1.1), Computer Modern (BaKoMa)",
    }


def _versions() -> str:
    return (
        f"matplotlib {metadata.version('matplotlib')} pillow {PIL.__version__} freetype {features.version('freetype2')}"
    )


# ----------------------------------------------------------------------------------------------------------- characters


def _font_file(face: str) -> Path:
    import matplotlib  # here, not above: it is slow to import and only this set needs it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise ResourceError(f"{path}: matplotlib's font file is missing; install matplotlib from PyPI, which ships it")
    return path


@functools.cache
def _code_points(face: str) -> frozenset[int]:
    """Code points for which a face has a glyph. Any other would be drawn as an empty box."""
    from matplotlib import ft2font

    return frozenset(ft2font.FT2Font(str(_font_file(face))).get_charmap())


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # basic layout: the other engine is not in every build of pillow and moves pixels
    return ImageFont.truetype(str(_font_file(face)), _FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


def _faces(character: str) -> tuple[str, ...]:
    """Faces that have the character, in the order in which its images use them."""
    unicode_faces = [f for f in _FACES if ord(character) in _code_points(f)]
    return (*unicode_faces, *(_CM_FACES if character in _CM_CHARACTERS else ()))


def _candidates() -> list[str]:
    """The visible, unaccented characters of the ranges that enough faces have, in order of code points."""
    found = []
    for first, last in _RANGES:
        for character in map(chr, range(first, last + 1)):
            visible = unicodedata.category(character)[0] in "LNPS"
            decomposition = unicodedata.decomposition(character)
            accented = bool(decomposition) and not decomposition.startswith("<")
            if visible and not accented and len(_faces(character)) >= _MIN_FACES:
                found.append(character)
    return found


@functools.lru_cache(maxsize=1)
def _kept_characters() -> tuple[str, ...]:
    """Candidates without those that look like an earlier one in several reference faces."""
    candidates = _candidates()
    alike = np.zeros((len(candidates), len(candidates)), dtype=np.int64)
    for face in _REFERENCE_FACES:
        has = [row for row, character in enumerate(candidates) if ord(character) in _code_points(face)]
        alike[np.ix_(has, has)] += _look_alike([_draw(candidates[row], face) for row in has])
    kept: list[int] = []
    for row in range(len(candidates)):
        if not (alike[row, kept] >= _SAME_FACES).any():
            kept.append(row)
    return tuple(candidates[row] for row in kept)


def _look_alike(drawn: Sequence[Image.Image]) -> np.ndarray:
    """Which glyphs look alike, bool [n, n]: their blurred ink nearly agrees, or their shape apart from stroke width.

    All sums are of whole numbers below 2**53 in float64. They are exact in any order, so every machine keeps the same
    classes.
    """
    blurred = _rows(glyph.filter(ImageFilter.BoxBlur(1)) for glyph in drawn)
    energy = (blurred * blurred).sum(axis=1)
    distance = energy[:, None] + energy[None, :] - 2.0 * _products(blurred, blurred)
    same_ink = distance < _SAME_INK * np.minimum(energy[:, None], energy[None, :])
    bold = [glyph.point([0] * _INK_LEVEL + [1] * (256 - _INK_LEVEL)) for glyph in drawn]
    shape, wider = _rows(bold), _rows(glyph.filter(ImageFilter.MaxFilter(3)) for glyph in bold)
    area = shape.sum(axis=1)
    outside = area[:, None] - _products(shape, wider)  # pixels more than a pixel away from the other glyph
    few = outside < _SAME_SHAPE * area[:, None]
    return same_ink | (few & few.T)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner products [n m] of rows [n d] and [m d].

    They are torch's and not NumPy's: the OpenBLAS of NumPy never returns from a product during which another thread
    forks, and Ray forks while glyphs are drawn.
    """
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()


def _rows(drawn: Iterable[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(glyph, dtype=np.float64).ravel() for glyph in drawn])


# --------------------------------------------------------------------------------------------------------------- images


@functools.lru_cache(maxsize=512)
def _ink(character: str, face: str) -> Image.Image:
    """The glyph, white on black, cut to its ink, at the size of `_FONT_PIXELS`."""
    canvas = Image.new("L", (4 * _FONT_PIXELS, 4 * _FONT_PIXELS))
    ImageDraw.Draw(canvas).text((_FONT_PIXELS, 3 * _FONT_PIXELS), character, fill=255, font=_font(face), anchor="ls")
    return canvas.crop(canvas.getbbox())


def _draw(
    character: str,
    face: str,
    *,
    turn: float = 0.0,
    shear: float = 0.0,
    zoom: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> Image.Image:
    """White ink on black, 28x28: the glyph fills the ink box, then is sheared, turned (radians), zoomed and shifted."""
    ink = _ink(character, face)
    scale = _OVERSAMPLE * zoom * min(_INK_BOX / max(ink.size), _MAX_SCALE)
    # forward map: turn @ [[1, shear], [0, 1]] * scale; pillow wants the inverse
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = (cos + shear * sin) / scale, (sin - shear * cos) / scale
    c, d = -sin / scale, cos / scale
    side = SIZE * _OVERSAMPLE
    x, y = (side / 2 + _OVERSAMPLE * s for s in shift)
    into = (a, b, ink.width / 2 - a * x - b * y, c, d, ink.height / 2 - c * x - d * y)
    large = ink.transform((side, side), Image.Transform.AFFINE, into, resample=Image.Resampling.BILINEAR)
    return large.reduce(_OVERSAMPLE)


def _draw_all(characters: Sequence[str]) -> np.ndarray:
    """Draw all images, uint8 [len(characters) * 20, 1, 28, 28]. Each character has a random stream of its own."""
    out = np.empty((len(characters), PER_CLASS, SIZE, SIZE), dtype=np.uint8)
    for row, character in enumerate(characters):
        rng = np.random.default_rng((_SEED, ord(character)))
        faces = _faces(character)
        for index in range(PER_CLASS):
            turn, shear, zoom, right, down = rng.uniform(*_JITTER).tolist()
            face = faces[index % len(faces)]
            drawn = _draw(character, face, turn=turn, shear=shear, zoom=zoom, shift=(right, down))
            out[row, index] = 255 - np.asarray(drawn)
    return out.reshape(-1, 1, SIZE, SIZE)
