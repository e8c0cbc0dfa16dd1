"""Recovered tasks in the memory bank, for the methods that replay from it ([Wei2024] arXiv 2405.00984, section 4.2)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ray_dfml.core import memory
from ray_dfml.errors import UsageError
from ray_dfml.methods.base import MetaConfig, Metrics, World
from ray_dfml.types import Arrays

BankKey = Literal["class", "teacher"]
"""A bank class is a class name (side information of the cards), or a (teacher, class) pair."""


def check(method: str, cfg: MetaConfig, capacity: int) -> None:
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
        full = name if key == "class" else f"{task['teacher']}#{name}"
        found = memory.add(found, full, task["images"][task["labels"] == local], capacity)
    return found


def figures(cfg: MetaConfig, world: World, bank: Mapping[str, np.ndarray], key: BankKey) -> Metrics:
    """How many classes have images for a task, how many of the pool have not, and the images in all."""
    names = {name if key == "class" else f"{card.id}#{name}" for card in world.cards for name in card.classes}
    ready = memory.ready(bank, cfg.shot + cfg.query)
    return {
        "bank/classes": len(ready),
        "bank/missing_classes": len(names - set(ready)),
        "bank/images": sum(len(images) for images in bank.values()),
    }
