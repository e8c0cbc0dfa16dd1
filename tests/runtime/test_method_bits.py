"""The same bits of every other method: one process, two shards, a shard killed within a job, and a run that resumes."""

import os
import signal
from pathlib import Path

import pytest

from ray_dfml.methods import METHODS
from ray_dfml.runtime import cluster, driver
from ray_dfml.runtime.driver import Machine
from tests.runtime import toy
from tests.runtime.test_bits import PATIENCE, Ambush, gone, meanwhile


@pytest.fixture(scope="module", params=["purer", "bidf-mkd", "shared-answers"])
def local_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_pool: Path, toy_data: str
) -> tuple[str, Path]:
    """A method and its finished run of one process."""
    method: str = request.param
    path = tmp_path_factory.mktemp("local") / method
    toy.train(toy.config(method, toy_pool, toy_data), path)
    return method, path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_shards_agree_with_one_process(
    tmp_path: Path, local_run: tuple[str, Path], toy_pool: Path, toy_data: str
) -> None:
    method, reference = local_run
    toy.train(toy.config(method, toy_pool, toy_data), tmp_path / "run", Machine(workers=2))
    toy.assert_same_run(tmp_path / "run", reference)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_killed_within_a_job(
    tmp_path: Path, local_run: tuple[str, Path], toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, reference = local_run
    config = toy.config(method, toy_pool, toy_data)
    world = driver.read_inputs(config).world
    state = METHODS[method].init(config.method, world)
    teacher = str(METHODS[method].plan(config.method, world, state, 0)[0].teacher)
    ambush = Ambush(tmp_path / "ambush", teacher)
    monkeypatch.setattr(cluster, "PoolStore", ambush.store(cluster.PoolStore))
    killed: list[int] = []

    def strike() -> None:
        killed.append(ambush.held())
        os.kill(killed[0], signal.SIGKILL)

    thread = meanwhile(strike)
    toy.train(config, tmp_path / "run", Machine(workers=2))
    thread.join(PATIENCE)
    assert gone(killed[0])
    assert set(ambush.loads()) - set(killed), "the job ran again elsewhere"
    assert toy.status(tmp_path / "run")["rejected"] == {}
    toy.assert_same_run(tmp_path / "run", reference)


def test_a_run_that_resumes_after_every_round(
    tmp_path: Path, local_run: tuple[str, Path], toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside the checkpoint survives a round: images, moments, switch and bank are all in it."""
    method, reference = local_run
    config = toy.config(method, toy_pool, toy_data)
    toy.stopped_after_each_round(config, tmp_path / "run", monkeypatch)
    toy.assert_same_run(tmp_path / "run", reference)


def test_the_toy_run_does_what_these_tests_are_about(local_run: tuple[str, Path]) -> None:
    method, reference = local_run
    state = toy.last_state(reference)
    if method == "purer":
        assert state["switch"]["fired"] >= 1
    elif method == "shared-answers":
        inverted = sum(len(images) for images in state["recovered"].values())
        assert inverted > 0
        assert all(len(known["answers"]) == 20 + inverted for known in state["answers"].values())
    else:
        assert state["bank"]
