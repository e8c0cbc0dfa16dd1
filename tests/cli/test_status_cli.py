"""`ray-dfml status`: a run as its folder shows it, while it goes on, when it is done, and when it is silent."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.errors import ResourceError
from ray_dfml.runtime import watch
from ray_dfml.runtime.rundir import RunFolder
from tests.runtime import toy

Command = Callable[..., toy.Done]


@pytest.fixture
def run(tmp_path: Path, free_run: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(free_run, tmp_path / "run"))


def test_a_run_that_is_done(free_run: Path, command: Command) -> None:
    done = command("status", free_run)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "free: done, exit code 0"
    assert lines[1].startswith("round 6/6  eta 0:00  ")
    assert "validation" in lines[1]
    assert any(line.startswith("random") for line in lines)
    assert lines[-1] == f"run: {free_run}"
    found = json.loads(command("status", free_run, "--json").out)
    assert found["status"] == toy.status(free_run)
    assert found["scores"] == json.loads((free_run / "scores.json").read_text())


def test_a_run_is_followed_to_its_end(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process goes on with the run between two looks at the folder; its exit code is that of the command."""
    whole, rows = toy.status(run), (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:2]) + rows[2][:9])  # a line is being written
    unknown = {"exit_code": None, "state": "running", "updated": "2999-01-01T00:00:00+00:00"}
    (run / "status.json").write_text(json.dumps(whole | unknown | {"round": 2, "notes": ["a note"]}))
    looks = threading.Semaphore(1)

    def goes_on(_seconds: float) -> None:
        if looks.acquire(blocking=False):
            (run / "metrics.jsonl").write_text("".join(rows))
        else:
            changed = {"state": "budget", "exit_code": 4, "last_error": "the budget is used", "notes": ["a note"]}
            (run / "status.json").write_text(json.dumps(whole | changed))

    monkeypatch.setattr("ray_dfml.runtime.watch.time.sleep", goes_on)
    monkeypatch.setattr("ray_dfml.runtime.progress.INTERVAL_SECONDS", -1.0)
    done = command("status", run, "--follow")
    assert done.code == 4
    said = [line.split("  ")[0] for line in done.err.splitlines()]
    assert said == ["a note", *(f"round {n}/6" for n in range(2, 7)), "last error: the budget is used"]
    assert done.out.splitlines()[-1] == f"run: {run}"


def test_a_run_that_is_silent(run: Path, command: Command) -> None:
    status = toy.status(run) | {"state": "running", "exit_code": None, "updated": "2020-01-01T00:00:00+00:00"}
    (run / "status.json").write_text(json.dumps(status))
    done = command("status", run)
    assert "free: running" in done.out.splitlines()
    assert "no news since 2020-01-01T00:00:00+00:00" in done.out
    status |= {"seconds": 1e12, "round": 1}
    (run / "status.json").write_text(json.dumps(status))
    assert "no news" not in command("status", run).out, "a round of it takes longer"


def test_what_is_no_run(tmp_path: Path, command: Command) -> None:
    done = command("status", tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_teachers_that_were_left_out(run: Path) -> None:
    (run / "status.json").write_text(json.dumps(toy.status(run) | {"rejected": {"t1": "t1: NaN"}, "state": "testing"}))
    assert watch.summary(RunFolder.open(run))[2:] == ["left out: t1: NaN", "testing"]


def test_a_store_that_refuses_for_a_while_does_not_end_the_following(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so; a store that stays away ends it with its error."""
    left = [3]

    def refresh() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ResourceError("s3://b/run: no route")

    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    assert watch.follow(RunFolder.open(run), refresh) == 0
    assert capsys.readouterr().err.splitlines().count("s3://b/run: no route; trying again for 120 s") == 1
    left[0] = 10**9
    monkeypatch.setattr(watch, "PATIENCE", 0.0)
    with pytest.raises(ResourceError, match="no route"):
        watch.follow(RunFolder.open(run), refresh)
