"""Recovered tasks in the memory bank, and tasks drawn from it ([Wei2024] arXiv 2405.00984, section 4.2).

The classes of a task are of one data set, as those of a test episode are, unless `mix_data` is set.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch

from ray_dfml.core import memory
from ray_dfml.errors import UsageError
from ray_dfml.methods.base import MetaConfig, Metrics, World
from ray_dfml.types import Arrays

BankKey = Literal["class", "teacher"]
"""A bank class is a class name (side information of the cards), or a (teacher, class) pair."""


def class_key(name: str, teacher: str, key: BankKey) -> str:
    """The bank's key of a teacher's class."""
    return name if key == "class" else f"{name}#{teacher}"


def data_set(class_key: str) -> str:
    """The data set of a class: what its name has before the first `/`; empty for a name without one."""
    return class_key.partition("/")[0] if "/" in class_key else ""


def _group(cfg: MetaConfig) -> Callable[[str], str]:
    return memory.one_group if cfg.mix_data else data_set


def draw(
    cfg: MetaConfig, way: int, bank: Mapping[str, np.ndarray], generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A task as `cfg` wants it: uint8 support and query, as `core.memory.draw_task`."""
    task = memory.draw_task(bank, way=way, shot=cfg.shot, query=cfg.query, generator=generator, group=_group(cfg))
    return task[1:]


def ready(cfg: MetaConfig, way: int, bank: Mapping[str, np.ndarray]) -> list[str]:
    """Classes that a task can be drawn from."""
    return memory.ready(bank, cfg.shot + cfg.query, way=way, group=_group(cfg))


def _of_pool(world: World, key: BankKey) -> set[str]:
    return {class_key(name, card.id, key) for card in world.cards for name in card.classes}


def _sizes(cfg: MetaConfig, world: World, key: BankKey) -> Counter[str]:
    """Data set -> how many classes of it the pool knows."""
    return Counter(map(_group(cfg), sorted(_of_pool(world, key))))


def notes(cfg: MetaConfig, world: World, key: BankKey) -> list[str]:
    """The data sets whose classes are in no task, one line each."""
    return [
        f"no task of the meta-updates has classes of {kind or 'no named data set'}: the teachers know {count} of them, "
        f"a task takes {world.way} of one data set"
        for kind, count in _sizes(cfg, world, key).items()
        if count < world.way
    ]


def check(method: str, cfg: MetaConfig, world: World, key: BankKey) -> None:
    """Raises UsageError where no data set has as many classes as a task takes."""
    most = max(_sizes(cfg, world, key).values())
    if most < world.way:
        raise UsageError(
            f"{method}: a task takes {world.way} classes of one data set, the teachers know {most} of one at most; "
            "lower learner.way, or let tasks mix data sets (mix_data=true, beside the tasks' shot)"
        )


def check_capacity(method: str, cfg: MetaConfig, capacity: int) -> None:
    """Raises UsageError for a bank that could never hold what a task takes of a class."""
    if capacity < cfg.shot + cfg.query:
        raise UsageError(
            f"{method}: tasks take {cfg.shot} + {cfg.query} images of a class, method.bank_capacity is {capacity}; "
            "raise it"
        )


def store(bank: Mapping[str, np.ndarray], task: Arrays, key: BankKey, capacity: int) -> memory.Bank:
    """The bank with the images of a recovered task (`inversion.Inversion.task`) under their classes."""
    found: memory.Bank = dict(bank)
    for local, name in enumerate(task["classes"]):
        found = memory.add(
            found, class_key(name, task["teacher"], key), task["images"][task["labels"] == local], capacity
        )
    return found


def figures(cfg: MetaConfig, world: World, bank: Mapping[str, np.ndarray], key: BankKey) -> Metrics:
    """How many classes a task can be drawn from, how many of the pool lack images for one, and the images in all."""
    filled = set(memory.ready(bank, cfg.shot + cfg.query))
    return {
        "bank/classes": len(ready(cfg, world.way, bank)),
        "bank/missing_classes": len(_of_pool(world, key) - filled),
        "bank/images": sum(len(images) for images in bank.values()),
    }
