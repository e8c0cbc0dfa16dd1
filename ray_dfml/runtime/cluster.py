"""Ray: a connection to it, shard actors, and the learner actor. With `dispatch` the only code that knows of them.

Shards and the learner are plain classes wrapped here. The driver owns the shards and the pool's arrays, so that they
outlive a learner that dies; the learner dispatches jobs to the shards and puts shared values in the object store once
per call.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ray_dfml.errors import LearnerLost, RejectedError, ResourceError
from ray_dfml.methods.base import World
from ray_dfml.runtime import host
from ray_dfml.runtime.dispatch import RayBackend, ShardActor, cause
from ray_dfml.runtime.learning import Done, Learning
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.ray_environment import IMPORTED_BEFORE, OnNode, exceptions, ray
from ray_dfml.runtime.shard import Loaded, LoadWeights, pick_device, pin
from ray_dfml.types import Labelled

PLACEMENT_SECONDS = 180
"""Longest wait for all shards to be placed and to import torch."""

ADDRESS_SECONDS = 20.0
"""Longest wait for somebody to answer at RAY_ADDRESS."""

STORE_BYTES = 512 * 2**20
"""Object store of a private cluster for work without a pool, and room beside what a run is known to hold."""

LEAST_STORE_BYTES = 80 * 2**20
"""Ray takes no smaller one."""


def connect(
    workers: int, gpus_per_worker: float, gpus_per_learner: float = 0.0, *, store_bytes: int = STORE_BYTES
) -> bool:
    """Join the cluster of RAY_ADDRESS, or start a private one on this machine, unless this process is connected
    already.

    A private one has an object store of `store_bytes`, or as much as this machine can give. Returns whether the
    connection is new, and so the caller's to close. What SIGTERM does here stays as it was. Raises ResourceError if
    there is no cluster, or it is too small.
    """
    new = not ray.is_initialized()
    if new:
        address = os.environ.get("RAY_ADDRESS", "")
        _check_address(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not address:
            if IMPORTED_BEFORE:
                print("ray was imported before ray_dfml: its own settings of authentication hold", file=sys.stderr)
            options |= {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": host.processors(),
                "object_store_memory": store_size(store_bytes),
            }
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ResourceError(f"cannot reach or start Ray: {reason}; check RAY_ADDRESS") from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
    try:
        _check_size(workers, gpus_per_worker, gpus_per_learner)
    except ResourceError:
        if new:
            ray.shutdown()
        raise
    return new


def store_size(wanted: int) -> int:
    """Bytes of the object store of a private cluster: what is wanted, in at most 3/10 of the memory and 9/10 of what is
    free where processes share arrays. It spills to disk what it cannot hold."""
    return max(min(wanted, 3 * host.memory() // 10, 9 * host.shared_memory() // 10), LEAST_STORE_BYTES)


def _check_size(workers: int, gpus_per_worker: float, gpus_per_learner: float) -> None:
    """Raises ResourceError for a cluster that lacks what shards and learner ask for."""
    have, gpus = ray.cluster_resources(), workers * gpus_per_worker + gpus_per_learner
    learner = f" and a learner of {gpus_per_learner:g} GPU" if gpus_per_learner else ""
    for name, wanted in (("CPU", float(workers)), ("GPU", gpus)):
        if wanted > have.get(name, 0.0):
            raise ResourceError(
                f"{workers} shards{learner} need {wanted:g} {name}, the cluster has {have.get(name, 0.0):g}; "
                "lower --workers"
            )
    if gpus_per_learner:
        here = sum(node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["NodeID"] == _node())
        if gpus_per_learner > here:
            raise ResourceError(
                f"--gpus-per-learner {gpus_per_learner:g}: the learner runs on the node of this command, which has "
                f"{here:g} GPU; start the command on a node with one, or leave the option out"
            )


def _node() -> str:
    """The node of this process."""
    return ray.get_runtime_context().get_node_id()


def _check_address(address: str) -> None:
    """Raises ResourceError for a RAY_ADDRESS that is not of a cluster's head, and where nobody answers."""
    if address in ("", "auto", "local"):
        return
    what = "a run joins a cluster at its head's HOST:PORT, such as 10.0.0.1:6379"
    name, _, port = address.rpartition(":")
    if "://" in address:
        raise ResourceError(
            f"RAY_ADDRESS={address} is not the address of a cluster's head: {what}; to start a run through the "
            "dashboard use `ray job submit -- ray-dfml train ...`, and unset RAY_ADDRESS to run on this machine"
        )
    if not name or not port.isdigit():
        raise ResourceError(f"RAY_ADDRESS={address} has no port: {what}; unset it to run on this machine")
    try:
        socket.create_connection((name.strip("[]"), int(port)), timeout=ADDRESS_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"RAY_ADDRESS={address}: nobody answers there ({getattr(error, 'strerror', None) or error}); start the "
            "cluster, correct the address, or unset it to run on this machine"
        ) from None


