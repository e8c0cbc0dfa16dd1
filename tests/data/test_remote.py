"""Pools and data in an object store: the same teachers and images as on the disk, checked as there."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_dfml import object_store
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool, manifest_sha256
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from ray_dfml.files import Uri
from tests import stores
from tests.runtime import toy

Command = Callable[..., toy.Done]


@pytest.fixture
def pool(toy_pool: Path, memory_folder: Uri) -> Uri:
    return stores.upload(toy_pool, memory_folder / "pool")


def test_a_pool_has_the_same_teachers(pool: Uri, toy_pool: Path) -> None:
    here, there = Pool.open(toy_pool), Pool.open(str(pool) + "/")
    assert (there.path, there.cards, there.sha256()) == (pool, here.cards, here.sha256())
    assert manifest_sha256(pool) == manifest_sha256(toy_pool) != ""
    for card in here.cards:
        for a, b in zip(here.load(card.id), there.load(card.id), strict=True):
            assert a.tobytes() == b.tobytes()


def test_what_is_wrong_with_a_pool_is_said(pool: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, _ = (card.id for card in Pool.open(pool).cards)
    file = pool / "weights" / f"{a}.safetensors"
    object_store.write(file, object_store.read(file)[:-1] + b"x")
    object_store.remove(pool / "weights" / f"{b}.safetensors")
    with pytest.raises(RejectedError, match=f"^{a}: weights/{a}.safetensors has sha256 .*, pool.yaml says"):
        Pool.open(pool).load(a)
    with pytest.raises(RejectedError, match=f"^{b}: cannot be read: no such file"):
        Pool.open(pool).load(b)
    with pytest.raises(UsageError, match=f"^{pool}x: no pool here"):
        Pool.open(f"{pool}x")
    with pytest.raises(UsageError, match="a path on a disk is needed here"):
        Pool.open(pool)._write(Pool.open(pool).entry(a), b"")

    def away(uri: Uri, **_: object) -> bytes:
        raise OSError(5, "the store is away", uri)

    opened = Pool.open(pool)
    monkeypatch.setattr(object_store, "read", away)
    with pytest.raises(ResourceError, match="cannot be read: the store is away"):
        opened.load(c)
    assert manifest_sha256(pool) == ""


def test_the_commands_read_a_pool(pool: Uri, command: Command) -> None:
    rows = json.loads(command("pool", "check", pool, "--json").out)
    assert [row["ok"] for row in rows] == [True] * 4
    asked = command("pool", "check", pool, "--ask")
    assert asked.code == 0, "no teacher here is a service"
    for words in (("pool", "build", "--data", "glyphs", "--models", 1, "--out", pool), ("pool", "add", pool)):
        found = command(*words)
        assert (found.code, found.out) == (2, ""), words


def test_class_folders_have_the_same_images(toy_data: str, memory_folder: Uri) -> None:
    uri = stores.upload(Path(toy_data.partition(":")[2]), memory_folder / "images")
    here, there = datasets.load(toy_data), datasets.load(f"folder:{uri}/")
    assert there.identity == here.identity
    assert np.array_equal(there.images, here.images)
    assert there.source["path"] == uri


def test_a_file_is_named_by_its_uri(memory_folder: Uri, command: Command) -> None:
    object_store.write(memory_folder / "x.parquet", b"not parquet")
    with pytest.raises(RejectedError, match=f"^{memory_folder}/x.parquet: "):
        datasets.load(f"parquet:{memory_folder}/x.parquet")
    with pytest.raises(RejectedError, match=f"^{memory_folder}/y.parquet: no such file or folder"):
        datasets.load(f"parquet:{memory_folder}/y.parquet")
    found = command("data", "check", f"omniglot:{memory_folder}/x.csv")
    assert (found.code, found.out) == (3, "")
