"""Image sets by name, such as `load("glyphs")` and `load("omniglot:PATH")`. Every source becomes an `ImageSet`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import object_store
from ray_dfml.data import cache, folders, formats, glyphs, specs, splits, torchvision_root
from ray_dfml.data.identity import identity
from ray_dfml.data.images import one_line
from ray_dfml.data.specs import DATASETS, Entry
from ray_dfml.errors import DfmlError, RejectedError, ResourceError, UsageError
from ray_dfml.files import Uri


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Labelled images of one size, with their splits by class or by image.

    All callers that load the same spec share the arrays, so copy them before you write to them. Objects are compared
    and hashed as objects, not by content.
    """

    name: str
    """the NAME of the spec, such as omniglot"""
    images: np.ndarray
    """uint8 [n, c, h, w], 0..255"""
    labels: np.ndarray
    """int64 [n], index into class_names"""
    class_names: tuple[str, ...]
    """sorted, unique"""
    class_splits: Mapping[str, tuple[str, ...]] | None
    """"train", "val", "test" -> sorted class names, disjoint; None where every split has all classes"""
    image_splits: np.ndarray | None
    """int8 [n], 0 = train, 1 = val, 2 = test, for sets split by image; else None"""
    mean: tuple[float, ...]
    """per channel, for pixels in [0, 1]; 0 where the set is not normalised"""
    std: tuple[float, ...]
    """per channel, for pixels in [0, 1]; 1 where the set is not normalised"""
    source: Mapping[str, str]
    """path, format, md5 (of a file) or pixels_md5, licence, ..."""
    notes: tuple[str, ...] = ()
    """what a reader must know of how it was read, one line each"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def identity(self) -> str:
        """NAME@HASH, by which scores and reports name the set (`ray_dfml.data.identity`)."""
        return identity(
            self.name, self.images, self.labels, self.class_names, self.class_splits, self.image_splits
        )  # fmt: skip

    def subset(self, split: str) -> "ImageSet":
        """The images of the split "train", "val" or "test" in their order, with only their classes.

        Labels are numbered anew. "all" gives the set itself. A part knows its own split only, so the others are empty
        in it. Raises UsageError for an unknown split, and RejectedError for an empty one.
        """
        if split == "all":
            return self
        rows = self._rows(split)
        if not len(rows):
            raise RejectedError(
                f"{self.name}: split {split} is empty ({self.source.get('path', 'embedded')}); "
                f"use one of {', '.join(s for s in splits.SPLITS if len(self._rows(s))) or 'all'}, or add images to it"
            )
        present = np.unique(self.labels[rows])
        names = tuple(self.class_names[i] for i in present)
        return replace(
            self,
            images=self.images[rows],
            labels=np.searchsorted(present, self.labels[rows]).astype(np.int64),
            class_names=names,
            class_splits=None if self.class_splits is None else {s: names if s == split else () for s in splits.SPLITS},
            image_splits=None if self.image_splits is None else self.image_splits[rows],
        )

    def _rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, ascending."""
        if split not in splits.SPLITS:
            raise UsageError(f"{self.name}: unknown split {split!r}; use train, val, test or all")
        if self.image_splits is not None:
            return np.flatnonzero(self.image_splits == splits.SPLITS.index(split))
        wanted = set((self.class_splits or {}).get(split, ()))
        return np.flatnonzero(np.array([name in wanted for name in self.class_names], dtype=bool)[self.labels])


def load(spec: str) -> ImageSet:
    """The image set of a spec: "glyphs", "NAME:PATH" or "NAME@COLOUR:PATH" with NAME of `DATASETS`.

    Transparent parts of images are put on COLOUR, a CSS name or #rrggbb, which is white by default. PATH is a .parquet
    file, a torchvision root or a folder of class folders; it may be the URI of an object store, from which a copy is
    kept in the cache. All callers in this process share the result, and a file that
    changes later is not read again. Raises UsageError for a spec that names nothing, and RejectedError for data that
    cannot be used.
    """
    return _load(specs.absolute(spec))


@lru_cache(maxsize=8)
def _load(spec: str) -> ImageSet:
    """The set of an absolute spec, which is kept. A relative spec could mean another folder the next time."""
    name, background, path = specs.parse(spec)
    entry = DATASETS[name]
    if path is None:
        return glyphs_set()
    raw = _read(name, entry, path, background)
    class_names, labels = np.unique(raw.names, return_inverse=True)
    names = tuple(class_names.tolist())
    if entry.classes is not None and entry.rule == "image" and len(names) != entry.classes:
        raise RejectedError(
            f"{path}: {len(names)} classes, {name} has {entry.classes}; "
            "give the whole set, or load it as folder:PATH or parquet:PATH"
        )
    labels = labels.astype(np.int64)
    class_splits, image_splits = _splits(name, entry, path, names, labels, raw.splits)
    channels = raw.images.shape[1]
    return ImageSet(
        name=name,
        images=raw.images,
        labels=labels,
        class_names=names,
        class_splits=class_splits,
        image_splits=image_splits,
        mean=entry.mean or (0.0,) * channels,
        std=entry.std or (1.0,) * channels,
        source=raw.source,
        notes=raw.notes,
    )


def glyphs_set() -> ImageSet:
    """The embedded set of characters, uint8 [n, 1, 28, 28], dark ink (0) on white (255)."""
    images, labels, names = glyphs.load_arrays()
    return ImageSet(
        name="glyphs",
        images=images,
        labels=labels,
        class_names=names,
        class_splits=glyphs.class_splits(names),
        image_splits=None,
        mean=glyphs.MEAN,
        std=glyphs.STD,
        source=glyphs.source(images, names),
    )


