"""How teachers reach the shards of a cluster: a shard reads them where it sees their pool, else the driver stores them.

A pool in an object store or on a shared disk, of any size, so never passes through the driver.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray_dfml.data.pool import manifest_sha256
from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.runtime.inputs import Teachers
from ray_dfml.runtime.ray_environment import ray
from ray_dfml.runtime.shard import Loaded


class PoolStore:
    """Loads a teacher by its id, in any process of the cluster.

    The teachers in `near` are read from their pool in the process that asks. The others are put in Ray's object store
    here, one by one, and the store spills to disk what it cannot hold. A teacher that could not be read is refused when
    a shard asks for it.
    """

    def __init__(self, teachers: Mapping[str, Loaded], near: Collection[str] = ()) -> None:
        self._near = dict.fromkeys(near, teachers)
        self._refs: dict[str, ray.ObjectRef] = {}
        self._refused: dict[str, str] = {}
        for id in teachers:
            if id in self._near:
                continue
            try:
                self._refs[id] = ray.put(teachers[id])
            except RejectedError as error:
                self._refused[id] = str(error)

    def __call__(self, id: str) -> Loaded:
        if id in self._near:
            return _read(self._near[id], id)
        if id in self._refused:
            raise RejectedError(self._refused[id])
        return ray.get(self._refs[id])


def _read(teachers: Mapping[str, Loaded], id: str) -> Loaded:
    """A teacher from its pool. Raises ResourceError on a node that does not see the pool, as one that joined later."""
    try:
        return teachers[id]
    except RejectedError:
        if isinstance(teachers, Teachers) and not manifest_sha256(teachers.pool_of(id)):
            raise ResourceError(
                f"{teachers.pool_of(id)}: a shard cannot read this pool, and others can; mount it on every node, then "
                "go on with --resume"
            ) from None
        raise


def seen_by(shards: Sequence[Any], teachers: Teachers) -> list[str]:
    """The teachers whose pool every shard reads with the same manifest as this process."""
    pools = list(dict.fromkeys(map(teachers.pool_of, teachers)))
    if not pools:
        return []
    here = [manifest_sha256(pool) for pool in pools]
    found = ray.get([shard.manifests.remote(pools) for shard in shards])
    near = {pool for i, pool in enumerate(pools) if here[i] and all(one[i] == here[i] for one in found)}
    return [id for id in teachers if teachers.pool_of(id) in near]


def through_here(teachers: Teachers, near: Collection[str]) -> list[str]:
    """A line about each pool that shards cannot read."""
    seen = set(near)
    far = dict.fromkeys(teachers.pool_of(id) for id in teachers if id not in seen)
    return [f"{pool}: not every shard can read this pool, so its teachers pass through this process" for pool in far]
