"""Ray: the connection to it, the shard actors, and the learner actor.

Only this module, `preflight`, `dispatch`, `ray_gateway` and `ray_teachers` use Ray.

Shards and the learner are plain classes, which are wrapped as actors here. The driver owns the shards and the arrays of
the pool, so that they outlive a learner that dies. The learner sends jobs to the shards.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ray_dfml.errors import LearnerLost, ResourceError
from ray_dfml.files import Uri
from ray_dfml.methods.base import World
from ray_dfml.runtime import host, preflight
from ray_dfml.runtime.accounts import EXPORTED, Accounts
from ray_dfml.runtime.asking import Desk
from ray_dfml.runtime.dispatch import RayBackend, ShardActor, cause
from ray_dfml.runtime.inputs import Teachers
from ray_dfml.runtime.learning import CHECKPOINTS, Done, Learning
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.ray_environment import IMPORTED_BEFORE, OnNode, exceptions, keeping_sigterm, ray
from ray_dfml.runtime.ray_gateway import RayGateway
from ray_dfml.runtime.ray_metrics import RunMetrics
from ray_dfml.runtime.ray_teachers import PoolStore, seen_by, through_here
from ray_dfml.runtime.shard import LoadWeights, cap_memory, pick_device, pin
from ray_dfml.runtime.stalls import BOARD, AtWork, Board
from ray_dfml.types import Labelled, Spent

PLACEMENT_SECONDS = 180
"""Longest wait for all shards to be placed and to import torch."""

ADDRESS_SECONDS = 20.0
"""Longest wait for an answer at RAY_ADDRESS."""

STORE_BYTES = 512 * 2**20
"""Size of a private cluster's object store for work without a pool. A run gets as much beside what it will hold."""

LEAST_STORE_BYTES = 80 * 2**20
"""The smallest object store that Ray accepts."""


def connect(
    workers: int, gpus_per_worker: float, gpus_per_learner: float = 0.0, *, store_bytes: int = STORE_BYTES
) -> bool:
    """Join the cluster of RAY_ADDRESS, or start a private one on this machine. A connected process stays as it is.

    A private cluster has an object store of `store_bytes`, or as much as this machine can give. Returns whether the
    connection is new; then the caller must close it. The handler of SIGTERM stays as it was. Raises ResourceError if
    there is no cluster, or if it is too small.
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
        try:
            with keeping_sigterm():
                ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ResourceError(f"cannot reach or start Ray: {reason}; check RAY_ADDRESS") from None
    try:
        _check_size(workers, gpus_per_worker, gpus_per_learner)
    except ResourceError:
        if new:
            ray.shutdown()
        raise
    return new


def store_size(wanted: int) -> int:
    """Size in bytes of a private cluster's object store.

    It is what is wanted, but at most 3/10 of the memory and 9/10 of the free shared memory. The store spills to disk
    what it cannot hold.
    """
    return max(min(wanted, 3 * host.memory() // 10, 9 * host.shared_memory() // 10), LEAST_STORE_BYTES)


def examine(
    *, workers: int, gpus_per_worker: float, storage: Path | Uri | None, seconds: float
) -> list[preflight.Finding]:  # fmt: skip
    """Join a cluster, or start a private one, and look whether it is fit for a run of so many shards.

    Room for the shards is waited for up to `seconds`, since nodes may be on their way. Raises ResourceError if there
    is no cluster.
    """
    connected, until = connect(0, 0.0), time.monotonic() + seconds
    try:
        while True:
            try:
                _check_size(workers, gpus_per_worker, 0.0)
                room = preflight.Finding("resources", True, f"room for {workers} shards")
                break
            except ResourceError as error:
                room = preflight.Finding("resources", False, str(error))
                if time.monotonic() >= until:
                    break
                time.sleep(1.0)
        return [room, *preflight.examine(storage)]
    finally:
        if connected:
            ray.shutdown()


def _check_size(workers: int, gpus_per_worker: float, gpus_per_learner: float) -> None:
    """Raise ResourceError if the cluster lacks the CPUs or GPUs that shards and learner ask for."""
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
    """Raise ResourceError if RAY_ADDRESS is not the address of a cluster's head, or if nobody answers there."""
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


def start_shards(*, workers: int, gpus_per_worker: float) -> list[Any]:
    """Start shard actors. Ray restarts them without limit; the dispatcher repeats their calls, as it counts strikes.

    Raises ResourceError if they are not up in time. If this fails or is interrupted, no shard is left.
    """
    shard = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0)(ShardActor)
    device = None if gpus_per_worker else torch.device("cpu")  # Ray hides no GPU from an actor that asks for none
    shards: list[Any] = []
    try:
        shards += [shard.remote(device=device, share=gpus_per_worker) for _ in range(workers)]
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
        raise ResourceError(f"a shard did not start: {str(error).strip().splitlines()[-1]}") from None
    return shards


