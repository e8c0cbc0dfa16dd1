"""The processors and the memory that this process may use, by its affinity and the limits of its control groups."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def processors() -> int:
    """How many processors this process may use, at least 1.

    It is the number in its affinity, or less if a control group (version 1 or 2) limits the processor time.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for version, folder in _groups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = _words(folder, *names)
        if len(words) == 2 and words[0] > 0 and words[1] > 0:
            quotas.append(words[0] // words[1])
    return max(1, min([count, *quotas]))


def memory() -> int:
    """Bytes of memory that this process and its children may use together."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for version, folder in _groups("memory"):
        limits += [n for n in _words(folder, "memory.max" if version == 2 else "memory.limit_in_bytes") if n > 0]
    return min(limits)


def shared_memory() -> int:
    """Free bytes of shared memory, through which processes of a machine share arrays. Without /dev/shm: all memory."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else memory()


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of the control group of this process, and of each parent of the group."""
    try:
        lines = PROC.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = ROOT / controller if controllers else ROOT
        group = base / path.lstrip("/")  # in a container the path may be the host's, and absent here
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield (1 if controllers else 2), folder


def _words(folder: Path, *names: str) -> list[int]:
    """The numbers in files of a control group. There are none if a file is absent or says that there is no limit."""
    try:
        return [int(word) for name in names for word in (folder / name).read_text().split()]
    except (OSError, ValueError):
        return []
