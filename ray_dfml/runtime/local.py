"""The backend and the session of a run that needs no other process."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml.errors import DfmlError
from ray_dfml.methods.base import World
from ray_dfml.runtime import balance
from ray_dfml.runtime.accounts import EXPORTED, Accounts
from ray_dfml.runtime.asking import Desk
from ray_dfml.runtime.learning import CHECKPOINTS, Done, Learning
from ray_dfml.runtime.shard import CACHE_BYTES, Loaded, LoadWeights, Shard, pick_device
from ray_dfml.runtime.stalls import AtWork, Pace
from ray_dfml.types import Arrays, Job, Labelled, Spent


def no_teachers(id: str) -> Loaded:
    """The `load` of a backend for work that needs no pool. It always raises DfmlError, since no job has a teacher."""
    raise DfmlError(f"teacher {id} was asked for by work that has no pool")


class LocalBackend:
    """Runs every job in this process, in order. On a CPU all other backends equal its results bit for bit."""

    def __init__(self, load: LoadWeights, desk: Desk | None = None) -> None:
        self._shard = Shard(load, desk=desk)
        self.notes: list[str] = []
        self._pace = Pace()
        self._working: tuple[str, Sequence[Job], float] | None = None

    def keep(self, value: np.ndarray) -> np.ndarray:
        """See `Backend.keep`. The array is here already."""
        return value

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """See `Backend.map`."""
        balance.check_distinct(jobs)
        chunks = balance.chunks(jobs, 1, CACHE_BYTES) if self._shard.batched else [[job] for job in jobs]
        done: dict[int, Arrays] = {}
        try:
            for chunk in chunks:
                self._working = op, chunk, time.monotonic()
                done |= zip((job.index for job in chunk), self._shard.run(op, chunk, shared), strict=True)
                self._pace.ended(op, chunk, time.monotonic() - self._working[2])
                self.notes += self._shard.news()
        finally:
            self._working = None
        return [done[job.index] for job in jobs]

    def at_work(self) -> list[AtWork]:
        """What this process is at, for another thread."""
        if (working := self._working) is None:
            return []
        op, jobs, since = working
        return [self._pace.at_work(0, op, jobs, time.monotonic() - since)]


class LocalSession:
    """A trainer in this process."""

    notes: Sequence[str] = ()

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Mapping[str, Loaded],
        folder: Path,
        accounts: Accounts,
        *,
        on_device: bool = False,
    ) -> None:
        world = replace(world, device=str(pick_device())) if on_device else world
        self._folder = folder
        self._gateway = accounts.gateway(folder) if accounts.asked else None
        desk = Desk(self._gateway, accounts.by_id) if self._gateway else None
        self._backend = LocalBackend(teachers.__getitem__, desk)
        self._arguments = (config, world, sets, self._backend, folder / CHECKPOINTS)

    def start(self) -> Done:
        """Make a new trainer from the last checkpoint, or from the seed if there is none."""
        self._learning = Learning(*self._arguments)
        return self._learning.begin()

    def call(self, name: str, *args: Any) -> Any:
        """Call a method of the trainer."""
        return self._learning.call(name, *args)

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        """See `Learning.save`."""
        return self._learning.save(rounds, row)

    def spent(self) -> dict[str, Spent]:
        """See `Session.spent`."""
        if self._gateway is None:
            return {}
        self._gateway.export(self._folder / EXPORTED)
        return self._gateway.totals()

    def at_work(self) -> list[AtWork]:
        """See `Session.at_work`."""
        return self._backend.at_work()

    def close(self) -> None:
        """Close the gateway, if there is one; nothing else was started."""
        if self._gateway is not None:
            self._gateway.close()
