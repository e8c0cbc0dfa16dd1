"""`shared-answers` on a pool of two teachers with weights, one of probabilities and one of labels: a whole run."""

import json
from collections import Counter
from pathlib import Path

from ray_dfml.methods import METHODS
from ray_dfml.runtime import driver
from ray_dfml.runtime.estimate import estimate
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with


def test_each_teacher_is_asked_as_often_as_planned_and_the_learner_is_moved(
    tmp_path: Path, toy_pool: Path, toy_data: str
) -> None:
    pool = pool_with(toy_pool, tmp_path / "pool", {}, {}, {"access": "probs"}, {"access": "label"})
    config = toy.config("shared-answers", pool, toy_data)
    toy.train(config, tmp_path / "run")
    sent, answered = Counter[str](), Counter[str]()
    for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        sent[row["teacher"]] += row["sent"]
        answered[row["teacher"]] += row["answered"]
    inputs = driver.read_inputs(config)
    assert sent == answered == METHODS["shared-answers"].queries(config.method, inputs.world)
    assert sent == dict.fromkeys(ids(pool), 20 + 2 * inputs.world.way)
    assert "queries" in estimate(config, inputs, toy.LOCAL)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["fit/agreement" in row for row in rows] == [False, False, False, True, True]
    state = toy.last_state(tmp_path / "run")
    assert state["theta"].tolist() != METHODS["shared-answers"].init(config.method, inputs.world)["theta"].tolist()
