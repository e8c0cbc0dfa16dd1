"""A trial whose process died in the moment between two writes. No Ray."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.runtime import driver, watch
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import sweep, trial
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


def test_a_winner_that_trains_on_for_its_test_keeps_the_rank_that_it_had(tmp_path: Path, free_run: Path) -> None:
    """Others had no more rounds. Also if the sweep is killed while it trains on, and for ASHA, which is told again."""
    path = Path(shutil.copytree(free_run, tmp_path / "run"))
    run = RunFolder(path)
    rows = [{"round": r, "validation": 50.0 + r} for r in range(6)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.status(state="stopped", round=3)
    task = Task(path=path, config=run.config().model_dump(mode="json"), machine=toy.LOCAL, label="", shown={})

    def killed(*_: Any, **__: Any) -> None:
        run.status(state="running", round=5)
        raise KeyboardInterrupt

    for goes_on in (killed, lambda *_, **__: run.status(state="done", round=6)):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(trial, "continue_run", goes_on)
            trial.test(task)
        assert trial.look(path).validation("free") == 52.0
        assert trial.has_ended(task)
        told: list[int] = []
        trial.train(task, lambda row, told=told: told.append(row["round"]) or True)
        assert told == [1, 2, 3]
    assert trial.look(path).rounds == 6


@pytest.mark.parametrize("name", ["0004-seed1", "0005-seed0"])
def test_a_batch_has_begun_with_any_of_its_trials(tmp_path: Path, name: str) -> None:
    (tmp_path / "trials" / ".0009.tmp").mkdir(parents=True)
    (tmp_path / "trials" / "0003-seed0").mkdir()
    assert not sweep._begun(tmp_path, 4)
    (tmp_path / "trials" / name).mkdir()
    assert sweep._begun(tmp_path, 4)
