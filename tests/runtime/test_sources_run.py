"""Runs whose teachers with weights label images of sources: their bits, and every question that the ledger counts."""

from pathlib import Path

import pytest

from ray_dfml.config import RunConfig
from ray_dfml.methods import METHODS, sourced
from ray_dfml.runtime.driver import Machine, read_inputs
from tests.runtime import toy
from tests.runtime.test_accounts import ids, sums

MIXTURE = ("method.images=[generator,dip]", "method.draws=turns", "method.warmup=1", "eval.every=6")


def config(pool: Path, data: str) -> RunConfig:
    return toy.config("free", pool, data, *MIXTURE)


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path, toy_data: str) -> Path:
    """A finished run of one process."""
    path = tmp_path_factory.mktemp("sources") / "run"
    toy.train(config(toy_pool, toy_data), path)
    return path


def test_every_question_is_planned_and_counted(local_run: Path, toy_pool: Path, toy_data: str) -> None:
    """Six rounds of two teachers are three cycles of four: after the warm-up each teacher labels at least once."""
    made = config(toy_pool, toy_data)
    planned = METHODS["free"].queries(made.method, read_inputs(made).world)
    assert sums(local_run) == {id: (count, count) for id, count in planned.items()}
    way, visit = 2, sourced.CANDIDATES * 8
    assert set(planned) == set(ids(toy_pool))
    assert all(count and count % (visit * way) == 0 for count in planned.values())
    assert toy.status(local_run)["queries"]["answered"] == sum(planned.values())
    assert any("label images of dip" in note for note in toy.status(local_run)["notes"])


def test_a_run_that_resumes_after_every_round(
    tmp_path: Path, local_run: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.stopped_after_each_round(config(toy_pool, toy_data), tmp_path / "run", monkeypatch)
    toy.assert_same_run(tmp_path / "run", local_run)
    assert sums(tmp_path / "run") == sums(local_run)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_shards_have_the_same_bits(tmp_path: Path, local_run: Path, toy_pool: Path, toy_data: str) -> None:
    toy.train(config(toy_pool, toy_data), tmp_path / "run", Machine(workers=2))
    toy.assert_same_run(tmp_path / "run", local_run)
    assert sums(tmp_path / "run") == sums(local_run)
