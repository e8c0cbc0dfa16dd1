"""Where all work of a command is done: in this process, or in one cluster, which starts while the command goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.types import Backend

if TYPE_CHECKING:
    from ray_dfml.runtime.cluster import Cluster


class Place:
    """A machine at work. The first call waits until its cluster is up, and raises what its start raised."""

    def __init__(self, cluster: "Callable[[], Cluster] | None") -> None:
        self._cluster = cluster

    def cluster(self) -> "Cluster | None":
        """The cluster, or None if this process does the work."""
        return self._cluster() if self._cluster else None

    def backend(self) -> Backend:
        """A backend for work that needs no pool."""
        cluster = self.cluster()
        return cluster.backend(no_teachers) if cluster else LocalBackend(no_teachers)


@contextmanager
def opened(machine: Machine) -> Iterator[Place]:
    """The place of a machine. Its cluster, if it has one, starts during the `with` block and is stopped at the end."""
    if machine.backend == "local":
        yield Place(None)
        return
    from ray_dfml.runtime.cluster import STORE_BYTES, starting

    with starting(machine.cluster(STORE_BYTES)) as ready:
        yield Place(ready)
