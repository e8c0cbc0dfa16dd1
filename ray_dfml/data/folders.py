"""Readers of directories: class folders (with or without train/val/test above them) and torchvision roots."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ray_dfml.data import cache, formats
from ray_dfml.errors import RejectedError, UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".gif", ".webp", ".tif", ".tiff")

TORCHVISION_MARKERS: Mapping[str, str] = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "SVHN": "train_32x32.mat",
}
"""torchvision class -> what its root holds once it is downloaded (Omniglot's is read as class folders)"""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    split: str | None


def read(
    name: str, path: Path, *, channels: int | None, size: tuple[int, int] | None, torchvision: str | None
) -> formats.Raw:
    """The images under a directory: a torchvision root if it holds `torchvision`'s files, else class folders.

    `size` (h, w) resizes; None demands one size. `channels` 1 or 3 converts; None keeps grey only if every image is
    grey. Raises RejectedError.
    """
    marker = TORCHVISION_MARKERS.get(torchvision or "")
    if torchvision is not None and marker is not None and (path / marker).exists():
        return _read_torchvision(path, torchvision, size)
    files = _listing(name, path, marker)
    channels, size, resize = _geometry(files, channels, size)
    digest = hashlib.md5(repr((channels, size)).encode(), usedforsecurity=False)
    for file in files:
        stat = file.path.stat()
        digest.update(f"{file.path.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    shape = (channels, *size)

    def decode(row: int) -> np.ndarray:
        try:
            with Image.open(files[row].path) as image:
                return formats.to_chw(image, channels, size if resize else None)
        except formats.DECODE_ERRORS as error:
            raise _undecodable(files[row].path, error) from None

    images = cache.array(
        f"{digest.hexdigest()}-{channels}x{size[0]}x{size[1]}",
        (len(files), *shape),
        lambda: formats.decode_all(len(files), shape, decode),
    )
    names = np.array([file.name for file in files], dtype=np.str_)
    found = [file.split for file in files]
    splits = None if None in found else np.array(found, dtype=np.str_)
    source = {"path": str(path), "format": "folder", "pixels_md5": formats.pixels_md5(images, names)}
    if resize:
        source["processing"] = f"resized to {size[0]}x{size[1]} (Lanczos) where it was not"
    return formats.Raw(images=images, names=names, splits=splits, source=source)


def _undecodable(path: Path, error: BaseException) -> RejectedError:
    return RejectedError(f"{path}: cannot be decoded ({formats.one_line(error)}); replace or remove it")


def _geometry(
    files: Sequence[_File], channels: int | None, size: tuple[int, int] | None
) -> tuple[int, tuple[int, int], bool]:
    """Channels, (h, w) and whether to resize; reads all headers only where something is not given."""
    if channels is not None and size is not None:
        return channels, size, True
    grey, first = True, None
    for file in files:
        try:
            with Image.open(file.path) as image:
                found, mode = (image.height, image.width), image.mode
        except formats.DECODE_ERRORS as error:
            raise _undecodable(file.path, error) from None
        grey = grey and mode in ("1", "L", "LA")
        first = first or found
        if size is None and found != first:
            raise RejectedError(
                f"mixed sizes: {files[0].path} is {first[0]}x{first[1]} and {file.path} is {found[0]}x{found[1]} "
                "(height x width); resize all images to one size first"
            )
    assert first is not None  # _listing never returns an empty list
    return channels or (1 if grey else 3), size or first, size is not None


# -------------------------------------------------------------------------------------------------------- class folders


def _listing(name: str, path: Path, marker: str | None) -> list[_File]:
    """Every image with its class and, where the directory has them, its split; sorted by split, class, file name."""
    root = _root(name, path)
    if name == "tiny-imagenet" and (root / "val" / "val_annotations.txt").is_file():
        return _tiny_imagenet(root)
    depth = 2 if name == "omniglot" else 1
    below = _folders(root)
    files: list[_File] = []
    # "train" is also a class of CIFAR-100: split folders are meant only where there is nothing else
    if below and all(folder.name in formats.SPLIT_NAMES for folder in below):
        for folder in below:
            files += _class_files(folder, formats.SPLIT_NAMES[folder.name], depth)
    elif below:
        files = _class_files(root, None, depth)
    if not files:
        also = f" or {marker} of torchvision" if marker else ""
        layout = "alphabet/character folders" if depth == 2 else "class folders"
        raise RejectedError(f"{root}: no {layout} with images{also} in it; give the folder above the {layout}")
    return files


def _root(name: str, path: Path) -> Path:
    """Where class or split folders start, in the layouts to which CUB-200-2011 and torchvision's Omniglot unpack."""
    for inner in {"cub": ("CUB_200_2011", "images"), "omniglot": ("omniglot-py",)}.get(name, ()):
        if (path / inner).is_dir():
            path = path / inner
    return path


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _class_files(root: Path, split: str | None, depth: int) -> list[_File]:
    """Images of the class folders under `root`; at depth 2 a class is two folders, "alphabet/character"."""
    classes = _folders(root)
    if depth == 2:
        classes = [inner for outer in classes for inner in _folders(outer)]
    files = []
    for folder in classes:
        inner = folder / "images"  # Tiny-ImageNet keeps the images of a class one level down
        images = _images(inner if inner.is_dir() else folder)
        if not images:
            raise RejectedError(f"{folder}: a class folder without {' '.join(IMAGE_SUFFIXES)}; fill or remove it")
        files += [_File(image, folder.relative_to(root).as_posix(), split) for image in images]
    return files


def _tiny_imagenet(root: Path) -> list[_File]:
    """The layout as published: labels of val in a text file, none for test. Its val is the only labelled test set."""
    annotations = root / "val" / "val_annotations.txt"
    files = _class_files(root / "train", "train", 1) if (root / "train").is_dir() else []
    known = {file.name for file in files}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), start=1):
        image, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        file = root / "val" / "images" / image
        if label not in known or not file.is_file():
            what = f"class {label!r} is not in train" if file.is_file() else f"{file} does not exist"
            raise RejectedError(f"{annotations}: line {number}: {what}; unpack the whole set again")
        files.append(_File(file, label, "test"))
    return files


