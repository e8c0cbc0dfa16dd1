"""Dispatch without a cluster, over a stand-in for Ray."""

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.ops import OPS
from ray_dfml.runtime import dispatch, ray_teachers
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.runtime.shard import Loaded
from ray_dfml.types import Arrays, ImageSpec, Job, TeacherCard
from tests.runtime.standin import Method, Ref, Shard, StandIn, backend_of, costing, jobs


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[Shard]:
    monkeypatch.setattr(dispatch, "ray", StandIn)
    return [Shard(up=True), Shard(up=False)]


def test_a_shard_that_never_comes_back_does_not_hold_up_the_others(shards: list[Shard]) -> None:
    backend = backend_of(shards, batched=False)
    assert backend.map("op", jobs(6), {}) == [{"index": i} for i in range(6)]


def test_a_shard_that_is_down_gets_no_work_in_the_next_call(shards: list[Shard]) -> None:
    backend = backend_of(shards, batched=False)
    backend.map("op", jobs(4), {})
    sent = len(shards[1].calls)
    assert backend.map("op", jobs(4), {}) == [{"index": i} for i in range(4)]
    assert len(shards[1].calls) == sent


def test_chunks_of_an_accelerator_keep_the_order_of_jobs(shards: list[Shard]) -> None:
    both_up = [Shard(up=True), Shard(up=True)]
    backend = backend_of(both_up, batched=True)
    assert backend.map("op", jobs(5), {}) == [{"index": i} for i in range(5)]
    assert both_up[0].calls + both_up[1].calls == [[0, 1, 2], [3, 4]]


def test_costly_jobs_are_sent_first_and_queued_where_least_is_ahead(shards: list[Shard]) -> None:
    """Costs 1, 10, 6, 5, 1: a second job of 5 waits behind that of 6, not behind that of 10."""
    both_up = [Shard(up=True), Shard(up=True)]
    results = backend_of(both_up, batched=False).map("op", costing(1, 10, 6, 5, 1), {})
    assert results == [{"index": i} for i in range(5)], "results come in job order all the same"
    assert (both_up[0].calls[0], both_up[1].calls[:2]) == ([1], [[2], [3]])


