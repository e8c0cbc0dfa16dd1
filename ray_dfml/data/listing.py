"""Finds the image files below a folder, with their classes and splits. Counts what it passes over, and gives hints."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_dfml.data.images import SUFFIXES
from ray_dfml.errors import RejectedError
from ray_dfml.files import is_readable, shown

_SPLITS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "background": "train",
    "evaluation": "test",
    "images_background": "train",
    "images_evaluation": "test",
}

_CLUTTER = ("thumbs.db", "desktop.ini")
"""Files that desktops make by themselves. Neither these nor hidden files are counted."""


@dataclass(frozen=True)
class ImageFile:
    """A file with its class and, if the folder has splits, its split."""

    path: Path
    label: str
    split: str | None


@dataclass
class Listing:
    """Images in the order of split, class and file name, and counts of all else that was met, by suffix or kind."""

    files: list[ImageFile] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """One line that counts what was passed over, if anything was."""
        return [f"passed over, since they are not read as images: {_counted(self.passed)}"] if self.passed else []


def split_of(word: str) -> str | None:
    """`train`, `val` or `test` for a name of a split in any case, such as `Test` or `dev`; None for another word."""
    return _SPLITS.get(word.lower())


def check_class_name(where: str, name: str) -> str:
    """The name itself. Raises RejectedError, which shows it in a printable form, if a pool could not hold it."""
    if not name or not is_readable(name):
        raise RejectedError(
            f"{where}: the class name '{shown(name)}' is not one line of readable UTF-8 text; rename the class"
        )
    return name


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_in(folder: Path, passed: Counter[str]) -> list[Path]:
    """The sorted images in a folder. Everything else that is not hidden is counted in `passed`."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _CLUTTER:
            continue
        if path.is_dir():
            passed["folder"] += 1
        elif path.suffix.lower() not in SUFFIXES:
            passed[shown(path.suffix.lower()) or "no suffix"] += 1
        elif path.is_file():
            found.append(path)
        else:
            passed["dangling link" if path.is_symlink() else "no regular file"] += 1
    return found


def class_images(folder: Path, passed: Counter[str]) -> list[Path]:
    """The images of one class. Raises RejectedError for a folder without any."""
    found: Counter[str] = Counter()
    images = images_in(folder, found)
    if not images:
        held = f"; it holds {_counted(found)}" if found else ""
        advice = "give the folder right above the class folders" if list(found) == ["folder"] else "fill or remove it"
        raise RejectedError(f"{folder}: a class folder without images ({' '.join(SUFFIXES)}){held}; {advice}")
    passed.update(found)
    return images


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))


# ------------------------------------------------------------------------------------------------------------ data sets


def listing(name: str, path: Path, marker: str | None) -> Listing:
    """List the class folders of the data set `name`, in the layouts to which the known sets unpack.

    Raises RejectedError, with a hint, if there is none. `marker` names what the folder could have held instead.
    """
    root, found = _root(name, path), Listing()
    if name == "tiny-imagenet" and (root / "val" / "val_annotations.txt").is_file():
        _tiny_imagenet(root, found)
        return found
    depth = 2 if name == "omniglot" else 1
    below = folders_in(root)
    # "train" is also a class of CIFAR-100: split folders are meant only where there is nothing else
    if below and all(split_of(folder.name) for folder in below):
        for folder in below:
            _add_classes(found, folder, split_of(folder.name), depth)
    elif below:
        _hint_at_levels(root, below, depth)
        _add_classes(found, root, None, depth)
    if not found.files:
        _hint_at_nothing([root, *below], depth, marker)
    return found


def _root(name: str, path: Path) -> Path:
    """Where class or split folders start, in the layouts to which CUB-200-2011 and torchvision's Omniglot unpack."""
    for inner in {"cub": ("CUB_200_2011", "images"), "omniglot": ("omniglot-py",)}.get(name, ()):
        if (path / inner).is_dir():
            path = path / inner
    return path


def _add_classes(found: Listing, root: Path, split: str | None, depth: int) -> None:
    """Add the images of the class folders under `root`. At depth 2 a class is two folders, "alphabet/character"."""
    classes = folders_in(root)
    if classes and (beside := images_in(root, Counter())):
        found.passed["image beside the class folders"] += len(beside)
    if depth == 2:
        classes = [inner for outer in classes for inner in folders_in(outer)]
    for folder in classes:
        label = check_class_name(shown(folder), folder.relative_to(root).as_posix())
        inner = folder / "images"  # Tiny-ImageNet keeps the images of a class one level down
        images = class_images(inner if inner.is_dir() else folder, found.passed)
        found.files += [ImageFile(image, label, split) for image in images]


def _tiny_imagenet(root: Path, found: Listing) -> None:
    """Add the images of the published layout. Labels of val are in a text file; test has none, so val is the test."""
    annotations = root / "val" / "val_annotations.txt"
    if (root / "train").is_dir():
        _add_classes(found, root / "train", "train", 1)
    known = {file.label for file in found.files}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), start=1):
        image, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        file = root / "val" / "images" / image
        if label not in known or not file.is_file():
            what = f"class {label!r} is not in train" if file.is_file() else f"{file} does not exist"
            raise RejectedError(f"{annotations}: line {number}: {what}; unpack the whole set again")
        found.files.append(ImageFile(file, label, "test"))


# ---------------------------------------------------------------------------------------------------------------- hints


def _has_images(folder: Path) -> bool:
    return bool(images_in(folder, Counter()))


def _hint_at_levels(root: Path, below: Sequence[Path], depth: int) -> None:
    """Raise RejectedError if the class folders lie one level further down."""
    if depth == 2 or any(_has_images(folder) or (folder / "images").is_dir() for folder in below):
        return
    deeper = [folder for folder in below if any(_has_images(inner) for inner in folders_in(folder))]
    if not deeper:
        return
    known = [folder.name for folder in below if split_of(folder.name)]
    if known:
        other = next(folder.name for folder in below if not split_of(folder.name))
        raise RejectedError(
            f"{root}: holds folders of splits ({', '.join(known)}) beside {shown(other)}; name every one train, val or "
            "test, or move the other away"
        )
    raise RejectedError(
        f"{root}: its folders hold class folders, not images; give the one that is meant ({shown(deeper[0])}), or "
        "name them train, val and test"
    )


def _hint_at_nothing(folders: Sequence[Path], depth: int, marker: str | None) -> None:
    """Raise RejectedError for a folder that holds no class folder with images."""
    layout = "alphabet/character folders" if depth == 2 else "class folders"
    for folder in folders:
        if _has_images(folder):
            raise RejectedError(
                f"{shown(folder)}: holds images, but no {layout}; give the folder above it if this is one class, else "
                "make one folder per class"
            )
    also = f" or {marker} of torchvision" if marker else ""
    raise RejectedError(f"{folders[0]}: no {layout} with images{also} in it; give the folder above the {layout}")
