"""The Ray backend: shard actors, the learner actor, and the only code that knows of them.

Shards and the learner are plain classes wrapped here. The driver owns the shards and the pool's arrays, so that they
outlive a learner that dies; the learner dispatches jobs to the shards and puts shared values in the object store once
per call. Delivery is at least once: a shard that dies is restarted by Ray, and the job it held is sent again. Ops
depend on (job, shared) only, so a job that ran twice gives the same bits.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ray_dfml.errors import LearnerLost, RejectedError, ResourceError
from ray_dfml.methods.base import State, World
from ray_dfml.pipeline import Labelled, Trainer
from ray_dfml.runtime import balance
from ray_dfml.runtime.ray_environment import exceptions, ray
from ray_dfml.runtime.shard import CACHE_BYTES, Loaded, Shard, pin
from ray_dfml.types import Arrays, Job

STRIKES = 2
"""A job whose process died this often is given up: its teacher is rejected."""

IN_FLIGHT = 2
"""Jobs queued per shard: the next one is there when the last one ends."""

WAKE_SECONDS = 0.1
"""Between two questions whether a shard that died is up again. Until it is, Ray fails every call to it at once."""

PLACEMENT_SECONDS = 180
"""Longest wait for all shards to be placed and to import torch."""

OBJECT_STORE_BYTES = 512 * 2**20


def connect(workers: int, gpus_per_worker: float) -> bool:
    """Join the cluster of RAY_ADDRESS, or start a private one on this machine, unless this process is connected
    already.

    Returns whether the connection is new, and so the caller's to close. Raises ResourceError if the cluster is too
    small.
    """
    new = not ray.is_initialized()
    if new:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(f"cannot reach or start Ray: {str(error).splitlines()[0]}; check RAY_ADDRESS") from None
    have = ray.cluster_resources()
    for name, wanted in (("CPU", float(workers)), ("GPU", workers * gpus_per_worker)):
        if wanted > have.get(name, 0.0):
            if new:
                ray.shutdown()
            raise ResourceError(
                f"{workers} shards need {wanted:g} {name}, the cluster has {have.get(name, 0.0):g}; lower --workers"
            )
    return new


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


def start_shards(store: PoolStore, *, workers: int, gpus_per_worker: float, threads: int) -> list[Any]:
    """Shard actors that Ray restarts for ever; their calls are retried by the dispatcher, which knows what to blame."""
    shard = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0)(Shard)
    device = None if gpus_per_worker else torch.device("cpu")  # Ray hides no GPU from an actor that asks for none
    shards: list[Any] = [shard.remote(store, threads=threads, device=device) for _ in range(workers)]
    try:
        ray.get([one.__ray_ready__.remote() for one in shards], timeout=PLACEMENT_SECONDS)
    except exceptions.GetTimeoutError:
        for one in shards:
            ray.kill(one)
        free = {name: round(n, 2) for name, n in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise ResourceError(
            f"{workers} shards of 1 CPU and {gpus_per_worker:g} GPU did not start in {PLACEMENT_SECONDS} s, the "
            f"cluster has {free} free; lower --workers or wait for other work to end"
        ) from None
    return shards


class RayBackend:
    """`Backend` over shard actors: dynamic dispatch, costly work first, results in job order, lost jobs sent again.

    A shard that works on a chunk for longer than `job_seconds` is killed, as if it had died of it; None for no limit.
    """

    def __init__(self, shards: Sequence[Any], *, batched: bool, job_seconds: float | None = None) -> None:
        self.shards = list(shards)
        self.batched = batched
        self.job_seconds = job_seconds
        self.waking: set[int] = set()

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """See `Backend.map`. Raises ResourceError when no shard is left, and whatever an op raises."""
        if self.batched:
            waiting = balance.chunks(jobs, len(self.shards), CACHE_BYTES)
        else:
            waiting = [[job] for job in balance.longest_first(jobs)]
        done = _Dispatch(self, op, waiting, ray.put(shared)).run(len(jobs))
        return [done[job.index] for job in jobs]


class _Dispatch:
    """One call of `map`: chunks of jobs that wait, those that shards have, and what came back.

    The first chunk in a shard's queue is the one at work. When its process dies each of its jobs gets a strike, if the
    shard has answered in this call: one that had died before takes its first chunk with it, unseen. A job with a strike
    is sent alone to a shard that has answered, and nothing is queued with it, so that a second strike is its own.
    """

    def __init__(self, backend: RayBackend, op: str, waiting: Iterable[Sequence[Job]], shared: "ray.ObjectRef") -> None:
        self._backend, self._op, self._shared = backend, op, shared
        self._waiting = deque(waiting)
        self._flying: dict[ray.ObjectRef, tuple[int, Sequence[Job]]] = {}
        self._load: dict[int, list[ray.ObjectRef]] = {i: [] for i in range(len(backend.shards))}
        self._since: dict[int, float] = {}
        self._done: dict[int, Arrays] = {}
        self._strikes: dict[int, int] = {}
        self._late: set[int] = set()
        self._answered: set[int] = set()

    def run(self, count: int) -> dict[int, Arrays]:
        """Results of `count` jobs by their index."""
        for i in tuple(self._backend.waking):
            self._wake(i)
        self._fill()
        while len(self._done) < count:
            results_first = sorted(self._flying, key=lambda ref: not self._flying[ref][1])
            ready, _ = ray.wait(results_first, num_returns=1, timeout=self._patience())
            for ref in ready:
                self._receive(ref)
            self._kill_late()
            self._fill()
        return self._done

    def _receive(self, ref: "ray.ObjectRef") -> None:
        i, chunk = self._flying[ref]
        try:
            results = ray.get(ref)
            self._answered.add(i)
            if chunk:
                self._done.update((job.index, result) for job, result in zip(chunk, results, strict=True))
            else:
                self._backend.waking.discard(i)
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            self._lost(i, ref, error)
            if not self._load:
                raise ResourceError(f"no shard is left: {str(error).splitlines()[0]}") from None
        except exceptions.ObjectLostError:  # the call ended, but its result went with its node
            self._waiting.extendleft([job] for job in reversed(chunk))
            if not chunk:
                self._backend.waking.discard(i)
        except exceptions.RayTaskError as error:
            raise _cause(error) from error
        del self._flying[ref]
        if ref in self._load.get(i, []):
            self._load[i].remove(ref)
            self._since[i] = time.monotonic()

    def _ahead(self, i: int) -> float:
        return sum(job.cost for ref in self._load[i] for job in self._flying[ref][1])

    def _suspect(self, chunk: Sequence[Job]) -> bool:
        return any(job.index in self._strikes for job in chunk)

    def _fill(self) -> None:
        """Send the next chunks where the least is ahead of them."""
        for depth in range(1, IN_FLIGHT + 1):
            for i in sorted(self._load, key=self._ahead):
                queue = self._load[i]
                if not self._waiting or i in self._backend.waking or len(queue) >= depth:
                    continue
                suspect = self._suspect(self._waiting[0])
                if queue and (suspect or self._suspect(self._flying[queue[-1]][1])):
                    continue
                if suspect and i not in self._answered:
                    self._wake(i)
                    continue
                chunk = self._waiting.popleft()
                if not queue:
                    self._since[i] = time.monotonic()
                ref = self._backend.shards[i].run.remote(self._op, list(chunk), self._shared)
                self._flying[ref] = (i, chunk)
                queue.append(ref)

    def _wake(self, i: int) -> None:
        self._backend.waking.add(i)
        self._flying[self._backend.shards[i].__ray_ready__.remote()] = (i, ())

    def _lost(self, i: int, ref: "ray.ObjectRef", error: Exception) -> None:
        """Shard `i` died, or is not up again: whatever ran gets a strike once, what was queued is sent again."""
        queue, chunk = self._load.get(i, []), self._flying[ref][1]
        if queue and i not in self._backend.waking and i in self._answered:
            for job in self._flying[queue[0]][1]:
                self._strikes[job.index] = self._strikes.get(job.index, 0) + 1
            self._answered.clear()  # what killed this shard may have killed others: ask them before the next suspect
        for job in reversed(chunk):
            if self._strikes.get(job.index, 0) >= STRIKES and len(chunk) == 1:
                late = f" or took longer than {self._backend.job_seconds:g} s," if job.index in self._late else ""
                self._done[job.index] = {"rejected": f"its process died{late} {STRIKES} times"}
            else:
                self._waiting.appendleft([job])
        if isinstance(error, exceptions.ActorDiedError):
            self._load.pop(i, None)
        elif i in self._load and (i not in self._backend.waking or not chunk):
            time.sleep(WAKE_SECONDS if i in self._backend.waking else 0.0)
            self._wake(i)

    def _working(self) -> list[int]:
        return [i for i, queue in self._load.items() if queue and i not in self._backend.waking]

    def _patience(self) -> float | None:
        """Seconds until the first shard at work is late; None if none can be."""
        limit, working = self._backend.job_seconds, self._working()
        if limit is None or not working:
            return None
        return max(0.0, min(self._since[i] for i in working) + limit - time.monotonic())

    def _kill_late(self) -> None:
        """End the process of each shard that is late; Ray starts it again, and its calls fail as those of any death."""
        now, limit = time.monotonic(), self._backend.job_seconds
        if limit is None:
            return
        for i in self._working():
            if now - self._since[i] >= limit:
                self._late |= {job.index for job in self._flying[self._load[i][0]][1]}
                self._since[i] = now
                self._answered.add(i)  # it was up until here
                ray.kill(self._backend.shards[i], no_restart=False)


def _cause(error: exceptions.RayTaskError) -> Exception:
    """What the remote code raised: its message is one line, Ray's holds a traceback."""
    return error.cause if isinstance(error.cause, Exception) else error


