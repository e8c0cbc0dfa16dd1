"""The server's count outlives it, is right whatever is killed, and says where it cannot be kept."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.errors import ResourceError
from ray_dfml.services.counter import Counter, Counts


def test_counts_are_kept_for_each_model(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "deep" / "counts")
    counter.receive("a", 5)
    counter.receive("b", 1)
    counter.receive("a", 2)
    counter.answer("a", [(b"1", 3), (b"2", 2), (b"1", 3)])
    counter.answer("a", [(b"2", 2)])
    counter.answer("b", [(b"1", 1)])
    assert counter.counts(["a", "b", "c"]) == {"a": Counts(7, 5), "b": Counts(1, 1), "c": Counts(0, 0)}
    counter.close()
    again = Counter(counter.file)
    other = Counter(counter.file)
    other.receive("a", 1)
    again.answer("a", [(b"2", 2), (b"3", 1)])
    assert again.counts(["a"]) == {"a": Counts(8, 6)}
    again.close()
    other.close()


def test_a_request_without_a_key_counts_each_time_and_leaves_no_row(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counts")
    counter.receive("a", 7)
    counter.answer("a", [(None, 3), (b"1", 1), (None, 3)])
    assert counter.counts(["a"]) == {"a": Counts(7, 7)}
    counter.close()
    with contextlib.closing(sqlite3.connect(counter.file)) as read:
        assert read.execute("SELECT key FROM requests").fetchall() == [(b"1",)]


WORK = """
import sys
from pathlib import Path
from ray_dfml.services.counter import Counter
counter = Counter(Path(sys.argv[1]))
for i in range(int(sys.argv[2]), 10**9):
    counter.receive("a", 3)
    counter.answer("a", [(str(i).encode(), 3)])
    print(i, flush=True)
"""


def test_what_is_said_to_be_counted_survives_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "counts"
    before = Counts(0, 0)
    for most in (1, 7):
        words = [sys.executable, "-c", WORK, str(file), str(1000 * most)]
        work = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert work.stdout is not None
        for _ in range(most):
            work.stdout.readline()
        os.kill(work.pid, signal.SIGKILL)
        said = 3 * (most + len(work.stdout.read().splitlines()))
        work.wait()
        counter = Counter(file)
        after = counter.counts(["a"])["a"]
        counter.close()
        assert after.answered - before.answered in (said, said + 3)
        assert after.received - before.received in (said, said + 3)
        before = after


def other_database(file: Path) -> None:
    """A database of something else."""
    with contextlib.closing(sqlite3.connect(file)) as made:
        made.execute("CREATE TABLE batches (id INTEGER)")


@pytest.mark.parametrize(
    "make",
    [lambda file: file.write_bytes(b"x" * 5000), lambda file: file.write_bytes(b"notes"), Path.mkdir, other_database],
)
def test_a_file_that_is_something_else_is_named_and_kept(make: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "counts"
    make(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(ResourceError, match="counts: the count of images cannot be kept here"):
        Counter(file)
    assert before is None or file.read_bytes() == before
