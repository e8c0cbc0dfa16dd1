"""The lock of a folder that one process at a time may work in."""

import sys
from pathlib import Path

import filelock

from ray_dfml.errors import UsageError
from ray_dfml.files import shown

WAIT_SECONDS = 10.0
"""How long another process is waited for. One that was killed holds its locks until the system has cleared it away."""


def hold(file: Path, who: str) -> filelock.BaseFileLock:
    """Take the lock of a file, which the caller must release. `who` is said of another process that has it.

    That process is waited for, and a line on the terminal says so. Raises UsageError if it still has the lock after
    WAIT_SECONDS, and OSError.
    """
    lock = filelock.FileLock(file, timeout=0)
    try:
        return _taken(lock, 0.0)
    except filelock.Timeout:
        print(shown(f"{who}; waiting {WAIT_SECONDS:g} s for its end"), file=sys.stderr, flush=True)
    try:
        return _taken(lock, WAIT_SECONDS)
    except filelock.Timeout:
        raise UsageError(f"{who}; wait, or stop it") from None


def _taken(lock: filelock.BaseFileLock, seconds: float) -> filelock.BaseFileLock:
    lock.acquire(timeout=seconds)
    return lock
