"""What `ray-dfml train` says of questions: the plan, a budget that ends a run, and a run that was killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with, sums
from tests.runtime.test_signals import PATIENCE, first_checkpoint

Command = Callable[..., toy.Done]
HERE = ("--backend", "local")
PLAN = 24


@pytest.fixture
def pool(tmp_path: Path, toy_pool: Path) -> Path:
    """Four teachers that are only asked, for a price."""
    prices = (0.1, 0.2, 0.0, 0.25)
    return pool_with(toy_pool, tmp_path / "pool", *[{"access": "label", "price": price} for price in prices])


def test_a_dry_run_prints_what_each_teacher_is_asked(tmp_path: Path, pool: Path, command: Command) -> None:
    words = ("train", "ideal", "--pool", pool, "--run-dir", tmp_path / "run", *HERE, "--dry-run", *toy.flags("ideal"))
    plan = json.loads(command(*words, "--json").out)["queries"]
    assert plan["teachers"] == {
        id: {"images": PLAN, "money": money} for id, money in zip(ids(pool), (2.4, 4.8, 0.0, 6.0), strict=True)
    }
    assert (plan["images"], plan["money"]) == (4 * PLAN, 13.2)
    lines = command(*words).out.splitlines()
    assert [line for line in lines if line.startswith(f"queries to {ids(pool)[0]} ") and line.endswith(" 24, cost 2.4")]
    assert [line for line in lines if line.startswith("queries in all ") and line.endswith(" 96, cost 13.2")]
    assert not (tmp_path / "run").exists()


def test_a_plan_of_a_run_that_asks_nobody_has_no_queries(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    words = ("train", "average", "--pool", toy_pool, "--run-dir", tmp_path / "run", *HERE, "--dry-run", "--json")
    assert "queries" not in json.loads(command(*words).out)


def test_a_budget_ends_with_4_and_a_raised_one_goes_on(tmp_path: Path, pool: Path, command: Command) -> None:
    """One line says why; the students of the rounds that are done are there."""
    run = tmp_path / "run"
    words = ("train", "ideal", "--run-dir", run, *HERE)
    done = command(*words, "--pool", pool, *toy.flags("ideal", "budget.queries=70"))
    assert done.code == 4, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("ray-dfml: the budget of the run is 70 images: 64 are sent and 8 more are asked")
    assert f"run: {run}" in done.out
    assert toy.status(run)["state"] == "budget"
    page = " ".join((run / "report.html").read_text().split())
    assert '<td>in all</td><td class="n">64</td><td class="n">64</td><td class="n">8.8</td>' in page
    refused = command(*words, "--resume", "--set", "method.batch=4")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    still = command(*words, "--resume", "--json")
    assert (still.code, json.loads(still.out)) == (4, {"run": str(run), "scores": []})
    again = command(*words, "--resume", "--set", "budget.queries=96")
    assert again.code == 0, again.err
    assert sums(run) == dict.fromkeys(ids(pool), (PLAN, PLAN))


def test_a_run_that_is_killed_asks_nothing_twice(tmp_path: Path, pool: Path, command: Command) -> None:
    """SIGKILL after the first checkpoint, then --resume: the same bits, and no answer is paid for again."""
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    toy.train(toy.config("ideal", pool, None), quiet)
    words = [sys.executable, "-m", "ray_dfml", "train", "ideal", "--pool", str(pool), "--run-dir", str(run)]
    process = subprocess.Popen(
        [*words, *HERE, *toy.flags("ideal")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first_checkpoint(run, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    done = command("train", "ideal", "--run-dir", run, "--resume", *HERE)
    assert done.code == 0, done.err
    toy.assert_equal(toy.last_state(run), toy.last_state(quiet))
    assert {id: answered for id, (_, answered) in sums(run).items()} == dict.fromkeys(ids(pool), PLAN)
    assert all(PLAN <= sent <= PLAN + 8 for sent, _ in sums(run).values())
