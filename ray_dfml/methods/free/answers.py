"""What services say of the images that FREE recovered from their surrogates."""

import numpy as np

from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.students.training import labels_of, learnable
from ray_dfml.types import Arrays, Service

CERTAIN = 30.0
"""The logit that stands for an answer that is a label; those of the other classes are 0. In float32 it is certainty."""
SMALLEST = 1e-6
"""The smallest probability of an answer whose logarithm is taken."""


def asked_once(cfg: Config, service: Service, task: Arrays) -> Arrays:
    """A task that was recovered from a surrogate, with the answers of its service, which is asked about each image.

    `cfg.surrogate.labels` says what happens where the answer is not the class that was wished for: the image keeps the
    wished label (`keep`), it is left out (`drop`), or it gets the label of the answer (`relabel`), unless the task does
    not have that class. The view is the one that was asked about. `agreement` is the share of images whose answer is
    the wished class, in percent. `told` says which answers give the classes of the task any probability.
    """
    card, own = service.card, cfg.surrogate
    units = np.array([card.classes.index(name) for name in task["classes"]])
    seen = to_bytes(fit(to_pixels(task["images"]), card.image.shape))
    answers = learnable(service.query(seen), card.access, own.answers)
    best = labels_of(answers)
    right = best == units[task["labels"]]
    labels = task["labels"]
    if own.labels == "relabel":
        place = np.full(len(card.classes), -1)
        place[units] = np.arange(len(units))
        labels = place[best]
    rows = np.flatnonzero(right if own.labels == "drop" else labels >= 0)
    return task | {
        "images": task["images"][rows],
        "labels": labels[rows],
        "logits": _logits(answers, len(card.classes))[rows][:, units],
        "told": _probabilities(answers, len(card.classes))[rows][:, units].max(1) > SMALLEST,
        "view": (cfg.crop_pad, cfg.crop_pad, False),
        "agreement": 100.0 * float(right.mean()),
    }


def told(cfg: Config, task: Arrays) -> Arrays:
    """What BELL learns of a task: its images, without those whose answer says nothing of the task's classes.

    Their target would be uniform. The form `hard` has the labels as targets, and so all images.
    """
    if "told" not in task or cfg.distill == "hard":
        return task
    return task | {name: task[name][task["told"]] for name in ("images", "labels", "logits")}


def _probabilities(answers: np.ndarray, classes: int) -> np.ndarray:
    return answers if answers.ndim == 2 else np.eye(classes, dtype=np.float32)[answers]


def _logits(answers: np.ndarray, classes: int) -> np.ndarray:
    """Logits [n q] of which the answers, labels [n] or probabilities [n q], are the softmax."""
    if answers.ndim == 1:
        return (CERTAIN * np.eye(classes, dtype=np.float32))[answers]
    return np.log(np.maximum(answers, SMALLEST)).astype(np.float32)
