"""Population-based training: who takes over from whom, with which settings, and from which state. No Ray."""

import json
import shutil
from pathlib import Path

import filelock
import pytest

from ray_dfml.core import seeds
from ray_dfml.errors import UsageError
from ray_dfml.runtime import driver, locks
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import pbt, plan, results, spec, trial
from ray_dfml.sweeps.space import Axis
from ray_dfml.sweeps.trial import Task
from tests.runtime import toy
from tests.runtime.test_accounts import pool_with
from tests.support import small_world
from tests.sweeps.conftest import SweepFile

AXES = [
    Axis("a", "uniform", (0.0, 1.0)), Axis("b", "loguniform", (1e-4, 1e-1)), Axis("c", "randint", (1, 20)),
    Axis("d", "grid", (1, 2, 5, 10)), Axis("e", "choice", ("x", "y", "z")),
]  # fmt: skip
POINT = {"a": 0.5, "b": 1e-2, "c": 10, "d": 5, "e": "z"}


def test_settings_move_to_neighbours() -> None:
    near = [pbt.moved(POINT, AXES, 0.0, seeds.rng(n)) for n in range(60)]
    assert {round(p["a"], 9) for p in near} == {0.4, 0.6}
    assert {round(p["b"], 9) for p in near} == {0.008, 0.012}
    assert {p["c"] for p in near} == {8, 12}
    assert {p["d"] for p in near} == {2, 10}
    assert {p["e"] for p in near} == {"y", "z"}


def test_settings_stay_in_their_range() -> None:
    ends = [pbt.moved({"a": 1.0, "b": 1e-4, "c": 1, "d": 10, "e": "x"}, AXES, 0.0, seeds.rng(n)) for n in range(60)]
    assert {p["a"] for p in ends} == {0.8, 1.0}
    assert min(p["b"] for p in ends) == 1e-4
    assert {p["c"] for p in ends} == {1, 2}  # a whole number moves by one at least
    assert {p["d"] for p in ends} == {5, 10}


def test_settings_are_drawn_anew_with_their_chance() -> None:
    drawn = [pbt.moved(POINT, AXES, 1.0, seeds.rng(n)) for n in range(100)]
    assert len({p["a"] for p in drawn}) == 100
    assert {p["d"] for p in drawn} == {1, 2, 5, 10}
    half = [pbt.moved(POINT, AXES, 0.5, seeds.rng(n))["a"] for n in range(200)]
    assert 60 < sum(round(a, 9) in (0.4, 0.6) for a in half) < 140


@pytest.mark.parametrize(
    ("scores", "quantile", "low", "high"),
    [
        ([10.0, 40.0, 30.0, 20.0], 0.25, {0}, {1}),
        ([10.0, 40.0, 30.0, 20.0], 0.5, {0, 3}, {1, 2}),
        ([10.0, None, 30.0, 20.0], 0.25, {1}, {2}),
        ([10.0, None], 0.25, {1}, {0}),
        ([10.0], 0.5, set(), set()),
        ([None, None], 0.5, set(), set()),
    ],
)
def test_the_lowest_take_over_from_the_highest(
    scores: list[float | None], quantile: float, low: set[int], high: set[int]
) -> None:
    found = [pbt.exchanges(scores, quantile, seeds.rng(n)) for n in range(20)]
    assert {i for one in found for i in one} == low
    assert {i for one in found for i in one.values()} == high


def test_boundaries() -> None:
    assert pbt.boundaries(6, 2) == [2, 4, 6]
    assert pbt.boundaries(5, 2) == [2, 4, 5]


def test_a_member_goes_on_from_the_state_of_a_better_one(
    tmp_path: Path, sweep_file: SweepFile, toy_pool: Path, free_run: Path
) -> None:
    """In a folder of its own, with the better one's checkpoint and metrics, and it trains on to the end.

    With the settings of the better one it would end in the same bits, and so the state is whole.
    """
    space = {"method": {"lr_meta": {"grid": [1e-3, 1e-4]}}}
    sweep = spec.read(sweep_file(space=space, scheduler={"type": "pbt", "interval": 2, "resample": 0}))
    settings = dict(plan.flat(sweep.set)) | {"method.steps": 2}
    sweep = sweep.model_copy(update={"set": settings})
    members, folder = plan.trials(sweep, sweep.pool), tmp_path / "trials"  # type: ignore[arg-type]

    def go(one: plan.Trial, until: int) -> None:
        task = Task(
            path=folder / one.name, config=one.config.model_dump(mode="json"), machine=driver.Machine(backend="local"),
            until=until, label="", shown={},
        )  # fmt: skip
        trial.train(task, lambda _: True)

    for one in members:
        go(one, 2)
    assert [toy.status(folder / one.name)["state"] for one in members] == ["stopped", "stopped"]
    worse, better = (0, 1) if _last(folder / members[0].name) < _last(folder / members[1].name) else (1, 0)
    axes = plan.axes(sweep, [str(toy_pool)])
    found = pbt.next_members(sweep, axes, members, folder, 2, [str(toy_pool)])
    assert found == pbt.next_members(sweep, axes, members, folder, 2, [str(toy_pool)])
    assert found[better] == members[better]
    new = found[worse]
    assert new.name == f"000{worse}-seed0-from2"
    assert json.loads((folder / new.name / "manifest.json").read_text())["parent"] == {
        "run": members[better].name, "round": 2, "queries": 0,
    }  # fmt: skip
    toy.assert_equal(toy.last_state(folder / new.name), toy.last_state(folder / members[better].name))
    for one in (new, found[better]):
        go(one, 6)
        assert toy.status(folder / one.name)["state"] == "trained"
    same = new.point == found[better].point
    states = [(folder / one.name / "checkpoints" / "round-000005.json").read_bytes() for one in (new, found[better])]
    assert (states[0] == states[1]) == same
    if found[better].point == {"method.lr_meta": 1e-3}:
        toy.assert_equal(toy.last_state(folder / found[better].name)["theta"], toy.last_state(free_run)["theta"])


