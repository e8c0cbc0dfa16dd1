"""The round loop's body: quarantine, selection, and what is scored under which name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.config import resolve
from ray_dfml.errors import DfmlError, RejectedError
from ray_dfml.methods import METHODS
from ray_dfml.pipeline import KEPT, Labelled, Trainer
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.scores import KEYS, as_row
from ray_dfml.types import Arrays, Job
from tests.runtime import toy
from tests.support import FakeWorker, random_teacher, small_world

WORLD = small_world(channels=1)
WORLD = replace(WORLD, cards=tuple(replace(c, accuracy=50.0 + i) for i, c in enumerate(WORLD.cards)))
TEACHERS = {c.id: (c, random_teacher(c).theta.numpy(), random_teacher(c).stats.numpy()) for c in WORLD.cards}


class Spoiled(LocalBackend):
    """The local backend, with results that a test replaces: op -> position -> result."""

    def __init__(self, spoil: dict[str, dict[int, Arrays]]) -> None:
        super().__init__(TEACHERS.__getitem__)
        self.spoil, self.sent = spoil, []

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """As the local one, but spoiled."""
        self.sent.append((op, len(jobs)))
        bad = self.spoil.get(op, {})
        return [bad.get(i) or super(Spoiled, self).map(op, [job], shared)[0] for i, job in enumerate(jobs)]


def sets() -> list[Labelled]:
    """Validation and test images of three classes."""
    rng = np.random.default_rng(0)
    return [
        Labelled("toy", split, rng.integers(0, 256, (24, 1, 16, 16), dtype=np.uint8), np.repeat(np.arange(3), 8))
        for split in ("val", "test")
    ]


def trainer(
    method: str = "free", *more: str, spoil: dict[str, dict[int, Arrays]] | None = None, data: bool = True
) -> Trainer:
    config = resolve(method, sets=[*toy.SETS.get(method, toy.EVAL), *more])
    return Trainer(config.model_dump(mode="json"), WORLD, sets() if data else [], Spoiled(spoil or {}), None)


def test_a_teacher_whose_job_failed_is_left_out_from_then_on() -> None:
    one = trainer(spoil={"free.recover": {0: {"rejected": "its process died 2 times"}}})
    jobs = one.method.plan(one.config.method, one.world, one.state, 0)
    metrics = one.round(0)
    assert one.state["rejected"] == {jobs[0].teacher: "its process died 2 times"}
    assert metrics["recover/tasks"] == 1
    assert [card.id for card in one.world.cards] == [c.id for c in WORLD.cards if c.id != jobs[0].teacher]
    later = one.method.plan(one.config.method, one.world, one.state, 1)
    assert jobs[0].teacher not in {job.teacher for job in later}


def test_a_teacher_found_bad_in_a_chain_of_jobs_is_left_out() -> None:
    """A sequential generator's jobs are sent by `learn`, one by one."""
    sequential = "method.generator_sharing=sequential"
    whole = trainer("free", sequential)
    assert whole.round(0)["recover/tasks"] == 2
    one = trainer("free", sequential, spoil={"free.recover": {0: {"rejected": "the loss is not finite"}}})
    metrics = one.round(0)
    assert set(one.state["rejected"].values()) == {"the loss is not finite"}
    assert metrics["recover/tasks"] == 0


def test_the_last_teacher_lost_ends_the_run() -> None:
    bad: dict[int, Arrays] = {i: {"rejected": "no use"} for i in range(len(WORLD.cards))}
    with pytest.raises(RejectedError, match=r"every teacher was rejected \(conv4-0: no use; .*pool check"):
        trainer("purer", spoil={"purer.recover": bad}).round(0)


def test_a_run_that_too_few_teachers_end_says_why_the_others_are_out() -> None:
    first, second = WORLD.cards[:2]
    world = replace(WORLD, cards=(first, replace(second, classes=("a/0", "b/0"))))
    config = resolve("purer", sets=[*toy.SETS["purer"], "method.image_warmup=0"])
    backend = Spoiled({"purer.recover": {0: {"rejected": "its loss is not finite"}}})
    message = r"too few of any one data set for a task of 2 \(rejected: conv4-0: its loss is not finite\)$"
    with pytest.raises(RejectedError, match=message):
        Trainer(config.model_dump(mode="json"), world, [], backend, None).round(0)


def test_work_without_a_teacher_that_fails_ends_the_run() -> None:
    one = trainer(
        "free",
        "method.warmup=0",
        spoil={"maml.grad": {1: {"rejected": "its process died 2 times"}}},
    )
    with pytest.raises(DfmlError, match="a job without a teacher failed: its process died 2 times"):
        one.round(0)
    one = trainer("random", spoil={"evaluate": {0: {"rejected": "its process died 2 times"}}})
    with pytest.raises(DfmlError, match="evaluation failed: its process died 2 times"):
        one.validate(0)


