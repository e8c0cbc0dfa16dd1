import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.data import DATASETS, ImageSet, describe, load, splits
from ray_dfml.errors import RejectedError, UsageError

CIFAR_FS_NAMES = sorted(c for part in splits.CIFAR_FS.values() for c in part)


def made_set(labels, image_splits=None, class_splits=None):
    labels = np.asarray(labels, dtype=np.int64)
    names = tuple(f"c{i}" for i in range(5))
    return ImageSet(
        name="folder",
        images=np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8),
        labels=labels,
        class_names=names,
        class_splits=class_splits,
        image_splits=None if image_splits is None else np.asarray(image_splits, dtype=np.int8),
        mean=(0.0,),
        std=(1.0,),
        source={"path": "made"},
    )


def class_counts(found: ImageSet) -> list[int]:
    assert found.class_splits is not None
    assert list(found.class_splits) == ["train", "val", "test"]
    return [len(part) for part in found.class_splits.values()]


def image_counts(found: ImageSet) -> list[int]:
    assert found.image_splits is not None
    assert found.image_splits.dtype == np.int8
    return np.bincount(found.image_splits, minlength=3).tolist()


# ------------------------------------------------------------------------------------------------------------- subset


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.permutations([0, 0, 1, 1, 2]))
def test_subset_by_class_keeps_images_order_and_names(labels, assigned):
    parts = {
        s: tuple(f"c{i}" for i in range(5) if assigned[i] == number)
        for number, s in enumerate(("train", "val", "test"))
    }
    whole = made_set(labels, class_splits=parts)
    seen = 0
    for split, wanted in parts.items():
        rows = [i for i, label in enumerate(labels) if f"c{label}" in wanted]
        if not rows:
            with pytest.raises(RejectedError, match=f"split {split} is empty"):
                whole.subset(split)
            continue
        part = whole.subset(split)
        seen += len(rows)
        np.testing.assert_array_equal(part.images, whole.images[rows])
        assert [part.class_names[i] for i in part.labels] == [f"c{labels[i]}" for i in rows]
        assert set(part.class_names) == {f"c{labels[i]}" for i in rows}
        assert list(part.class_names) == sorted(part.class_names)
        assert part.labels.dtype == np.int64
        np.testing.assert_array_equal(part.subset(split).images, part.images)
    assert seen == len(labels)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=40))
def test_subset_by_image_partitions_the_images(rows):
    labels, numbers = zip(*rows, strict=True)
    whole = made_set(labels, image_splits=numbers)
    for number, split in enumerate(("train", "val", "test")):
        if number not in numbers:
            with pytest.raises(RejectedError, match=f"split {split} is empty"):
                whole.subset(split)
            continue
        part = whole.subset(split)
        np.testing.assert_array_equal(part.images[:, 0, 0, 0], np.flatnonzero(np.array(numbers) == number))
        assert [part.class_names[i] for i in part.labels] == [f"c{la}" for la, n in rows if n == number]
        assert part.image_splits is not None
        assert (part.image_splits == number).all()


def test_subset_all_is_the_set_and_other_words_are_usage_errors():
    whole = made_set([0, 1], image_splits=[0, 2])
    assert whole.subset("all") is whole
    assert whole.shape == (1, 2, 2)
    with pytest.raises(UsageError, match="unknown split 'dev'; use train, val, test or all"):
        whole.subset("dev")
    with pytest.raises(RejectedError, match=r"split val is empty \(made\); use one of train, test"):
        whole.subset("val")
    with pytest.raises(RejectedError, match="split test is empty"):  # a part does not lead back to the whole
        whole.subset("train").subset("test")


# --------------------------------------------------------------------------------------------------------------- spec


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "omniglott:x",
            "unknown data set 'omniglott' in 'omniglott:x' (did you mean 'omniglot'?); known: glyphs, omniglot,",
        ),
        ("CIFAR-FS:x", "did you mean 'cifar-fs'?"),
        ("quux:x", "unknown data set 'quux' in 'quux:x'; known: glyphs,"),
        ("some/file.parquet", "write NAME:PATH"),
        ("mnist", "'mnist' names no place; write mnist:PATH"),
        ("mnist:", "names no place"),
        ("glyphs:here", "glyphs is embedded and takes no path; write 'glyphs'"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_a_usage_error(spec, said):
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_place_that_is_absent_or_of_the_wrong_kind(tmp_path):
    file = tmp_path / "images.zip"
    file.write_text("x")
    with pytest.raises(RejectedError, match="no such file or folder; give the path of the mnist data"):
        load(f"mnist:{tmp_path / 'absent'}")
    with pytest.raises(UsageError, match=r"images\.zip is not a \.parquet file"):
        load(f"mnist:{file}")
    with pytest.raises(UsageError, match="is a folder; write folder:"):
        load(f"parquet:{tmp_path}")
    with pytest.raises(UsageError, match="is a file; write parquet:"):
        load(f"folder:{file}")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RejectedError, match=f"^{tmp_path}/absent.parquet: no such file"):
        load("mnist:~/absent.parquet")


