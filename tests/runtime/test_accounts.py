"""What a run asks and spends: levels of access, budgets, what is shown of them, and how a run goes on."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_dfml.errors import BudgetReached, RejectedError, UsageError
from ray_dfml.learner import Learner
from ray_dfml.methods import METHODS
from ray_dfml.ops import OPS, of_method
from ray_dfml.runtime import launch
from ray_dfml.runtime.driver import read_inputs
from tests import asking_method
from tests.runtime import toy

Command = Callable[..., toy.Done]
PLAN = 4 * 20 + 1
"""Images that a whole training asks each teacher about."""


@pytest.fixture(autouse=True)
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method that asks."""
    monkeypatch.setitem(METHODS, "asking", asking_method.METHOD)
    for name, op in of_method("asking", asking_method.METHOD).items():
        monkeypatch.setitem(OPS, name, op)


def ids(pool: Path) -> list[str]:
    return [entry["id"] for entry in yaml.safe_load((pool / "pool.yaml").read_text())["teachers"]]


def pool_with(toy_pool: Path, path: Path, *changes: dict[str, Any], budget: dict[str, Any] | None = None) -> Path:
    """A copy of a pool, with changes of its first entries."""
    shutil.copytree(toy_pool, path)
    content = yaml.safe_load((path / "pool.yaml").read_text())
    for entry, change in zip(content["teachers"], changes, strict=False):
        entry.update(change)
    if budget is not None:
        content["budget"] = budget
    (path / "pool.yaml").write_text(yaml.safe_dump(content))
    return path


