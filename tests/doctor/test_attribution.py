"""Which teachers helped or harmed: on a run whose bank is known."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.core.influence import Influence
from ray_dfml.data import quarantine
from ray_dfml.doctor.attribution import Attribution, Contribution, attribute
from ray_dfml.errors import UsageError
from tests.runtime import toy

Command = Callable[..., toy.Done]


def test_every_teacher_of_a_run_is_judged(tmp_path: Path, free_run: Path, command: Command) -> None:
    before = {path: path.read_bytes() for path in free_run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = command("attribute", free_run, "--tasks", 3, "--episodes", 4, "--updates", 1, "--json",
                   "--quarantine", tmp_path / "out.yaml")  # fmt: skip
    assert done.code == 0, done.err
    assert re.match(r"cost: about .* in 1 process; nobody is asked\n", done.err)
    rows = json.loads(done.out)
    assert len(rows) == 4
    assert all(row["classes"] <= 2 for row in rows)
    judged = [row for row in rows if row["influence"]]
    assert judged
    assert all(-1 <= row["influence"]["cosine"] <= 1 for row in judged)
    assert set(quarantine.read(tmp_path / "out.yaml")) == {row["teacher"] for row in rows if row["harms"]}
    after = {path: path.read_bytes() for path in free_run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after, "the run is only read"
    again = attribute(free_run, tasks=3, count=4, updates=1)
    assert [one.tree() for one in again.contributions] == [
        {k: v for k, v in row.items() if k != "harms"} for row in rows
    ]
    assert len(again.lines()) == 6


def test_a_run_without_a_bank_is_refused(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    toy.train(toy.config("average", toy_pool, toy_data), tmp_path / "run")
    with pytest.raises(UsageError, match="hold no bank of recovered images"):
        attribute(tmp_path / "run", tasks=2, count=2, updates=0)


def test_only_evidence_beyond_chance_makes_a_proposal() -> None:
    def one(name: str, product: float, left_out: float | None = None) -> Contribution:
        found = Influence(product, 0.5, 0.1)
        return Contribution(teacher=name, classes=5, alone=5, influence=found, left_out=left_out)

    rows = [one("bad", -1), one("unsure", -0.4), one("good", 1)]
    alone = Attribution(contributions=rows, whole=None, episodes=9, updates=0)
    assert list(alone.harmful()) == ["bad"]
    tried = [one("bad", -1, 3.0), one("luck", -1, 1.0), one("good", 1, 5.0)]
    both = Attribution(contributions=tried, whole=(80.0, 0.7), episodes=9, updates=5)
    assert both.harmful() == {
        "bad": [
            "influence -1 ± 0.5 on the loss of 9 validation episodes, cosine 0.10",
            "+3.00 points without it, equal learners differ by 0.70",
        ]
    }
