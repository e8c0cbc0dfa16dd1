"""A shard's cache of teachers: bounded in bytes, the longest unused go first, each loaded when it is asked for."""

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ray_dfml.core.net import net
from ray_dfml.errors import ResourceError
from ray_dfml.ops import OPS
from ray_dfml.runtime import local, shard
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.runtime.shard import Loaded, Shard
from ray_dfml.types import Arrays, ImageSpec, Job, TeacherCard

IMAGE = ImageSpec(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
NET = net("resnet10", IMAGE.shape, 2)
BYTES = 4 * (NET.layout.numel + NET.stats_layout.numel)
"""Of a ResNet-10: 20 MB."""


class Source:
    """Teachers whose weights are all their number; `loads` are the ids in the order they were asked for."""

    def __init__(self) -> None:
        self.loads: list[str] = []

    def __call__(self, id: str) -> Loaded:
        self.loads.append(id)
        card = TeacherCard(id=id, arch="resnet10", image=IMAGE, classes=("a", "b"))
        theta = np.full(NET.layout.numel, int(id), np.float32)
        return card, theta, np.ones(NET.stats_layout.numel, np.float32)


def held(one: Shard) -> list[str]:
    return list(one._hosted)


def test_the_longest_unused_teachers_go(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "CACHE_BYTES", 2 * BYTES)
    source = Source()
    one = Shard(source, device=device)
    for id in "1213":
        assert float(one.teacher(id).theta[0]) == int(id)
    assert (source.loads, held(one)) == (["1", "2", "3"], ["1", "3"])
    assert float(one.teacher("2").theta[-1]) == 2
    assert (source.loads, held(one)) == (["1", "2", "3", "2"], ["3", "2"])


def test_the_bound_holds_to_the_byte(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics count as well as weights."""
    monkeypatch.setattr(shard, "CACHE_BYTES", 2 * BYTES - 1)
    one = Shard(Source(), device=device)
    for id in "12":
        one.teacher(id)
    assert held(one) == ["2"]
    assert one.teacher("2").bytes == BYTES


def test_a_teacher_larger_than_the_bound_is_hosted_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "CACHE_BYTES", 1)
    one = Shard(Source(), device=device)
    assert [float(one.teacher(id).theta[0]) for id in "12"] == [1.0, 2.0]
    assert held(one) == ["2"]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.usefixtures("device")
def test_a_pool_larger_than_the_bound_is_worked_through(monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    """Each teacher is loaded once, in whatever order, and results come in job order."""
    monkeypatch.setattr(shard, "CACHE_BYTES", 2 * BYTES)
    monkeypatch.setattr(local, "CACHE_BYTES", 2 * BYTES)
    source = Source()
    calls: list[int] = []
    backend = LocalBackend(source)
    backend._shard.batched = batched
    run = backend._shard.run

    def count(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        calls.append(len(jobs))
        return run(op, jobs, shared)

    monkeypatch.setattr(backend._shard, "run", count)
    jobs = [Job(index=i, seed=0, teacher=str(i), cost=float(i), memory=BYTES) for i in range(5)]
    results = backend.map("weights", jobs, {})
    assert [int(result["theta"][0]) for result in results] == [0, 1, 2, 3, 4]
    assert sorted(source.loads) == ["0", "1", "2", "3", "4"]
    assert sorted(calls) == ([1, 2, 2] if batched else [1] * 5)
    assert len(held(backend._shard)) == 2


def crowded(room: int, calls: list[int]) -> Callable[..., list[Arrays]]:
    """An op on a device that has room for so many jobs at once."""

    def op(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        calls.append(len(jobs))
        if len(jobs) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"index": job.index} for job in jobs]

    return op


def test_a_batch_without_room_is_done_in_halves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches are no larger than what fitted; one line says so, once."""
    calls: list[int] = []
    monkeypatch.setitem(OPS, "weights", crowded(2, calls))
    one = Shard(Source(), device=device)
    jobs = [Job(index=i, seed=0) for i in range(7)]
    assert one.run("weights", jobs, {}) == [{"index": i} for i in range(7)]
    assert calls == [7, 4, 2, 2, 2, 1]
    assert one.news() == ["memory of a shard was short: weights does at most 2 jobs at a time"]
    assert one.run("weights", jobs[:5], {}) == [{"index": i} for i in range(5)]
    assert calls[6:] == [2, 2, 1]
    assert one.news() == []


def refusing(error: Exception, place: int, calls: list[int]) -> Callable[..., list[Arrays]]:
    """An op whose job at a place has no room, with whatever others."""

    def op(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        calls.append(len(jobs))
        if any(job.index == place for job in jobs):
            raise error
        return [{"index": job.index} for job in jobs]

    return op


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "CUDA out of memory. Tried"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_teacher_without_room_for_itself_is_rejected_and_does_not_make_batches_small(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    calls: list[int] = []
    monkeypatch.setitem(OPS, "weights", refusing(error, 2, calls))
    one = Shard(Source(), device=device)
    one.teacher("1")
    jobs = [Job(index=i, seed=0, teacher=str(i)) for i in range(4)]
    found = one.run("weights", jobs, {})
    assert found[2] == {"rejected": f"weights needs more memory than a shard has: {reason}"}
    assert [found[i] for i in (0, 1, 3)] == [{"index": i} for i in (0, 1, 3)]
    assert calls == [4, 2, 2, 1, 1, 1], "the job is tried once more, alone in the memory"
    assert held(one) == []
    assert one.news() == []
    calls.clear()
    one.run("weights", [Job(index=i, seed=0) for i in range(10, 14)], {})
    assert calls == [4]


def test_other_errors_of_an_op_are_no_lack_of_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "weights", refusing(RuntimeError("shapes differ"), 0, calls := []))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Shard(Source(), device=device).run("weights", [Job(index=i, seed=0) for i in range(3)], {})
    assert calls == [3]


def test_the_system_says_so_when_memory_is_short() -> None:
    for ask in (lambda: torch.empty(2**60), lambda: np.empty(2**55)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            ask()
        assert shard.is_short_of_memory(raised.value)
    assert shard.is_short_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not shard.is_short_of_memory(RuntimeError("shapes differ"))


def test_a_job_without_teacher_or_room_ends_the_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "weights", crowded(0, []))
    with pytest.raises(ResourceError, match="weights needs more memory than a shard has: CUDA out of memory; give"):
        Shard(Source(), device=device).run("weights", [Job(index=i, seed=0) for i in range(3)], {})


GIB = 2**30


@pytest.mark.parametrize(("share", "left"), [(0.25, 0.25 - 5 / 128), (0.3333, 1 / 3 - 5 / 128), (0.5, 0.5 - 5 / 128)])
def test_a_part_of_an_accelerator_has_its_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, share: float, left: float
) -> None:
    """Of 16 GiB, less 640 MiB for the process itself."""
    set_to: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: set_to.append(part))
    shard.cap_memory(share)
    assert set_to == [pytest.approx(left)]
    for whole in (0.0, 1.0):
        shard.cap_memory(whole)
    assert len(set_to) == 1
    with pytest.raises(ResourceError, match="1/40 of a GPU of 16 GiB has no room for tensors"):
        shard.cap_memory(0.025)


FAULTS = """
import resource, torch
from ray_dfml.runtime.shard import pin

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        kept = [torch.ones(2**22) for _ in range(12)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
pin()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the C library of Linux")
def test_a_pinned_process_keeps_its_memory() -> None:
    """Tensors of 192 MiB in all, made and freed again and again: without `pin` each page is asked for anew."""
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    before, after = map(int, found)
    assert after <= max(before // 10, 100)  # some systems count no faults
