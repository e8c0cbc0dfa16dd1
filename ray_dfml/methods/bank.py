"""The bank keeps recovered images of each class, first in first out, and tasks are drawn from it.

[Wei2024] FREE, arXiv 2405.00984, section 4.2 (cross task replay).

A bank is a dict from class key to uint8 images [n c h w], oldest first. To add images is to make a new bank; nothing
changes in place. The classes of a task come from one data set, as those of a test episode do, unless `mix_data` is set.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import torch

from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods.base import MetaConfig, Metrics, World
from ray_dfml.types import Arrays

Bank = dict[str, np.ndarray]

BankKey = Literal["class", "teacher"]
"""What a class of the bank is: a class name, which is side information of the cards, or a (teacher, class) pair."""


def add(bank: Mapping[str, np.ndarray], key: str, images: np.ndarray, capacity: int) -> Bank:
    """The bank with uint8 images [n c h w] appended to `key`; the oldest beyond `capacity` images are dropped."""
    kept = np.concatenate([bank[key], images] if key in bank else [images])
    return {**bank, key: np.ascontiguousarray(kept[-capacity:])}


def one_group(key: str) -> str:
    """Put every class into the same group, so that a task may hold any of them."""
    return ""


def ready(
    bank: Mapping[str, np.ndarray], per_class: int, *, way: int = 1, group: Callable[[str], str] = one_group
) -> list[str]:
    """The sorted keys of the classes that are ready: they hold `per_class` images or more, and their group has `way`
    such classes or more."""
    keys = sorted(key for key, images in bank.items() if len(images) >= per_class)
    sizes = Counter(map(group, keys))
    return [key for key in keys if sizes[group(key)] >= way]


def draw_task(
    bank: Mapping[str, np.ndarray], *, way: int, shot: int, query: int, rng: torch.Generator,
    group: Callable[[str], str] = one_group,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Draw an interpolated task: `way` ready classes of one group, `shot` + `query` distinct images of each.

    Groups are equally likely, whatever their number of classes. Returns uint8 support [shot*way c h w] and query
    [query*way c h w], in which the classes take turns: the labels are 0..way-1, repeated. Raises ValueError if no group
    has `way` ready classes.
    """
    keys = ready(bank, shot + query, way=way, group=group)
    if not keys:
        filled = len(ready(bank, shot + query))
        raise ValueError(
            f"a task needs {way} classes of one group with {shot + query} images or more; the bank has {filled} in all"
        )
    groups = sorted(set(map(group, keys)))
    if len(groups) > 1:
        chosen_group = groups[int(torch.randint(len(groups), (1,), generator=rng))]
        keys = [key for key in keys if group(key) == chosen_group]
    chosen = [keys[int(i)] for i in torch.randperm(len(keys), generator=rng)[:way]]
    picks = [bank[k][torch.randperm(len(bank[k]), generator=rng)[: shot + query].numpy()] for k in chosen]
    both = np.stack(picks, axis=1)
    flat = both.reshape(-1, *both.shape[2:])
    return flat[: shot * way], flat[shot * way :]


def class_key(name: str, teacher: str, key: BankKey) -> str:
    """The key of a teacher's class in the bank."""
    return name if key == "class" else f"{name}#{teacher}"


def data_set(name: str) -> str:
    """The data set of a class: its name up to the first `/`, or an empty text for a name without a `/`."""
    return name.partition("/")[0] if "/" in name else ""


def of_pool(world: World, key: BankKey) -> set[str]:
    """The keys in the bank of all classes that the teachers know."""
    return {class_key(name, card.id, key) for card in world.cards for name in card.classes}


def _group(cfg: MetaConfig) -> Callable[[str], str]:
    return one_group if cfg.mix_data else data_set


def draw(
    cfg: MetaConfig, way: int, bank: Mapping[str, np.ndarray], rng: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a task with the sizes of `cfg`: uint8 support and query, as `draw_task` returns them."""
    return draw_task(bank, way=way, shot=cfg.shot, query=cfg.query, rng=rng, group=_group(cfg))


def _sizes(cfg: MetaConfig, keys: Iterable[str]) -> Counter[str]:
    """Data set -> how many of the classes `keys` it has, in order of names."""
    return Counter(map(_group(cfg), sorted(keys)))


def notes(cfg: MetaConfig, way: int, keys: Iterable[str]) -> list[str]:
    """One line for each data set that has too few of the classes `keys` for a task."""
    return [
        f"{kind or 'classes whose names have no data set'}: known classes {count}, a task takes {way} of one data set, "
        "so no meta-update has them"
        for kind, count in _sizes(cfg, keys).items()
        if count < way
    ]


def check(method: str, field: str, cfg: MetaConfig, way: int, keys: Iterable[str]) -> None:
    """Raise UsageError if no data set has as many of the classes `keys` as a task takes.

    `field` is the place of `cfg` in the settings of the run, such as `method.replay`.
    """
    sizes = _sizes(cfg, keys)
    if max(sizes.values(), default=0) < way:
        known = ", ".join(f"{kind or 'no data set'} {count}" for kind, count in list(sizes.items())[:5]) or "none"
        raise UsageError(
            f"{method}: a task takes {way} classes of one data set (a class name up to its first '/'), and the known "
            f"classes are: {known}; lower learner.way, or let tasks mix data sets with {field}.mix_data=true"
        )


def check_left(cfg: MetaConfig, world: World, bank: Mapping[str, np.ndarray], key: BankKey) -> None:
    """Raise RejectedError if no task can be drawn, now or later.

    This is so if the usable teachers and `bank` together have too few classes of every data set.
    """
    known = of_pool(world, key) | set(ready(bank, cfg.shot + cfg.query))
    if max(_sizes(cfg, known).values(), default=0) < world.way:
        kind = "" if cfg.mix_data else " of any one data set"
        raise RejectedError(
            f"the usable teachers and the bank have {len(known)} classes, too few{kind} for a task of {world.way}"
        )


def check_capacity(method: str, cfg: MetaConfig, capacity: int) -> None:
    """Raise UsageError if the bank could never hold as many images of a class as a task takes."""
    if capacity < cfg.shot + cfg.query:
        raise UsageError(
            f"{method}: tasks take {cfg.shot} + {cfg.query} images of a class, method.bank_capacity is {capacity}; "
            "raise it"
        )


def store(bank: Mapping[str, np.ndarray], task: Arrays, key: BankKey, capacity: int) -> Bank:
    """The bank with the images of a recovered task (`inversion.Inversion.task`) under their classes."""
    found: Bank = dict(bank)
    for local, name in enumerate(task["classes"]):
        found = add(found, class_key(name, task["teacher"], key), task["images"][task["labels"] == local], capacity)
    return found


def figures(cfg: MetaConfig, world: World, bank: Mapping[str, np.ndarray], key: BankKey) -> Metrics:
    """Figures of the bank for the log.

    They are the classes with enough images for a task, the classes of the pool without, all images, and the data sets
    that tasks come from.
    """
    filled = ready(bank, cfg.shot + cfg.query)
    drawable = ready(bank, cfg.shot + cfg.query, way=world.way, group=_group(cfg))
    return {
        "bank/classes": len(filled),
        "bank/missing_classes": len(of_pool(world, key) - set(filled)),
        "bank/images": sum(len(images) for images in bank.values()),
        "bank/data_sets": len(set(map(_group(cfg), drawable))),
    }
