import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_dfml.data import ImageSet, datasets, describe, load, splits
from ray_dfml.errors import RejectedError


def grey(value, h=6, w=6):
    return np.full((h, w), value, np.uint8)


def colour(value, h=6, w=6):
    return np.full((h, w, 3), value, np.uint8)


def rejected(spec: str) -> str:
    with pytest.raises(RejectedError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def class_counts(found: ImageSet) -> list[int]:
    assert found.class_splits is not None
    assert list(found.class_splits) == ["train", "val", "test"]
    return [len(part) for part in found.class_splits.values()]


def image_counts(found: ImageSet) -> list[int]:
    assert found.image_splits is not None
    assert found.image_splits.dtype == np.int8
    return np.bincount(found.image_splits, minlength=3).tolist()


# ------------------------------------------------------------------------------------------------------ class folders


def test_class_folders_directly(tmp_path, write_folder):
    root = write_folder(tmp_path, {f"k{i}": [grey(10 * i), grey(10 * i + 1)] for i in range(10)})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "k0" / "notes.txt").write_text("not an image")
    found = load(f"folder:{root}")
    assert found.shape == (1, 6, 6)
    assert found.class_names == tuple(f"k{i}" for i in range(10))
    assert found.images[:, 0, 0, 0].tolist() == [10 * i + j for i in range(10) for j in (0, 1)]
    assert found.class_splits == splits.by_share(found.class_names)
    assert class_counts(found) == [6, 2, 2]
    assert describe(f"folder:{root}")["md5"] == found.source["pixels_md5"]


def test_one_colour_image_makes_the_set_rgb(tmp_path, write_folder):
    root = write_folder(tmp_path, {"a": [grey(5)], "b": [colour((1, 2, 3))]})
    found = load(f"folder:{root}")
    assert found.images[:, :, 0, 0].tolist() == [[5, 5, 5], [1, 2, 3]]


def test_split_folders_with_disjoint_classes_split_by_class(tmp_path, write_folder):
    root = write_folder(tmp_path, {"train/a": [grey(1)], "train/b": [grey(2)], "val/c": [grey(3)], "test/d": [grey(4)]})
    found = load(f"folder:{root}")
    assert found.class_splits == {"train": ("a", "b"), "val": ("c",), "test": ("d",)}
    assert found.image_splits is None
    assert found.subset("test").images.max() == 4


def test_split_folders_that_share_classes_split_by_image(tmp_path, write_folder):
    tree = {f"train/{c}": [grey(i) for i in range(20)] for c in "ab"} | {f"test/{c}": [grey(99)] for c in "ab"}
    found = load(f"folder:{write_folder(tmp_path, tree)}")
    assert found.class_splits is None
    assert found.subset("val").images[:, 0, 0, 0].tolist() == [18, 19, 18, 19]
    assert found.subset("test").images.min() == 99


def test_a_class_may_be_called_train(tmp_path, write_folder):
    found = load(f"folder:{write_folder(tmp_path, {'train': [grey(1)], 'tram': [grey(2)]})}")
    assert found.class_names == ("train", "tram")


def test_mixed_sizes_name_two_files_and_a_way_out(tmp_path, write_folder):
    root = write_folder(tmp_path, {"a": [grey(1), grey(2)], "b": [grey(3, 6, 7)]})
    assert rejected(f"folder:{root}") == (
        f"mixed sizes: {root}/a/000.png is 6x6 and {root}/b/000.png is 6x7 (height x width); "
        "resize all images to one size first"
    )


def test_nothing_to_read(tmp_path, write_folder):
    assert rejected(f"folder:{tmp_path}").startswith(f"{tmp_path}: no class folders with images in it;")
    text = rejected(f"mnist:{tmp_path}")
    assert "no class folders with images or MNIST/raw of torchvision in it" in text
    assert "alphabet/character folders" in rejected(f"omniglot:{tmp_path}")
    write_folder(tmp_path, {"a": [grey(1)]})
    (tmp_path / "empty").mkdir()
    assert rejected(f"folder:{tmp_path}").startswith(f"{tmp_path}/empty: a class folder without images (.png .jpg")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, write_folder):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    root = write_folder(tmp_path, {"a": [noise], "b": [noise]})
    bad = Path(root) / "b" / "000.png"
    bad.write_bytes(bad.read_bytes()[:2000])  # the header is whole, the pixels are not
    assert rejected(f"folder:{root}").startswith(f"{bad}: cannot be decoded (")
    bad.write_bytes(b"no image")
    assert rejected(f"folder:{root}").startswith(f"{bad}: cannot be decoded (")


def test_a_changed_file_is_read_again(tmp_path, write_folder):
    root = write_folder(tmp_path, {"a": [grey(1)], "b": [grey(2)]})
    assert load(f"folder:{root}").images.max() == 2
    datasets._load.cache_clear()
    write_folder(tmp_path, {"b": [grey(200)]})
    assert load(f"folder:{root}").images.max() == 200


# --------------------------------------------------------------------------------------------------- sets with a name


def test_mini_imagenet_is_resized_and_split_by_wordnet_id(tmp_path, write_folder):
    names = [name for part in splits.MINI_IMAGENET.values() for name in part]
    tree = {name: [colour(i % 256, 20, 30 + i % 3)] for i, name in enumerate(names)}
    found = load(f"mini-imagenet:{write_folder(tmp_path, tree)}")
    assert found.shape == (3, 84, 84)
    assert found.class_splits == splits.MINI_IMAGENET
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.std == (0.229, 0.224, 0.225)
    assert found.source["processing"].startswith("resized to 84x84")
    row = found.class_names.index(names[70])
    assert (found.images[found.labels == row] == 70).all()


