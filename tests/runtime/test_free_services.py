"""FREE on a pool of which some teachers are only asked: whole runs, their bits, and every query of theirs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ray_dfml.config import RunConfig
from ray_dfml.errors import BudgetReached, Interrupted, ServiceAway
from ray_dfml.methods import METHODS
from ray_dfml.runtime import driver
from ray_dfml.runtime.asking import WrappedModel
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.learning import Done
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with

SURROGATE = (
    "method.rounds=3", "method.draws=turns", "method.surrogate.budget=500", "method.surrogate.student=mlp",
    "method.surrogate.last_steps=2", "eval.every=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Path:
    """The toy pool: two teachers with weights, one with probabilities, one with labels."""
    changes: tuple[dict[str, str], ...] = ({}, {}, {"access": "probs"}, {"access": "label"})
    return pool_with(toy_pool, tmp_path_factory.mktemp("services") / "pool", *changes)


def config(pool: Path, data: str, *more: str) -> RunConfig:
    return toy.config("free", pool, data, *SURROGATE, *more)


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory, mixed: Path, toy_data: str) -> Path:
    """A finished run of one process, to which the others are compared."""
    path = tmp_path_factory.mktemp("services") / "local"
    toy.train(config(mixed, toy_data), path)
    return path


def answered(run: Path) -> Counter[str]:
    """Teacher -> images answered, by `ledger.jsonl`."""
    found = Counter[str]()
    for line in (run / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["teacher"]] += row["answered"]
    return found


def test_each_service_is_asked_as_often_as_planned_and_no_other_teacher(
    local_run: Path, mixed: Path, toy_data: str
) -> None:
    made = config(mixed, toy_data)
    planned = METHODS["free"].queries(made.method, driver.read_inputs(made).world)
    assert dict(answered(local_run)) == planned
    assert set(planned) == set(ids(mixed)[2:])
    assert all(count > 500 for count in planned.values())


def test_the_rounds_of_the_distillation_come_first(local_run: Path) -> None:
    rows = [json.loads(line) for line in (local_run / "metrics.jsonl").read_text().splitlines()]
    assert ["surrogate/agreement" in row for row in rows] == [True, True, False, False, False]
    assert [row["recover/tasks"] for row in rows[2:]] == [2, 2, 2]
    assert [
        note
        for note in toy.status(local_run)["notes"]
        if "2 of 4 teachers are asked, and inverted as surrogates" in note
    ]


@pytest.mark.ray
def test_two_shards_have_the_same_bits(
    tmp_path: Path, local_run: Path, mixed: Path, toy_data: str, ray_cluster: None
) -> None:
    toy.train(config(mixed, toy_data), tmp_path / "run", Machine(workers=2))
    toy.assert_same_run(tmp_path / "run", local_run)
    assert answered(tmp_path / "run") == answered(local_run)


def test_a_run_that_resumes_after_every_round_pays_once(
    tmp_path: Path, local_run: Path, mixed: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students, then surrogates, are in the checkpoint, and what was answered is in the ledger."""
    made, save = config(mixed, toy_data), LocalSession.save

    def save_and_stop(session: LocalSession, rounds: int, row: dict) -> None:
        save(session, rounds, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSession, "save", save_and_stop)
    inputs = driver.read_inputs(made)
    folder = RunFolder.create(tmp_path / "run", made, {"pool": inputs.pools, "data": inputs.data})
    for _ in range(made.method.total_rounds):
        with pytest.raises(Interrupted):
            driver.run(made, inputs, folder, toy.LOCAL, Progress(quiet=True))
    driver.run(made, inputs, folder, toy.LOCAL, Progress(quiet=True))
    toy.assert_same_run(tmp_path / "run", local_run)
    assert answered(tmp_path / "run") == answered(local_run)


def test_a_budget_of_an_entry_ends_the_run_and_keeps_the_learner(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    """The label service may be asked 510 images: its surrogate, and not the images of all rounds."""
    changes: tuple[dict[str, object], ...] = ({}, {}, {}, {"access": "label", "budget": 510})
    pool = pool_with(toy_pool, tmp_path / "pool", *changes)
    with pytest.raises(BudgetReached):
        toy.train(config(pool, toy_data), tmp_path / "run")
    assert answered(tmp_path / "run")[ids(pool)[3]] <= 510
    assert (tmp_path / "run" / "learner.safetensors").exists()


def test_what_a_service_missed_of_its_distillation_is_made_up_after_a_resume(
    tmp_path: Path, local_run: Path, mixed: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away for the second round and the third. Then it has the surrogate of a run in which it never was."""
    made, save, gone = config(mixed, toy_data), LocalSession.save, ids(mixed)[2]
    inputs = driver.read_inputs(made)
    folder = RunFolder.create(tmp_path / "run", made, {"pool": inputs.pools, "data": inputs.data})
    query = WrappedModel.query

    def answer(self: WrappedModel, images: np.ndarray) -> np.ndarray:
        if self.card.id != gone:
            return query(self, images)
        if asked:
            raise ServiceAway(f"{gone}: the server is down")
        asked.append(gone)
        return query(self, images)

    def stop_after_three(session: LocalSession, rounds: int, row: dict) -> Done:
        done = save(session, rounds, row)
        if rounds == 3:
            raise KeyboardInterrupt
        return done

    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(WrappedModel, "query", answer)
        patch.setattr(LocalSession, "save", stop_after_three)
        with pytest.raises(Interrupted):
            driver.run(made, inputs, folder, toy.LOCAL, Progress(quiet=True))
    assert answered(tmp_path / "run")[gone] == 250
    driver.run(made, driver.read_inputs(made), folder, toy.LOCAL, Progress(quiet=True))
    state, quiet = toy.last_state(tmp_path / "run"), toy.last_state(local_run)
    assert "students" not in state
    toy.assert_equal(state["surrogates"], quiet["surrogates"])
    assert 500 <= answered(tmp_path / "run")[gone] <= answered(local_run)[gone]
