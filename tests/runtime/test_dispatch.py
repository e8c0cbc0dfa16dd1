"""Dispatch without a cluster: a stand-in for Ray whose calls end when and how the test says."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ray_dfml.runtime import cluster
from ray_dfml.types import Arrays, Job


class Ref:
    """A call's future: a value, an error, or, with neither, a call that never ends."""

    def __init__(self, value: Any = None, error: Exception | None = None, *, ends: bool = True) -> None:
        self.value, self.error, self.ends = value, error, ends


class Method:
    """`shard.method` with its `.remote`."""

    def __init__(self, call: Callable[..., Ref]) -> None:
        self.remote = call


class StandIn:
    """The three calls of Ray that dispatch makes."""

    ObjectRef = Ref

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def wait(refs: Sequence[Ref], num_returns: int) -> tuple[list[Ref], list[Ref]]:
        ended = [ref for ref in refs if ref.ends][:num_returns]
        assert ended, "dispatch waits for a call that never ends"
        return ended, [ref for ref in refs if ref not in ended]

    @staticmethod
    def get(ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value


class Shard:
    """A shard that works, or one that is down and never comes up again."""

    def __init__(self, *, up: bool) -> None:
        self.calls: list[list[int]] = []
        self.up = up
        self.run = Method(self._run)
        self.__ray_ready__ = Method(lambda: Ref(ends=up))

    def _run(self, op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        self.calls.append([job.index for job in jobs])
        if self.up:
            return Ref([{"index": job.index} for job in jobs])
        return Ref(error=cluster.exceptions.ActorUnavailableError("down", None))


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[Shard]:
    monkeypatch.setattr(cluster, "ray", StandIn)
    return [Shard(up=True), Shard(up=False)]


def jobs(count: int) -> list[Job]:
    return [Job(index=i, seed=i, teacher=f"t{i}") for i in range(count)]


def test_a_shard_that_never_comes_back_does_not_hold_up_the_others(shards: list[Shard]) -> None:
    backend = cluster.RayBackend(shards, batched=False)
    assert backend.map("op", jobs(6), {}) == [{"index": i} for i in range(6)]


def test_a_shard_that_is_down_gets_no_work_in_the_next_call(shards: list[Shard]) -> None:
    backend = cluster.RayBackend(shards, batched=False)
    backend.map("op", jobs(4), {})
    sent = len(shards[1].calls)
    assert backend.map("op", jobs(4), {}) == [{"index": i} for i in range(4)]
    assert len(shards[1].calls) == sent


def test_chunks_of_an_accelerator_keep_the_order_of_jobs(shards: list[Shard]) -> None:
    both_up = [Shard(up=True), Shard(up=True)]
    backend = cluster.RayBackend(both_up, batched=True)
    assert backend.map("op", jobs(5), {}) == [{"index": i} for i in range(5)]
    assert both_up[0].calls + both_up[1].calls == [[0, 1, 2], [3, 4]]
