import json
import unicodedata

import numpy as np
import pytest
from matplotlib import ft2font
from PIL import Image, ImageDraw, ImageFont

from ray_dfml.data import describe, formats, glyphs, load


@pytest.fixture(scope="module")
def drawn(cache_folder):
    return load("glyphs")


def test_shapes_ink_and_counts(drawn):
    n = len(drawn.class_names)
    assert n >= 500
    assert drawn.images.shape == (20 * n, 1, 28, 28)
    assert drawn.images.dtype == np.uint8
    assert drawn.labels.dtype == np.int64
    np.testing.assert_array_equal(drawn.labels, np.repeat(np.arange(n), 20))
    # dark ink on a white page, in every image, and none of it touches the frame's corners
    assert (drawn.images.reshape(len(drawn.images), -1).min(axis=1) < 128).all()
    assert (drawn.images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert drawn.images.mean() > 200


def test_names_are_sorted_unicode_names(drawn):
    assert list(drawn.class_names) == sorted(set(drawn.class_names))
    assert "U+0041 LATIN CAPITAL LETTER A" in drawn.class_names
    for name in drawn.class_names:
        code, _, rest = name.partition(" ")
        assert unicodedata.name(chr(int(code[2:], 16))) == rest


def test_look_alikes_are_one_class(drawn):
    codes = {name.split()[0] for name in drawn.class_names}
    assert codes.isdisjoint({"U+0391", "U+0410"})  # Greek Alpha, Cyrillic A: drawn as Latin A
    assert codes.isdisjoint({"U+0063", "U+0441"})  # Latin c and Cyrillic es: C but for the size
    assert {"U+0041", "U+0043", "U+0416", "U+03A9", "U+0034", "U+2192", "U+2660"} <= codes


def test_splits_hold_different_characters_64_16_20(drawn):
    parts = drawn.class_splits
    n = len(drawn.class_names)
    assert sorted(c for part in parts.values() for c in part) == list(drawn.class_names)
    assert all(list(part) == sorted(part) for part in parts.values())
    for part, share in zip(parts.values(), (0.64, 0.16, 0.20), strict=True):
        assert abs(len(part) - share * n) <= 1
    assert parts["train"] != drawn.class_names[: len(parts["train"])]  # shuffled: each split has every script


def test_two_generations_give_the_same_bits(drawn):
    some = tuple(chr(int(name.split()[0][2:], 16)) for name in drawn.class_names[::10])
    again = glyphs._draw_all(some)
    wanted = drawn.images.reshape(-1, 20, 1, 28, 28)[::10].reshape(-1, 1, 28, 28)
    np.testing.assert_array_equal(again, wanted)
    assert drawn.source["pixels_md5"] == formats.pixels_md5(drawn.images, np.array(drawn.class_names))


def test_a_new_process_would_choose_the_same_characters(drawn):
    names = tuple(glyphs.class_name(c) for c in glyphs._kept_characters.__wrapped__())
    assert names == drawn.class_names


def test_no_image_is_the_empty_box_of_a_missing_glyph(drawn):
    for name in drawn.class_names[::25]:
        character = chr(int(name.split()[0][2:], 16))
        for face in glyphs._faces(character):
            font = ImageFont.truetype(str(glyphs._font_file(face)), 40)
            page, box = Image.new("L", (100, 100)), Image.new("L", (100, 100))
            ImageDraw.Draw(page).text((10, 60), character, fill=255, font=font, anchor="ls")
            ImageDraw.Draw(box).text((10, 60), "\U0010fffd", fill=255, font=font, anchor="ls")  # in no font
            assert page.tobytes() != box.tobytes(), (name, face)


@pytest.mark.parametrize("face", glyphs._CM_FACES)
def test_computer_modern_draws_the_character_that_it_is_asked_for(face):
    """Its files have their own encodings: the glyph's own name must be that of the same character in DejaVu Sans."""
    ours, theirs = (ft2font.FT2Font(str(glyphs._font_file(f))) for f in (face, "DejaVuSans"))
    for code in map(ord, glyphs._CM_CHARACTERS):
        names = [font.get_glyph_name(font.get_charmap()[code]) for font in (ours, theirs)]
        assert names[0] == names[1]


def test_mean_and_std_literals_are_those_of_the_train_pixels(drawn):
    pixels = drawn.subset("train").images / 255.0
    assert pixels.mean() == pytest.approx(glyphs.MEAN[0], abs=2e-3)
    assert pixels.std() == pytest.approx(glyphs.STD[0], abs=2e-3)


def test_characters_can_be_told_apart(drawn):
    """Nearest class mean of 10 images, on the other 10, in 5-way tasks: far above chance, far below certainty."""
    test = drawn.subset("test")
    images = test.images.reshape(-1, 20, 28 * 28) / 255.0
    rng, right = np.random.default_rng(0), []
    for _ in range(200):
        task = images[rng.permutation(len(images))[:5]]
        means = task[:, :10].mean(axis=1)
        guess = ((task[:, 10:, None] - means) ** 2).sum(-1).argmin(-1)
        right.append((guess == np.arange(5)[:, None]).mean())
    assert 0.7 < np.mean(right) < 0.999


def test_describe_is_json_ready(drawn):
    found = json.loads(json.dumps(describe("glyphs")))
    assert found["size"] == [1, 28, 28]
    assert found["split_by"] == "class"
    assert found["source"]["path"] == "embedded"
    assert sum(part["images"] for part in found["splits"].values()) == found["images"] == len(drawn.images)
