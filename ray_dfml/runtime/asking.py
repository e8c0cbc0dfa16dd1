"""Teachers as an op asks them: a service behind HTTP, or a model of this machine that is only asked.

Both go through the gateway, which alone counts queries and keeps answers, so that a job that runs twice pays once.
"""

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ray_dfml.data.services import Asked
from ray_dfml.services.ledger import content_hashes
from ray_dfml.types import Gateway, TeacherCard, size_text


@dataclass(frozen=True)
class Desk:
    """Whom a shard may ask, and the gateway through which it asks."""

    gateway: Gateway
    asked: Mapping[str, Asked] = field(default_factory=dict)
    """Teacher id -> what the gateway knows of the teacher."""


class Answering(Protocol):
    """What computes the answers of models on this machine: the shard."""

    def answers(self, asked: Asked, images: np.ndarray) -> np.ndarray:
        """The answers to images, which the ledger has counted."""
        ...


_ANSWERING: weakref.WeakValueDictionary[int, Answering] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enter(one: Answering) -> int:
    """The number by which proxies find what computes their answers, as long as it lives."""
    number = next(_numbers)
    _ANSWERING[number] = one
    return number


class RemoteService:
    """A service behind HTTP. The gateway sends the images."""

    __slots__ = ("_desk", "card")

    def __init__(self, card: TeacherCard, desk: Desk) -> None:
        self.card, self._desk = card, desk

    def query(self, images: np.ndarray) -> np.ndarray:
        """See `types.Service.query`."""
        _check(self.card, images)
        return self._desk.gateway.ask(self.card.id, images) if len(images) else _none(self.card)


class WrappedModel:
    """A model of this machine that is only asked.

    It holds the number of the shard that has the model, and neither shard nor model, so that nothing that can be
    reached from it is a weight.
    """

    __slots__ = ("_asked", "_gateway", "_number", "card")

    def __init__(self, asked: Asked, desk: Desk, number: int) -> None:
        self.card, self._asked, self._gateway, self._number = asked.card, asked, desk.gateway, number

    def query(self, images: np.ndarray) -> np.ndarray:
        """See `types.Service.query`. The ledger counts the images before their answers are computed."""
        _check(self.card, images)
        if not len(images):
            return _none(self.card)
        claim = self._gateway.claim(self.card.id, content_hashes(self._asked, images))
        if not claim.id:
            return claim.join()
        new = _ANSWERING[self._number].answers(self._asked, images[claim.missing])
        self._gateway.settle(claim.id, new)
        return claim.join(new)


def _none(card: TeacherCard) -> np.ndarray:
    return np.empty(0, np.int64) if card.access == "label" else np.empty((0, len(card.classes)), np.float32)


def _check(card: TeacherCard, images: np.ndarray) -> None:
    """Raise ValueError unless images are [n c h w] of the teacher's size, uint8 or float32 in [0, 1]."""
    if images.ndim != 4 or images.shape[1:] != card.image.shape:
        raise ValueError(
            f"{card.id}: takes images [n c h w] of {size_text(card.image.shape)}, was asked about an array of "
            f"{size_text(images.shape)}"
        )
    if images.dtype == np.uint8:
        return
    if images.dtype != np.float32 or (images.size and not (images.min() >= 0 and images.max() <= 1)):
        raise ValueError(f"{card.id}: takes uint8 images, or float32 ones in [0, 1]")
