"""What is asked, with which step, and under which name: a scorer over accuracies that a test writes down."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ray_dfml import scorer as module
from ray_dfml.evaluate import EvalConfig
from ray_dfml.scorer import POOLED, Ask, Entry, Episodes, Part, Scorer, Step


class Told:
    """Answers with the mean that `mean` says for the episodes of a part; `asked` are the parts."""

    def __init__(self, mean: Callable[[Episodes], float]) -> None:
        self.mean, self.asked = mean, list[Part]()

    def __call__(self, part: Part) -> np.ndarray:
        """Equal accuracies."""
        self.asked.append(part)
        return np.full(part.stop - part.start, self.mean(part.episodes))

    def episodes(self, **fields: Any) -> int:
        """Number of episodes asked for whose kind has these fields."""
        kinds = [part for part in self.asked if all(getattr(part.episodes, k) == v for k, v in fields.items())]
        return sum(part.stop - part.start for part in kinds)


def scorer(
    ask: Ask, *, data: tuple[str, ...] = ("toy",), head: Any = "maml", shards: int = 1,
    on_work: Callable[[float], object] = lambda work: None, **cfg: Any,
) -> Scorer:  # fmt: skip
    """A two-way scorer of these data sets, each with validation and test episodes."""
    return Scorer(
        EvalConfig(**({"episodes": 40, "shots": (1, 2), "lrs": (0.1, 0.5, 0.9)} | cfg)), way=2, head=head,
        val=[(one, "val") for one in data], test=[(one, "test") for one in data], ask=ask,
        shards=shards, on_work=on_work,
    )  # fmt: skip


def entry(weights: str, *, method: str = "free", selection: str = "last", readings: Any = ("finetune",)) -> Entry:
    return Entry(method=method, selection=selection, weights=weights, readings=readings)


def by_step(best: dict[float, float]) -> Callable[[Episodes], float]:
    """On validation the accuracy of the step; on test the smallest step is best."""
    return lambda of: best[of.lr] if of.split == "val" else 99.0 - of.lr


def test_the_step_is_chosen_on_validation_episodes_alone() -> None:
    """The test would choose 0.1; validation chooses 0.5, the first of equals, over all shots."""
    told = Told(by_step({0.1: 30.0, 0.5: 60.0, 0.9: 60.0}))
    one = scorer(told)
    scores = one.test([entry("a")])
    assert [(s.shot, s.accuracies.tolist()) for s in scores] == [(1, [98.5] * 40), (2, [98.5] * 40)]
    assert {part.episodes.lr for part in told.asked if part.episodes.split == "test"} == {0.5}
    assert told.episodes(split="val") == 3 * 2 * 100
    assert one.steps([entry("a")]) == [Step(method="free", selection="last", data="toy", lr=0.5)]


def test_each_data_set_has_a_step_of_its_own() -> None:
    """0.1 suits the one, 0.5 the other, 0.9 both together, which is what is exported."""
    best = {"toy": {0.1: 60.0, 0.5: 20.0, 0.9: 50.0}, "other": {0.1: 20.0, 0.5: 60.0, 0.9: 50.0}}
    told = Told(lambda of: best[of.data][of.lr])
    one = scorer(told, data=("toy", "other"), shots=(1,))
    scores = one.test([entry("a")])
    assert [(s.data, s.accuracies.mean()) for s in scores] == [("toy", 60.0), ("other", 60.0), (POOLED, 60.0)]
    assert scores[2].accuracies.tolist() == [*scores[0].accuracies, *scores[1].accuracies]
    asked = len(told.asked)
    assert (one.step("a"), one.step("a", "unknown")) == (0.9, 0.9)
    assert {(step.data, step.lr) for step in one.steps([entry("a")])} == {("toy", 0.1), ("other", 0.5)}
    assert len(told.asked) == asked, "the choice for all data sets is made of the episodes of each"


@pytest.mark.parametrize(("more", "data"), [({"lrs": ()}, ("toy",)), ({}, ()), ({"head": "protonet"}, ("toy",))])
def test_without_a_choice_the_step_is_the_given_one(more: dict[str, Any], data: tuple[str, ...]) -> None:
    told = Told(lambda _: 50.0)
    one = scorer(told, data=data, lr=0.07, **more)
    assert one.step("a") == 0.07
    assert told.asked == []
    assert one.steps([entry("a")]) == []
    assert one.test([entry("a")]) or not data
    assert {part.episodes.lr for part in told.asked} == ({0.07} if data else set())


def test_one_candidate_is_taken_without_a_trial() -> None:
    told = Told(lambda _: 50.0)
    assert scorer(told, lrs=(0.3,), lr=0.07).step("a") == 0.3
    assert told.asked == []


def test_equal_weights_are_scored_once_under_all_their_names() -> None:
    told = Told(by_step({0.1: 30.0, 0.5: 60.0, 0.9: 50.0}))
    entries = [entry("a", selection="val"), entry("a"), entry("a", method="random"), entry("b")]
    scores = scorer(told).test(entries)
    assert [(s.method, s.selection) for s in scores[::2]] == [
        ("free", "val"), ("free", "last"), ("random", "last"), ("free", "last"),
    ]  # fmt: skip
    assert told.episodes(weights="a") == told.episodes(weights="b") == 3 * 2 * 100 + 2 * 40


def test_a_reading_without_adaptation_needs_no_step() -> None:
    told = Told(lambda _: 50.0)
    scores = scorer(told).test([entry("a", readings=("direct", "assign"))])
    assert [s.method for s in scores] == ["free-direct"] * 2 + ["free-assign"] * 2
    assert told.episodes(split="val") == 0
    assert scorer(told).steps([entry("a", readings=("direct",))]) == []


def test_a_validation_tries_the_steps_on_a_quarter_and_scores_the_best_on_all() -> None:
    """At the largest shot: 3 x 30 episodes, then the other 70 of the best. The test's choice asks only for the rest."""
    told = Told(by_step({0.1: 30.0, 0.5: 60.0, 0.9: 50.0}))
    one = scorer(told)
    assert one.validate("a", "finetune") == 60.0
    assert told.episodes(shot=2, split="val") == told.episodes() == 3 * 30 + 70
    assert told.episodes(lr=0.5) == 100
    assert one.step("a") == 0.5
    assert told.episodes(shot=2) == told.episodes(shot=1) == 300


