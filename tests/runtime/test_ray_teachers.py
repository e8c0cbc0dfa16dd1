"""How teachers reach shards: from their pool where shards see it, else through Ray's object store, in the same bits."""

from pathlib import Path

import pytest

from ray_dfml import object_store
from ray_dfml.data.pool import Pool
from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.files import Uri
from ray_dfml.runtime import cluster, driver, ray_teachers
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.inputs import Teachers
from ray_dfml.runtime.ray_teachers import PoolStore
from tests import stores
from tests.runtime import toy


def teachers_of(*places: Path | Uri) -> Teachers:
    members = {}
    for number, place in enumerate(places):
        pool = Pool.open(place)
        members |= {f"{number}:{card.id}": (pool.entry(card.id), pool) for card in pool.cards}
    return Teachers(members)


class Seeing:
    """A shard that sees some pools, and the calls of Ray that are made of it."""

    def __init__(self, *pools: Path | Uri) -> None:
        self.pools = pools
        self.manifests = self

    def remote(self, pools: list[Path | Uri]) -> list[str]:
        return [ray_teachers.manifest_sha256(pool) if pool in self.pools else "" for pool in pools]


def test_a_pool_is_near_if_every_shard_sees_it(
    toy_pool: Path, memory_folder: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = stores.upload(toy_pool, memory_folder)
    teachers = teachers_of(toy_pool, uri)
    monkeypatch.setattr(ray_teachers.ray, "get", lambda values: values)
    both, one = Seeing(toy_pool, uri), Seeing(toy_pool)
    assert ray_teachers.seen_by([both, both], teachers) == list(teachers)
    near = ray_teachers.seen_by([both, one], teachers)
    assert near == [id for id in teachers if id.startswith("0:")]
    assert ray_teachers.through_here(teachers, near) == [
        f"{uri}: not every shard can read this pool, so its teachers pass through this process"
    ]
    another = Seeing(toy_pool, uri)
    monkeypatch.setattr(another, "remote", lambda pools: ["0" * 64 for _ in pools])
    assert ray_teachers.seen_by([both, another], teachers) == [], "it sees a pool there, but not this one"


def test_near_teachers_are_not_put_in_the_store(
    toy_pool: Path, memory_folder: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = stores.upload(toy_pool, memory_folder)
    teachers, put = teachers_of(uri), []
    monkeypatch.setattr(ray_teachers.ray, "put", lambda teacher: put.append(teacher))
    store = PoolStore(teachers, list(teachers))
    first, second, *_ = teachers
    assert put == []
    assert store(first)[1].tobytes() == teachers[first][1].tobytes()
    object_store.write(uri / "weights" / f"{second.partition(':')[2]}.safetensors", b"other")
    with pytest.raises(RejectedError, match="has sha256"):
        store(second)
    object_store.remove(uri / "pool.yaml")
    with pytest.raises(ResourceError, match=f"^{uri}: a shard cannot read this pool, and others can"):
        store(second)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_both_ways_give_the_same_bits(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, memory_folder: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of this process is a store that no shard sees; the disk is one that all see."""
    uri, near = stores.upload(toy_pool, memory_folder), []
    plain = cluster.PoolStore

    def noted(teachers: Teachers, ids: list[str]) -> PoolStore:
        near.append(len(ids))
        return plain(teachers, ids)

    monkeypatch.setattr(cluster, "PoolStore", noted)
    for pool in (toy_pool, uri):
        config = toy.config("free", None, toy_data).model_copy(update={"pool": (str(pool),)})
        run = tmp_path / str(len(near))
        toy.train(config, run, Machine(workers=2))
        toy.assert_same_run(run, free_run)
    assert near == [4, 0]
    assert toy.status(tmp_path / "0")["notes"] == []
    assert [line.partition(": ")[2] for line in toy.status(tmp_path / "1")["notes"]] == [
        "the weights of each teacher are checked when they are first needed",
        "not every shard can read this pool, so its teachers pass through this process",
    ]


def test_a_run_in_one_process_reads_a_store(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, s3_folder: Uri
) -> None:
    pool = stores.upload(toy_pool, s3_folder / "pool")
    here = toy.config("free", toy_pool, toy_data)
    there = here.model_copy(update={"pool": (str(pool),)})
    assert driver.read_inputs(there).held_bytes() == driver.read_inputs(here).held_bytes()
    toy.train(there, tmp_path / "run")
    toy.assert_same_run(tmp_path / "run", free_run)
