"""Images in folders: data sets of class folders, with or without splits above them, and a user's few images."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ray_dfml.data import formats, images, listing
from ray_dfml.data.listing import ImageFile
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import resolved, shown
from ray_dfml.types import ImageSpec


def read(
    name: str, path: Path, *, channels: int | None, size: tuple[int, int] | None, marker: str | None, background: str
) -> formats.Raw:
    """The images of the class folders under a directory.

    With `size` (h, w) they are resized; with None all must have one size, as they are shown. With `channels` 1 or 3
    they are converted; with None they are grey if every image is grey, else RGB. `marker` names what the directory
    could have held instead, for the message. Raises RejectedError.
    """
    found = listing.listing(name, path, marker)
    files = found.files
    channels, size, resize = _geometry(files, channels, size)
    digest = hashlib.md5(repr((channels, size, images.colour(background))).encode(), usedforsecurity=False)
    for file in files:
        stat = file.path.stat()
        digest.update(os.fsencode(file.path.relative_to(path)) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())

    def decode(row: int) -> images.Decoded:
        file = shown(files[row].path)
        decoded = images.decode(
            files[row].path, file, channels=channels, size=size if resize else None, background=background
        )
        if decoded.pixels.shape[1:] != size:
            raise RejectedError(f"{file}: its header does not say that it is turned; save it again as it is shown")
        return decoded

    pixels, kinds = images.decode_all(digest.hexdigest(), len(files), (channels, *size), decode)
    labels = np.array([file.label for file in files], dtype=np.str_)
    splits = [file.split for file in files]
    source = {"path": str(path), "format": "folder", "pixels_md5": formats.pixels_md5(pixels, labels)}
    if resize:
        source["processing"] = f"resized to {size[0]}x{size[1]} (Lanczos) where it was not"
    return formats.Raw(
        images=pixels,
        names=labels,
        splits=None if None in splits else np.array(splits, dtype=np.str_),
        source=source,
        notes=(*found.notes(), *images.notes(kinds, background)),
    )


def _geometry(
    files: Sequence[ImageFile], channels: int | None, size: tuple[int, int] | None
) -> tuple[int, tuple[int, int], bool]:
    """Channels, (h, w) and whether to resize. All headers are read if channels or size are not given."""
    if channels is not None and size is not None:
        return channels, size, True
    looks = [images.look(file.path) for file in files]
    first = looks[0].height, looks[0].width
    for file, look in zip(files, looks, strict=True):
        if size is None and (look.height, look.width) != first:
            raise RejectedError(
                f"mixed sizes: {shown(files[0].path)} is {first[0]}x{first[1]} and {shown(file.path)} is "
                f"{look.height}x{look.width} (height x width); resize all images to one size first"
            )
    return channels or (1 if all(look.grey for look in looks) else 3), size or first, size is not None


class UserImages(NamedTuple):
    """Images of `read_folder`, uint8 [n c h w], with their labels, their file names, and notes for the reader."""

    images: np.ndarray
    labels: list[str]
    names: list[str]
    notes: list[str]


def read_folder(path: str | Path, image: ImageSpec, *, background: str = "white") -> UserImages:
    """Read the images of a folder of class folders, or of a folder of images.

    Labels are the names of the class folders, or "" if there are none. File names are relative to `path`, printable and
    sorted. Images are decoded as in `images.decode`, converted to the channels of `image`, and resized to its size
    (Lanczos, without regard to proportions). Files whose names are not of images are passed over and counted in a note.
    Raises UsageError if there is no folder, and RejectedError if it is empty or an image cannot be decoded.
    """
    path = resolved(path)
    if image.channels not in (1, 3):
        raise UsageError(
            f"{path}: image files have 1 or 3 channels, the learner takes {image.channels}; use the Python API"
        )
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name a folder of images, or of one folder of images per class")
    found = listing.Listing()
    folders = listing.folders_in(path)
    files = listing.images_in(path, found.passed if not folders else Counter())
    if folders and files:
        raise RejectedError(
            f"{path}: holds images ({shown(files[0].name)}) beside folders ({shown(folders[0].name)}); keep one kind"
        )
    found.files = [ImageFile(file, "", None) for file in files]
    for folder in folders:
        label = listing.check_class_name(shown(folder), folder.name)
        found.files += [ImageFile(file, label, None) for file in listing.class_images(folder, found.passed)]
    if not found.files:
        raise RejectedError(
            f"{path}: no images; expected {', '.join(images.SUFFIXES)} files or folders of them, one per class"
        )
    decoded = [
        images.decode(
            file.path, shown(file.path), channels=image.channels, size=(image.height, image.width),
            background=background,
        )
        for file in found.files
    ]  # fmt: skip
    return UserImages(
        np.stack([one.pixels for one in decoded]),
        [file.label for file in found.files],
        [shown(file.path.relative_to(path).as_posix()) for file in found.files],
        [*found.notes(), *images.notes([one.kind for one in decoded], background)],
    )