def test_a_validation_counts_all_data_sets_alike() -> None:
    told = Told(lambda of: 40.0 if of.data == "toy" else 60.0)
    one = scorer(told, data=("toy", "other"))
    assert one.validate("a", "assign") == 50.0
    assert told.episodes(split="val") == told.episodes(reading="assign") == 2 * 100
    assert one.validate("a", "assign", on_test=True) == 50.0
    assert told.episodes(split="test") == 2 * 100, "as many episodes as of validation"


def test_without_validation_data_there_is_no_validation() -> None:
    told = Told(lambda _: 50.0)
    assert scorer(told, data=()).validate("a", "finetune") is None
    assert scorer(told, data=()).test([entry("a")]) == told.asked == []


@pytest.mark.parametrize("bad", [0.1, 0.5, 0.9])
def test_a_step_whose_accuracy_is_nan_is_never_the_best(bad: float) -> None:
    told = Told(lambda of: math.nan if of.lr == bad else 10.0 + of.lr)
    assert scorer(told).step("a") == max(lr for lr in (0.1, 0.5, 0.9) if lr != bad)


@pytest.mark.parametrize("count", [7, 25, 100])
def test_parts_begin_where_jobs_do(count: int) -> None:
    """So that a job's episodes are the same ones whoever asks first; none is left out, none kept twice."""
    told = Told(lambda _: 50.0)
    one = scorer(told, val_episodes=count)
    one.validate("a", "finetune")
    one.step("a")
    assert {part.start % 10 for part in told.asked} == {0}
    assert {len(found) for found in one._known.values()} == {count}


def test_the_work_is_told_before_it_is_done() -> None:
    """Of the test, and of what is left of it after a validation; a 2-shot episode is the dearer one."""
    told, done = Told(by_step({0.1: 30.0, 0.5: 60.0, 0.9: 50.0})), list[float]()
    one = scorer(told, on_work=done.append)

    def plan(scorer: Scorer) -> object:
        return scorer.step("a"), scorer.test([entry("a"), entry("a", method="random"), entry("b")])

    whole = one.total(plan)
    assert told.asked == done == []
    one.validate("a", "finetune")
    spent, rest = sum(done), one.total(plan)
    assert rest == whole - spent
    plan(one)
    assert sum(done) == spent + rest
    assert one.total(plan) == 0
    of = told.asked[0].episodes
    small, large = (one.work(Part(episodes=replace(of, shot=shot), start=0, stop=10)) for shot in (1, 2))
    assert large > small > one.work(Part(episodes=replace(of, reading="direct"), start=0, stop=10)) > 0


def test_parts_grow_while_they_are_quick_and_shrink_where_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole rounds of jobs for all shards, and to no less than one."""
    now, pace = [0.0], [0.001]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def ask(part: Part) -> np.ndarray:
        now[0] += pace[0] * (part.stop - part.start)
        told(part)
        return np.full(part.stop - part.start, 50.0)

    told = Told(lambda _: 50.0)
    one = scorer(ask, shards=3, episodes=4000, lrs=(), shots=(1,))
    one.test([entry("a")])
    sizes = [part.stop - part.start for part in told.asked]
    assert sizes[:6] == [30, 60, 120, 240, 480, 960]
    pace[0] = 1.0
    told.asked.clear()
    one.test([entry("b")])
    sizes = [part.stop - part.start for part in told.asked]
    assert all(size % 30 == 0 for size in sizes[:-1])
    assert sizes[-2] == 30
    assert {len(found) for found in one._known.values()} == {4000}