class LearnerActor(Trainer):
    """The trainer in its own process, over the driver's shards."""

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        shards: Sequence[Any],
        batched: bool,
        job_seconds: float | None,
        threads: int,
        state: State | None,
    ) -> None:
        pin(threads)
        backend = RayBackend(shards, batched=batched, job_seconds=job_seconds)
        super().__init__(config, world, sets, backend, state)


class RaySession:
    """A trainer in the cluster, called by method name. LearnerLost: begin again from a checkpoint."""

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        sets: Sequence[Labelled],
        teachers: Mapping[str, Loaded],
        *,
        workers: int,
        gpus_per_worker: float,
        threads: int,
        job_seconds: float | None = None,
    ) -> None:
        self._connected = connect(workers, gpus_per_worker)
        self._store = PoolStore(teachers)
        self.shards = start_shards(self._store, workers=workers, gpus_per_worker=gpus_per_worker, threads=threads)
        inputs = (ray.put(world), ray.put(list(sets)))
        self._arguments = (config, *inputs, self.shards, gpus_per_worker > 0, job_seconds, threads)
        self._learner: Any = None

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
            raise _cause(error) from error

    def close(self) -> None:
        """Stop the actors, and the connection to Ray where it was made here."""
        for actor in [*self.shards, *([self._learner] if self._learner is not None else [])]:
            ray.kill(actor)
        if self._connected:
            ray.shutdown()


@contextmanager
def shards_of(workers: int) -> Iterator[RayBackend]:
    """A backend of `workers` shards of one thread and no teachers, for work that needs no pool. Stopped at the end."""
    connected = connect(workers, 0.0)
    shards = start_shards(PoolStore({}), workers=workers, gpus_per_worker=0.0, threads=1)
    try:
        yield RayBackend(shards, batched=False)
    finally:
        for shard in shards:
            ray.kill(shard)
        if connected:
            ray.shutdown()
