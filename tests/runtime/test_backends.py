"""`Backend.map` over shards: order, deaths, errors; and every baseline in the same bits here and there."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.methods.base import World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import cluster, driver
from ray_dfml.runtime.dispatch import RayBackend
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.types import Job
from tests.runtime import toy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def inputs(toy_pool: Path, toy_data: str) -> driver.Inputs:
    return driver.read_inputs(toy.config("maml-oracle", toy_pool, toy_data))


@pytest.fixture(scope="module")
def ids(inputs: driver.Inputs) -> list[str]:
    return list(inputs.teachers)


def obedient(store: Callable[[str], tuple]) -> Callable[[str], tuple]:
    """A loader that does what a teacher's name says before `ID`: die, die-once:FILE, fail, refuse, or sleep:SECONDS."""

    def load(name: str) -> tuple:
        order, _, id = name.rpartition("/")
        word, _, value = order.partition(":")
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "die-once" and not os.path.exists(value.replace("|", "/")):
            with open(value.replace("|", "/"), "x") as note:
                note.write(str(os.getpid()))
            os._exit(1)
        elif word == "fail":
            raise ZeroDivisionError("teacher divides by zero")
        elif word == "refuse":
            raise RejectedError("teacher is refused")
        elif word == "sleep":
            time.sleep(float(value))
        return store(id)

    return load


@pytest.fixture(scope="module")
def backend(ray_cluster: None, inputs: driver.Inputs) -> Iterator[RayBackend]:
    with cluster.Cluster(workers=2) as place:
        yield place.backend(obedient(cluster.PoolStore(inputs.teachers)))


def load_jobs(*names: str) -> list[Job]:
    return [Job(index=i, seed=0, teacher=name) for i, name in enumerate(names)]


def is_teacher(result: dict[str, Any], inputs: driver.Inputs, id: str) -> bool:
    return "theta" in result and result["theta"].tobytes() == inputs.teachers[id][1].tobytes()


def test_results_come_in_job_order(backend: RayBackend, inputs: driver.Inputs, ids: list[str]) -> None:
    """Nine jobs for two shards; the first is the last to end."""
    names = [f"sleep:{0.5 if i == 0 else 0.01 * (9 - i)}/{ids[i % 4]}" for i in range(9)]
    results = backend.map("weights", load_jobs(*names), {})
    assert len(results) == 9
    assert all(is_teacher(result, inputs, ids[i % 4]) for i, result in enumerate(results))


def test_no_jobs_give_no_results(backend: RayBackend) -> None:
    assert backend.map("weights", [], {}) == []


def test_a_job_whose_process_dies_twice_is_rejected_alone(
    backend: RayBackend, inputs: driver.Inputs, ids: list[str], tmp_path: Path
) -> None:
    """Deaths are counted once each, although Ray also refuses the calls to a shard that is not up again."""
    note = tmp_path / "note"
    once = f"die-once:{str(note).replace('/', '|')}/{ids[3]}"
    names = [ids[0], ids[1], f"die/{ids[0]}", ids[2], once, ids[0], ids[1]]
    results = backend.map("weights", load_jobs(*names), {})
    assert results[2] == {"rejected": "its process died 2 times"}
    assert note.read_text().isdigit()
    wanted = [ids[0], ids[1], None, ids[2], ids[3], ids[0], ids[1]]
    assert all(is_teacher(result, inputs, id) for result, id in zip(results, wanted, strict=True) if id is not None)


def test_a_job_that_hangs_is_rejected_and_its_shard_works_on(
    backend: RayBackend, inputs: driver.Inputs, ids: list[str]
) -> None:
    """Also for the next call, with another limit."""
    strict = RayBackend(backend.shards, backend.load, batched=False, job_seconds=3.0)
    results = strict.map("weights", load_jobs(ids[0], f"sleep:600/{ids[1]}", ids[2], ids[3]), {})
    assert results[1] == {"rejected": "its process died or took longer than 3 s, 2 times"}
    assert all(is_teacher(results[i], inputs, ids[i]) for i in (0, 2, 3))
    after = backend.map("weights", load_jobs(*ids), {})
    assert all(is_teacher(result, inputs, id) for result, id in zip(after, ids, strict=True))


def test_an_exception_of_an_op_surfaces_as_itself(backend: RayBackend, ids: list[str]) -> None:
    with pytest.raises(ZeroDivisionError) as error:
        backend.map("weights", load_jobs(ids[0], f"fail/{ids[1]}", ids[2]), {})
    assert type(error.value) is ZeroDivisionError
    assert str(error.value) == "teacher divides by zero"


def test_a_refused_teacher_is_a_result(backend: RayBackend, inputs: driver.Inputs, ids: list[str]) -> None:
    results = backend.map("weights", load_jobs(f"refuse/{ids[0]}", ids[1]), {})
    assert results[0] == {"rejected": "teacher is refused"}
    assert is_teacher(results[1], inputs, ids[1])


@pytest.mark.parametrize("method", ["random", "no-pool", "best-model", "average", "ota", "dro", "maml-oracle"])
def test_a_baseline_has_the_same_bits_on_shards(
    backend: RayBackend, inputs: driver.Inputs, toy_pool: Path, toy_data: str, method: str
) -> None:
    """A local shard holds the teachers itself, and a shard actor gets them from the object store."""
    config = toy.config(method, toy_pool, toy_data)
    tree, real = config.model_dump(mode="json"), inputs.world.real if method == "maml-oracle" else {}
    world = World(**{**vars(inputs.world), "real": real})
    found = []
    for where in (LocalBackend(inputs.teachers.__getitem__), backend):
        trainer = Trainer(tree, world, inputs.sets, where, None)
        for r in range(config.method.rounds):
            trainer.round(r)
        trainer.keep("val", 50.0, 0)
        scores = toy.scores_of(trainer, "val", "last", "random")
        tests = {f"{s.method} {s.selection} {i}": s.accuracies for i, s in enumerate(scores)}
        found.append({"state": trainer.state, "tests": tests})
    toy.assert_equal(found[0], found[1])


def test_more_shards_than_processors(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    with pytest.raises(ResourceError, match=r"^3 shards need 3 CPU, the cluster has 2; lower --workers$") as error:
        toy.train(toy.config("random", toy_pool, toy_data), tmp_path / "run", Machine(workers=3))
    assert error.value.exit_code == 5
    assert toy.status(tmp_path / "run")["state"] == "failed"
    with pytest.raises(ResourceError, match="2 shards need 2 GPU, the cluster has 0"):
        cluster.connect(2, 1.0)
    assert cluster.ray.is_initialized(), "a Ray that was there before is not stopped"


def test_only_a_connection_of_our_own_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.connect(1, 0.0) is False
    stopped: list[str] = []
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: stopped.append("shutdown"))
    monkeypatch.setattr(cluster, "start_shards", lambda *_, **__: [])
    with cluster.shards_of(1):
        pass
    assert stopped == []
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: True)
    with cluster.shards_of(1):
        pass
    assert stopped == ["shutdown"]
