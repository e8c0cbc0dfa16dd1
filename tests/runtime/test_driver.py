"""The driver: a learner that keeps dying, teachers that are bad, and inputs that do not fit each other."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_dfml.errors import Interrupted, LearnerLost, RejectedError, UsageError
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import driver, locks
from ray_dfml.runtime.assess import Assessment
from ray_dfml.runtime.checkpoint import Saved
from ray_dfml.runtime.learning import Done
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.scorer import Part
from tests.runtime import toy


class Dying:
    """A session whose learner dies in round `last`, each time; `starts` are the rounds that were done when it was
    started."""

    notes = ()

    def __init__(self, last: int) -> None:
        self.last = last
        self.starts: list[Any] = []
        self.done = Done()

    def start(self) -> Done:
        self.starts.append(self.done.rounds)
        return self.done

    def call(self, name: str, *args: Any) -> Any:
        if name == "round" and args[0] == self.last:
            raise LearnerLost("its process ended")
        return {"round": {}, "learned": False}[name]

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        self.done = Done(Saved(f"round-{rounds}", "", rounds), row)
        return self.done

    def at_work(self) -> list[Any]:
        return []

    def close(self) -> None:
        self.starts.append("closed")


@pytest.mark.parametrize(("method", "last"), [("random", 0), ("free", 2)])
def test_a_learner_that_keeps_dying_fails_the_run(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch, method: str, last: int
) -> None:
    """It is started again from the last round each time."""
    session = Dying(last)
    monkeypatch.setattr(driver.Machine, "session", lambda *_: session)
    with pytest.raises(LearnerLost):
        toy.train(toy.config(method, toy_pool, toy_data), tmp_path / "run")
    assert session.starts == [0, *[last] * (driver.LEARNER_LIVES - 1), "closed"]
    assert toy.status(tmp_path / "run")["state"] == "failed"
    assert "its process ended" in toy.status(tmp_path / "run")["last_error"]
    assert [row["round"] for row in rows(tmp_path / "run")] == list(range(last))


def rows(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stop",
    [
        KeyboardInterrupt(), MemoryError(), ValueError("shapes"), RuntimeError("no room on the device"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_ends_a_run_the_rounds_before_are_on_disk(
    tmp_path: Path, toy_pool: Path, toy_data: str, free_run: Path, monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
) -> None:  # fmt: skip
    """It ends in the fourth of six rounds; the three before are not repeated, and the bits are those of a quiet run."""
    config, run, computed, stops = toy.config("free", toy_pool, toy_data), tmp_path / "run", [], [3]
    compute = Trainer.round

    def stop_once(self: Trainer, r: int) -> Any:
        computed.append(r)
        if r in stops:
            stops.remove(r)
            raise stop
        return compute(self, r)

    monkeypatch.setattr(Trainer, "round", stop_once)
    with pytest.raises(Interrupted if isinstance(stop, KeyboardInterrupt) else type(stop)):
        toy.train(config, run)
    assert toy.last_state(run).keys() >= {"theta", "bank"}
    assert toy.status(run)["state"] == ("interrupted" if isinstance(stop, KeyboardInterrupt) else "failed")
    driver.run(config, driver.read_inputs(config), RunFolder(run), toy.LOCAL, Progress(quiet=True))
    assert computed == [0, 1, 2, 3, 3, 4, 5]
    assert [row["round"] for row in rows(run)] == list(range(6))
    toy.assert_same_run(run, free_run)


def test_a_death_between_a_checkpoint_and_its_line_of_metrics_costs_nothing(
    tmp_path: Path, toy_pool: Path, toy_data: str, free_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has the line too: the learner may die before it answers, or the driver before it writes."""
    plain, deaths = LocalSession.save, [2, 4]

    def save(self: LocalSession, rounds: int, row: dict[str, Any]) -> Done:
        done = plain(self, rounds, row)
        if rounds in deaths:
            deaths.remove(rounds)
            raise LearnerLost("its process ended") if rounds == 2 else KeyboardInterrupt
        return done

    monkeypatch.setattr(LocalSession, "save", save)
    config, run = toy.config("free", toy_pool, toy_data), tmp_path / "run"
    with pytest.raises(Interrupted):
        toy.train(config, run)
    assert [row["round"] for row in rows(run)] == [0, 1, 2]
    driver.run(config, driver.read_inputs(config), RunFolder(run), toy.LOCAL, Progress(quiet=True))
    wanted = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows(free_run)]
    found = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows(run)]
    assert found == wanted
    toy.assert_same_run(run, free_run)


