"""The images of a run folder as a page shows them: PNG inside the page, each with a text for who cannot see it."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ray_dfml import examples, gallery
from ray_dfml.errors import RejectedError
from ray_dfml.report.record import Record

KINDS = {
    "recovered": ("Recovered images", "These images were made from the teachers' weights or answers. None is real."),
    "asked": (
        "What the teachers were asked",
        "These images were made too, and bear the class that the teacher said.",
    ),
}
"""Kind of images in a gallery -> the title of their part, and what they are."""


PICTURES = 3_600_000
"""How many bytes the addresses of all pictures of a page may have together, so that the page stays below 5 MB."""


def thinned(galleries: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]], most: int = PICTURES) -> int:
    """Leave out pictures of a page until all of them have at most `most` bytes. Returns how many are left out.

    Every strip of pictures loses its later ones first; of a class over the rounds, the first and the last stay longest.
    """
    strips: list[tuple[list[dict[str, Any]], list[int]]] = []
    for part in galleries:
        strips += [(one["images"], list(range(len(one["images"])))) for one in part["classes"]]
        strips += [(one["images"], _ends_first(len(one["images"]))) for one in part["course"]]
    for row in (row for one in tests for part in one["parts"] for row in part["rows"]):
        strips += [(row[key], list(range(len(row[key])))) for key in ("support", "images")]
    ranked = sorted(
        (rank, number, place) for number, (_, order) in enumerate(strips) for rank, place in enumerate(order)
    )  # fmt: skip
    dropped: dict[int, set[int]] = {}
    for _, number, place in ranked:
        most -= len(strips[number][0][place]["uri"])
        if most < 0:
            dropped.setdefault(number, set()).add(place)
    for number, places in dropped.items():
        strip = strips[number][0]
        strip[:] = [image for place, image in enumerate(strip) if place not in places]
    return sum(map(len, dropped.values()))


def _ends_first(count: int) -> list[int]:
    """The numbers below `count`: the first and the last one, then those between in turn."""
    ends = list(dict.fromkeys([0, count - 1])) if count else []
    return ends + list(range(1, count - 1))


def uri(image: np.ndarray) -> str:
    """A uint8 image [c h w] of 1 or 3 channels as the address of a PNG that holds all of it."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def short(name: str) -> str:
    """The name of a class without its data set."""
    return name.partition("/")[2] or name


def galleries(record: Record) -> list[dict[str, Any]]:
    """The parts of the gallery: for each kind of images their classes, and how some of them changed over the rounds.

    There are none if the run has no gallery. Raises RejectedError for a file that is no gallery.
    """
    path = record.path / gallery.FILE
    if not path.is_file():
        return []
    found = gallery.read(path)
    parts = []
    for kind, (title, about) in KINDS.items():
        latest = [entry for entry in found["latest"] if entry["kind"] == kind]
        course = [entry for entry in found["course"] if entry["kind"] == kind and len(entry["images"]) > 1]
        if latest:
            parts.append({
                "kind": kind, "title": title, "about": about, "agreement": _agreement(latest),
                "classes": [_shown(entry) for entry in sorted(latest, key=_place)],
                "course": [_shown(entry) for entry in sorted(course, key=lambda entry: -len(entry["images"]))],
            })  # fmt: skip
    return parts


def _place(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["teacher"], entry["class"]


def _agreement(entries: Sequence[Mapping[str, Any]]) -> str:
    """How many of the images bear the class that was wished for, as text."""
    said = [(one, entry["class"]) for entry in entries for one in entry["said"]]
    return f"{sum(one == name for one, name in said)} of {len(said)}"


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    name, images = entry["class"], []
    for image, said, confidence, r in zip(
        entry["images"], entry["said"], entry["confidence"], entry["round"], strict=True
    ):
        sure = "" if confidence is None else f"{confidence:.0f} %"
        made = "recovered from" if entry["kind"] == "recovered" else "asked of"
        text = f"{name}, {made} {entry['teacher']} in round {r}; the teacher says {said}{', ' * bool(sure)}{sure}"
        images.append({
            "uri": uri(image), "alt": text, "right": said == name, "said": short(said), "sure": sure,
            "round": r,
        })  # fmt: skip
    return {"name": short(name), "teacher": entry["teacher"], "round": entry["round"][-1], "images": images}


def tests(record: Record) -> list[dict[str, Any]]:
    """Examples of the test: images of the best and worst episode or of a student's answers, and confused classes.

    There are none if the run has none. Raises RejectedError for a file that holds no examples.
    """
    path = record.path / examples.FILE
    found = examples.read(path) if path.is_file() else []
    try:
        return [_test(one) for one in found]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RejectedError(f"{path}: not examples of a test ({error}); remove it to report without it") from None


def _test(one: Mapping[str, Any]) -> dict[str, Any]:
    episodic = one["kind"] == "episodes"
    return {
        "kind": one["kind"], "teacher": None if episodic else str(one["teacher"]),
        "data": str(one["data"]).partition("@")[0], "split": str(one["split"]), "looked": int(one["looked"]),
        "parts": [_part(part, episodic) for part in one["parts"]], "confusions": _confusions(one["confusions"]),
    }  # fmt: skip


def _part(part: Mapping[str, Any], episodic: bool) -> dict[str, Any]:
    """Rows of images, class after class, of an episode or of a student's answers."""
    classes, support = [short(name) for name in part["classes"]], part.get("support", ())
    rows = []
    for c, name in enumerate(classes):
        places = [i for i, label in enumerate(part["labels"]) if label == c]
        shown = [_example(part["query"][i], name, _name(classes, part["predicted"][i])) for i in places]
        given = [{"uri": uri(support[c]), "alt": f"support image of {name}"}] if c < len(support) else []
        if shown or given:
            rows.append({"name": name, "support": given, "images": shown})
    found = {"which": part["which"], "rows": rows}
    return found | ({"accuracy": float(part["accuracy"]), "number": int(part["number"])} if episodic else {})


def _name(classes: Sequence[str], place: int) -> str:
    return classes[place] if 0 <= place < len(classes) else "a class that is not shown"


def _example(image: np.ndarray, name: str, said: str) -> dict[str, Any]:
    return {"uri": uri(image), "alt": f"{name}, taken for {said}", "right": name == said, "said": said}


def _confusions(found: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [
        {"name": short(one["class"]), "said": short(one["said"]), "count": int(one["count"]), "of": int(one["of"])}
        for one in found["pairs"]
    ]
    matrix = found["matrix"] and {
        "names": [short(name) for name in found["matrix"]["names"]],
        "shares": [[None if one is None else float(one) for one in row] for row in found["matrix"]["shares"]],
    }
    if matrix and {len(matrix["shares"]), *map(len, matrix["shares"])} != {len(matrix["names"])}:
        raise ValueError("the table of confusions is not square")
    return {"pairs": pairs, "classes": int(found["classes"]), "matrix": matrix}
