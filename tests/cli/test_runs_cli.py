"""`ray-dfml runs`, `--quiet` and completion."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import run_folders
from tests.runtime import toy

Command = Callable[..., toy.Done]


def stamped(run: Path, **changes: object) -> Path:
    """The run folder with changes to its status."""
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | changes))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that is done, one of a sweep that failed, and one that cannot be read."""
    scores = {"free/val": run_folders.FREE, "random/last": run_folders.RANDOM}
    stamped(run_folders.make(tmp_path / "new", scores), updated="2026-01-03T00:00:00+00:00", exit_code=0)
    failed = run_folders.make(tmp_path / "sweep" / "trials" / "0000-seed0", {}, name="purer", state="failed")
    stamped(failed, updated="2026-01-02T00:00:00+00:00", exit_code=3, last_error="nobody is left", round=1)
    broken = run_folders.make(tmp_path / "broken", {})
    (broken / "status.json").write_text("{")
    (tmp_path / "pool").mkdir()
    return tmp_path


def test_runs_are_listed_with_their_states_and_scores(folder: Path, command: Command) -> None:
    done = command("runs", folder)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "broken", str(folder / "broken" / "status.json:"),
                                                   "sweep/trials/0000-seed0", "last", "new"]  # fmt: skip
    half = json.loads((folder / "new" / "scores.json").read_text())[0]["ci95"]
    assert lines[-1].split()[1:9] == ["free", "done", "2/2", "5-way", "1-shot", "65.00", "±", f"{half:.2f}"]
    assert "nobody is left" in lines[4]


def test_runs_as_json(folder: Path, command: Command) -> None:
    rows = json.loads(command("runs", folder, "--json").out)
    assert [(row["run"], row["method"], row["state"]) for row in rows] == [
        ("broken", "?", "unreadable"), ("sweep/trials/0000-seed0", "purer", "failed"), ("new", "free", "done"),
    ]  # fmt: skip
    assert rows[-1]["score"] == json.loads((folder / "new" / "scores.json").read_text())[0]
    assert rows[1]["score"] is None


@pytest.mark.parametrize("where", ["nothing", "pool"])
def test_a_folder_without_runs_is_refused_in_one_line(folder: Path, command: Command, where: str) -> None:
    done = command("runs", folder / where)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert str(folder / where) in done.err


def complete(words: str) -> list[str]:
    """What the shell offers for the last of the words."""
    environment = os.environ | {
        "_RAY_DFML_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ray_dfml"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_and_paths() -> None:
    assert complete("ray-dfml ru") == ["plain,runs"]
    assert complete("ray-dfml runs som") == ["file,som"]
