"""Sends jobs to shard actors and returns the results in job order, even if shards die on the way.

Every job is delivered at least once. Ray restarts a shard that died, and the jobs that it had are sent again. The
result of an op depends on (job, shared) only, so a job that runs twice gives the same bits.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_dfml.data.pool import manifest_sha256
from ray_dfml.errors import ResourceError
from ray_dfml.files import Uri
from ray_dfml.runtime import balance
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.ray_environment import exceptions, ray
from ray_dfml.runtime.ray_metrics import waiting
from ray_dfml.runtime.shard import CACHE_BYTES, Shard, cap_memory
from ray_dfml.runtime.stalls import LOOK_SECONDS, AtWork, Board, Pace
from ray_dfml.types import Arrays, Job

STRIKES = 2
"""How many deaths of a process make the dispatcher give up its job; the teacher of the job is then rejected."""

IN_FLIGHT = 2
"""How many chunks a shard is sent at a time, so that the next one is there when the first one ends."""

WAKE_SECONDS = 0.1
"""Wait between two attempts to reach a shard that died. Until it is up again, Ray fails every call to it at once."""

LOST_SECONDS = 180.0
"""Longest time in which all shards may be down, since nodes may be replaced and processes take seconds to start."""


class ShardActor(Shard):
    """A shard in a process of its own.

    Each message says where teachers come from, so that a restarted shard needs nothing else.
    """

    def __init__(self, *, device: torch.device | None, share: float) -> None:
        """`share` is what the shard may use of the memory of its device, if that is an accelerator."""
        self._where: ray.ObjectRef | None = None
        cap_memory(share)
        super().__init__(no_teachers, device=device)

    def manifests(self, pools: Sequence[Path | Uri]) -> list[str]:
        """The hash of the manifest of each pool as this process sees it; empty for one that it does not see."""
        return [manifest_sha256(pool) for pool in pools]

    def run_for(
        self, load: "Sequence[ray.ObjectRef]", op: str, jobs: Sequence[Job], shared: Arrays
    ) -> tuple[list[Arrays], list[str]]:
        """`run` with the teachers of `load[0]`, which are a `shard.LoadWeights` and an `asking.Desk` or None; `news`.

        References in `shared` are replaced by the arrays they stand for.
        """
        if load[0] != self._where:
            self.reload(*ray.get(load[0]))
            self._where = load[0]
        here = {k: ray.get(v) if isinstance(v, ray.ObjectRef) else v for k, v in shared.items()}
        return self.run(op, jobs, here), self.news()


class RayBackend:
    """The `Backend` over shard actors. It sends costly work first, and sends lost jobs again.

    A shard that works on a chunk for longer than `job_seconds` is killed, which counts as any other death. None means
    that there is no limit.
    """

    def __init__(
        self, shards: Sequence[Any], load: "ray.ObjectRef", *, batched: bool, job_seconds: float | None = None,
        board: Board | None = None,
    ) -> None:  # fmt: skip
        """`load` refers to what a shard gets teachers by, in the object store (`ShardActor.run_for`).

        While a call goes on, `board` says every few seconds what is at work.
        """
        self.shards = list(shards)
        self.load = load
        self.batched = batched
        self.job_seconds = job_seconds
        self.waking: set[int] = set()
        self.notes: list[str] = []
        self.board, self.pace = board, Pace()

    def keep(self, value: np.ndarray) -> "ray.ObjectRef":
        """See `Backend.keep`. The calling process owns what is kept; if it ends, what is kept is lost."""
        return ray.put(value)

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """See `Backend.map`.

        Raises ResourceError if no shard is left, or if none was up for LOST_SECONDS, and whatever an op raises.
        """
        balance.check_distinct(jobs)
        if self.batched:
            waiting = balance.chunks(jobs, len(self.shards), CACHE_BYTES)
        else:
            waiting = [[job] for job in balance.longest_first(jobs)]
        try:
            done = _Dispatch(self, op, waiting, ray.put(shared)).run(len(jobs))
        finally:
            if self.board:
                self.board.clear()
        return [done[job.index] for job in jobs]


class _Dispatch:
    """One call of `map`: the chunks of jobs that wait, the chunks that shards have, and the results so far.

    A shard works on the first chunk of its queue. If its process dies, each job of that chunk gets a strike. There is
    one exception: a shard that has not answered in this call may have been dead before the chunk arrived, so the chunk
    gets no strike. A job with a strike is sent alone to a shard that has answered, and nothing is queued with it. If
    that shard dies too, the job is to blame.
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
        self._down_since: float | None = None
        self._shown = time.monotonic()

    def run(self, count: int) -> dict[int, Arrays]:
        """Send all jobs: index -> result, for `count` jobs."""
        for i in tuple(self._backend.waking):
            self._wake(i)
        self._fill()
        while len(self._done) < count:
            results_first = sorted(self._flying, key=lambda ref: not self._flying[ref][1])
            ready, _ = ray.wait(results_first, num_returns=1, timeout=self._patience())
            for ref in ready:
                self._receive(ref)
            self._kill_late()
            self._check_lost()
            self._fill()
            self._show()
        return self._done

    def _show(self) -> None:
        """Let the board say what is at work, if that is due."""
        board, now = self._backend.board, time.monotonic()
        if board is not None and now - self._shown >= LOOK_SECONDS:
            board.write([self._at_work(i, now) for i in self._working()])
            self._shown = now

    def _at_work(self, i: int, now: float) -> AtWork:
        chunk = self._flying[self._load[i][0]][1]
        return self._backend.pace.at_work(i, self._op, chunk, now - self._since[i])

    def _receive(self, ref: "ray.ObjectRef") -> None:
        i, chunk = self._flying[ref]
        try:
            answer = ray.get(ref)
            self._answered.add(i)
            if chunk:
                results, news = answer
                self._backend.pace.ended(self._op, chunk, time.monotonic() - self._since[i])
                self._done.update((job.index, result) for job, result in zip(chunk, results, strict=True))
                self._backend.notes += [line for line in news if line not in self._backend.notes]
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
            raise cause(error) from error
        del self._flying[ref]
        if ref in self._load.get(i, []):
            self._load[i].remove(ref)
            self._since[i] = time.monotonic()

    def _ahead(self, i: int) -> float:
        return sum(job.cost for ref in self._load[i] for job in self._flying[ref][1])

    def _suspect(self, chunk: Sequence[Job]) -> bool:
        return any(job.index in self._strikes for job in chunk)

    def _fill(self) -> None:
        """Send the next chunks to the shards that have the least work before them."""
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
                ref = self._backend.shards[i].run_for.remote([self._backend.load], self._op, list(chunk), self._shared)
                self._flying[ref] = (i, chunk)
                queue.append(ref)
        waiting(self._op, sum(map(len, self._waiting)))

    def _wake(self, i: int) -> None:
        self._backend.waking.add(i)
        self._flying[self._backend.shards[i].__ray_ready__.remote()] = (i, ())

    def _lost(self, i: int, ref: "ray.ObjectRef", error: Exception) -> None:
        """Shard `i` died, or is not up again. The jobs at work get a strike once, and all its jobs are sent again."""
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
        """Seconds until a shard is late, all have been down for too long, or the board is due; None for no limit."""
        limit, working = self._backend.job_seconds, self._working()
        ends = [self._since[i] + limit for i in working] if limit is not None else []
        if self._down_since is not None:
            ends.append(self._down_since + LOST_SECONDS)
        if self._backend.board is not None:
            ends.append(self._shown + LOOK_SECONDS)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _check_lost(self) -> None:
        """Raise ResourceError if no shard has been up for LOST_SECONDS, since their nodes are then gone."""
        if not self._backend.waking >= self._load.keys():
            self._down_since = None
            return
        now = time.monotonic()
        self._down_since = self._down_since or now
        if now - self._down_since >= LOST_SECONDS:
            raise ResourceError(
                f"no shard has been up for {LOST_SECONDS:g} s: their nodes are gone; go on with --resume when the "
                "cluster is back, or on another"
            )

    def _kill_late(self) -> None:
        """Kill each shard that is late. Ray starts it again, and its calls fail as after any other death."""
        now, limit = time.monotonic(), self._backend.job_seconds
        if limit is None:
            return
        for i in self._working():
            if now - self._since[i] >= limit:
                self._late |= {job.index for job in self._flying[self._load[i][0]][1]}
                self._since[i] = now
                self._answered.add(i)  # it was up until here
                ray.kill(self._backend.shards[i], no_restart=False)


def cause(error: exceptions.RayTaskError) -> Exception:
    """The exception that the remote code raised. Its message is one line, while Ray's holds a traceback."""
    return error.cause if isinstance(error.cause, Exception) else error
