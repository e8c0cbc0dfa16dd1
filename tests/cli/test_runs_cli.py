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


@pytest.mark.parametrize(
    ("changes", "score", "said"),
    [
        ({"updated": "yesterday", "exit_code": None}, {}, "not as a run writes it"),
        ({"state": ["x"], "updated": 5, "exit_code": 0}, {}, "65.00 ±"),
        ({"exit_code": 0}, {"ci95": None}, "65.00"),
        ({"exit_code": 0}, {"mean": None}, "free"),
    ],
)
def test_one_odd_run_does_not_hide_the_others(
    folder: Path, command: Command, changes: dict[str, object], score: dict[str, object], said: str
) -> None:  # fmt: skip
    run = run_folders.make(folder / "odd", {"free/val": run_folders.FREE}, **score)
    stamped(run, **({"state": "training"} | changes))
    done = command("runs", folder)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("odd "))
    assert said in " ".join(lines[place : place + 2])
    assert any(line.startswith("new ") for line in lines)


def test_a_run_that_is_done_is_not_called_silent(tmp_path: Path, command: Command) -> None:
    stamped(run_folders.make(tmp_path / "old", {}), updated="2026-01-01T00:00:00+00:00")
    assert "no news" not in command("runs", tmp_path).out


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