def test_every_entry_is_whole():
    assert " ".join(DATASETS) == (
        "glyphs omniglot cifar-fs cifar10 cifar100 mnist fashion-mnist svhn "
        "mini-imagenet cub tiny-imagenet parquet folder"
    )
    for name, entry in DATASETS.items():
        assert entry.description
        assert entry.rule in ("class", "image", "as found")
        assert (entry.rule == "as found") == (name in ("parquet", "folder"))
        for numbers in (entry.mean, entry.std):
            assert numbers is None or len(numbers) == entry.channels


# ------------------------------------------------------------------------------------------------------- class splits


def test_cifar_fs_pools_both_parts_and_splits_by_name(tmp_path, write_parquet, noise):
    names = CIFAR_FS_NAMES * 2
    file = write_parquet(
        tmp_path / "c.parquet", noise(200, 32, 32, 3), names, splits=["train"] * 100 + ["test"] * 100, encoding="png"
    )
    found = load(f"cifar-fs:{file}")
    assert found.class_splits == splits.CIFAR_FS
    assert found.image_splits is None
    assert found.mean == (0.5071, 0.4867, 0.4408)
    assert found.std == (0.2675, 0.2565, 0.2761)
    test = found.subset("test")
    assert test.class_names == splits.CIFAR_FS["test"]
    assert np.bincount(test.labels).tolist() == [2] * 20
    assert load(f"cifar-fs:{file}") is found


def test_cifar_fs_rejects_a_missing_class_and_a_contradicting_split(tmp_path, write_parquet, noise):
    pixels = noise(100, 32, 32, 3)
    file = write_parquet(tmp_path / "a.parquet", pixels[1:], CIFAR_FS_NAMES[1:])
    with pytest.raises(RejectedError, match=r"a\.parquet: as cifar-fs it lacks class apple; add the whole set"):
        load(f"cifar-fs:{file}")
    by_class = ["test" if name in ("apple", *splits.CIFAR_FS["test"]) else "train" for name in CIFAR_FS_NAMES]
    file = write_parquet(tmp_path / "b.parquet", pixels, CIFAR_FS_NAMES, splits=by_class)
    with pytest.raises(RejectedError, match="class apple is under test, but not so in the published cifar-fs split"):
        load(f"cifar-fs:{file}")


def test_omniglot_trains_on_background_and_tests_on_evaluation(tmp_path, write_parquet, noise):
    names, source_splits = [], []
    for split, counts in (("background", splits.OMNIGLOT_BACKGROUND), ("evaluation", splits.OMNIGLOT_EVALUATION)):
        for alphabet, count in counts.items():
            names += [f"{alphabet}/character{i + 1:02d}" for i in range(count)]
            source_splits += [split] * count
    pixels = noise(len(names), 28, 28, 1)
    found = load(f"omniglot:{write_parquet(tmp_path / 'o.parquet', pixels, names, splits=source_splits)}")
    assert [len(found.subset(s).class_names) for s in ("train", "val", "test")] == [806, 158, 659]
    assert found.mean == (0.0,)
    assert found.std == (1.0,)
    row = names.index("Greek/character05")
    np.testing.assert_array_equal(found.images[row, 0], pixels[row, :, :, 0])
    assert found.class_names[found.labels[row]] == "Greek/character05"
    assert "ULOG/character01" in found.subset("test").class_names


def test_a_named_set_of_another_size_is_rejected(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "x.parquet", noise(4, 30, 30, 1), list("abcd"))
    with pytest.raises(RejectedError, match=r"x\.parquet: images are 30x30x1, omniglot has 28x28x1; resize them"):
        load(f"omniglot:{file}")


@pytest.mark.parametrize("with_splits", [False, True])
def test_a_source_without_splits_of_its_own_is_split_by_sorted_name(tmp_path, write_parquet, noise, with_splits):
    names = [f"class{i:02d}" for i in range(25)][::-1]
    file = write_parquet(
        tmp_path / "p.parquet", noise(25, 4, 6, 3), names, splits=["train"] * 25 if with_splits else None
    )
    found = load(f"parquet:{file}")
    assert found.class_splits == splits.by_share(sorted(names))
    assert class_counts(found) == [16, 4, 5]
    assert found.shape == (3, 4, 6)
    assert found.mean == (0.0, 0.0, 0.0)
    assert found.std == (1.0, 1.0, 1.0)


