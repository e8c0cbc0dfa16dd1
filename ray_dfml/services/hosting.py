"""A classifier that is served: how much it gives away, and how requests that wait share a forward pass."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.answers import answers
from ray_dfml.core.net import Net, net
from ray_dfml.core.steady import steady_logits
from ray_dfml.data.pool import Pool
from ray_dfml.data.services import Terms
from ray_dfml.errors import UsageError
from ray_dfml.services.counter import Counter
from ray_dfml.types import LEVELS, Access, ImageSpec

OUTPUTS: dict[Access, str] = {"logits": "logits", "probs": "probabilities", "label": "label"}
"""Access -> name of the only output of a model that is served."""
TOGETHER = 4096
"""Images that are answered together at most, unless one request has more."""


class NotFinite(Exception):
    """A model has made NaN or infinity of good images."""


@dataclass(frozen=True, kw_only=True)
class Gives:
    """How much of a classifier is given away."""

    access: Access
    """`label`, `probs` or `logits`."""
    decimals: int | None = None
    """To which probabilities are rounded."""
    top_k: int | None = None
    """How many of the largest probabilities are given; the others are 0."""

    @property
    def output(self) -> str:
        """The name of the output."""
        return OUTPUTS[self.access]

    def check(self, id: str, classes: int) -> None:
        """Raise UsageError unless this can be given of a classifier with so many classes."""
        if self.access != "probs" and (self.decimals, self.top_k) != (None, None):
            raise UsageError(f"decimals and top_k are of probabilities; access is {self.access!r}")
        if self.top_k is not None and self.top_k > classes:
            raise UsageError(f"{id}: top_k is {self.top_k}, and there are {classes} classes")

    def within(self, id: str, terms: Terms) -> "Gives":
        """The same, as coarse as the terms of the pool's entry where it says less. Raises UsageError if it is finer."""
        if self.access != "probs":
            return self
        for name in ("decimals", "top_k"):
            wanted, most = getattr(self, name), getattr(terms, name)
            if wanted is not None and most is not None and wanted > most:
                raise UsageError(f"{id}: its pool gives away {name} {most} and no more, got {wanted}")
        decimals = terms.decimals if self.decimals is None else self.decimals
        return replace(self, decimals=decimals, top_k=terms.top_k if self.top_k is None else self.top_k)


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """A classifier with frozen weights, and what it answers. Outputs beyond its classes take no part."""

    id: str
    image: ImageSpec
    classes: tuple[str, ...]
    gives: Gives
    net: Net
    theta: Tensor
    stats: Tensor

    def answers(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers [n] or [n q] to float32 images [n c h w] in [0, 1], and bool [n]: whether they may be given.

        They may be if the logits are finite. An answer has the same bits whatever else is asked.
        """
        mean, std = (torch.tensor(values) for values in (self.image.mean, self.image.std))
        logits = steady_logits(self.net, self.theta, self.stats, images, mean, std)
        good = torch.isfinite(logits).all(-1).cpu().numpy()
        gives = self.gives
        return answers(logits[:, : len(self.classes)], gives.access, decimals=gives.decimals, top_k=gives.top_k), good


@dataclass(frozen=True, kw_only=True)
class Adapts:
    """A few-shot learner that is served: it makes a classifier of a support."""

    image: ImageSpec
    adapt: Callable[[str, np.ndarray, list[str]], Served]
    """(id, images float32 [n c h w] in [0, 1], n labels) -> the classifier. Raises UsageError for a bad support."""


def from_pool(pool: Pool, id: str, gives: Gives, device: torch.device) -> Served:
    """A teacher of a pool, to be served on a device, no finer than its entry says.

    Raises UsageError for a service, for more than the pool's entry gives away, and for what does not fit it, and
    RejectedError for weights that cannot be used.
    """
    entry = pool.entry(id)
    card = entry.inside
    if entry.api is not None:
        raise UsageError(f"{id}: is a service already; serve a teacher whose weights are in the pool")
    if LEVELS.index(gives.access) < LEVELS.index(card.access):
        raise UsageError(f"{id}: {pool.path} gives away {card.access!r} only; serve it with --access {card.access}")
    gives.check(id, len(card.classes))
    gives = gives.within(id, entry.terms)
    theta, stats = (torch.tensor(part, device=device) for part in pool.load(id))
    network = net(card.arch, card.image.shape, len(card.classes))
    return Served(id=id, image=card.image, classes=card.classes, gives=gives, net=network, theta=theta, stats=stats)


@dataclass(frozen=True, eq=False)
class _Waiting:
    images: np.ndarray
    key: bytes | None
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """Answers requests to one model. Those that came while the model was at work are answered together."""

    def __init__(self, served: Served, counter: Counter, executor: Executor) -> None:
        self.served = served
        self._counter, self._executor = counter, executor
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, images: np.ndarray, key: bytes | None) -> np.ndarray:
        """The answers to float32 images [n c h w] in [0, 1], counted under `key`, if there is one.

        Raises NotFinite, and ResourceError if they cannot be counted.
        """
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(images, key, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft()]
            count = len(batch[0].images)
            while self._waiting and count + len(self._waiting[0].images) <= TOGETHER:
                batch.append(self._waiting.popleft())
                count += len(batch[-1].images)
            try:
                found = await loop.run_in_executor(self._executor, self._answered, batch)
            except Exception as error:
                found = [error] * len(batch)
            for one, answer in zip(batch, found, strict=True):
                if one.answer.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _answered(self, batch: Sequence[_Waiting]) -> list[np.ndarray | Exception]:
        images = np.concatenate([one.images for one in batch])
        self._counter.receive(self.served.id, len(images))
        answered, good = self.served.answers(images)
        ends = np.cumsum([len(one.images) for one in batch])[:-1]
        rows = list(zip(batch, np.split(answered, ends), np.split(good, ends), strict=True))
        self._counter.answer(self.served.id, [(one.key, len(one.images)) for one, _, fine in rows if fine.all()])
        return [
            answer if fine.all() else NotFinite(f"{self.served.id} makes NaN or infinity of these images")
            for _, answer, fine in rows
        ]