def sums(run: Path) -> dict[str, tuple[int, int]]:
    """Teacher -> images sent and answered, by `ledger.jsonl`."""
    sent, answered = Counter[str](), Counter[str]()
    for line in (run / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        sent[row["teacher"]] += row["sent"]
        answered[row["teacher"]] += row["answered"]
    return {id: (sent[id], answered[id]) for id in sent}


LEVELS = ({}, {"access": "probs", "price": 0.5}, {"access": "label", "price": 0.25}, {"access": "logits"})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Path:
    """The toy pool with one teacher at each level."""
    return pool_with(toy_pool, tmp_path_factory.mktemp("mixed") / "pool", *LEVELS)


def test_a_run_asks_teachers_of_every_access(tmp_path: Path, mixed: Path, toy_data: str) -> None:
    """The answers are those of the weights, and everything that was asked is in status, manifest and ledger."""
    run = tmp_path / "run"
    toy.train(toy.config("asking", mixed, toy_data), run)
    found, known = toy.last_state(run)["answers"], ids(mixed)
    assert [found[id].dtype.kind + str(found[id].ndim) for id in known] == ["f2", "f2", "i1", "f2"]
    assert sums(run) == dict.fromkeys(known, (PLAN, PLAN))
    each = toy.status(run)["queries"]["teachers"]
    assert [each[id] for id in known] == [
        {"answered": PLAN, "sent": PLAN, "money": price * PLAN} for price in (0, 0.5, 0.25, 0)
    ]
    total = {key: toy.status(run)["queries"][key] for key in ("answered", "sent", "money")}
    assert total == {"answered": 4 * PLAN, "sent": 4 * PLAN, "money": 0.75 * PLAN}
    assert json.loads((run / "manifest.json").read_text())["queries"] == toy.status(run)["queries"]


def test_a_run_that_asks_nobody_has_no_ledger(free_run: Path) -> None:
    assert "queries" not in toy.status(free_run)
    assert not (free_run / "ledger.sqlite").exists()
    assert (free_run / "ledger.jsonl").read_text() == ""


def test_other_teachers_are_left_out(mixed: Path) -> None:
    inputs = read_inputs(toy.config("average", mixed, None))
    known = ids(mixed)
    assert [card.id for card in inputs.world.cards] == known[:1]
    assert inputs.rejected == {
        id: f"gives {access}, and average takes weights"
        for id, access in zip(known[1:], ("probs", "label", "logits"), strict=True)
    }
    assert not inputs.accounts.asked


def test_a_run_without_a_usable_level_is_refused(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    pool = pool_with(toy_pool, tmp_path / "pool", *[{"access": "label"}] * 4)
    done = command("train", "average", "--pool", pool, "--run-dir", tmp_path / "run", "--backend", "local")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"{ids(pool)[0]} gives label, and average takes weights" in done.err
    assert not (tmp_path / "run").exists()


def test_a_bad_file_is_the_pools_fault(tmp_path: Path, toy_pool: Path) -> None:
    pool = pool_with(toy_pool, tmp_path / "pool", {"sha256": "0" * 64}, *[{"access": "label"}] * 3)
    with pytest.raises(RejectedError, match="no usable teacher"):
        read_inputs(toy.config("average", pool, None))


@pytest.mark.parametrize(
    ("settings", "entry", "whole", "said"),
    [
        ((), {"budget": 50}, None, "the budget of teacher"),
        (("budget.per_teacher=50",), {}, None, "the run's budget for each teacher"),
        (("budget.queries=200",), {}, None, "the budget of the run is 200 images"),
        (("budget.money=12.5",), {"price": 0.25}, None, "the budget of the run is 12.5 in money"),
        ((), {"price": 0.25, "money": 12.5}, None, "in money"),
        ((), {}, {"queries": 200}, "the budget of pool"),
    ],
    ids=["entry", "per teacher", "run", "money of the run", "money of the entry", "pool"],
)
def test_a_budget_ends_a_run_and_what_is_done_is_kept(
    tmp_path: Path, toy_pool: Path, toy_data: str, settings: tuple[str, ...], entry: dict[str, Any],
    whole: dict[str, Any] | None, said: str,
) -> None:  # fmt: skip
    """The third round cannot be paid: two are exported, tested and reported."""
    pool, run = pool_with(toy_pool, tmp_path / "pool", {"access": "label"} | entry, budget=whole), tmp_path / "run"
    with pytest.raises(BudgetReached, match=said):
        launch.new_run(toy.config("asking", pool, toy_data, *settings), run, toy.LOCAL, quiet=True)
    status = toy.status(run)
    assert (status["state"], status["round"]) == ("budget", 2)
    assert said in status["last_error"]
    assert status["exit_code"] == 4
    assert {row["method"] for row in json.loads((run / "scores.json").read_text())} == {"asking", "random"}
    assert Learner.load(run).weights.finite
    assert (run / "report.html").is_file()
    assert status["queries"]["sent"] == sum(sent for sent, _ in sums(run).values())
    assert status["queries"]["sent"] <= 200


def test_a_raised_budget_goes_on_to_the_same_end(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    """Nothing that was answered is sent again, and the end has the bits of a run that was never stopped."""
    pool = pool_with(toy_pool, tmp_path / "pool", *LEVELS)
    whole, run = tmp_path / "whole", tmp_path / "run"
    toy.train(toy.config("asking", pool, toy_data), whole)
    with pytest.raises(BudgetReached):
        launch.new_run(toy.config("asking", pool, toy_data, "budget.queries=200"), run, toy.LOCAL, quiet=True)
    assert toy.status(run)["round"] == 2
    launch.continue_run(run, "asking", toy.LOCAL, budget=["budget.queries=324"], quiet=True)
    assert yaml.safe_load((run / "config.yaml").read_text())["budget"]["queries"] == 324
    assert toy.status(run)["state"] == "done"
    assert sums(run) == sums(whole)
    toy.assert_same_run(run, whole)


def test_a_budget_in_the_pool_may_be_raised(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    pool, run = pool_with(toy_pool, tmp_path / "pool", {"access": "label", "budget": 50}), tmp_path / "run"
    with pytest.raises(BudgetReached):
        launch.new_run(toy.config("asking", pool, toy_data), run, toy.LOCAL, quiet=True)
    content = yaml.safe_load((pool / "pool.yaml").read_text())
    content["teachers"][0]["budget"] = 81
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    launch.continue_run(run, "asking", toy.LOCAL, quiet=True)
    assert sums(run)[ids(pool)[0]] == (81, 81)


def test_without_a_round_there_is_no_learner(tmp_path: Path, toy_pool: Path) -> None:
    pool, run = pool_with(toy_pool, tmp_path / "pool", *[{"access": "label"}] * 4), tmp_path / "run"
    with pytest.raises(BudgetReached, match="no round is done"):
        launch.new_run(toy.config("asking", pool, None, "budget.queries=10"), run, toy.LOCAL, quiet=True)
    assert (toy.status(run)["state"], toy.status(run)["queries"]["sent"]) == ("budget", 0)
    assert not (run / "learner.json").exists()


@pytest.mark.parametrize("setting", ["method.rounds=9", "eval.episodes=3", "budget=3", "budget.rest=3"])
def test_a_resumed_run_keeps_all_but_its_budget(tmp_path: Path, free_run: Path, setting: str) -> None:
    with pytest.raises(UsageError, match=r"only budget.\* may change|unknown key budget.rest"):
        launch.continue_run(free_run, "free", toy.LOCAL, budget=[setting], quiet=True)


@pytest.mark.parametrize(
    ("setting", "said"),
    [("budget.queries=0", "greater than or equal to 1"), ("budget.money=-1", "greater than 0"),
     ("budget.per_teacher=half", "valid integer"), ("budget.query=5", "did you mean 'queries'")],
)  # fmt: skip
def test_budgets_that_cannot_be(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        toy.config("asking", None, None, setting)
