"""The backend of one process, and a session on it with the interface of the cluster's."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_dfml.errors import DfmlError
from ray_dfml.methods.base import State, World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import balance
from ray_dfml.runtime.shard import CACHE_BYTES, Loaded, LoadWeights, Shard
from ray_dfml.types import Arrays, Job, Labelled


def no_teachers(id: str) -> Loaded:
    """The `load` of a backend for work that needs no pool. Raises DfmlError: nothing there asks for a teacher."""
    raise DfmlError(f"teacher {id} was asked for by work that has no pool")


class LocalBackend:
    """Runs every job here, in order, on one shard: the reference that all other backends equal bit for bit on a CPU."""

    def __init__(self, load: LoadWeights, *, threads: int = 1) -> None:
        self._shard = Shard(load, threads=threads)

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """See `Backend.map`."""
        balance.check_distinct(jobs)
        if not self._shard.batched:
            return [result for job in jobs for result in self._shard.run(op, [job], shared)]
        done: dict[int, Arrays] = {}
        for chunk in balance.chunks(jobs, 1, CACHE_BYTES):
            done |= zip((job.index for job in chunk), self._shard.run(op, chunk, shared), strict=True)
        return [done[job.index] for job in jobs]


class LocalSession:
    """A trainer in this process."""

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Mapping[str, Loaded],
        *,
        threads: int,
    ) -> None:
        self._arguments = (config, world, sets, LocalBackend(teachers.__getitem__, threads=threads))

    def start(self, state: State | None) -> None:
        """A new trainer, from a state or from the seed."""
        self._trainer = Trainer(*self._arguments, state)

    def call(self, name: str, *args: Any) -> Any:
        """A trainer method's result."""
        return getattr(self._trainer, name)(*args)

    def close(self) -> None:
        """Nothing to stop."""