def test_a_round_tells_where_its_time_went() -> None:
    one = trainer("free", "method.warmup=0")
    metrics = one.round(0)
    parts = {k: v for k, v in metrics.items() if k.startswith("seconds/")}
    assert set(parts) == {"seconds/free.recover", "seconds/maml.grad", "seconds/learner", "seconds/round"}
    total = parts.pop("seconds/round")
    assert sum(parts.values()) == pytest.approx(total)  # type: ignore[arg-type]
    assert all(np.isfinite(v) for v in metrics.values())


def test_the_best_weights_on_validation_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of equals stays; a later, better one replaces it."""
    one = trainer("random", "eval.shots=[1,2]")
    asked: list[tuple[str, int, int]] = []
    means = iter([40.0, 60.0, 60.0, 50.0])

    def score(self: Trainer, images: Labelled, shot: int, count: int, *_: Any) -> np.ndarray:
        asked.append((images.split, shot, count))
        return np.full(count, next(means))

    monkeypatch.setattr(Trainer, "_score", score)
    rounds = []
    for r in range(4):
        one.state["theta"] = torch.full_like(one.state["theta"], float(r))
        assert one.validate(r) == (40.0, 60.0, 60.0, 50.0)[r]
        rounds.append(one.state["best"]["round"])
    assert rounds == [0, 1, 1, 1]
    assert one.state["best"]["accuracy"] == 60.0
    assert (one.state["best"]["theta"] == 1).all()
    assert asked == [("val", 2, 10)] * 4
    assert one.state["test_best"] == {}


def test_selection_on_test_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer("random", "eval.test_best=true")
    asked: list[str] = []

    def score(self: Trainer, images: Labelled, shot: int, count: int, *_: Any) -> np.ndarray:
        asked.append(images.split)
        return np.full(count, 50.0)

    monkeypatch.setattr(Trainer, "_score", score)
    one.validate(3)
    assert asked == ["test", "val"]
    assert one.state["test_best"]["round"] == 3


def test_without_data_nothing_is_selected() -> None:
    one = trainer("random", data=False)
    assert one.validate(0) is None
    assert one.test("last") == one.baseline() == []
    assert {name: one.state[name] for name in KEPT} == {"rejected": {}, "best": {}, "test_best": {}}


def test_the_parts_of_the_loop_survive_a_round() -> None:
    one = trainer()
    one.validate(0)
    best = one.state["best"]
    one.round(1)
    assert one.snapshot()["best"] is best
    assert set(KEPT) <= set(one.snapshot())


def test_a_trainer_from_a_snapshot_goes_on_in_the_same_bits() -> None:
    whole, first = trainer(), trainer()
    for r in range(3):
        whole.round(r)
    first.round(0)
    second = Trainer(first.config.model_dump(mode="json"), WORLD, sets(), Spoiled({}), first.snapshot())
    for r in (1, 2):
        second.round(r)
    toy.assert_equal(whole.snapshot(), second.snapshot())


def test_the_scores_of_a_selection_are_those_of_its_weights() -> None:
    """`val` reads the weights kept, `last` the current ones; `random` stands on the same episodes."""
    one = trainer("average")
    fresh = [s.accuracies.tolist() for s in one.test("last")]
    one.validate(0)
    one.round(0)
    val, last, random = one.test("val"), one.test("last"), one.baseline()
    assert [s.accuracies.tolist() for s in val] == fresh
    assert [s.accuracies.tolist() for s in last] != fresh
    assert [(s.method, s.selection) for s in (*val, *last, *random)] == [
        ("average", "val"), ("average", "last"), ("random", "last")
    ]  # fmt: skip
    assert [s.accuracies.tolist() for s in random] == fresh, "a fresh learner is the random baseline"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_has_the_keys_of_the_contract(method: str) -> None:
    rows = [as_row(score, "fixed") for score in trainer(method).test("last")]
    names = [row["method"] for row in rows]
    readings = METHODS[method].READINGS
    assert names == ([method] if len(readings) == 1 else [f"{method}-{reading}" for reading in readings])
    for row in rows:
        assert tuple(row) == KEYS
        assert (row["way"], row["shot"], row["episodes"], row["split"]) == (2, 1, 20, "test")


def test_the_worker_of_the_tests_is_a_shard_in_small() -> None:
    """Both give a recover job the same bits."""
    one = trainer()
    jobs = one.method.plan(one.config.method, one.world, one.state, 0)
    shared = one.method.shared(one.config.method, one.world, one.state, 0)
    here = FakeWorker(WORLD).send("free.recover", jobs[:1], shared)
    toy.assert_equal(here, LocalBackend(TEACHERS.__getitem__).map("free.recover", jobs[:1], shared))


def scripted(monkeypatch: pytest.MonkeyPatch, best: dict[float, float]) -> list[tuple[str, int, float | None]]:
    """Scores that depend on the step size only: step -> accuracy on validation. Returns what was asked for."""
    asked: list[tuple[str, int, float | None]] = []

    def score(
        self: Trainer, one: Labelled, shot: int, count: int, state: Any, reading: str, lr: float | None = None
    ) -> np.ndarray:
        asked.append((one.split, shot, lr))
        return np.full(count, best.get(lr or 0.0, 0.0) if one.split == "val" else 99.0 - (lr or 0.0))

    monkeypatch.setattr(Trainer, "_score", score)
    return asked


def test_the_step_size_is_chosen_on_validation_episodes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test would choose 0.1; validation chooses 0.5, over all shots, once for each set of weights."""
    asked = scripted(monkeypatch, {0.1: 30.0, 0.5: 60.0, 0.9: 60.0})
    one = trainer("free", "eval.lrs=[0.1,0.5,0.9]", "eval.shots=[1,2]")
    scores = one.test("last") + one.test("last") + one.baseline()
    chosen = [row for row in asked if row[0] == "val"]
    assert chosen == [("val", shot, lr) for lr in (0.1, 0.5, 0.9) for shot in (1, 2)] * 2
    assert {lr for split, _, lr in asked if split == "test"} == {0.5}
    assert len(scores) == 6
    assert one.step_sizes() == {"free/last": 0.5, "random/last": 0.5}


