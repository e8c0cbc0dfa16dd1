"""BiDf-MKD on a pool in which one teacher is open and three are only asked, through the ledger of a run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from ray_dfml.config import RunConfig
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.runtime.driver import Machine, read_inputs
from tests.runtime import toy

LEVELS = ("weights", "probs", "label", "logits")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Path:
    """The toy pool with one teacher at each level."""
    path = tmp_path_factory.mktemp("levels") / "pool"
    shutil.copytree(toy_pool, path)
    content = yaml.safe_load((path / "pool.yaml").read_text())
    for entry, access in zip(content["teachers"], LEVELS, strict=True):
        entry["access"] = access
    (path / "pool.yaml").write_text(yaml.safe_dump(content))
    return path


def config(pool: Path, *more: str) -> RunConfig:
    return toy.config("bidf-mkd", pool, None, "method.zero_order.directions=4", "method.teachers_per_round=4", *more)


def counts(run: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Teacher -> images sent, and images answered, by `ledger.jsonl`."""
    sent, answered = Counter[str](), Counter[str]()
    for line in (run / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        sent[row["teacher"]] += row["sent"]
        answered[row["teacher"]] += row["answered"]
    return dict(sent), dict(answered)


SURROGATE = (
    "method.surrogate.budget=500", "method.surrogate.student=mlp", "method.surrogate.last_steps=2",
    "method.rounds=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> Path:
    """A run of one process."""
    path = tmp_path_factory.mktemp("asked") / "run"
    toy.train(config(pool), path)
    return path


def test_a_run_asks_what_was_planned_to_the_image(run: Path, pool: Path) -> None:
    cfg = config(pool)
    world = read_inputs(cfg).world
    assert isinstance(cfg.method, bidf.Config)
    planned = {id: count for id, count in bidf.queries(cfg.method, world).items() if count}
    assert len(planned) == 3
    assert counts(run) == (planned, planned)
    state = toy.last_state(run)
    assert set(state["bank"]) == {name for card in world.cards for name in card.classes}
    assert np.isfinite(state["theta"].numpy()).all()


def test_images_of_a_source_cost_one_query_each(tmp_path: Path, pool: Path) -> None:
    toy.train(config(pool, "method.images=dip,strokes", "method.rounds=1"), tmp_path / "run")
    sent, answered = counts(tmp_path / "run")
    assert sent == answered
    visits = 2 * 6 * 2  # two sets of six images of two classes
    assert all(count % visits == 0 for count in sent.values())
    notes = toy.status(tmp_path / "run")["notes"]
    assert sum(note.startswith("services are asked about images of ") for note in notes) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_shards_give_the_bits_of_one_process(tmp_path: Path, pool: Path, run: Path) -> None:
    toy.train(config(pool), tmp_path / "run", Machine(workers=2))
    assert (tmp_path / "run" / "learner.safetensors").read_bytes() == (run / "learner.safetensors").read_bytes()
    toy.assert_equal(toy.last_state(tmp_path / "run"), toy.last_state(run))
    assert counts(tmp_path / "run") == counts(run)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_surrogates_cost_what_was_planned_and_two_shards_give_the_bits_of_one_process(
    tmp_path: Path, pool: Path
) -> None:
    """After the distillation a visit costs its two sets, and no zero-order gradient."""
    cfg = config(pool, *SURROGATE)
    toy.train(cfg, tmp_path / "one")
    assert isinstance(cfg.method, bidf.Config)
    planned = bidf.queries(cfg.method, read_inputs(cfg).world)
    assert counts(tmp_path / "one") == (planned, planned)
    assert all(count >= 500 and (count - 500) % (2 * 6 * 2) == 0 for count in planned.values())
    assert set(toy.last_state(tmp_path / "one")["surrogates"]) == set(planned)
    toy.train(cfg, tmp_path / "two", Machine(workers=2))
    toy.assert_same_run(tmp_path / "two", tmp_path / "one")
    assert counts(tmp_path / "two") == (planned, planned)
