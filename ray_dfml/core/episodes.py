"""Evaluation episodes, as lists of positions in a data set.

An episode depends on its seed and its index only, so all methods and shards see the same ones.
"""

from typing import NamedTuple

import numpy as np
import torch

from ray_dfml.core import seeds


class Episode(NamedTuple):
    """Positions in a labelled set: support [way*shot] and query [way*query].

    The classes take turns: the labels are 0..way-1, repeated.
    """

    support: np.ndarray
    query: np.ndarray


def usable(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The labels that occur at least `per_class` times in `labels` [n], ascending: episodes take these classes."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts >= per_class]


def draw(labels: np.ndarray, *, way: int, shot: int, query: int, seed: int, index: int) -> Episode:
    """Episode number `index`: `way` random classes of `labels` [n], `shot` support and `query` query images of each.

    Classes with fewer images take no part. The draw depends on (seed, way, shot, query, index) alone. Raises ValueError
    if fewer than `way` classes are left.
    """
    classes = usable(labels, shot + query)
    if len(classes) < way:
        raise ValueError(
            f"{way}-way episodes of {shot} support and {query} query images need {way} classes with {shot + query} "
            f"images, there are {len(classes)}"
        )
    rng = seeds.rng("episode", seed, way, shot, query, index)
    chosen = [int(classes[int(i)]) for i in torch.randperm(len(classes), generator=rng)[:way]]
    picks = []
    for label in chosen:
        members = np.flatnonzero(labels == label)
        picks.append(members[torch.randperm(len(members), generator=rng)[: shot + query].numpy()])
    both = np.stack(picks, axis=1).reshape(-1)
    return Episode(both[: shot * way], both[shot * way :])


def interleaved(way: int, per_class: int) -> torch.Tensor:
    """Labels 0..way-1 repeated `per_class` times, int64 [way * per_class]."""
    return torch.arange(way).repeat(per_class)