def test_each_data_set_is_tested_with_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of weights: 0.1 suits the one, 0.5 the other, 0.3 both together, which is what is exported."""
    best = {"toy": {0.1: 60.0, 0.3: 50.0, 0.5: 20.0}, "other": {0.1: 20.0, 0.3: 50.0, 0.5: 60.0}}
    asked: list[tuple[str, str, float | None]] = []

    def score(
        self: Trainer, one: Labelled, shot: int, count: int, state: Any, reading: str, lr: float | None = None
    ) -> np.ndarray:
        asked.append((one.data, one.split, lr))
        return np.full(count, best[one.data][lr or 0.0])

    monkeypatch.setattr(Trainer, "_score", score)
    config = resolve("free", sets=[*toy.EVAL, "eval.lrs=[0.1,0.3,0.5]"])
    both = sets() + [replace(part, data="other") for part in sets()]
    one = Trainer(config.model_dump(mode="json"), WORLD, both, LocalBackend(TEACHERS.__getitem__), None)
    scores = one.test("last") + one.baseline()
    assert [(s.data, s.accuracies.mean()) for s in scores] == [("toy", 60.0), ("other", 60.0), ("pooled", 60.0)] * 2
    assert {(data, lr) for data, split, lr in asked if split == "test"} == {("toy", 0.1), ("other", 0.5)}
    assert one.step_size("last") == 0.3
    assert one.step_size("last", "unknown") == 0.3
    steps = {"toy": 0.1, "other": 0.5}
    assert one.step_sizes() == {f"{w}/last/{data}": lr for w in ("free", "random") for data, lr in steps.items()}
    assert len(asked) == 2 * (2 * 3 + 2), "each step is scored once on each set"


@pytest.mark.parametrize(("more", "data"), [(("eval.lrs=[]",), True), ((), False), (("learner.head=protonet",), True)])
def test_without_a_choice_the_step_is_the_given_one(
    monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], data: bool
) -> None:
    asked = scripted(monkeypatch, {})
    one = trainer("free", "eval.lr=0.07", *more, data=data)
    one._world = replace(one._world, head=one.config.learner.head)
    assert one.step_size("last") == 0.07
    assert asked == []


def test_several_sets_are_scored_one_by_one_and_pooled() -> None:
    config = resolve("random", sets=[*toy.EVAL, "eval.lrs=[]"])
    first, second = sets(), [replace(part, data="other", images=255 - part.images) for part in sets()]
    one = Trainer(config.model_dump(mode="json"), WORLD, first + second, LocalBackend(TEACHERS.__getitem__), None)
    scores = one.test("last")
    assert [score.data for score in scores] == ["toy", "other", "pooled"]
    assert scores[2].accuracies.tolist() == [*scores[0].accuracies, *scores[1].accuracies]
    assert [score.data for score in one.baseline()] == ["toy", "other", "pooled"]
