"""What a pool can and cannot train, and what asking its services costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_dfml.core.net import net
from ray_dfml.data.manifest import Entry
from ray_dfml.errors import DfmlError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.runtime.inputs import learner_input

ARCH = "conv4"
"""The learner's default architecture."""


@dataclass(frozen=True)
class Use:
    """How a method with its defaults can use a pool."""

    method: str
    teachers: int
    """How many teachers give the access that the method takes."""
    way: int | None
    """Classes of the learner's tasks; None if the method cannot begin."""
    reason: str
    """Why the method cannot begin, or what it says of the pool."""
    images: int
    """Images that its services are asked about in a whole training."""
    cost: float
    """Money for that, at the prices of the pool."""


def uses(entries: Sequence[Entry]) -> list[Use]:
    """What each data-free method can do with the teachers of `entries`, with default settings. Nothing is asked."""
    return [
        _use(name, method, entries) for name, method in METHODS.items()
        if method.needs_pool and not method.needs_real
    ]  # fmt: skip


def _use(name: str, method: Any, entries: Sequence[Entry]) -> Use:
    taken = [entry for entry in entries if entry.access in method.access]
    if not taken:
        given = " and ".join(sorted({entry.access for entry in entries}))
        return Use(name, 0, None, f"it takes {' or '.join(method.access)}, and the teachers give {given}", 0, 0.0)
    cards = tuple(entry.card for entry in taken)
    cfg = method.Config()
    try:
        unstated = [card.id for card in cards if card.access != "weights"]
        image = learner_input({card.id: card.image for card in cards}, unstated=unstated)
        way = min(len(card.classes) for card in cards)
        net(ARCH, image.shape, way)
        world = World(cards=cards, arch=ARCH, image=image, way=way, seed=0)
        method.init(cfg, world)
        asked = method.queries(cfg, world)
        reason = "; ".join(method.notes(cfg, world))
    except DfmlError as error:
        return Use(name, len(taken), None, str(error), 0, 0.0)
    price = {entry.id: entry.price or 0.0 for entry in taken}
    return Use(
        name, len(taken), way, reason, sum(asked.values()), sum(price[id] * count for id, count in asked.items())
    )  # fmt: skip
