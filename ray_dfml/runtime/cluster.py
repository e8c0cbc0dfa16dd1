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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ray_dfml.errors import LearnerLost, RejectedError, ResourceError
from ray_dfml.methods.base import State, World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import host
from ray_dfml.runtime.dispatch import RayBackend, ShardActor, cause
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.ray_environment import IMPORTED_BEFORE, exceptions, ray
from ray_dfml.runtime.shard import Loaded, LoadWeights, pin
from ray_dfml.types import Labelled

PLACEMENT_SECONDS = 180
"""Longest wait for all shards to be placed and to import torch."""

ADDRESS_SECONDS = 20.0
"""Longest wait for somebody to answer at RAY_ADDRESS."""

OBJECT_STORE_BYTES = 512 * 2**20


def connect(workers: int, gpus_per_worker: float) -> bool:
    """Join the cluster of RAY_ADDRESS, or start a private one on this machine, unless this process is connected
    already.

    Returns whether the connection is new, and so the caller's to close. What SIGTERM does here stays as it was. Raises
    ResourceError if there is no cluster, or it is too small.
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
                "object_store_memory": OBJECT_STORE_BYTES,
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
    have = ray.cluster_resources()
    for name, wanted in (("CPU", float(workers)), ("GPU", workers * gpus_per_worker)):
        if wanted > have.get(name, 0.0):
            if new:
                ray.shutdown()
            raise ResourceError(
                f"{workers} shards need {wanted:g} {name}, the cluster has {have.get(name, 0.0):g}; lower --workers"
            )
    return new


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


def start_shards(*, workers: int, gpus_per_worker: float, threads: int) -> list[Any]:
    """Shard actors that Ray restarts for ever; their calls are retried by the dispatcher, which knows what to blame.

    Raises ResourceError where they are not up in time. None is left where they are not, or the wait is broken off.
    """
    shard = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0)(ShardActor)
    device = None if gpus_per_worker else torch.device("cpu")  # Ray hides no GPU from an actor that asks for none
    shards: list[Any] = []
    try:
        shards += [shard.remote(threads=threads, device=device) for _ in range(workers)]
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

    def __init__(self, *, workers: int, gpus_per_worker: float = 0.0, threads: int = 1) -> None:
        self._workers, self._gpus, self._threads = workers, gpus_per_worker, threads
        self._connected = False
        self.shards: list[Any] = []

    def __enter__(self) -> "Cluster":
        try:
            self._connected = connect(self._workers, self._gpus)
            self.shards = start_shards(workers=self._workers, gpus_per_worker=self._gpus, threads=self._threads)
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


class LearnerActor(Trainer):
    """The trainer in its own process, over the driver's shards."""

    def __init__(
        self, config: dict[str, Any], world: World, sets: Sequence[Labelled], backend: RayBackend, threads: int,
        state: State | None,
    ) -> None:  # fmt: skip
        pin(threads)
        super().__init__(config, world, sets, backend, state)


class RaySession:
    """A trainer in the cluster, called by method name. LearnerLost: begin again from a checkpoint."""

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Mapping[str, Loaded],
        cluster: Cluster,
        *,
        threads: int,
        job_seconds: float | None = None,
    ) -> None:
        self._cluster = cluster
        self._learner: Any = None
        cluster.__enter__()
        try:
            backend = cluster.backend(PoolStore(teachers), job_seconds=job_seconds)
            self._arguments = (config, ray.put(world), ray.put(list(sets)), backend, threads)
        except BaseException:
            self.close()
            raise

    def start(self, state: State | None) -> None:
        """A new learner actor, from a state or from the seed."""
        if self._learner is not None:
            ray.kill(self._learner)
        learner = ray.remote(num_cpus=0, max_restarts=0)(LearnerActor)
        self._learner = learner.remote(*self._arguments, None if state is None else ray.put(state))

    def call(self, name: str, *args: Any) -> Any:
        """A trainer method's result. Raises LearnerLost if the actor died, and whatever the method raises."""
        assert self._learner is not None
        try:
            return ray.get(getattr(self._learner, name).remote(*args))
        except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            raise LearnerLost(str(error).splitlines()[0]) from None
        except exceptions.RayTaskError as error:
            raise cause(error) from error

    def close(self) -> None:
        """Stop the actors, and the connection to Ray where it was made here."""
        try:
            if self._learner is not None:
                ray.kill(self._learner)
        finally:
            self._cluster.close()


@contextmanager
def shards_of(workers: int) -> Iterator[RayBackend]:
    """A backend of `workers` shards of one thread and no teachers, for work that needs no pool. Stopped at the end."""
    with Cluster(workers=workers) as cluster:
        yield cluster.backend(no_teachers)