def test_cub_accepts_the_folder_it_unpacks_to(tmp_path, write_folder):
    names = [f"{i + 1:03d}.Bird" for i in range(200)]
    write_folder(tmp_path / "CUB_200_2011" / "images", {name: [colour(i)] for i, name in enumerate(names)})
    (tmp_path / "CUB_200_2011" / "attributes").mkdir()
    found = load(f"cub:{tmp_path}")
    assert found.shape == (3, 84, 84)
    assert class_counts(found) == [100, 50, 50]
    assert found.subset("test").class_names[:2] == ("004.Bird", "008.Bird")


def test_omniglot_folders_in_the_layout_of_torchvision(tmp_path, write_folder):
    tree = {}
    for part, counts in (("background", splits.OMNIGLOT_BACKGROUND), ("evaluation", splits.OMNIGLOT_EVALUATION)):
        for alphabet, count in counts.items():
            for i in range(1, count + 1):
                tree[f"images_{part}/{alphabet}/character{i:02d}"] = [grey(255, 35, 35)]
    write_folder(tmp_path / "omniglot-py", tree)
    found = load(f"omniglot:{tmp_path}")
    assert found.shape == (1, 28, 28)
    assert len(found.class_names) == 1623
    assert class_counts(found) == [806, 158, 659]
    assert (found.images == 255).all()


def test_tiny_imagenet_as_published(tmp_path, write_folder):
    names = [f"n{i:08d}" for i in range(200)]
    write_folder(tmp_path, {f"train/{name}/images": [colour(i)] * 10 for i, name in enumerate(names)})
    write_folder(tmp_path, {"val/images": [colour(7), colour(9)], "test/images": [colour(0)]})
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("000.png\tn00000007\t0\t0\t62\t62\n001.png\tn00000009\t0\t0\t62\t62\n")
    found = load(f"tiny-imagenet:{tmp_path}")
    assert found.shape == (3, 64, 64)
    assert image_counts(found) == [1800, 200, 2]
    test = found.subset("test")
    assert test.class_names == ("n00000007", "n00000009")
    assert test.images[:, 0, 0, 0].tolist() == [7, 9]
    annotations.write_text("000.png\tn9\n")
    datasets._load.cache_clear()
    assert "line 1: class 'n9' is not in train" in rejected(f"tiny-imagenet:{tmp_path}")


# -------------------------------------------------------------------------------------------------------- torchvision


def write_idx(root: Path, kind: str, count: int) -> None:
    """MNIST's four files, `count` images each; the label of image i is i % 10, its pixels are i."""
    (root / kind / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        stem = root / kind / "raw" / part
        Path(f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        Path(f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


@pytest.mark.parametrize(
    ("name", "kind", "third"), [("mnist", "MNIST", "3"), ("fashion-mnist", "FashionMNIST", "Dress")]
)
def test_a_torchvision_root_of_idx_files(tmp_path, name, kind, third):
    write_idx(tmp_path, kind, 100)
    found = load(f"{name}:{tmp_path}")
    assert found.shape == (1, 28, 28)
    assert len(found.class_names) == 10
    assert image_counts(found) == [90, 10, 100]
    assert found.class_names[found.labels[3]] == third
    assert (found.images[103] == 3).all()
    assert found.source["format"] == f"torchvision {kind}"


def test_a_torchvision_root_that_is_not_whole(tmp_path):
    write_idx(tmp_path, "MNIST", 100)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    text = rejected(f"mnist:{tmp_path}")
    assert text.startswith(f"{tmp_path}: torchvision cannot read MNIST here (")
    assert "download=True" in text
    file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    for damage in (b"\0\0", struct.pack(">2i", 2049, 99) + bytes(99)):
        file.write_bytes(damage)
        assert "torchvision cannot read MNIST here" in rejected(f"mnist:{tmp_path}")
    assert "(100 images, 99 labels)" in rejected(f"mnist:{tmp_path}")


def test_a_torchvision_root_of_cifar_100_serves_cifar_fs_and_cifar100(tmp_path, monkeypatch):
    names = sorted(c for part in splits.CIFAR_FS.values() for c in part)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part in ("train", "test"):
        data = np.repeat(np.arange(100, dtype=np.uint8), 3072).reshape(100, 3072)
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": list(range(100))}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    assert "torchvision cannot read CIFAR100 here" in rejected(f"cifar100:{tmp_path}")  # md5 of made files differ
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = load(f"cifar-fs:{tmp_path}")
    assert found.class_splits == splits.CIFAR_FS
    assert found.images.shape == (200, 3, 32, 32)
    assert (found.images[142] == 42).all()
    assert found.class_names[found.labels[142]] == names[42]
    assert image_counts(load(f"cifar100:{tmp_path}")) == [100, 0, 100]


def test_a_torchvision_root_of_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    for part in ("train", "test"):
        pixels = np.zeros((32, 32, 3, 20), np.uint8)
        pixels[..., :] = np.arange(20)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": (np.arange(20) % 10 + 1)[:, None]})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    found = load(f"svhn:{tmp_path}")
    assert found.images.shape == (40, 3, 32, 32)
    assert found.class_names == tuple("0123456789")
    assert found.class_names[found.labels[9]] == "0"
    assert (found.images[9] == 9).all()


def test_class_folders_serve_sets_that_torchvision_knows_too(tmp_path):
    for digit in range(10):
        (tmp_path / "train" / str(digit)).mkdir(parents=True)
        Image.fromarray(colour(digit, 32, 32)).save(tmp_path / "train" / str(digit) / "x.png")
    found = load(f"mnist:{tmp_path}")
    assert found.shape == (1, 28, 28)
    assert found.images[:, 0, 5, 5].tolist() == list(range(10))