def test_at_most_two_chunks_are_queued_per_shard(shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    both_up = [Shard(up=True), Shard(up=True)]
    queued: list[int] = []
    wait = StandIn.wait

    def watch(refs: Sequence[Ref], num_returns: int, timeout: float | None) -> tuple[list[Ref], list[Ref]]:
        assert timeout is None, "no limit, no waking up"
        queued.append(len(refs))
        return wait(refs, num_returns, timeout)

    monkeypatch.setattr(StandIn, "wait", staticmethod(watch))
    backend_of(both_up, batched=False).map("op", costing(9, 9, *[1] * 8), {})
    assert max(queued) == 2 * len(both_up)


def test_chunks_of_an_accelerator_cost_the_same(shards: list[Shard]) -> None:
    both_up = [Shard(up=True), Shard(up=True)]
    results = backend_of(both_up, batched=True).map("op", costing(1, 1, 8, 1, 4, 1), {})
    assert results == [{"index": i} for i in range(6)]
    assert both_up[0].calls + both_up[1].calls == [[2], [0, 1, 3, 4, 5]]


def test_chunks_of_an_accelerator_fit_its_cache(shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CACHE_BYTES", 20)
    both_up = [Shard(up=True), Shard(up=True)]
    results = backend_of(both_up, batched=True).map("op", costing(*[1.0] * 6, memory=10), {})
    assert results == [{"index": i} for i in range(6)]
    assert sorted(both_up[0].calls + both_up[1].calls) == [[0, 1], [2], [3, 4], [5]]


class OnDemand(Mapping[str, Loaded]):
    """Teachers that are made when they are asked for; the second has gone bad. `alive` counts those in memory."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[np.ndarray]] = []

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self._made)

    def __getitem__(self, id: str) -> Loaded:
        if id == "b":
            raise RejectedError("b: weights/b.safetensors has changed")
        theta = np.full(3, ord(id), np.float32)
        self._made.append(weakref.ref(theta))
        image = ImageSpec(channels=1, height=16, width=16, mean=(0.0,), std=(1.0,))
        return TeacherCard(id=id, arch="conv4", image=image, classes=("x", "y")), theta, np.zeros(0, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter("abcd")

    def __len__(self) -> int:
        return 4


def test_teachers_are_put_in_the_store_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    teachers, alive, stored = OnDemand(), [], []

    class Store:
        ObjectRef = int

        @staticmethod
        def put(teacher: Loaded) -> int:
            alive.append(teachers.alive)
            stored.append(teacher[1].tolist())
            return len(stored) - 1

        @staticmethod
        def get(ref: int) -> list[float]:
            return stored[ref]

    monkeypatch.setattr(ray_teachers, "ray", Store)
    store = ray_teachers.PoolStore(teachers)
    assert alive == [1, 1, 1], "the one before is gone when the next is put"
    assert [store(id) for id in "acd"] == [[ord(id)] * 3 for id in "acd"]
    with pytest.raises(RejectedError, match=r"b: weights/b\.safetensors has changed"):
        store("b")


class Mortal(Shard):
    """A shard that dies of certain jobs, and is up again at once."""

    def __init__(self, *deadly: int) -> None:
        super().__init__(up=True)
        self.deadly = set(deadly)

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        done = super()._run(load, op, jobs, shared)
        if self.deadly & {job.index for job in jobs}:
            return Ref(error=dispatch.exceptions.ActorUnavailableError("died", None))
        return done


@pytest.mark.parametrize("batched", [False, True])
def test_only_the_job_that_kills_is_given_up(shards: list[Shard], batched: bool) -> None:
    """The jobs of a chunk that killed its shard are sent one by one, which shows which job it was."""
    mortals = [Mortal(2), Mortal(2)]
    results = backend_of(mortals, batched=batched).map("op", costing(1, 2, 9, 3, 2, 4), {})
    assert results.pop(2) == {"rejected": "its process died 2 times"}
    assert results == [{"index": i} for i in (0, 1, 3, 4, 5)]
    calls = sum(2 in call for shard in mortals for call in shard.calls)
    assert calls == 3, "two strikes, and one death of a shard that might have been dead already"


class Forgetful(Shard):
    """A shard that dies of certain jobs at once, and takes with it the results that nobody has taken yet."""

    def __init__(self, *deadly: int) -> None:
        super().__init__(up=True)
        self.deadly = set(deadly)
        self.behind: list[tuple[int, int]] = []

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        self.behind += [(job.index, sum(not ref.taken for ref in self.refs)) for job in jobs]
        done = super()._run(load, op, jobs, shared)
        if self.deadly & {job.index for job in jobs}:
            self.die()
        return done


def test_a_job_with_a_strike_is_sent_alone(shards: list[Shard]) -> None:
    """The job before the deadly one gets a strike too. When it is sent alone, it turns out to be harmless."""
    shard = Forgetful(2)
    results = backend_of([shard], batched=False).map("op", costing(99, 9, 8, 1), {})
    assert results == [{"index": 0}, {"index": 1}, {"rejected": "its process died 2 times"}, {"index": 3}]
    assert shard.behind[:3] == [(0, 0), (1, 1), (2, 1)], "a first time they queue"
    assert shard.behind[3:] == [(2, 0), (2, 0), (1, 0), (3, 0)]


class Hanging(Shard):
    """A shard on which certain jobs never end."""

    def __init__(self, *endless: int) -> None:
        super().__init__(up=True)
        self.endless = set(endless)
        self.deaths = 0

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        done = super()._run(load, op, jobs, shared)
        done.ends = not self.endless & {job.index for job in jobs}
        return done

    def die(self) -> None:
        self.deaths += 1
        super().die()


@pytest.mark.parametrize("batched", [False, True])
def test_a_job_that_hangs_is_given_up_alone(shards: list[Shard], batched: bool) -> None:
    hanging = [Hanging(1), Hanging(1)]
    backend = backend_of(hanging, batched=batched, job_seconds=0.05)
    results = backend.map("op", costing(3, 9, 2, 1, 1), {})
    assert results.pop(1) == {"rejected": "its process died or took longer than 0.05 s, 2 times"}
    assert results == [{"index": i} for i in (0, 2, 3, 4)]
    assert 2 <= sum(shard.deaths for shard in hanging) <= 4


def test_a_job_that_hangs_is_given_up_while_another_shard_is_down(shards: list[Shard]) -> None:
    """The calls to that shard fail all the time, so there is always something to receive."""
    backend = backend_of([Hanging(1), Shard(up=False)], batched=False, job_seconds=0.05)
    results = backend.map("op", jobs(3), {})
    assert results.pop(1) == {"rejected": "its process died or took longer than 0.05 s, 2 times"}
    assert results == [{"index": 0}, {"index": 2}]


class Asleep(Shard):
    """A shard that died unnoticed before the call. Its first call fails, and then it is up again."""

    def __init__(self) -> None:
        super().__init__(up=False)

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        done = super()._run(load, op, jobs, shared)
        self.up = True
        return done


@pytest.mark.parametrize("count", [1, 2, 5])
def test_deaths_before_the_call_are_nobodys_fault(shards: list[Shard], count: int) -> None:
    """Even if all shards had died, and there are fewer jobs than shards."""
    backend = backend_of([Asleep() for _ in range(4)], batched=False)
    assert backend.map("op", jobs(count), {}) == [{"index": i} for i in range(count)]


class Doomed(Shard):
    """A shard that is gone from a certain job on, one of its own or of another shard, until it has failed a call."""

    def __init__(self, node: "Node") -> None:
        super().__init__(up=True)
        self.node = node

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        if not self.node.fell and self.node.last in [job.index for job in jobs]:
            self.node.fell = True
            for shard in self.node.shards:
                shard.up = False
        done = super()._run(load, op, jobs, shared)
        self.up = True
        return done


class Node:
    """Two shards that go down together when a certain job begins."""

    def __init__(self, last: int) -> None:
        self.last, self.fell = last, False
        self.shards = [Doomed(self), Doomed(self)]


def test_a_node_that_goes_down_costs_a_job_one_strike(shards: list[Shard]) -> None:
    """The other shard of the node was idle and had answered before: it is asked again before it gets the job."""
    backend = backend_of(Node(last=3).shards, batched=False)
    assert backend.map("op", costing(4, 3, 2, 1), {}) == [{"index": i} for i in range(4)]


def test_a_result_that_is_lost_is_made_again(shards: list[Shard]) -> None:
    class Loses(Shard):
        def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
            done = super()._run(load, op, jobs, shared)
            if len(self.calls) == 2:
                done.error = dispatch.exceptions.ObjectLostError("ab", None, "")
            return done

    shard = Loses(up=True)
    assert backend_of([shard], batched=False).map("op", jobs(3), {}) == [{"index": i} for i in range(3)]
    assert sum(1 in call for call in shard.calls) == 2


def test_a_lost_answer_of_a_shard_ends_the_wait_for_it(shards: list[Shard]) -> None:
    """A shard that was down is asked whether it is up; the call ends, and what it returned is gone."""
    shard = Asleep()
    shard.__ray_ready__ = Method(lambda: Ref(error=dispatch.exceptions.ObjectLostError("ab", None, "")))
    assert backend_of([shard], batched=False).map("op", jobs(2), {}) == [{"index": 0}, {"index": 1}]


def test_two_jobs_of_one_index_are_refused_at_once(shards: list[Shard]) -> None:
    """Every backend refuses this, since results find their job by its index."""
    twice = [*jobs(2), *jobs(1)]
    for backend in (backend_of([Shard(up=True)], batched=False), LocalBackend(no_teachers)):
        with pytest.raises(ValueError, match=r"^3 jobs: index 0 is given twice$"):
            backend.map("weights", twice, {})


class Unreachable(Shard):
    """A shard whose node is gone: calls do not even fail."""

    def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Job], shared: Arrays) -> Ref:
        done = super()._run(load, op, jobs, shared)
        self.__ray_ready__ = Method(lambda: Ref(ends=False))
        return done


@pytest.mark.parametrize("kind", [Shard, Unreachable])
def test_a_run_whose_shards_are_all_gone_ends_in_time(
    shards: list[Shard], monkeypatch: pytest.MonkeyPatch, kind: type[Shard]
) -> None:
    """Whether Ray refuses calls to them, or keeps them waiting for a node that never comes."""
    monkeypatch.setattr(dispatch, "LOST_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"no shard has been up for 0.3 s: their nodes are gone; .*--resume"
    ) as error:
        backend_of([kind(up=False), kind(up=False)], batched=False).map("op", jobs(3), {})
    assert error.value.exit_code == 5
    assert 0.3 <= time.monotonic() - began < 5


def test_arrays_by_reference_and_teachers_come_with_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that was restarted needs nothing but the next message; one that was not loads a teacher once."""
    asked: list[str] = []

    class Store:
        ObjectRef = Ref

        @staticmethod
        def get(ref: Ref) -> Any:
            return ref.value

    def load(id: str) -> Loaded:
        asked.append(id)
        return OnDemand()[id]

    seen: list[Arrays] = []
    monkeypatch.setattr(dispatch, "ray", Store)
    weights = OPS["weights"]
    monkeypatch.setitem(OPS, "weights", lambda shard, jobs, shared: seen.append(shared) or weights(shard, jobs, {}))
    where, images = [Ref((load, None))], np.arange(3)
    job = [Job(index=0, seed=0, teacher="a")]
    one = dispatch.ShardActor(device=torch.device("cpu"), share=0.0)
    for _ in range(2):
        one.run_for(where, "weights", job, {"images": Ref(images), "steps": 3})
    assert seen[0]["images"] is images
    assert seen[0]["steps"] == 3
    assert asked == ["a"]
    restarted = dispatch.ShardActor(device=torch.device("cpu"), share=0.0)
    assert restarted.run_for(where, "weights", job, {})[0][0]["theta"].tolist() == [97.0] * 3
    one.run_for([Ref((load, None))], "weights", job, {})
    assert asked == ["a"] * 3, "another pool under the same name is another pool"
