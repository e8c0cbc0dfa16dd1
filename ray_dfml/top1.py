"""Top-1 accuracy of classifiers that need no adaptation, on labelled images: the `top1` op and its jobs.

The classes of the images are matched to those of the classifier by their names. Images of classes that it does not know
are left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.errors import UsageError
from ray_dfml.types import Arrays, Job, Labelled, LearnerWeights, Shard, TeacherCard

IMAGES_PER_JOB = 500


def units(known: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The output of a classifier of classes `known` for each class of a data set: int64 [names], -1 if it has none.

    Names are `data/name`. A class is found by its whole name, or by the part after the first slash if a classifier
    knows none of the whole names.
    """
    for shorten in (lambda name: name, lambda name: name.partition("/")[2] or name):
        places = {shorten(name): unit for unit, name in enumerate(known)}
        found = np.array([places.get(shorten(name), -1) for name in names], np.int64)
        if (found >= 0).any():
            return found
    return np.full(len(names), -1, np.int64)


def rows_known(of: Labelled, known: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images that a classifier of classes `known` can be right about, and its outputs for them."""
    wanted = units(known, of.names)[of.labels]
    rows = np.flatnonzero(wanted >= 0)
    return rows, wanted[rows]


def check_known(cards: Sequence[TeacherCard], sets: Sequence[Labelled]) -> list[str]:
    """One line for each data set and teacher of which some classes are left out.

    Raises UsageError if no teacher knows any class of a data set.
    """
    notes = []
    for of in sets:
        known = {card.id: int((units(card.classes, of.names) >= 0).sum()) for card in cards}
        if not any(known.values()):
            raise UsageError(
                f"--data {of.data}, split {of.split}: no teacher knows any of its classes, such as {of.names[0]!r}, so "
                "no student can be scored on it; classes are matched by name"
            )
        few = [id for id, count in known.items() if count < len(of.names)]
        if few:
            notes.append(
                f"--data {of.data}, split {of.split}: {len(few)} of {len(cards)} teachers do not know all "
                f"{len(of.names)} classes; {few[0]} knows {known[few[0]]}, and is scored on their images"
            )
    return notes


def jobs(rows: np.ndarray, wanted: np.ndarray) -> list[Job]:
    """Jobs of up to 500 images each, so that the work is cut alike for any number of shards."""
    starts = range(0, len(rows), IMAGES_PER_JOB)
    parts = [slice(start, start + IMAGES_PER_JOB) for start in starts]
    return [Job(index=i, seed=0, values={"rows": rows[p], "wanted": wanted[p]}) for i, p in enumerate(parts)]


def shared(weights: LearnerWeights, images: Any) -> Arrays:
    """Values that all jobs read: the classifier, and uint8 images [n c h w] or what `Backend.keep` made of them."""
    return {"weights": weights.values(), "images": images}


@torch.no_grad()
def top1(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `top1` op: for each image of a job's `rows` the best output `said`, and whether it is the one in `wanted`.

    Batch norm uses the running statistics of the weights. The images have the size that the classifier takes.
    """
    weights, device = LearnerWeights.of(shared["weights"]), shard.device
    theta, stats = weights.theta.to(device), weights.stats.to(device)
    mean, std = (torch.tensor(values, device=device) for values in (weights.image.mean, weights.image.std))
    results = []
    for job in jobs:
        pixels = to_pixels(shared["images"][job.values["rows"]], device)
        logits = weights.net(theta, normalise(pixels, mean, std), stats, first_order=True)
        said = logits.argmax(-1).cpu().numpy()
        results.append({"said": said, "right": said == job.values["wanted"]})
    return results
