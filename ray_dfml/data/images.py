"""The only decoder of images, from files and from bytes. It gives what a viewer shows, as uint8 grey or RGB.

An image is turned as its EXIF orientation says. Transparent parts are put on a colour, white by default. 16 bits per
channel become 8, where 65535 is white. Palettes, CMYK and other colour models become RGB, without their colour
profiles. If there are several frames, the first one is taken.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ray_dfml.data import cache, mistaken
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import shown
from ray_dfml.types import size_text

VERSION = 2
"""Version of the pixels that this module makes, and part of the key of every cached array. Raise it if they change."""

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Suffixes of files that are read as images, in any case."""

TRANSPARENT, DEEP = 1, 2
"""The terms of `Decoded.kind`: the image was put on a background; it was brought from 16 bits per channel to 8."""

_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""The errors that pillow raises for damaged images."""
_ORIENTATION = 0x0112
_SIDEWAYS = range(5, 9)
_THREADS = 4
_SMALL = 64 * 64  # pixels; below it decoding is mostly Python, and more than one thread is slower than one


class Decoded(NamedTuple):
    """The pixels of an image, uint8 [c, h, w], and what was done to get them."""

    pixels: np.ndarray
    kind: int


class Look(NamedTuple):
    """What a header says: the size as shown, and whether the image is grey."""

    height: int
    width: int
    grey: bool


def colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, which is a CSS name or `#rrggbb`. Raises UsageError for another text."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        raise UsageError(f"unknown colour {name!r}; write a CSS name such as white or black, or #rrggbb") from None
    return red, green, blue


def decode(
    source: Path | bytes, what: str, *, channels: int, size: tuple[int, int] | None, background: str = "white"
) -> Decoded:
    """Decode the image in a file or in bytes: grey (`channels` 1) or RGB (3), resized to `size` (h, w) if given.

    Raises RejectedError, which begins with `what`, for what cannot be decoded, for pixels of 32 bits, whose white is
    unknown, and for a drawing that the background would hide.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return _pixels(ImageOps.exif_transpose(opened), channels, size, background)
    except _Hidden:
        raise RejectedError(
            f"{what}: shows nothing on {background}, the colour of its drawing; choose another background"
        ) from None
    except _ERRORS as error:
        raise _undecodable(source, what, error) from None


def look(file: Path) -> Look:
    """What the header of a file says. Raises RejectedError for a file that is no image."""
    try:
        with Image.open(file) as image:
            # a PNG may hold its orientation behind its pixels, where `decode` meets it
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in _SIDEWAYS
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            return Look(height, width, _is_grey(image))
    except _ERRORS as error:
        raise _undecodable(file, shown(file), error) from None


def _undecodable(source: Path | bytes, what: str, error: Exception) -> RejectedError:
    if said := mistaken.what_it_is(source):
        return RejectedError(f"{what}: {said}")
    reason = "no format that pillow knows" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
    return RejectedError(f"{what}: cannot be decoded ({reason}); replace or remove it")


class _Hidden(Exception):
    """A drawing in the colour of its background."""


def _pixels(image: Image.Image, channels: int, size: tuple[int, int] | None, background: str) -> Decoded:
    kind = 0
    if _is_deep(image):
        image, kind = Image.fromarray((np.asarray(image) // 257).astype(np.uint8)), DEEP
    elif image.mode.startswith(("I", "F")):
        raise ValueError("32 bits per pixel have no known white; convert it to 8 bits per channel")
    if _may_be_transparent(image):
        image, transparent = _composited(image, background)
        kind += TRANSPARENT if transparent else 0
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return Decoded(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), kind)


def _is_deep(image: Image.Image) -> bool:
    """Whether a grey image has 16 bits. Of colour images with 16 bits, pillow itself keeps the upper 8."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La") or _is_deep(image)


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _composited(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """The image on the background, and whether any of it was transparent. Raises _Hidden."""
    if image.mode in ("La", "RGBa"):  # colours already multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if least == 255:
        return image, False
    ground = Image.new("RGBA", image.size, (*colour(background), 255))
    ground.alpha_composite(image)
    if most != least and bool((np.asarray(ground) == ground.getpixel((0, 0))).all()):
        raise _Hidden
    return ground, True


# ---------------------------------------------------------------------------------------------------------------- many


def decode_all(
    key: str, count: int, shape: tuple[int, int, int], decode_one: Callable[[int], Decoded]
) -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 [count, *shape] that `decode_one(0..count-1)` decodes, and the kind of each.

    They come from the cache if they are there. `key` names the source; the version of the decoder is added to it. A few
    threads work, and the error that is raised is that of the lowest number.
    """
    size = shape[0] * shape[1] * shape[2]

    def parts(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return both[: count * size].reshape(count, *shape), both[count * size :]

    def build() -> np.ndarray:
        both = np.empty(count * (size + 1), np.uint8)
        _fill(*parts(both), decode_one)
        return both

    # one file holds both, so that the kinds are kept as long as the images
    return parts(cache.array(f"{key}-{size_text(shape)}-v{VERSION}", (count * (size + 1),), build))


def _fill(images: np.ndarray, kinds: np.ndarray, decode_one: Callable[[int], Decoded]) -> None:
    count, _, height, width = images.shape

    def fill(rows: range) -> None:
        for row in rows:
            images[row], kinds[row] = decode_one(row)

    with ThreadPoolExecutor(1 if height * width < _SMALL else _THREADS) as pool:
        pending = [pool.submit(fill, range(i, min(i + 256, count))) for i in range(0, count, 256)]
        try:
            for done in pending:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a damaged image, do not decode the rest first


def notes(kinds: Sequence[int] | np.ndarray, background: str) -> list[str]:
    """One line for each kind of change, with the number of images that it was made to."""
    kinds = np.asarray(kinds, np.uint8)
    transparent, deep = (int((kinds & kind > 0).sum()) for kind in (TRANSPARENT, DEEP))
    said = []
    if transparent:
        said.append(f"{transparent} of {len(kinds)} images have transparent parts, which were put on {background}")
    if deep:
        said.append(f"{deep} of {len(kinds)} images have 16 bits per channel, which were brought to 8 (65535 is white)")
    return said


def one_line(error: BaseException) -> str:
    """First line of an error of a library, short enough for a one-line message, without addresses of objects."""
    text = " ".join(str(error).split()).split(" <_io.")[0]
    return text[:117] + "..." if len(text) > 120 else text or type(error).__name__