# ---------------------------------------------------------------------------------------------------------- torchvision


def _read_torchvision(path: Path, kind: str, size: tuple[int, int] | None) -> formats.Raw:
    """Both parts of a set that torchvision has downloaded before; nothing is downloaded here."""
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError:
        raise UsageError(f"{path} needs torchvision, which is missing; install it or give a .parquet") from None
    parts: list[tuple[np.ndarray, list[str]]] = []
    # torchvision unpickles CIFAR's own files, after it has compared their md5 with the published ones
    try:
        for train in (True, False):
            which = {"split": "train" if train else "test"} if kind == "SVHN" else {"train": train}
            parts.append(_arrays(kind, getattr(datasets, kind)(root=str(path), download=False, **which)))
            if len(parts[-1][0]) != len(parts[-1][1]):
                raise ValueError(f"{len(parts[-1][0])} images, {len(parts[-1][1])} labels")
    except Exception as error:  # its parsers report damaged files by whatever fails first, asserts included
        raise RejectedError(
            f"{path}: torchvision cannot read {kind} here ({formats.one_line(error)}); download it again with "
            f"torchvision.datasets.{kind}(root, download=True)"
        ) from None
    images = np.concatenate([images for images, _ in parts])
    names = np.array([name for _, names in parts for name in names], dtype=np.str_)
    if size is not None and images.shape[2:] != size:
        raise RejectedError(
            f"{path}: {kind} images are {images.shape[2]}x{images.shape[3]}, must be {size[0]}x{size[1]}; "
            "download it again"
        )
    splits = np.array(
        [split for split, part in zip(("train", "test"), parts, strict=True) for _ in part[1]], dtype=np.str_
    )
    source = {"path": str(path), "format": f"torchvision {kind}", "pixels_md5": formats.pixels_md5(images, names)}
    return formats.Raw(images=images, names=names, splits=splits, source=source)


def _arrays(kind: str, part: Any) -> tuple[np.ndarray, list[str]]:
    """uint8 [n, c, h, w] and class names of one part; digits are named "0" to "9"."""
    if kind == "SVHN":
        return np.ascontiguousarray(part.data, dtype=np.uint8), [str(int(label)) for label in part.labels]
    pixels = np.asarray(part.data, dtype=np.uint8)
    chw = pixels[:, None] if pixels.ndim == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    labels = [int(label) for label in part.targets]
    return chw, [str(label) if kind == "MNIST" else part.classes[label] for label in labels]
