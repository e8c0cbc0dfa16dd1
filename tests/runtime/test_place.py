"""One cluster for all the work of a command: a pool is built and a learner trained on it by the same shards."""

from pathlib import Path
from typing import Any

import pytest

from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import DfmlError, ResourceError
from ray_dfml.runtime import build_pool, cluster
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.launch import new_run
from ray_dfml.runtime.place import opened
from ray_dfml.types import Job
from tests.runtime import toy


def pool_and_run(folder: Path, data: str, machine: Machine) -> Path:
    """A pool of three teachers, and a run on it, in one place; the run folder."""
    with opened(machine) as place:
        image, planned = build_pool.plan(data, models=3, archs=["conv4"], way=2, seed=0)
        build_pool.build(
            Pool.create(folder / "pool"), data, image, planned, PretrainConfig(epochs=2, batch=16),
            backend=place.backend(), at_once=2, seed=0, on_teacher=lambda *_: None,
        )  # fmt: skip
        config = toy.config("free", folder / "pool", data, "method.rounds=2")
        new_run(config, folder / "run", machine, quiet=True, cluster=place.cluster())
    return folder / "run"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_and_a_run_share_their_shards(tmp_path: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are started once, and the bits are those of one process."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = pool_and_run(tmp_path / "here", toy_data, toy.LOCAL)
    plain, started = cluster.start_shards, []

    def start(**options: Any) -> list[Any]:
        started.append(options)
        return plain(**options)

    monkeypatch.setattr(cluster, "start_shards", start)
    there = pool_and_run(tmp_path / "there", toy_data, Machine(workers=2))
    assert len(started) == 1
    toy.assert_same_run(there, here)


def test_a_cluster_that_cannot_start_is_told_when_work_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise ResourceError("2 shards need 2 CPU, the cluster has 1; lower --workers")

    monkeypatch.setattr(cluster, "connect", fail)
    with opened(Machine(workers=2)) as place, pytest.raises(ResourceError, match="lower --workers"):
        place.backend()


def test_one_process_needs_no_cluster_and_hosts_no_teacher_of_its_own() -> None:
    with opened(toy.LOCAL) as place:
        assert place.cluster() is None
        with pytest.raises(DfmlError, match="no pool"):
            place.backend().map("weights", [Job(index=0, seed=0, teacher="a")], {})
