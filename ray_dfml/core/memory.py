"""The memory bank: recovered images per class, first in first out, as a value ([Wei2024] section 4.2, cross task
replay).

A bank is a dict from class key to uint8 images [n c h w], oldest first. Adding gives a new bank; nothing changes in
place.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import torch

Bank = dict[str, np.ndarray]


def add(bank: Mapping[str, np.ndarray], key: str, images: np.ndarray, capacity: int) -> Bank:
    """The bank with uint8 images [n c h w] appended to `key`; the oldest beyond `capacity` images are dropped."""
    kept = np.concatenate([bank[key], images] if key in bank else [images])
    return {**bank, key: np.ascontiguousarray(kept[-capacity:])}


def one_group(key: str) -> str:
    """The group of every class where a task may hold any of them."""
    return ""


def ready(
    bank: Mapping[str, np.ndarray], per_class: int, *, way: int = 1, group: Callable[[str], str] = one_group
) -> list[str]:
    """Class keys, sorted, that hold at least `per_class` images, of groups that have `way` such classes."""
    keys = sorted(key for key, images in bank.items() if len(images) >= per_class)
    sizes = Counter(map(group, keys))
    return [key for key in keys if sizes[group(key)] >= way]


def draw_task(
    bank: Mapping[str, np.ndarray], *, way: int, shot: int, query: int, generator: torch.Generator,
    group: Callable[[str], str] = one_group,
) -> tuple[list[str], np.ndarray, np.ndarray]:  # fmt: skip
    """An interpolated task: `way` ready classes of one group, `shot` + `query` distinct images of each.

    Groups are equally likely, whatever their number of classes. Returns the class keys in label order, and uint8
    support [shot*way c h w] and query [query*way c h w], interleaved: the labels are 0..way-1 repeated. Raises
    ValueError if no group has `way` ready classes.
    """
    keys = ready(bank, shot + query, way=way, group=group)
    if not keys:
        filled = len(ready(bank, shot + query))
        raise ValueError(
            f"a task needs {way} classes of one group with {shot + query} images or more; the bank has {filled} in all"
        )
    groups = sorted(set(map(group, keys)))
    if len(groups) > 1:
        chosen_group = groups[int(torch.randint(len(groups), (1,), generator=generator))]
        keys = [key for key in keys if group(key) == chosen_group]
    chosen = [keys[int(i)] for i in torch.randperm(len(keys), generator=generator)[:way]]
    picks = [bank[k][torch.randperm(len(bank[k]), generator=generator)[: shot + query].numpy()] for k in chosen]
    both = np.stack(picks, axis=1)
    flat = both.reshape(-1, *both.shape[2:])
    return chosen, flat[: shot * way], flat[shot * way :]


def interleaved(way: int, per_class: int) -> torch.Tensor:
    """Labels 0..way-1 repeated `per_class` times, int64 [way * per_class]."""
    return torch.arange(way).repeat(per_class)
