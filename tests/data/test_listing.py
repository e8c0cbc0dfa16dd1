"""What is found below a folder, what is counted instead of dropped, and hints that point the right way."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_dfml.data import datasets, load
from ray_dfml.data.folders import read_folder
from ray_dfml.errors import RejectedError
from ray_dfml.types import ImageSpec

GREY = ImageSpec(channels=1, height=6, width=6, mean=(0.0,), std=(1.0,))
Writer = Callable[..., Any]


def grey(value: int) -> np.ndarray:
    return np.full((6, 6), value, np.uint8)


def rejected(spec: str) -> str:
    with pytest.raises(RejectedError) as caught:
        load(spec)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_what_is_no_image_is_counted(tmp_path: Path, write_folder: Writer) -> None:
    root = Path(write_folder(tmp_path, {"a": [grey(1), grey(2)], "b": [grey(3)]}))
    for name in ("a/x.heic", "a/y.HEIC", "a/notes.txt", "b/README", "b/Thumbs.db", "b/.hidden", "top.png", "top.csv"):
        (root / name).write_bytes(b"x")
    (root / "b" / "sub").mkdir()
    (root / "b" / "gone.png").symlink_to("/nowhere/gone.png")
    (root / "a" / "more.jfif").write_bytes((root / "a" / "000.png").read_bytes())
    found = load(f"folder:{root}")
    assert len(found.images) == 4
    said = "1 .txt, 1 dangling link, 1 folder, 1 image beside the class folders, 1 no suffix, 2 .heic"
    assert sorted(found.notes[0].partition(": ")[2].split(", ")) == sorted(said.split(", "))
    assert found.notes[0].startswith("passed over, since they are not read as images: ")
    assert read_folder(root / "a", GREY).notes == ["passed over, since they are not read as images: 2 .heic, 1 .txt"]


def test_a_class_of_other_files_says_what_it_holds(tmp_path: Path, write_folder: Writer) -> None:
    root = Path(write_folder(tmp_path, {"a": [grey(1)]}))
    (root / "phone").mkdir()
    (root / "phone" / "1.heic").write_bytes(b"x")
    assert rejected(f"folder:{root}").endswith("; it holds 1 .heic; fill or remove it")
    with pytest.raises(RejectedError, match=r"phone: a class folder without images .* it holds 1 \.heic"):
        read_folder(root, GREY)


def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path, write_folder: Writer) -> None:
    root = write_folder(tmp_path, {"a": [grey(1)], "b": [grey(2)]})
    os.rename(tmp_path / "a" / "000.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    assert load(f"folder:{root}").images[:, 0, 0, 0].tolist() == [1, 2]
    assert read_folder(tmp_path / "a", GREY).names == ["caf\\xe9.png"]
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/caf\xe9.png")).write_bytes(b"broken")
    datasets._load.cache_clear()
    assert rejected(f"folder:{root}").startswith(f"{root}/a/caf\\xe9.png: cannot be decoded")


@pytest.mark.parametrize(("name", "said"), [(b"caf\xe9", "caf\\xe9"), (b"a\nb", "a\\nb"), (b"\xe2\x80\xae", "\\u202e")])
def test_a_class_that_no_pool_could_name_is_refused_by_a_printable_name(
    tmp_path: Path, write_folder: Writer, name: bytes, said: str
) -> None:
    root = write_folder(tmp_path, {"a": [grey(1)], "b": [grey(2)]})
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/" + name)
    assert f"the class name '{said}' is not one line of readable UTF-8 text; rename" in rejected(f"folder:{root}")
    with pytest.raises(RejectedError, match="rename the class"):
        read_folder(root, GREY)


def test_a_class_of_a_table_is_checked_too(
    tmp_path: Path, write_parquet: Writer, noise: Callable[..., np.ndarray]
) -> None:
    file = write_parquet(tmp_path / "t.parquet", noise(2, 2, 2, 1), ["red\u00a0fox", "日本\u3000語"])
    assert load(f"parquet:{file}").class_names == ("red\u00a0fox", "日本\u3000語")
    file = write_parquet(tmp_path / "u.parquet", noise(2, 2, 2, 1), ["a\tb", "c"])
    assert rejected(f"parquet:{file}").startswith(f"{file}: the class name 'a\\tb' is not")


@pytest.mark.parametrize(
    "names", [("Train", "Val", "Test"), ("train", "dev", "TEST"), ("Training", "valid", "testing")]
)
def test_splits_in_any_case_and_by_their_other_names(
    tmp_path: Path, write_folder: Writer, names: tuple[str, ...]
) -> None:
    found = load(f"folder:{write_folder(tmp_path, {f'{name}/{name}1': [grey(9)] for name in names})}")
    assert found.class_splits == {s: (f"{name}1",) for s, name in zip(("train", "val", "test"), names, strict=True)}


def test_the_hint_points_at_the_folder_that_is_meant(tmp_path: Path, write_folder: Writer) -> None:
    write_folder(tmp_path, {"deep/set/a": [grey(1)], "deep/set/b": [grey(2)]})
    assert f"give the one that is meant ({tmp_path}/deep/set)" in rejected(f"folder:{tmp_path}/deep")
    assert rejected(f"folder:{tmp_path}/deep/set/a").startswith(
        f"{tmp_path}/deep/set/a: holds images, but no class folders; give the folder above it"
    )
    assert rejected(f"folder:{tmp_path}").endswith("it holds 1 folder; give the folder right above the class folders")


def test_a_split_without_a_known_name_is_named(tmp_path: Path, write_folder: Writer) -> None:
    root = write_folder(tmp_path, {"train/a": [grey(1)], "train/b": [grey(1)], "holdout/c": [grey(2)]})
    assert rejected(f"folder:{root}") == (
        f"{root}: holds folders of splits (train) beside holdout; name every one train, val or test, or move the other "
        "away"
    )


def test_split_folders_without_class_folders_are_no_classes(tmp_path: Path, write_folder: Writer) -> None:
    root = write_folder(tmp_path, {"train": [grey(1)], "test": [grey(2)]})
    assert rejected(f"folder:{root}").startswith(f"{root}/test: holds images, but no class folders; give")


def test_a_torchvision_root_one_level_off_is_found(tmp_path: Path) -> None:
    (tmp_path / "root" / "MNIST" / "raw").mkdir(parents=True)
    for off in ("root/MNIST", "root/MNIST/raw", "."):
        assert rejected(f"mnist:{tmp_path / off}").endswith(f"begin at another level; give {tmp_path}/root")