class PoolStore:
    """Teachers in the object store; calling it with an id is a shard's way to load one.

    They are put there one by one, and the store spills to disk what it cannot hold. A teacher that can no longer be
    read is refused when it is asked for.
    """

    def __init__(self, teachers: Mapping[str, Loaded]) -> None:
        self._refs: dict[str, ray.ObjectRef] = {}
        self._refused: dict[str, str] = {}
        for id in teachers:
            try:
                self._refs[id] = ray.put(teachers[id])
            except RejectedError as error:
                self._refused[id] = str(error)

    def __call__(self, id: str) -> Loaded:
        if id in self._refused:
            raise RejectedError(self._refused[id])
        return ray.get(self._refs[id])


def start_shards(*, workers: int, gpus_per_worker: float) -> list[Any]:
    """Shard actors that Ray restarts for ever; their calls are retried by the dispatcher, which knows what to blame.

    Raises ResourceError where they are not up in time. None is left where they are not, or the wait is broken off.
    """
    shard = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0)(ShardActor)
    device = None if gpus_per_worker else torch.device("cpu")  # Ray hides no GPU from an actor that asks for none
    shards: list[Any] = []
    try:
        shards += [shard.remote(device=device) for _ in range(workers)]
        ray.get([one.__ray_ready__.remote() for one in shards], timeout=PLACEMENT_SECONDS)
    except BaseException as error:
        for one in shards:
            ray.kill(one)
        if not isinstance(error, exceptions.GetTimeoutError | exceptions.RayError):
            raise
        free = {name: round(n, 2) for name, n in ray.available_resources().items() if name in ("CPU", "GPU")}
        if isinstance(error, exceptions.GetTimeoutError):
            raise ResourceError(
                f"{workers} shards of 1 CPU and {gpus_per_worker:g} GPU did not start in {PLACEMENT_SECONDS} s, the "
                f"cluster has {free} free; lower --workers or wait for other work to end"
            ) from None
        raise ResourceError(f"a shard did not start: {' '.join(str(error).split())}") from None
    return shards


