"""Points that Optuna proposes: within the space, better than chance, and the same again after a restart."""

import pytest

from ray_dfml.errors import UsageError
from ray_dfml.sweeps import plan, spec
from ray_dfml.sweeps.optuna_search import proposed
from ray_dfml.sweeps.space import Axis, Point

AXES = [
    Axis("x", "uniform", (0.0, 1.0)), Axis("lr", "loguniform", (1e-4, 1e-1)), Axis("n", "randint", (1, 5)),
    Axis("images", "choice", (("dip",), ("dip", "dipw"))),
]  # fmt: skip


def score(point: Point) -> float:
    return 100.0 - 100.0 * abs(point["x"] - 0.8)


def search(count: int) -> list[Point]:
    """All points, of which each batch is proposed anew from the scores before, as a sweep does."""
    found: list[Point] = []
    for start in range(0, count, 4):
        found += proposed(AXES, [score(p) for p in found], start + 4, batch=4, seed=0)[start:]
    return found


def test_points_lie_in_the_space_and_come_closer() -> None:
    found = search(40)
    assert all(0 <= p["x"] <= 1 and 1e-4 <= p["lr"] <= 1e-1 and p["n"] in (1, 2, 3, 4) for p in found)
    assert {p["images"] for p in found} == {("dip",), ("dip", "dipw")}
    first, last = (sum(map(score, part)) / len(part) for part in (found[:12], found[-12:]))
    assert last > first


def test_points_are_the_same_again() -> None:
    found = search(16)
    assert found == search(16)
    assert proposed(AXES, [score(p) for p in found[:12]], 16, batch=4, seed=0) == found
    assert proposed(AXES, [score(p) for p in found[:12]], 16, batch=4, seed=1) != found


def test_a_point_that_failed_is_no_reason_to_stop() -> None:
    assert len(proposed(AXES, [None, 50.0, None, None], 8, batch=4, seed=0)) == 8


def test_it_takes_no_scheduler_that_stops_trials() -> None:
    tree = {"method": "free", "search": "optuna", "space": {"method": {"steps": {"grid": [1, 2]}}}}
    assert plan.trials(spec.build(tree, "s"), ["p"]) == []
    with pytest.raises(UsageError, match="optuna takes the scheduler none, not asha"):
        plan.trials(spec.build(tree | {"scheduler": {"type": "asha"}}, "s"), ["p"])
