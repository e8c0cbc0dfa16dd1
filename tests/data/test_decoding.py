"""One decoder for every way in: files in folders, Parquet, and the folders of `adapt` give the same pixels."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_dfml.data import datasets, images, load
from ray_dfml.data.folders import read_folder
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.types import ImageSpec

SIZE = 12


def ink(where: int, *, mode: str = "RGBA", shade: int = 0) -> Image.Image:
    """A drawing: an opaque stripe of one shade on transparency."""
    pixels = np.full((SIZE, SIZE, 4), shade, np.uint8)
    pixels[..., 3] = 0
    pixels[where : where + 2, :, 3] = 255
    return Image.fromarray(pixels).convert(mode)


def palette() -> Image.Image:
    """A GIF's way: a palette with one transparent entry."""
    image = Image.fromarray(np.array([[0, 1]] * 2, np.uint8).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)).convert("P")
    image.putpalette([255, 0, 0, 10, 20, 30])
    image.info["transparency"] = 0
    return image


def encoded(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation: int, form: str) -> tuple[bytes, np.ndarray]:
    """A picture stored turned, with the EXIF tag that turns it back, and its pixels [h, w, c] as a viewer shows it."""
    upright = np.zeros((8, 12, 3), np.uint8)
    upright[:4, :6] = 255  # the upper left corner is white
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "jpeg" else {}
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options), upright


Ways = Callable[..., list[tuple[np.ndarray, list[str]]]]


@pytest.fixture
def every_way(tmp_path: Path, write_parquet: Callable[..., str], noise: Callable[..., np.ndarray]) -> Ways:
    """every_way([bytes, ...], channels, (h, w)) -> uint8 [n, c, h, w] and notes by folder:, Parquet and `adapt`."""

    def read(blobs: list[bytes], channels: int, size: tuple[int, int], colour: str = "") -> Any:
        at = f"@{colour}" if colour else ""
        folder = tmp_path / "every"
        for number, blob in enumerate(blobs):
            (folder / "one").mkdir(parents=True, exist_ok=True)
            (folder / "one" / f"{number:02d}.png").write_bytes(blob)  # pillow goes by content
        file = write_parquet(
            tmp_path / "every.parquet", noise(len(blobs), *size, channels), ["one"] * len(blobs), encoding="png",
            columns={"image": pa.array(blobs, pa.binary())},
        )  # fmt: skip
        found = [load(f"folder{at}:{folder}"), load(f"parquet{at}:{file}")]
        spec = ImageSpec(
            channels=channels, height=size[0], width=size[1], mean=(0.0,) * channels, std=(1.0,) * channels
        )
        own = read_folder(folder, spec, background=colour or "white")
        return [(one.images, list(one.notes)) for one in found] + [(own.images, own.notes)]

    return read


def same(found: list[tuple[np.ndarray, list[str]]], wanted: np.ndarray, notes: list[str]) -> None:
    for pixels, said in found:
        np.testing.assert_array_equal(pixels, wanted)
        assert said == notes


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_a_drawing_on_transparency_is_put_on_white(every_way: Ways, mode: str, channels: int) -> None:
    found = every_way([encoded(ink(where, mode=mode)) for where in (1, 4, 7)], channels, (SIZE, SIZE))
    wanted = np.full((3, channels, SIZE, SIZE), 255, np.uint8)
    for number, where in enumerate((1, 4, 7)):
        wanted[number, :, where : where + 2] = 0
    same(found, wanted, ["3 of 3 images have transparent parts, which were put on white"])


def test_a_palette_with_a_transparent_colour_is_put_on_white(every_way: Ways) -> None:
    wanted = np.full((1, 3, SIZE, SIZE), 255, np.uint8)
    wanted[:, :, :, SIZE // 2 :] = np.array([10, 20, 30])[None, :, None, None]
    note = "1 of 1 images have transparent parts, which were put on white"
    same(every_way([encoded(palette())], 3, (SIZE, SIZE)), wanted, [note])


def test_the_background_can_be_chosen(every_way: Ways) -> None:
    found = every_way([encoded(ink(3, shade=255))], 3, (SIZE, SIZE), "#204060")
    wanted = np.array([0x20, 0x40, 0x60], np.uint8)[None, :, None, None].repeat(SIZE, 2).repeat(SIZE, 3)
    wanted[:, :, 3:5] = 255
    same(found, wanted, ["1 of 1 images have transparent parts, which were put on #204060"])


def test_a_drawing_that_the_background_would_hide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "white.png").write_bytes(encoded(ink(3, shade=255)))
    with pytest.raises(RejectedError, match=r"white\.png: shows nothing on white, .* choose another background"):
        load(f"folder:{tmp_path}")
    assert load(f"folder@black:{tmp_path}").images.max() == 255


def test_what_is_opaque_is_not_counted(every_way: Ways) -> None:
    opaque = ink(3)
    opaque.putalpha(255)
    same(every_way([encoded(opaque)], 3, (SIZE, SIZE)), np.zeros((1, 3, SIZE, SIZE), np.uint8), [])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_an_image_is_read_as_a_viewer_shows_it(every_way: Ways, orientation: int, form: str) -> None:
    blob, upright = turned(orientation, form)
    for pixels, notes in every_way([blob], 3, (8, 12)):
        assert notes == []
        np.testing.assert_array_equal(pixels[0] > 127, upright.transpose(2, 0, 1) > 127)