class Cluster:
    """A connection to Ray and shards in it. A context manager.

    When it ends, or cannot begin, nothing that it started is left.
    """

    def __init__(
        self, *, workers: int, gpus_per_worker: float = 0.0, gpus_per_learner: float = 0.0,
        store_bytes: int = STORE_BYTES,
    ) -> None:  # fmt: skip
        self.gpus_per_learner = gpus_per_learner
        self._workers, self._gpus, self._store_bytes = workers, gpus_per_worker, store_bytes
        self._connected = False
        self.shards: list[Any] = []

    def __enter__(self) -> "Cluster":
        try:
            self._connected = connect(self._workers, self._gpus, self.gpus_per_learner, store_bytes=self._store_bytes)
            self.shards = start_shards(workers=self._workers, gpus_per_worker=self._gpus)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the shards, and the connection where it was made here. Harmless when done twice."""
        shards, self.shards = self.shards, []
        connected, self._connected = self._connected, False
        try:
            for one in shards:
                ray.kill(one)
        finally:
            if connected:
                ray.shutdown()

    def backend(self, load: LoadWeights, *, job_seconds: float | None = None) -> RayBackend:
        """A backend over the shards, which get their teachers through `load`."""
        return RayBackend(self.shards, ray.put(load), batched=self._gpus > 0, job_seconds=job_seconds)


@contextmanager
def starting(cluster: Cluster) -> Iterator[Callable[[], Cluster]]:
    """Start a cluster beside other work: what this gives waits until it is up, and raises what its start raised. It is
    stopped at the end."""
    with ThreadPoolExecutor(1) as thread:
        start = thread.submit(cluster.__enter__)
        try:
            yield start.result
        finally:
            wait([start])
            cluster.close()


class LearnerActor(Learning):
    """The learner in its own process, over the driver's shards."""

    def __init__(
        self, config: dict[str, Any], world: World, sets: Sequence[Labelled], backend: RayBackend, checkpoints: Path,
        on_device: bool,
    ) -> None:  # fmt: skip
        pin()
        world = replace(world, device=str(pick_device())) if on_device else world
        super().__init__(config, world, sets, backend, checkpoints)


class RaySession:
    """A learner in a cluster, called by method name. LearnerLost: start it again.

    A cluster that is up already is used and left; another one is started, and closed with the session. The learner is
    placed on the driver's node, so that a path means one place for both.
    """

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Mapping[str, Loaded],
        checkpoints: Path,
        cluster: Cluster,
        *,
        job_seconds: float | None = None,
    ) -> None:
        self._cluster, self._own = cluster, not cluster.shards
        self._learner: Any = None
        if self._own:
            cluster.__enter__()
        try:
            backend = cluster.backend(PoolStore(teachers), job_seconds=job_seconds)
            kept = [replace(one, images=backend.keep(one.images)) for one in sets]
            self._arguments = (
                config, ray.put(world), kept, backend, checkpoints, cluster.gpus_per_learner > 0
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def start(self) -> Done:
        """A new learner actor, from the last checkpoint or from the seed. Raises ResourceError where there is no room
        for it, RejectedError for a checkpoint that cannot be read."""
        if self._learner is not None:
            ray.kill(self._learner)
        gpus = self._cluster.gpus_per_learner
        learner: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(LearnerActor)
        here = OnNode(_node(), soft=False)
        self._learner = learner.options(scheduling_strategy=here).remote(*self._arguments)
        try:
            ray.get(self._learner.__ray_ready__.remote(), timeout=PLACEMENT_SECONDS)
        except exceptions.GetTimeoutError:
            raise ResourceError(
                f"the learner, with {gpus:g} GPU on this node, did not start in {PLACEMENT_SECONDS} s; wait for other "
                "work to end, or lower --gpus-per-learner"
            ) from None
        except exceptions.RayActorError as error:
            raise LearnerLost(str(error).splitlines()[0]) from None
        return self._ask("begin")

    def call(self, name: str, *args: Any) -> Any:
        """A trainer method's result. Raises LearnerLost if the actor died, and whatever the method raises."""
        return self._ask("call", name, *args)

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        """See `Learning.save`. Raises LearnerLost if the actor died."""
        return self._ask("save", rounds, row)

    def _ask(self, verb: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._learner, verb).remote(*args))
        except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            raise LearnerLost(str(error).splitlines()[0]) from None
        except exceptions.RayTaskError as error:
            raise cause(error) from error

    def close(self) -> None:
        """Stop the learner, and the cluster where it was started here."""
        try:
            if self._learner is not None:
                ray.kill(self._learner)
        finally:
            if self._own:
                self._cluster.close()


@contextmanager
def shards_of(workers: int) -> Iterator[RayBackend]:
    """A backend of `workers` shards of one thread and no teachers, for work that needs no pool. Stopped at the end."""
    with Cluster(workers=workers) as cluster:
        yield cluster.backend(no_teachers)
