"""How much of its host a process may use: its affinity, and the limits of both versions of control groups."""

import os
from pathlib import Path

import pytest

from ray_dfml.runtime import host

MANY = set(range(64))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups on a host of 64 processors and 2^30 pages of 4 KiB."""
    monkeypatch.setattr(host, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: MANY, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**30}.__getitem__)
    return tmp_path


def write(groups: Path, lines: str, **files: str) -> None:
    """`/proc/self/cgroup`, and files of the tree: their path with `__` for `/`, and `_` for `.` after `cpu`."""
    (groups / "proc").write_text(lines)
    for name, text in files.items():
        path = groups / "cgroup" / name.replace("__", "/").replace("cpu_", "cpu.").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_control_groups_the_affinity_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.processors() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert host.processors() == 2
    assert host.memory() == 2**42


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 64), ("9900000 100000", 64)],
)
def test_a_quota_of_version_2_counts(groups: Path, text: str, wanted: int) -> None:
    write(groups, "0::/jobs/mine\n", jobs__mine__cpu_max=text)
    assert host.processors() == wanted


def test_the_quota_of_a_parent_counts_too(groups: Path) -> None:
    write(groups, "0::/jobs/mine\n", jobs__mine__cpu_max="max 100000", jobs__cpu_max="400000 100000")
    assert host.processors() == 4


def test_in_a_container_the_path_of_the_host_is_absent(groups: Path) -> None:
    """Its own group is then the root of what it sees."""
    write(groups, "0::/of/the/host\n", cpu_max="300000 100000", memory_max="1048576")
    assert (host.processors(), host.memory()) == (3, 2**20)


@pytest.mark.parametrize(("quota", "wanted"), [("150000", 1), ("600000", 6), ("-1", 64)])
def test_a_quota_of_version_1_counts(groups: Path, quota: str, wanted: int) -> None:
    write(
        groups, "3:memory:/box\n2:cpu,cpuacct:/box\n0::/\n",
        cpu__box__cpu_cfs_quota_us=quota, cpu__box__cpu_cfs_period_us="100000",
        memory__box__memory_limit_in_bytes="2097152",
    )  # fmt: skip
    assert (host.processors(), host.memory()) == (wanted, 2**21)


def test_this_process_may_use_something() -> None:
    assert 1 <= host.processors() <= (os.cpu_count() or 1)
    assert host.memory() > 2**27
    assert host.shared_memory() >= 0
