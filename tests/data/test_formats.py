import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_dfml.data import formats, load
from ray_dfml.errors import RejectedError


def rejected(file: str) -> str:
    """The one line with which a parquet file is rejected; it begins with the file."""
    with pytest.raises(RejectedError) as caught:
        formats.read_parquet(Path(file))
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    assert caught.value.exit_code == 3
    return text.removeprefix(f"{file}: ")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    encoding=st.sampled_from(formats.ENCODINGS),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_round_trip(write_parquet, encoding, height, width, channels, labels):
    """What was written comes back: exactly for raw and png, as pillow decodes it for jpeg."""
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), height, width, channels), dtype=np.uint8)
    names = [f"class {label}" for label in labels]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.parquet"
        write_parquet(file, pixels, names, encoding=encoding)
        for _ in range(2):  # the second time from the cache
            raw = formats.read_parquet(file)
            assert raw.images.shape == (len(labels), channels, height, width)
            assert raw.images.dtype == np.uint8
            assert raw.names.tolist() == names
            assert raw.splits is None
            exact = pixels.transpose(0, 3, 1, 2)
            wanted = [_through_jpeg(p) for p in pixels] if encoding == "jpeg" else exact
            np.testing.assert_array_equal(raw.images, wanted)


def _through_jpeg(pixels: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(stream, "jpeg")
    decoded = np.asarray(Image.open(stream))
    return decoded[None] if decoded.ndim == 2 else decoded.transpose(2, 0, 1)


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_grey_images_of_an_rgb_set_become_rgb(tmp_path, write_parquet, noise, encoding):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(stream, encoding)
    blobs = pa.array([stream.getvalue()], pa.binary())
    file = write_parquet(tmp_path / "g.parquet", noise(1, 8, 8, 3), ["a"], encoding=encoding, columns={"image": blobs})
    np.testing.assert_array_equal(load(f"parquet:{file}").images, np.full((1, 3, 8, 8), 77))


def test_source_says_where_the_data_come_from(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "s.parquet", noise(2, 2, 2, 1), ["a", "b"], meta={"citation": "A. Author"})
    source = formats.read_parquet(Path(file)).source
    assert source["path"] == file
    assert source["licence"] == "CC0"
    assert source["citation"] == "A. Author"
    assert source["md5"] == formats.file_md5(Path(file))


def test_the_damaged_file(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "cut.parquet", noise(50, 8, 8, 1), ["a"] * 50)
    whole = Path(file).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"PAR1 and no more", b"\0" * 100):
        Path(file).write_bytes(damaged)
        assert "not a readable parquet file" in rejected(file)
        assert "copy it again" in rejected(file)
    damaged = bytearray(whole)
    damaged[4:2000] = b"\xff" * 1996  # header of the first page
    Path(file).write_bytes(bytes(damaged))
    assert "not a readable parquet file" in rejected(file)


@pytest.mark.parametrize("key", ["height", "width", "channels"])
def test_schema_metadata_that_lack_or_garble_a_number(tmp_path, write_parquet, noise, key):
    file = write_parquet(tmp_path / "m.parquet", noise(1, 2, 2, 1), ["a"], meta={key: None})
    assert rejected(file) == f"schema metadata lack {key}; write height, width, channels and encoding"
    for garbled in ("0", "-3", "28px", ""):
        file = write_parquet(tmp_path / "m.parquet", noise(1, 2, 2, 1), ["a"], meta={key: garbled})
        assert rejected(file) == f"schema metadata {key} is {garbled!r}; write a whole number above 0"


def test_unknown_encoding_and_channels(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "e.parquet", noise(1, 2, 2, 1), ["a"], meta={"encoding": "webp"})
    assert rejected(file) == "unknown encoding 'webp' in the schema metadata; use raw_uint8_hwc, png, jpeg"
    file = write_parquet(tmp_path / "e.parquet", noise(1, 2, 2, 1), ["a"], meta={"encoding": None})
    assert "unknown encoding ''" in rejected(file)
    file = write_parquet(tmp_path / "e.parquet", noise(1, 2, 2, 4), ["a"])
    assert rejected(file) == "4 channels; images must be grey (1) or RGB (3)"


