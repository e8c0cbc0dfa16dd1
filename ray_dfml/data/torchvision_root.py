"""Reads roots of torchvision data sets that were downloaded before. Nothing is downloaded here."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.data import formats
from ray_dfml.data.images import one_line
from ray_dfml.errors import RejectedError

MARKERS: Mapping[str, str] = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "SVHN": "train_32x32.mat",
}
"""torchvision class -> what its root holds after the download. Omniglot is read as class folders instead."""


def find(kind: str, path: Path) -> bool:
    """Whether `path` is the torchvision root of a class. Raises RejectedError if the root is one level off."""
    if kind not in MARKERS:
        return False
    if (path / MARKERS[kind]).exists():
        return True
    inside = [parent for parent in list(path.parents)[:2] if (parent / MARKERS[kind]).is_relative_to(path)]
    for root in (*inside, *(child for child in path.iterdir() if child.is_dir())):
        if (root / MARKERS[kind]).exists():
            raise RejectedError(f"{path}: the files of torchvision begin at another level; give {root}")
    return False


def read(path: Path, kind: str, size: tuple[int, int] | None) -> formats.Raw:
    """Both parts, train and test, of a set that torchvision has downloaded before."""
    datasets = importlib.import_module("torchvision.datasets")  # slow to import, and seldom needed
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
            f"{path}: torchvision cannot read {kind} here ({one_line(error)}); download it again with "
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
