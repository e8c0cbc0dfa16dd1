"""The gallery of a run: a bounded choice of the images that were recovered, or that teachers were asked about.

It holds the first images of the classes that were met last, with what the teacher said of them, and for a few classes
one image from now and then, so that its change over the rounds can be seen. The choice looks at no image and no answer.
Nothing in it is a real image. The gallery is a part of the state of a run, and is written to the file FILE.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.errors import RejectedError
from ray_dfml.methods.base import Seen

FILE = "recovered.safetensors"
"""The name of the file in a run folder."""

CLASSES = 20
"""Of how many classes of each kind the last images are kept."""
FOLLOWED = 6
"""How many classes are followed over the rounds, of as many teachers as there are."""
MOMENTS = 10
"""How many images of a followed class are kept at most."""
SIDE = 64
"""Largest height and width of an image that is kept; larger ones are made smaller."""

FILE_BYTES = 8 << 20
"""Largest file that is read."""

T = TypeVar("T")

Gallery = dict[str, dict[str, Any]]
"""`latest` and `course`: key of a class -> its images [n c h w] and what is known of each."""


def taken(gallery: Mapping[str, Any], seen: Sequence[Seen], r: int) -> Gallery:
    """The gallery after round `r`, in which the images `seen` were made."""
    latest, course = dict(gallery.get("latest", {})), dict(gallery.get("course", {}))
    for one in seen:
        latest.pop(_key(one), None)
        latest[_key(one)] = _entry(one, slice(None), r)
    for kind in {one.kind for one in seen}:
        for key in [key for key, entry in latest.items() if entry["kind"] == kind][:-CLASSES]:
            del latest[key]
    for one in _by_turns(seen):
        if _key(one) in course:
            course[_key(one)] = _later(course[_key(one)], _entry(one, slice(1), r))
        elif len(course) < FOLLOWED:
            course[_key(one)] = _entry(one, slice(1), r) | {"place": np.zeros(1, np.int64)}
    return {"latest": latest, "course": course}


def _key(one: Seen) -> str:
    return json.dumps([one.kind, one.teacher, one.name])


def _entry(one: Seen, rows: slice, r: int) -> dict[str, Any]:
    images = small(one.images[rows])
    return {
        "kind": one.kind, "teacher": one.teacher, "class": one.name, "images": images, "said": list(one.said[rows]),
        "confidence": np.array(one.confidence[rows], np.float32), "round": np.full(len(images), r, np.int64),
    }  # fmt: skip


def small(images: np.ndarray) -> np.ndarray:
    """Images [n c h w] with a height and a width of at most SIDE."""
    channels, height, width = images.shape[1:]
    if max(height, width) <= SIDE:
        return images
    scale = SIDE / max(height, width)
    size = (channels, max(1, round(height * scale)), max(1, round(width * scale)))
    return to_bytes(fit(to_pixels(images), size))


def _by_turns(seen: Sequence[Seen]) -> list[Seen]:
    """The first class of every teacher, then the second of every teacher, and so on."""
    ranks: dict[str, int] = {}
    ranked = []
    for one in seen:
        ranks[one.teacher] = rank = ranks.get(one.teacher, -1) + 1
        ranked.append((rank, one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


def _later(entry: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A followed class with one more image. `place` counts them all.

    Those at multiples of a stride are kept, and the last one. The stride is the smallest power of 2 that suffices.
    """
    last = int(entry["place"][-1]) + 1
    stride = 1
    while -(-last // stride) + 1 > MOMENTS:
        stride *= 2
    place = np.append(entry["place"], last)
    kept = [i for i, at in enumerate(place.tolist()) if at % stride == 0 or at == last]
    both = {name: np.concatenate([entry[name], new[name]])[kept] for name in ("images", "confidence", "round")}
    return entry | both | {"said": [[*entry["said"], *new["said"]][i] for i in kept], "place": place[kept]}


def to_file(gallery: Mapping[str, Any]) -> bytes:
    """The gallery as the content of FILE: safetensors, with its description as JSON in the metadata.

    Each entry of the lists `latest` and `course` has `kind`, `teacher`, `class` and `tensor`, the name of its images
    uint8 [n c h w]; and for each image `said`, `confidence` (percent, or null) and `round`.
    """
    tensors, said = {}, {}
    for part in ("latest", "course"):
        said[part] = []
        for i, entry in enumerate(gallery.get(part, {}).values()):
            name = f"{part}-{i:02d}"
            tensors[name] = np.ascontiguousarray(entry["images"])
            shown = {key: entry[key] for key in ("kind", "teacher", "class", "said")}
            confidence = [None if np.isnan(one) else round(one, 2) for one in entry["confidence"].tolist()]
            said[part].append(
                shown | {"tensor": name, "confidence": confidence, "round": entry["round"].tolist()}
            )  # fmt: skip
    return packed(tensors, said)


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What `to_file` has written: `latest` and `course`, where `images` has taken the place of `tensor`.

    Raises RejectedError for another file.
    """
    return unpacked(path, lambda said, images: {
        part: [_read(entry, images(entry["tensor"])) for entry in said[part]] for part in ("latest", "course")
    })  # fmt: skip


def packed(tensors: Mapping[str, np.ndarray], said: Mapping[str, Any]) -> bytes:
    """Images by name, and a description of them, as the content of a file that `unpacked` reads."""
    return safetensors.numpy.save(dict(tensors), {"gallery": json.dumps(said)})


def unpacked(path: Path, read: Callable[[Any, Callable[[str], np.ndarray]], T]) -> T:
    """What `read` makes of the description in a file, and of a function that gives the images of a name.

    Raises RejectedError if it cannot, or if the file is too large; images are uint8 [n c h w] of 1 or 3 channels.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise ValueError(f"it has more than {FILE_BYTES} bytes")
        with safetensors.safe_open(path, "np") as file:

            def images(name: str) -> np.ndarray:
                found = file.get_tensor(name)
                if found.dtype != np.uint8 or found.ndim != 4 or found.shape[1] not in (1, 3) or 0 in found.shape:
                    raise ValueError(f"{name} holds no images")
                return found

            return read(json.loads((file.metadata() or {})["gallery"]), images)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RejectedError(f"{path}: not a gallery of images ({why}); remove it to report without it") from None


def _read(entry: Mapping[str, Any], images: np.ndarray) -> dict[str, Any]:
    if {len(entry[name]) for name in ("said", "confidence", "round")} != {len(images)}:
        raise ValueError(f"{entry['tensor']} and its description have different lengths")
    found = {name: str(entry[name]) for name in ("kind", "teacher", "class")}
    return found | {
        "images": images,
        "said": [str(one) for one in entry["said"]],
        "confidence": [None if one is None else float(one) for one in entry["confidence"]],
        "round": [int(one) for one in entry["round"]],
    }