def test_columns_that_are_missing_or_of_another_type(tmp_path, write_parquet, noise):
    def file(columns):
        return write_parquet(tmp_path / "c.parquet", noise(2, 2, 2, 1), ["a", "b"], columns=columns)

    assert rejected(file({"label": None})) == (
        "no column label (found image, label_name); write image, label, label_name and split"
    )
    assert "no column image, label_name (found label)" in rejected(file({"image": None, "label_name": None}))
    assert rejected(file({"label": pa.array(["0", "1"])})) == "column label is string; write it again as integer"
    assert rejected(file({"image": pa.array(["x", "y"])})) == "column image is string; write it again as binary"
    assert rejected(file({"label_name": pa.array(["a", None])})) == (
        "column label_name is empty in row 1; fill it or drop the row"
    )
    assert rejected(file({"split": pa.array(["train", "rest"])})) == "unknown split 'rest'; use train, val and test"


def test_no_rows(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "n.parquet", noise(0, 2, 2, 1), [])
    assert rejected(file) == "no rows; write at least one image"


def test_labels_and_names_that_contradict_each_other(tmp_path, write_parquet, noise):
    def file(labels):
        return write_parquet(
            tmp_path / "l.parquet", noise(3, 2, 2, 1), ["a", "b", "a"], columns={"label": pa.array(labels, pa.int32())}
        )

    assert rejected(file([0, 0, 0])) == "label 0 is both 'a' and 'b'; give each label one name"
    assert rejected(file([0, 1, 2])) == "'a' is label 0 and 2; give each name one label"
    assert formats.read_parquet(Path(file([7, 3, 7]))).names.tolist() == ["a", "b", "a"]


def test_raw_images_of_the_wrong_length(tmp_path, write_parquet, noise):
    blobs = pa.array([b"\1" * 12, b"\1" * 11], pa.binary())
    file = write_parquet(tmp_path / "r.parquet", noise(2, 2, 2, 3), ["a", "b"], columns={"image": blobs})
    assert rejected(file) == (
        "image in row 1 has 11 bytes, 2x2x3 needs 12; write whole images, or correct the schema metadata"
    )


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def test_images_that_cannot_be_decoded(tmp_path, write_parquet, noise):
    good = _png(noise(40, 40, 3))
    crooked = bytearray(good)
    crooked[60:90] = b"\0" * 30
    stream = io.BytesIO()
    Image.fromarray(noise(40, 40, 3)).save(stream, "jpeg")
    for bad in (b"", b"no image", good[:50], good[: len(good) // 2], bytes(crooked), stream.getvalue()[:300]):
        blobs = pa.array([good, bad], pa.binary())
        pixels = noise(2, 40, 40, 3)
        file = write_parquet(tmp_path / "d.parquet", pixels, ["a", "b"], encoding="png", columns={"image": blobs})
        text = rejected(file)
        assert text.startswith("image in row 1: ")
        assert text.endswith("; replace or remove it" if bad else "is an empty file; copy or download it again")
        assert "0x" not in text  # no address of an object


def test_an_image_of_another_size_than_the_metadata_say(tmp_path, write_parquet, noise):
    blobs = pa.array([_png(noise(8, 8, 3)), _png(noise(9, 8, 3))], pa.binary())
    file = write_parquet(
        tmp_path / "z.parquet", noise(2, 8, 8, 3), ["a", "b"], encoding="png", columns={"image": blobs}
    )
    assert rejected(file) == "image in row 1 is 9x8 as it is shown, the schema metadata say 8x8; make them agree"


def test_the_error_of_the_first_bad_row_is_told(tmp_path, write_parquet, noise):
    blobs = [_png(noise(2, 2, 3))] * 600
    for row in (599, 300, 299):
        blobs[row] = b"bad"
    file = write_parquet(
        tmp_path / "f.parquet",
        noise(600, 2, 2, 3),
        ["a"] * 600,
        encoding="png",
        columns={"image": pa.array(blobs, pa.binary())},
    )
    assert rejected(file).startswith("image in row 299: ")
