"""Examples of a test: the best and the worst episode, or what a student said of images, and which classes it confuses.

They are real images of the data that a run was tested on, for the page of that run alone: no method sees them, and
nothing else reads the file FILE.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.core import episodes
from ray_dfml.evaluate import EvalConfig
from ray_dfml.gallery import packed, small, unpacked
from ray_dfml.types import Labelled

FILE = "examples.safetensors"
"""The name of the file in a run folder."""

WAYS = 10
"""Of how many classes of an episode images are shown at most."""
IMAGES = 15
"""How many query images of an episode are shown at most; one of each class in any case."""
PAIRS = 12
"""How many pairs of confused classes are listed."""
MATRIX = 20
"""The most classes of which the whole table of confusions is kept."""

Example = dict[str, Any]


def of_episodes(
    cfg: EvalConfig, of: Labelled, *, way: int, shot: int, predicted: Mapping[int, np.ndarray],
    shown: Mapping[str, tuple[int, float]],
) -> Example:  # fmt: skip
    """The example of a few-shot test, from the ways that were `predicted` [q] in some episodes, by their numbers.

    `shown` names episodes, such as the best one, by their number and accuracy.
    """
    drawn = {
        i: episodes.draw(of.labels, way=way, shot=shot, query=cfg.query, seed=cfg.seed, index=i) for i in predicted
    }
    wrong: Counter[tuple[int, int]] = Counter()
    met: Counter[tuple[int, int]] = Counter()
    for i, ways in predicted.items():
        labels = of.labels[drawn[i].query]
        said = labels[:way][ways]
        for a in labels[:way].tolist():
            met.update({(a, b): cfg.query for b in labels[:way].tolist()})
        wrong.update(zip(labels.tolist(), said.tolist(), strict=True))
    parts = [
        _episode(of, drawn[i], predicted[i], way) | {"which": which, "number": i, "accuracy": round(accuracy, 2)}
        for which, (i, accuracy) in shown.items()
    ]
    name = [*of.names] or [str(label) for label in range(int(of.labels.max()) + 1)]
    return {
        "kind": "episodes", "data": of.data, "split": of.split, "way": way, "shot": shot, "looked": len(predicted),
        "parts": parts, "confusions": _confusions(wrong, met, name),
    }  # fmt: skip


def _episode(of: Labelled, episode: episodes.Episode, predicted: np.ndarray, way: int) -> Example:
    """The first support image of each class, and the first queries of each with the ways that were predicted."""
    ways, each = min(way, WAYS), max(1, IMAGES // min(way, WAYS))
    places = np.array([q * way + c for c in range(ways) for q in range(each) if q * way + c < len(episode.query)])
    classes = of.labels[episode.query[:way]]
    return {
        "classes": [of.names[c] if of.names else str(c) for c in classes.tolist()],
        "support": small(np.asarray(of.images)[episode.support[:ways]]),
        "query": small(np.asarray(of.images)[episode.query[places]]),
        "labels": (places % way).tolist(),
        "predicted": predicted[places].tolist(),
    }


def of_student(
    of: Labelled, id: str, classes: Sequence[str], rows: np.ndarray, wanted: np.ndarray, said: np.ndarray
) -> Example:
    """The example of a student: what it `said` [n] of the images `rows` [n] whose outputs `wanted` [n] are right."""
    right, wrong = np.flatnonzero(said == wanted), np.flatnonzero(said != wanted)
    first = [right[wanted[right] == c][:1] for c in range(len(classes))]
    met = Counter({(a, b): int((wanted == a).sum()) for a in range(len(classes)) for b in range(len(classes))})
    counts = Counter(zip(wanted.tolist(), said.tolist(), strict=True))
    parts = []
    for which, places in (("right", np.concatenate(first)[:WAYS]), ("wrong", wrong[: 2 * WAYS])):
        if len(places):
            parts.append({
                "which": which, "query": small(np.asarray(of.images)[rows[places]]), "classes": list(classes),
                "labels": wanted[places].tolist(), "predicted": said[places].tolist(),
            })  # fmt: skip
    return {
        "kind": "student",
        "teacher": id,
        "data": of.data,
        "split": of.split,
        "looked": len(rows),
        "parts": parts,
        "confusions": _confusions(counts, met, list(classes)),
    }


def _confusions(found: Counter[tuple[int, int]], met: Counter[tuple[int, int]], names: Sequence[str]) -> Example:
    """How often a class was taken for another one: the pairs with the largest shares of those that met, and all."""
    wrong = [(a, b, n) for (a, b), n in found.items() if a != b]
    wrong.sort(key=lambda one: (-one[2] / met[one[:2]], -one[2], one[:2]))
    pairs = [{"class": names[a], "said": names[b], "count": n, "of": met[a, b]} for a, b, n in wrong[:PAIRS]]
    known = sorted({a for a, _ in met})
    if len(known) > MATRIX:
        return {"pairs": pairs, "classes": len(known), "matrix": None}
    matrix = [[round(100 * found[a, b] / met[a, b], 1) if met[a, b] else None for b in known] for a in known]
    return {"pairs": pairs, "classes": len(known), "matrix": {"names": [names[a] for a in known], "shares": matrix}}


def to_file(examples: Sequence[Example]) -> bytes:
    """Examples as the content of FILE: their images, and the rest as JSON, where names of images take their place."""
    tensors: dict[str, np.ndarray] = {}

    def named(part: Example) -> Example:
        shown = dict(part)
        for key in ("support", "query"):
            if key in part:
                shown[key] = f"{len(tensors):02d}-{key}"
                tensors[shown[key]] = np.ascontiguousarray(part[key])
        return shown

    said = [one | {"parts": [named(part) for part in one["parts"]]} for one in examples]
    return packed(tensors, {"examples": said})


def read(path: Path) -> list[Example]:
    """The examples that `to_file` has written. Raises RejectedError for another file."""

    def whole(said: Any, images: Any) -> list[Example]:
        found = []
        for one in said["examples"]:
            parts = []
            for part in one["parts"]:
                parts.append(part | {key: images(part[key]) for key in ("support", "query") if key in part})
                if not len(parts[-1]["query"]) == len(part["labels"]) == len(part["predicted"]):
                    raise ValueError("images and their labels have different lengths")
            found.append(one | {"parts": parts})
        return found

    return unpacked(path, whole)
