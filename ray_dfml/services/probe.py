"""One question to a service before it enters a pool."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ray_dfml.data.services import Api, Asked
from ray_dfml.services.gateway import Gateway
from ray_dfml.types import Spent


class Probed(NamedTuple):
    """What a probe found out."""

    api: Api
    """The entry's block, with the names, types and ways that the server takes filled in."""
    spent: Spent
    """What the probe cost."""
    answer: np.ndarray
    """The answer to one image of noise: float32 [q], or an int64 label."""
    notes: list[str]
    """What was assumed."""


def probe(asked: Asked, ledger: Path) -> Probed:
    """Ask a service once about a new image of noise, which is charged in the ledger at a path.

    The model's description is compared with the entry first, then the answer is checked as every answer is: its shape,
    the number of classes, finite numbers, probabilities that sum to 1. Nothing is repeated, but in JSON if the server
    does not take binary tensors. Raises UsageError for an entry that cannot be
    carried out, such as one without its key, RejectedError if the service does not fit the entry or cannot be reached,
    and BudgetReached if nothing may be spent.
    """
    image = np.random.default_rng().integers(0, 256, (1, *asked.card.image.shape), np.uint8)
    teacher = asked.card.id
    with Gateway(ledger, [asked], patience=0, tries=1) as gateway:
        before = gateway.totals()[teacher]
        gateway.describe(teacher)
        answer = gateway.ask(teacher, image)[0]
        after = gateway.totals()[teacher]
        api, notes = gateway.reached(teacher)
    spent = Spent(sent=after.sent - before.sent, answered=1, cost=after.cost - before.cost)
    return Probed(api, spent, answer, notes)
