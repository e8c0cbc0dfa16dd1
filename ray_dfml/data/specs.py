"""Data specs, "glyphs" or "NAME:PATH" or "NAME@COLOUR:PATH": which names there are, and how a spec is parsed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ray_dfml.data import glyphs
from ray_dfml.data.images import colour
from ray_dfml.errors import UsageError, did_you_mean
from ray_dfml.files import Uri, located

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known about a set before any file is opened."""

    description: str
    channels: int | None = None
    """1 or 3; None: as found"""
    size: tuple[int, int] | None = None
    """height, width; folders are resized to it; None: as found"""
    mean: tuple[float, ...] | None = None
    """per channel, for pixels in [0, 1]; None: no normalisation (mean 0, std 1)"""
    std: tuple[float, ...] | None = None
    rule: str = "as found"
    """"class": disjoint classes by `splits`; "image": every class in every split; "as found": the source decides"""
    classes: int | None = None
    torchvision: str | None = None
    """class in torchvision.datasets that can read the set"""


DATASETS: Mapping[str, Entry] = {
    "glyphs": Entry(
        description="characters drawn from the fonts that matplotlib ships; embedded, no PATH",
        channels=1,
        size=(28, 28),
        mean=glyphs.MEAN,
        std=glyphs.STD,
        rule="class",
    ),
    "omniglot": Entry(
        description="handwritten characters of 50 alphabets, 20 images each",
        channels=1,
        size=(28, 28),
        rule="class",
        classes=1623,
        torchvision="Omniglot",
    ),
    "cifar-fs": Entry(
        description="CIFAR-100 with both parts pooled, split by class (64/16/20)",
        channels=3,
        size=(32, 32),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        rule="class",
        classes=100,
        torchvision="CIFAR100",
    ),
    "cifar10": Entry(
        description="photographs of 10 kinds of things",
        channels=3,
        size=(32, 32),
        rule="image",
        classes=10,
        torchvision="CIFAR10",
    ),
    "cifar100": Entry(
        description="photographs of 100 kinds of things",
        channels=3,
        size=(32, 32),
        rule="image",
        classes=100,
        torchvision="CIFAR100",
    ),
    "mnist": Entry(
        description="handwritten digits",
        channels=1,
        size=(28, 28),
        rule="image",
        classes=10,
        torchvision="MNIST",
    ),
    "fashion-mnist": Entry(
        description="articles of clothing",
        channels=1,
        size=(28, 28),
        rule="image",
        classes=10,
        torchvision="FashionMNIST",
    ),
    "svhn": Entry(
        description="digits of house numbers in photographs",
        channels=3,
        size=(32, 32),
        rule="image",
        classes=10,
        torchvision="SVHN",
    ),
    "mini-imagenet": Entry(
        description="100 ImageNet classes, folders named by WordNet id, split by class (64/16/20)",
        channels=3,
        size=(84, 84),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        rule="class",
        classes=100,
    ),
    "cub": Entry(
        description="200 bird species (CUB-200-2011), split by class (100/50/50)",
        channels=3,
        size=(84, 84),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        rule="class",
        classes=200,
    ),
    "tiny-imagenet": Entry(
        description="200 ImageNet classes at 64x64",
        channels=3,
        size=(64, 64),
        rule="image",
        classes=200,
    ),
    "parquet": Entry(description="any .parquet of this package's format; its own splits, else 64/16/20 by class"),
    "folder": Entry(description="any class folders, one image size; its own splits, else 64/16/20 by class"),
}


class Spec(NamedTuple):
    """A spec in its parts."""

    name: str
    background: str
    """The colour that transparent parts of images are put on."""
    path: Path | Uri | None
    """Absolute; None for the embedded set."""


def absolute(spec: str) -> str:
    """The spec with its PATH expanded and made absolute, so that it means the same from every folder.

    PATH may be a URI. A spec that `parse` would refuse stays as it is.
    """
    head, _, path = spec.partition(":")
    known = head.partition("@")[0] in DATASETS and head != "glyphs"
    return f"{head}:{located(path)}" if known and path else spec


def parse(spec: str) -> Spec:
    """The parts of a spec. Raises UsageError, which says how to write it."""
    head, colon, path = spec.partition(":")
    name, at, background = head.partition("@")
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        if "/" in name or name.endswith(".parquet"):
            hint = "; write NAME:PATH"
        raise UsageError(f"unknown data set {name!r} in {spec!r}{hint}; known: {', '.join(DATASETS)}")
    if name == "glyphs":
        if colon or at:
            raise UsageError(f"{spec!r}: glyphs is embedded and takes no path; write 'glyphs'")
        return Spec(name, "white", None)
    if not path:
        raise UsageError(f"{spec!r} names no place; write {name}:PATH (a .parquet file or a folder)")
    if at:
        colour(background)
    return Spec(name, background or "white", located(path))
