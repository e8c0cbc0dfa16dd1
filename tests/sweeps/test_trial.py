"""A trial whose process died in the moment between two writes. No Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.runtime import driver, watch
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import trial
from ray_dfml.sweeps.trial import Task
from tests.runtime import toy


@pytest.mark.parametrize(("until", "ends"), [(2, "stopped"), (6, "trained")])
def test_a_round_that_is_in_the_checkpoint_alone_is_told_and_not_followed_by_another(
    tmp_path: Path, toy_pool: Path, toy_data: str, until: int, ends: str
) -> None:
    """The process died after the checkpoint of the last round that it had to do, and before the log and the status."""
    values = toy.config("free", toy_pool, toy_data).model_dump(mode="json")
    task = Task(path=tmp_path / "run", config=values, machine=toy.LOCAL, until=until, label="", shown={})
    trial.train(task, lambda _: True)
    whole = trial.look(task.path)
    assert (whole.rounds, whole.state) == (until, ends)
    status = toy.status(task.path) | {"round": until - 1, "state": "running"}
    (task.path / "status.json").write_text(json.dumps(status))
    log = task.path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    told: list[Any] = []
    trial.train(task, lambda row: told.append(row["round"]) or True)
    found = trial.look(task.path)
    assert (found.rounds, found.state, found.rows) == (until, ends, whole.rows)
    assert watch.follow(RunFolder(task.path)) == 0, "whoever follows a trial sees that it is over"
    assert told == list(range(1, until + 1 if ends == "stopped" else until))


def test_a_run_that_did_all_rounds_and_has_not_said_so_is_at_work(
    tmp_path: Path, toy_pool: Path, toy_data: str
) -> None:
    """Else it would count as failed for ever, since nobody would begin it again."""
    values = toy.config("free", toy_pool, toy_data).model_dump(mode="json")
    task = Task(path=tmp_path / "run", config=values, machine=toy.LOCAL, until=6, label="", shown={})
    trial.train(task, lambda _: True)
    assert trial.has_ended(task)
    (task.path / "status.json").write_text(json.dumps(toy.status(task.path) | {"state": "running"}))
    assert not trial.has_ended(task)
    trial.train(task, lambda _: True)
    assert trial.look(task.path).state == driver.TRAINED
