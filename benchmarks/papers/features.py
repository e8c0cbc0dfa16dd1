"""What the figures of FREE are made of: teachers' features, images recovered from them, and figures of run folders."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.generators import generator
from ray_dfml.core.images import to_pixels
from ray_dfml.data.pool import Pool
from ray_dfml.errors import UsageError
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.free.five import five
from ray_dfml.methods.inversion import as_teacher_sees
from ray_dfml.runtime.shard import Shard
from ray_dfml.types import Teacher

RECOVERY = {"images_per_class": 10, "width": 16, "lr_generator": 0.01, "lr_latent": 0.1, "bn_weight": 1.0}
"""Settings of the inversion of single teachers: those of the presets, from a fresh generator."""


def teachers(place: str, *, of_class: str = "", most: int = 0) -> list[Teacher]:
    """The teachers of a pool in their order, with their weights: those that know a class, and at most so many.

    Raises UsageError if there are none.
    """
    pool = Pool.open(place)
    shard = Shard(lambda id: (pool.entry(id).card, *pool.load(id)), device=torch.device("cpu"))
    cards = [card for card in pool.cards if not of_class or of_class in card.classes]
    if not cards:
        raise UsageError(f"{place}: no teacher knows {of_class!r}" if of_class else f"{place}: holds no teacher")
    return [shard.teacher(card.id) for card in cards[: most or None]]


def commonest(place: str) -> str:
    """The class that most teachers of a pool know; of several the first by name."""
    names = [name for card in Pool.open(place).cards for name in card.classes]
    return min(set(names), key=lambda name: (-names.count(name), name))


def features(teacher: Teacher, images: np.ndarray) -> Tensor:
    """What the head of a teacher reads [n f] of uint8 images [n c h w] of any size, with its running statistics."""
    seen = as_teacher_sees(to_pixels(images), teacher.card.image)
    with torch.no_grad():
        parts = [teacher.net.features(teacher.theta, part, teacher.stats, first_order=True) for part in seen.split(50)]
    return torch.cat(parts)


def recovered(teacher: Teacher, of_class: str, *, steps: int, seed: int) -> np.ndarray:
    """Images of a class, uint8 [n c h w], recovered from a teacher by FIVE from a fresh generator in so many steps."""
    cfg = Config(steps=steps, **RECOVERY)
    net_g = generator(teacher.card.image.shape, cfg.latent, cfg.width)
    theta_g = net_g.init(seeds.rng(seed, "theta_g"))[None]
    name = seeds.derive(seed, teacher.card.id)
    tasks, _ = five(cfg, net_g, [teacher], theta_g, None, [name], way=len(teacher.card.classes), batched=False)
    task = tasks[0]
    return task["images"][np.array(task["labels"]) == task["classes"].index(of_class)]


def group_of(teacher: Teacher) -> str:
    """Data set and architecture of a teacher, such as `cifar-fs conv4`."""
    return f"{teacher.card.classes[0].partition('/')[0]} {teacher.card.arch}"


def between(alike: np.ndarray, groups: Sequence[str]) -> dict[tuple[str, str], float]:
    """Mean of a symmetric matrix [k k] over pairs of different rows of two groups, or of one."""
    names, found = list(dict.fromkeys(groups)), {}
    at = np.array([names.index(group) for group in groups])
    for i, one in enumerate(names):
        for j, other in enumerate(names[i:], i):
            rows, columns = np.flatnonzero(at == i), np.flatnonzero(at == j)
            pairs = [alike[r, c] for r in rows for c in columns if r != c]
            if pairs:
                found[one, other] = float(np.mean(pairs))
    return found


def over_rounds(runs: Iterable[Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds [m] in which all runs measured a figure, and its values [runs m]. Raises UsageError if there are none."""
    found: list[Mapping[int, float]] = []
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append({row["round"]: row[key] for row in rows if row.get(key) is not None})
    rounds = sorted(set.intersection(*map(set, found)))
    if not rounds:
        raise UsageError(f"no round in which all runs measured {key}; set method.alignment_every=1")
    return np.array(rounds), np.array([[values[r] for r in rounds] for values in found])