def test_a_stall_in_which_a_process_was_killed_is_not_said_of_the_next_one(tmp_path: Path, free_run: Path) -> None:
    run, session = RunFolder(Path(shutil.copytree(free_run, tmp_path / "run"))), Dying(9)
    session.done = Done(Saved("round-6", "", 6), rows(free_run)[5])
    run.status(stalled={"round": 6, "said": "round 6 has been at work for 9:00"})
    assert driver._begin(run, session) == (session.done, False)
    assert run.read_status()["stalled"] is None


def test_what_is_new_in_a_round_is_said_once_and_noted(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard's lack of memory, and a teacher that is left out: after the round, and not only at the end."""
    plain = LocalSession.save

    def save(self: LocalSession, rounds: int, row: dict[str, Any]) -> Done:
        done = plain(self, rounds, row)
        return replace(done, notes=("memory was short",), rejected={"t": "t: is bad"}) if rounds > 1 else done

    monkeypatch.setattr(LocalSession, "save", save)
    config, run = toy.config("free", toy_pool, toy_data, "method.rounds=3"), tmp_path / "run"
    inputs = driver.read_inputs(config)
    folder = RunFolder.create(run, config, {"pool": inputs.pools, "data": inputs.data})
    driver.run(config, inputs, folder, toy.LOCAL, Progress())
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line in ("memory was short", "left out: t: is bad")] == [
        "left out: t: is bad", "memory was short",
    ]  # fmt: skip
    assert said.index("memory was short") < said.index("testing")
    assert toy.status(run)["notes"] == [*inputs.notes, "memory was short"]