def test_a_state_is_not_copied_while_a_process_is_at_work_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As one of a sweep that was killed; it is waited for, and named if it stays."""
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    (tmp_path / "parent").mkdir()
    with (
        filelock.FileLock(tmp_path / "parent" / ".lock"),
        pytest.raises(UsageError, match=f"^{tmp_path}/parent: another process is at work"),
    ):
        pbt._fork(tmp_path / "parent", tmp_path / "child", 2, None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def _last(run: Path) -> float:
    return float(trial.look(run).rows[-1]["validation"])


FAULTS = [
    ({"space": {"learner": {"head": {"grid": ["maml", "anil"]}}}}, "learner.head cannot change while a run goes on"),
    ({"space": {"method": {"width": {"grid": [4, 8]}}}}, "method.width changes the shape of the state"),
    ({"space": {"method": {"lr_meta": {"grid": [1e-3]}}}}, "needs two points or more"),
    ({"space": {"method": {"rounds": {"grid": [6, 7]}}}}, "method.rounds cannot change while a run goes on"),
    ({"scheduler": {"type": "pbt", "interval": 6}}, "interval 6 leaves no exchange in 6 rounds"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_a_population_that_cannot_exchange(sweep_file: SweepFile, changes: dict, said: str, toy_pool: Path) -> None:
    sweep = spec.read(sweep_file(**{"scheduler": {"type": "pbt", "interval": 2}} | changes))
    for name in changes.get("space", {}).get("method", {}):
        sweep.set["method"].pop(name, None)
    trials = plan.trials(sweep, [str(toy_pool)])
    with pytest.raises(UsageError, match=said):
        pbt.check(sweep, trials, driver.read_inputs(trials[0].config).world)


@pytest.mark.parametrize(
    ("setting", "values"),
    [("budget", [20, 24]), ("images", [["shapes"], ["dip"]]), ("zoom_high", [1.0, 2.0]), ("answers", ["soft", "hard"])],
)
def test_what_shared_answers_asked_about_cannot_change(
    sweep_file: SweepFile, setting: str, values: list, toy_pool: Path
) -> None:
    """The images of earlier rounds are drawn again for the training, so that they have to be those that were asked."""
    changes = {"scheduler": {"type": "pbt", "interval": 2}, "method": "shared-answers", "set": {"eval": {"every": 1}}}
    sweep = spec.read(sweep_file(**changes, space={"method": {setting: {"grid": values}}}))
    with pytest.raises(UsageError, match=rf"method\.{setting} cannot change while a run goes on"):
        pbt.check(sweep, plan.trials(sweep, [str(toy_pool)]), small_world())


def test_members_have_as_many_rounds(sweep_file: SweepFile, tmp_path: Path, toy_pool: Path) -> None:
    """Surrogates of more queries have more rounds before those of the method."""
    pool = pool_with(toy_pool, tmp_path / "pool", *[{"access": "probs"}] * 4)
    space = {"method": {"surrogate": {"budget": {"grid": [600, 3000]}}}}
    sweep = spec.read(sweep_file(scheduler={"type": "pbt", "interval": 2}, space=space))
    trials = plan.trials(sweep, [str(pool)])
    with pytest.raises(UsageError, match=r"method\.surrogate\.budget changes the number of rounds"):
        pbt.check(sweep, trials, driver.read_inputs(trials[0].config).world)


def test_queries_that_were_taken_over_are_counted_once(
    tmp_path: Path, sweep_file: SweepFile, toy_pool: Path, free_run: Path
) -> None:
    """The run that was left asked 30, the better one 50 and then 20 more, and the one that took over from it 40."""
    sweep = spec.read(sweep_file(scheduler={"type": "pbt", "interval": 2, "resample": 0}))
    members, folder = plan.trials(sweep, [str(toy_pool)]), tmp_path / "trials"
    for one, sent, accuracy in zip(members, (30, 50), (20.0, 60.0), strict=True):
        run = RunFolder(Path(shutil.copytree(free_run, folder / one.name)))
        run.status(round=2, state="stopped", queries={"sent": sent})
        rows = [json.dumps({"round": r, "validation": accuracy}) + "\n" for r in range(2)]
        (run.path / "metrics.jsonl").write_text("".join(rows))
    found = pbt.next_members(sweep, plan.axes(sweep, [str(toy_pool)]), members, folder, 2, [str(toy_pool)])
    assert found[0].name == "0000-seed0-from2"
    RunFolder(folder / found[0].name).status(queries={"sent": 90})
    RunFolder(folder / found[1].name).status(queries={"sent": 70})
    assert {row.number: row.queries for row in results.collect(found, folder)} == {0: 30 + 40, 1: 70}
