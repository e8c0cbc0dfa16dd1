"""Planted faults are found, and good teachers are left in peace."""

from pathlib import Path

import numpy as np
import pytest

from ray_dfml.data.pool import Pool
from ray_dfml.doctor.examine import Examination, examine
from tests.doctor.conftest import GOOD, put


@pytest.fixture(scope="module")
def seen(spoiled_pool: Path) -> Examination:
    return examine(Pool.open(spoiled_pool))


def kinds(seen: Examination, id: str) -> set[str]:
    return {one.kind for one in seen.of(id) if one.severity != "note"}


def test_what_is_planted_is_found(seen: Examination) -> None:
    wanted = {"never": "untrained", "noise": "noise", "turned": "copy", "near": "copy"}
    assert {id: kinds(seen, id) for id in wanted} == {id: {kind} for id, kind in wanted.items()}
    assert set(seen.leave_out()) == set(wanted)


def test_a_copy_is_left_out_and_its_original_stays(seen: Examination) -> None:
    (copy,) = [one for one in seen.of("turned") if one.kind == "copy"]
    assert copy.teachers == ("turned", "good-0")
    assert copy.leave_out == ("turned",)
    assert "near copy of good-0: cosine of weights 1.000, CKA of answers 1.000" in copy.text


def test_maps_are_of_the_measured_teachers(seen: Examination) -> None:
    ids = [one.card.id for one in seen.vitals]
    assert len(ids) == GOOD + 4
    assert seen.cka.shape == seen.sorting.shape == (len(ids), len(ids))
    assert seen.cka.diagonal() == pytest.approx(1)
    order, clusters = seen.clusters
    assert sorted(order) == list(range(len(ids)))
    twins = ids.index("good-0"), ids.index("turned")
    assert clusters[twins[0]] == clusters[twins[1]]
    assert abs(order.index(twins[0]) - order.index(twins[1])) == 1, "alike teachers are neighbours"
    assert seen.cka[twins] == pytest.approx(1)
    assert seen.sorting[twins] == pytest.approx(1), "the names of the classes do not count"


def test_what_the_pool_can_train(seen: Examination) -> None:
    uses = {one.method: one for one in seen.uses}
    assert (uses["free"].teachers, uses["free"].way, uses["free"].images) == (GOOD + 4, 4, 0)
    assert "no-pool" not in uses
    assert "maml-oracle" not in uses


def test_the_same_pool_gives_the_same_findings(seen: Examination, spoiled_pool: Path) -> None:
    assert examine(Pool.open(spoiled_pool)).findings == seen.findings


def test_a_teacher_whose_answers_overflow_is_named_and_not_compared_with(
    tmp_path: Path, glyph_teachers: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    pool = Pool.create(tmp_path / "pool")
    for n, (theta, stats) in enumerate(glyph_teachers[:2]):
        put(pool, f"good-{n}", theta, stats)
    theta, stats = glyph_teachers[2]
    put(pool, "huge", np.where(np.arange(len(theta)) < len(theta) - 4, 1e30 * theta, theta).astype(np.float32), stats)
    seen = examine(Pool.open(pool.path))
    assert [one.card.id for one in seen.vitals] == ["good-0", "good-1"]
    assert [one.text for one in seen.of("huge")] == ["gives NaN or infinite logits on random images"]