@pytest.mark.parametrize("method", ["free", "purer"])
def test_what_the_learner_tells_the_driver_does_not_grow_with_the_bank(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Bytes of all questions and answers of each round, whatever the images of the state are."""
    answers: list[int] = []
    for name in ("start", "call", "save"):
        plain = getattr(LocalSession, name)

        def ask(self: LocalSession, *words: Any, plain: Any = plain) -> Any:
            answer = plain(self, *words)
            answers.append(len(pickle.dumps((answer, words))))
            return answer

        monkeypatch.setattr(LocalSession, name, ask)
    counts: list[int] = []

    def stop(self: driver.RunFolder, row: Any) -> None:
        counts.append(sum(answers))
        answers.clear()

    monkeypatch.setattr(RunFolder, "log", stop)
    monkeypatch.setattr(Assessment, "finish", lambda *_: ([], []))
    toy.train(toy.config(method, toy_pool, toy_data, "method.images_per_class=150"), tmp_path / "run")
    state = toy.last_state(tmp_path / "run")
    held = (
        state["bank"]
        if method == "free"
        else {f"{id}{k}": own[k] for id, own in state["images"].items() for k in "xmv"}
    )
    assert sum(array.nbytes for array in held.values()) > 20 * max(counts)
    assert len(counts) == (6 if method == "free" else 4)
    assert max(counts) < 20_000, "bound: 1 MB a round"


def test_a_teacher_with_nan_weights_is_quarantined_before_the_run(
    tmp_path: Path, toy_pool: Path, toy_data: str
) -> None:
    id = toy.damage(toy_pool, tmp_path / "pool", 1, float("nan"))
    toy.train(toy.config("free", tmp_path / "pool", toy_data, "method.rounds=2"), tmp_path / "run")
    found = toy.status(tmp_path / "run")
    assert found["state"] == "done"
    assert list(found["rejected"]) == [id]
    assert found["rejected"][id].startswith(f"{id}: ")
    assert "NaN" in found["rejected"][id]


def test_a_teacher_that_fails_at_work_is_quarantined_in_its_round(
    tmp_path: Path, toy_pool: Path, toy_data: str
) -> None:
    """Finite weights so large that its outputs are not."""
    id = toy.damage(toy_pool, tmp_path / "pool", 1, 1e30)
    toy.train(toy.config("free", tmp_path / "pool", toy_data), tmp_path / "run")
    found = toy.status(tmp_path / "run")
    assert (found["state"], found["round"]) == ("done", 6)
    assert found["rejected"] == {id: "the inversion loss is not finite"}
    assert toy.last_state(tmp_path / "run")["rejected"] == found["rejected"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(row["recover/tasks"] for row in rows) < 2, "the round that found it went on with the other tasks"


def test_a_pool_without_a_usable_teacher_is_rejected(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    toy.build_pool(tmp_path / "one", toy_data, models=1, way=2)
    toy.damage(tmp_path / "one", tmp_path / "bad", 0, float("inf"))
    with pytest.raises(RejectedError, match=r"no usable teacher in .*(infinite|NaN)"):
        driver.read_inputs(toy.config("free", tmp_path / "bad", toy_data))


def test_pools_of_one_run_are_told_apart(toy_pool: Path, toy_data: str) -> None:
    config = toy.config("free", toy_pool, toy_data).model_copy(update={"pool": (str(toy_pool), str(toy_pool))})
    found = driver.read_inputs(config)
    assert len(found.teachers) == len({card.id for card in found.world.cards}) == 8
    assert {id.split(":")[0] for id in found.teachers} == {"0", "1"}


def test_the_oracle_needs_data_and_gets_only_the_training_classes(toy_data: str) -> None:
    with pytest.raises(UsageError, match="--data"):
        driver.read_inputs(toy.config("maml-oracle", None, None))
    found = driver.read_inputs(toy.config("maml-oracle", None, toy_data))
    assert len(found.world.real) == 12
    assert all(key.startswith("folder-0/train") for key in found.world.real)
    assert [(one.split, len(one.images)) for one in found.sets] == [("val", 120), ("test", 160)]


def test_no_other_method_sees_real_training_images(toy_pool: Path, toy_data: str) -> None:
    for method in ("free", "average", "best-model", "random"):
        assert dict(driver.read_inputs(toy.config(method, toy_pool, toy_data)).world.real) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "eval.shots=[30]",
            "2-way 30-shot episodes need 2 classes with 33 images (30 support, 3 query), there are 0; ",
        ),
        ("learner.arch=foo", "unknown architecture"),
        ("eval.shots=[]", "eval.shots"),
        ("eval.shots=[0]", "eval.shots"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_there_is_a_run(
    tmp_path: Path, toy_pool: Path, toy_data: str, change: str, message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        driver.read_inputs(toy.config("free", toy_pool, toy_data, change))


def test_one_process_at_a_time_writes_a_run_folder(
    tmp_path: Path, free_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    copy = Path(shutil.copytree(free_run, tmp_path / "run"))
    with (
        RunFolder(copy).locked(),
        pytest.raises(UsageError, match="another process is at work"),
        RunFolder(copy).locked(),
    ):
        pass
    with RunFolder(copy).locked():
        assert (copy / "config.yaml").exists()


def test_the_learner_is_exported_before_it_is_tested(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Trainer.score

    def fail(self: Trainer, part: Part) -> Any:
        if part.episodes.split == "test":
            raise RuntimeError("the test failed")
        return answer(self, part)

    monkeypatch.setattr(Trainer, "score", fail)
    with pytest.raises(RuntimeError, match="the test failed"):
        toy.train(toy.config("free", toy_pool, toy_data), tmp_path / "run")
    assert (tmp_path / "run" / "learner.safetensors").exists()


def test_the_exported_learner_adapts_as_it_was_tested(tmp_path: Path, toy_data: str) -> None:
    """The exported learner has the run's head, and the step size that validation chose."""
    words = ("learner.head=anil", "eval.lrs=[0.3]", "eval.lr=0.01")
    toy.train(toy.config("maml-oracle", None, toy_data, *words), tmp_path / "run")
    card = json.loads((tmp_path / "run" / "learner.json").read_text())
    assert (card["head"], card["lr"], card["selection"]) == ("anil", 0.3, "val")
    steps = {(step["method"], step["selection"]): step["lr"] for step in toy.status(tmp_path / "run")["test_step"]}
    assert steps == {("maml-oracle", "val"): 0.3, ("maml-oracle", "last"): 0.3, ("random", "last"): 0.3}


def test_an_untrained_network_is_no_candidate(tmp_path: Path, toy_data: str) -> None:
    rows = toy.train(toy.config("random", None, toy_data), tmp_path / "run")
    assert [(row["method"], row["selection"]) for row in rows] == [("random", "last")]
    assert json.loads((tmp_path / "run" / "learner.json").read_text())["selection"] == "last"


def test_a_learner_that_dies_in_the_test_is_asked_only_for_the_rest(
    tmp_path: Path, toy_pool: Path, toy_data: str, free_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that are known stay known, and the bits are those of a run without a death."""
    answer, asked = Trainer.score, list[Part]()

    def once(self: Trainer, part: Part) -> Any:
        asked.append(part)
        if part.episodes.split == "test" and sum(one.episodes.split == "test" for one in asked) == 2:
            raise LearnerLost("its process ended")
        return answer(self, part)

    monkeypatch.setattr(Trainer, "score", once)
    toy.train(toy.config("free", toy_pool, toy_data), tmp_path / "run")
    assert [asked.count(part) for part in dict.fromkeys(asked)].count(2) == 1
    toy.assert_same_run(tmp_path / "run", free_run)