def test_disjoint_source_splits_are_splits_by_class(tmp_path, write_parquet, noise):
    given_splits = ["train"] * 4 + ["validation", "test"]
    file = write_parquet(tmp_path / "p.parquet", noise(6, 4, 4, 1), list("fedcba"), splits=given_splits)
    assert load(f"parquet:{file}").class_splits == {"train": ("c", "d", "e", "f"), "val": ("b",), "test": ("a",)}


# ------------------------------------------------------------------------------------------------------- image splits


def test_mnist_splits_by_image_with_the_last_tenth_of_each_class_as_val(tmp_path, write_parquet, noise):
    digits = [str(i % 10) for i in range(300)]
    file = write_parquet(tmp_path / "m.parquet", noise(300, 28, 28, 1), digits, splits=["train"] * 200 + ["test"] * 100)
    found = load(f"mnist:{file}")
    assert found.class_splits is None
    assert found.image_splits is not None
    assert image_counts(found) == [180, 20, 100]
    assert (found.image_splits[180:200] == 1).all()
    assert found.subset("val").class_names == tuple("0123456789")
    facts = describe(f"mnist:{file}")
    assert facts["splits"]["val"] == {"classes": 10, "images": 20}
    assert facts["split_by"] == "image"
    assert facts["licence"] == "CC0"
    assert len(facts["md5"]) == 32


def test_a_val_part_of_the_source_is_kept(tmp_path, write_parquet, noise):
    file = write_parquet(
        tmp_path / "v.parquet", noise(40, 4, 4, 1), ["a", "b"] * 20, splits=["train"] * 34 + ["val", "test"] * 3
    )
    assert image_counts(load(f"parquet:{file}")) == [34, 3, 3]


def test_an_image_split_set_with_a_class_too_few_is_rejected(tmp_path, write_parquet, noise):
    file = write_parquet(tmp_path / "m.parquet", noise(9, 28, 28, 1), list("012345678"))
    with pytest.raises(RejectedError, match=r"m\.parquet: 9 classes, mnist has 10; give the whole set"):
        load(f"mnist:{file}")


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.skipif("RAY_DFML_DATA" not in os.environ, reason="RAY_DFML_DATA names no folder")
@pytest.mark.parametrize(
    ("spec", "images", "classes"),
    [
        ("omniglot:omniglot28.parquet", [16120, 3160, 13180], [806, 158, 659]),
        ("cifar-fs:cifar100.parquet", [38400, 9600, 12000], [64, 16, 20]),
        ("cifar100:cifar100.parquet", [45000, 5000, 10000], [100, 100, 100]),
        ("cifar10:cifar10_jpeg.parquet", [45000, 5000, 10000], [10, 10, 10]),
        ("mnist:mnist.parquet", [54004, 5996, 10000], [10, 10, 10]),
    ],
)
def test_real_sets_have_their_published_counts(spec, images, classes):
    name, _, file = spec.partition(":")
    parts = describe(f"{name}:{Path(os.environ['RAY_DFML_DATA']) / file}")["splits"]
    assert [part["images"] for part in parts.values()] == images
    assert [part["classes"] for part in parts.values()] == classes


def test_the_identity_is_of_the_content_and_not_of_the_place(tmp_path):
    """The same images in a folder and in another have one; one pixel, label, name or split more has another."""
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    one = ImageSet(
        name="folder", images=images, labels=np.array([0, 0, 1, 1, 2, 2]), class_names=("a", "b", "c"),
        class_splits={"train": ("a",), "val": ("b",), "test": ("c",)}, image_splits=None, mean=(0.0,), std=(1.0,),
        source={"path": "here"},
    )  # fmt: skip
    assert re.fullmatch("folder@[0-9a-f]{8}", one.identity)
    same = replace(one, images=images.copy(), source={"path": "there", "md5": "0"}, mean=(0.5,))
    assert same.identity == one.identity
    parts = {"train": ("a",), "test": ("b",), "val": ("c",)}
    numbers = np.array([0, 1, 2, 0, 1, 2], np.int8)
    others = [
        replace(one, images=images ^ (np.arange(6 * 16).reshape(images.shape) == 7).astype(np.uint8)),
        replace(one, images=images.reshape(6, 1, 2, 8)),
        replace(one, labels=np.array([0, 0, 1, 1, 2, 1])),
        replace(one, class_names=("a", "b", "d")),
        replace(one, class_splits=parts),
        replace(one, class_splits=None, image_splits=numbers),
        replace(one, class_splits=None, image_splits=numbers[::-1].copy()),
    ]
    assert len({one.identity, *(other.identity for other in others)}) == 8