def test_photographs_of_one_shown_size_are_of_one_size(tmp_path: Path) -> None:
    """Half of them stored turned: their files have two sizes, their pictures one."""
    (tmp_path / "c").mkdir()
    for number, orientation in enumerate((1, 6, 8, 3)):
        (tmp_path / "c" / f"{number}.jpg").write_bytes(turned(orientation, "jpeg")[0])
    assert load(f"folder:{tmp_path}").shape == (3, 8, 12)


def test_sixteen_bits_become_eight(every_way: Ways) -> None:
    deep = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    wanted = (deep // 257).astype(np.uint8)[None, None]
    note = "1 of 1 images have 16 bits per channel, which were brought to 8 (65535 is white)"
    same(every_way([encoded(Image.fromarray(deep))], 1, (SIZE, SIZE)), wanted, [note])
    assert wanted.max() == 255


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_white_are_refused(tmp_path: Path, kind: type) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "map.tiff").write_bytes(encoded(Image.fromarray(np.ones((4, 4), kind)), "tiff"))
    with pytest.raises(RejectedError, match=r"map\.tiff: cannot be decoded \(32 bits .* convert it to 8 bits"):
        load(f"folder:{tmp_path}")


def test_colour_models_become_rgb(every_way: Ways) -> None:
    red = Image.new("RGB", (SIZE, SIZE), (255, 0, 0))
    for blob in (encoded(red.convert("CMYK"), "tiff"), encoded(red.convert("P")), encoded(red, "bmp")):
        wanted = np.array([255, 0, 0], np.uint8)[None, :, None, None].repeat(SIZE, 2).repeat(SIZE, 3)
        same(every_way([blob], 3, (SIZE, SIZE)), wanted, [])


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_stays_grey(every_way: Ways, mode: str) -> None:
    image = Image.fromarray(np.array([[0, 255]] * 2, np.uint8).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)).convert(mode)
    wanted = np.zeros((1, 1, SIZE, SIZE), np.uint8)
    wanted[..., SIZE // 2 :] = 255
    same(every_way([encoded(image)], 1, (SIZE, SIZE)), wanted, [])


def test_the_first_frame_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    frames = [Image.new("L", (SIZE, SIZE), shade) for shade in (40, 80)]
    frames[0].save(tmp_path / "c" / "film.gif", save_all=True, append_images=frames[1:])
    assert (load(f"folder:{tmp_path}").images == 40).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, not the file itself; run",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page, not the file itself; download it again"),
        (b"", "is an empty file; copy or download it again"),
        (encoded(Image.new("L", (60, 60)))[:60], "cannot be decoded ("),
        (b"nothing known", "cannot be decoded (no format that pillow knows); replace or remove it"),
    ],
)
@pytest.mark.parametrize("way", ["folder", "adapt", "parquet"])
def test_a_file_that_is_no_image_is_named_for_what_it_is(
    tmp_path: Path,
    write_parquet: Callable[..., str],
    noise: Callable[..., np.ndarray],
    content: bytes,
    said: str,
    way: str,
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(content)
    file = write_parquet(
        tmp_path / "x.parquet", noise(1, 60, 60, 1), ["c"], encoding="png",
        columns={"image": pa.array([content], pa.binary())},
    )  # fmt: skip
    grey = ImageSpec(channels=1, height=60, width=60, mean=(0.0,), std=(1.0,))
    read: dict[str, Callable[[], object]] = {
        "folder": lambda: load(f"folder:{tmp_path}"),
        "adapt": lambda: read_folder(tmp_path / "c", grey),
        "parquet": lambda: load(f"parquet:{file}"),
    }
    where = f"{file}: image in row 0: " if way == "parquet" else f"{tmp_path / 'c' / 'x.png'}: "
    with pytest.raises(RejectedError) as caught:
        read[way]()
    assert str(caught.value).startswith(where + said)


def test_notes_are_kept_with_cached_pixels(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(encoded(ink(2)))
    first = load(f"folder:{tmp_path}")
    datasets._load.cache_clear()
    assert load(f"folder:{tmp_path}").notes == first.notes != ()


def test_another_decoder_or_background_does_not_read_old_pixels(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(encoded(ink(2)))

    def files() -> set[str]:
        datasets._load.cache_clear()
        before = {path.name for path in cache_folder.iterdir()}
        load(spec)
        return {path.name for path in cache_folder.iterdir()} - before

    spec = f"folder:{tmp_path}"
    assert len(files()) == 1
    assert len(files()) == 0
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    assert len(files()) == 1
    spec = f"folder@red:{tmp_path}"
    assert len(files()) == 1


@pytest.mark.parametrize("name", ["reed", "#12", ""])
def test_an_unknown_colour_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="unknown colour"):
        load(f"folder@{name}:{tmp_path}")
    with pytest.raises(UsageError, match="glyphs is embedded"):
        load("glyphs@black")
