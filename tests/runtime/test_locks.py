"""The lock of a folder: another process is waited for, and named if it stays."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from ray_dfml.errors import UsageError
from ray_dfml.runtime import locks
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import sweep

Enter = Callable[[Path], Any]
PLACES = pytest.mark.parametrize(
    "enter", [lambda path: RunFolder(path).locked(), sweep._locked], ids=["run", "sweep"]
)  # fmt: skip


@PLACES
def test_one_that_ends_in_time_is_waited_for(tmp_path: Path, enter: Enter, capsys: pytest.CaptureFixture[str]) -> None:
    """As one that was killed, whose lock the system has not taken back yet when its job is submitted again."""
    other = filelock.FileLock(tmp_path / ".lock", thread_local=False)
    other.acquire()
    waits = threading.Event()
    plain = locks._taken

    def taken(lock: Any, seconds: float) -> Any:
        if seconds:
            waits.set()
        return plain(lock, seconds)

    def end() -> None:
        waits.wait(60)
        other.release()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "_taken", taken)
        patch.setattr(locks, "WAIT_SECONDS", 60.0)
        with enter(tmp_path):
            assert not other.is_locked
    thread.join()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.fullmatch(rf"{tmp_path}: another process is at work in this .*; waiting 60 s for its end", said[0])
    with enter(tmp_path):
        pass
    assert capsys.readouterr().err == ""


@PLACES
def test_one_that_stays_is_named(tmp_path: Path, enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    with enter(tmp_path), pytest.raises(UsageError, match=f"^{tmp_path}: another process is at work"), enter(tmp_path):
        pass
