"""The settings `pool.*`: which teachers a run uses, and which are spoiled."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from ray_dfml.config import resolve
from ray_dfml.core.net import net
from ray_dfml.errors import UsageError
from ray_dfml.runtime import driver
from tests.runtime import toy


def used(pool: Path, *settings: str, seed: int = 0) -> driver.Inputs:
    return driver.read_inputs(toy.config("average", pool, None, *settings, seed=seed))


def test_a_smaller_limit_is_a_subset_of_a_larger_one(toy_pool: Path) -> None:
    found = [list(used(toy_pool, f"pool.limit={n}").teachers) for n in (1, 2, 3, 4)]
    assert [len(ids) for ids in found] == [1, 2, 3, 4]
    assert all(set(a) < set(b) for a, b in pairwise(found))
    assert {tuple(used(toy_pool, "pool.limit=2", seed=seed).teachers) for seed in range(8)} != {tuple(found[1])}
    with pytest.raises(UsageError, match=r"pool.limit=5: there are 4 usable teachers; lower it"):
        used(toy_pool, "pool.limit=5")


def test_teachers_below_an_accuracy_are_left_out_by_name(toy_pool: Path, tmp_path: Path) -> None:
    """So are those that report none."""
    pool = Path(shutil.copytree(toy_pool, tmp_path / "pool"))
    content = yaml.safe_load((pool / "pool.yaml").read_text())
    ids = [entry["id"] for entry in content["teachers"]]
    for entry, reported in zip(content["teachers"], (40.0, None, 60.0, 80.0), strict=True):
        entry["accuracy"] = {"reported": reported}
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    found = used(pool, "pool.min_accuracy=60")
    assert list(found.teachers) == ids[2:]
    assert f"pool.min_accuracy=60 leaves out 2 teachers: {ids[0]}, {ids[1]}" in found.notes
    with pytest.raises(UsageError, match="no teacher reports as much"):
        used(pool, "pool.min_accuracy=90")


def test_a_share_of_the_teachers_has_shuffled_weights(toy_pool: Path) -> None:
    """The same ones with the same seed; their kernels hold the same values in another order."""
    plain, half = used(toy_pool).teachers, used(toy_pool, "pool.fraction_poisoned=0.5").teachers
    again = used(toy_pool, "pool.fraction_poisoned=0.5").teachers
    changed = [id for id in plain if plain[id][1].tobytes() != half[id][1].tobytes()]
    assert len(changed) == 2
    for id in plain:
        toy.assert_equal(half[id][1], again[id][1])
        card, theta, stats = plain[id]
        layout = net(card.arch, card.image.shape, len(card.classes)).layout
        spoiled = layout.unflatten(toy.torch.tensor(half[id][1]))
        assert half[id][2].tobytes() == stats.tobytes()
        for name, x in layout.unflatten(toy.torch.tensor(theta)).items():
            assert x.flatten().sort().values.equal(spoiled[name].flatten().sort().values)
            assert x.ndim > 1 or x.equal(spoiled[name])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pool.limits=3", r"unknown key pool.limits \(did you mean 'limit'\?\)"),
        ("pool.fraction_poisoned=2", "pool.fraction_poisoned: input should be less than or equal to 1"),
        ("pool=3", "name pools with --pool; pool.* is limit, min_accuracy, without, fraction_poisoned"),
    ],
)
def test_a_setting_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve("free", settings=[text])