def describe(spec: str) -> dict[str, Any]:
    """What a spec stands for, as values for JSON: classes and images per split, size, md5, licence, source.

    `size` is [channels, height, width]. `md5` is that of the file, or of the decoded pixels if there are many files.
    Raises what `load` raises.
    """
    found = load(spec)
    parts = {}
    for split in splits.SPLITS:
        rows = found._rows(split)
        parts[split] = {"classes": len(np.unique(found.labels[rows])), "images": len(rows)}
    return {
        "spec": spec,
        "name": found.name,
        "identity": found.identity,
        "description": DATASETS[found.name].description,
        "classes": len(found.class_names),
        "images": len(found.images),
        "size": list(found.shape),
        "split_by": "image" if found.image_splits is not None else "class",
        "splits": parts,
        "mean": list(found.mean),
        "std": list(found.std),
        "md5": found.source.get("md5") or found.source.get("pixels_md5"),
        "licence": found.source.get("licence", "not stated"),
        "source": dict(found.source),
        "notes": list(found.notes),
    }


def _read(name: str, entry: Entry, path: Path | Uri, background: str) -> formats.Raw:
    """Read the images of a place; what is in an object store is copied to the cache first."""
    if isinstance(path, Path):
        return _read_here(name, entry, path, background)
    try:
        copy = object_store.fetch(path, cache.folder() / "fetched")
    except FileNotFoundError:
        raise RejectedError(f"{path}: no such file or folder; give the URI of the {name} data") from None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be copied to {cache.folder()}: {error.strerror}") from None
    try:
        raw = _read_here(name, entry, copy, background)
    except DfmlError as error:
        raise type(error)(str(error).replace(str(copy), path)) from None
    return replace(raw, source={**raw.source, "path": str(path)})


def _read_here(name: str, entry: Entry, path: Path, background: str) -> formats.Raw:
    """Read the images behind a path with the reader that fits it. Their size must be the one that the set has."""
    try:
        exists, is_folder = path.exists(), path.is_dir()
        if is_folder and name != "parquet":
            kind = entry.torchvision
            if kind is not None and torchvision_root.find(kind, path):
                return torchvision_root.read(path, kind, entry.size)
            return folders.read(
                name, path, channels=entry.channels, size=entry.size, background=background,
                marker=torchvision_root.MARKERS.get(kind or ""),
            )  # fmt: skip
    except OSError as error:
        raise RejectedError(f"{path}: cannot be read ({one_line(error)}); check its permissions") from None
    if not exists:
        raise RejectedError(f"{path}: no such file or folder; give the path of the {name} data")
    if is_folder:
        raise UsageError(f"parquet:{path} is a folder; write folder:{path}, or name a .parquet file")
    if name == "folder":
        raise UsageError(f"folder:{path} is a file; write parquet:{path}, or name a folder")
    if path.suffix.lower() != ".parquet":
        raise UsageError(f"{name}:{path} is not a .parquet file; give a .parquet file or a folder")
    raw = formats.read_parquet(path, background=background)
    channels, height, width = raw.images.shape[1:]
    if entry.size is not None and ((height, width) != entry.size or channels != entry.channels):
        raise RejectedError(
            f"{path}: images are {height}x{width}x{channels}, "
            f"{name} has {entry.size[0]}x{entry.size[1]}x{entry.channels}; resize them, or load it as parquet:PATH"
        )
    return raw


def _splits(
    name: str, entry: Entry, path: Path | Uri, names: tuple[str, ...], labels: np.ndarray, found: np.ndarray | None
) -> tuple[splits.ClassSplits | None, np.ndarray | None]:
    """class_splits and image_splits of an ImageSet; one of the two is None."""
    if entry.rule == "class":
        known = _known_class_splits(name, path, names)
        _agree(name, path, names, labels, found, known)
        return known, None
    if entry.rule == "as found":
        if found is None or len(np.unique(found)) == 1:
            return splits.by_share(names), None
        parts = {s: tuple(names[i] for i in np.unique(labels[found == s])) for s in splits.SPLITS}
        if sum(map(len, parts.values())) == len(names):
            return splits.with_val(parts), None
    numbers = np.zeros(len(labels), dtype=np.int8)
    if found is not None:
        for number, split in enumerate(splits.SPLITS):
            numbers[found == split] = number
    return None, numbers if (numbers == 1).any() else splits.last_tenth_per_class(labels, numbers)


def _known_class_splits(name: str, path: Path | Uri, names: tuple[str, ...]) -> splits.ClassSplits:
    if name == "omniglot":
        return splits.omniglot(str(path), names)
    if name == "cub":
        return splits.cub(str(path), names)
    literal = {"cifar-fs": splits.CIFAR_FS, "mini-imagenet": splits.MINI_IMAGENET}[name]
    return splits.checked(name, str(path), names, literal)


def _agree(
    name: str,
    path: Path | Uri,
    names: tuple[str, ...],
    labels: np.ndarray,
    found: np.ndarray | None,
    known: splits.ClassSplits,
) -> None:
    """Raise RejectedError if a source's own split by class contradicts the published one.

    A source that is split by image is pooled instead.
    """
    if found is None or len(np.unique(found)) == 1:
        return
    parts = {s: {names[i] for i in np.unique(labels[found == s])} for s in splits.SPLITS}
    if sum(map(len, parts.values())) != len(names):
        return
    for split in ("train", "test"):
        # a source may give val as part of train, never train or val as part of test
        stray = sorted(parts[split] & set(known["test" if split == "train" else "train"]))
        if stray:
            raise RejectedError(
                f"{path}: class {stray[0]} is under {split}, but not so in the published {name} split; "
                "correct it, or load it as folder:PATH or parquet:PATH to keep its own split"
            )