class Cluster:
    """A connection to Ray, and shards in it. It is a context manager.

    When it ends, and also when it cannot start, everything that it started is stopped.
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
            if self._connected and os.environ.get("RAY_ADDRESS"):
                preflight.announce()
            self.shards = start_shards(workers=self._workers, gpus_per_worker=self._gpus)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the shards, and close the connection if it was made here. A second call does nothing."""
        shards, self.shards = self.shards, []
        connected, self._connected = self._connected, False
        try:
            for one in shards:
                ray.kill(one)
        finally:
            if connected:
                ray.shutdown()

    def backend(
        self, load: LoadWeights, desk: Desk | None = None, *, job_seconds: float | None = None,
        board: Board | None = None,
    ) -> RayBackend:  # fmt: skip
        """A backend over the shards, which get their teachers through `load` and ask others at `desk`."""
        return RayBackend(
            self.shards, ray.put((load, desk)), batched=self._gpus > 0, job_seconds=job_seconds, board=board
        )  # fmt: skip


@contextmanager
def starting(cluster: Cluster) -> Iterator[Callable[[], Cluster]]:
    """Start a cluster while the `with` block does other work. The cluster is stopped at the end of the block.

    The block gets a function that waits until the cluster is up and returns it, or raises what its start raised.
    """
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
        share: float,
    ) -> None:  # fmt: skip
        """`share` is the learner's own of an accelerator; with 0 it computes on the CPU."""
        pin()
        cap_memory(share)
        world = replace(world, device=str(pick_device())) if share else world
        super().__init__(config, world, sets, backend, checkpoints)


class RaySession:
    """A session whose learner is an actor in a cluster. After LearnerLost the learner can be started again.

    If the cluster is already up, it is used and left running; otherwise it is started here and closed with the session.
    The learner is placed on the driver's node, so that a path means the same place for both.
    """

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Teachers,
        folder: Path,
        accounts: Accounts,
        cluster: Cluster,
        *,
        job_seconds: float | None = None,
    ) -> None:
        self._cluster, self._own, self._folder = cluster, not cluster.shards, folder
        self._board = Board(folder / BOARD)
        self._learner: Any = None
        self._gateway: RayGateway | None = None
        self.notes: Sequence[str] = ()
        if self._own:
            cluster.__enter__()
        try:
            self._metrics = RunMetrics(folder.name)
            if accounts.asked:
                self._gateway = RayGateway.start(accounts, folder, _node())
            desk = Desk(self._gateway, accounts.by_id) if self._gateway else None
            near = seen_by(cluster.shards, teachers)
            self.notes = through_here(teachers, near)
            backend = cluster.backend(PoolStore(teachers, near), desk, job_seconds=job_seconds, board=self._board)
            kept = [replace(one, images=backend.keep(one.images)) for one in sets]
            self._arguments = (
                config, ray.put(world), kept, backend, folder / CHECKPOINTS, cluster.gpus_per_learner
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def start(self) -> Done:
        """Start a new learner actor from the last checkpoint, or from the seed if there is none.

        Raises ResourceError if there is no room for it, and RejectedError for a checkpoint that cannot be read.
        """
        if self._learner is not None:
            ray.kill(self._learner)
        self._board.clear()  # of a process that was killed while jobs were at work
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
        """Call a method of the trainer. Raises LearnerLost if the actor died, and whatever the method raises."""
        return self._ask("call", name, *args)

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        """See `Learning.save`. Raises LearnerLost if the actor died."""
        done: Done = self._ask("save", rounds, row)
        self._metrics.round(rounds, row, len(done.rejected))
        return done

    def spent(self) -> dict[str, Spent]:
        """See `Session.spent`."""
        if self._gateway is None:
            return {}
        self._gateway.export(self._folder / EXPORTED)
        totals = self._gateway.totals()
        self._metrics.spent(totals)
        return totals

    def at_work(self) -> list[AtWork]:
        """See `Session.at_work`."""
        return self._board.read()

    def _ask(self, verb: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._learner, verb).remote(*args))
        except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            raise LearnerLost(str(error).splitlines()[0]) from None
        except exceptions.RayTaskError as error:
            raise cause(error) from error

    def close(self) -> None:
        """Stop the learner, the gateway, and the cluster if it was started here."""
        try:
            if self._learner is not None:
                ray.kill(self._learner)
            if self._gateway is not None:
                self._gateway.close()
            self._board.clear()
        finally:
            if self._own:
                self._cluster.close()


@contextmanager
def shards_of(workers: int) -> Iterator[RayBackend]:
    """A backend of `workers` shards for work that needs no teachers. The shards are stopped at the end of the block."""
    with Cluster(workers=workers) as cluster:
        yield cluster.backend(no_teachers)
