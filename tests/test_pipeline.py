"""The round loop's body: quarantine, selection, and the weights behind a score."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.config import resolve
from ray_dfml.errors import DfmlError, RejectedError
from ray_dfml.methods import METHODS
from ray_dfml.pipeline import KEPT, KEYS, Trainer
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.runtime.shard import Shard
from ray_dfml.scorer import Episodes, Part
from ray_dfml.scores import KEYS as KEYS_OF_A_ROW
from ray_dfml.scores import as_row
from ray_dfml.types import Arrays, Job, Labelled
from tests.runtime import toy
from tests.support import FakeShard, alike, random_teacher, small_world

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


pytestmark = pytest.mark.usefixtures("device")


def trainer(
    method: str = "free", *more: str, spoil: dict[str, dict[int, Arrays]] | None = None, data: bool = True
) -> Trainer:
    config = resolve(method, settings=[*toy.SETTINGS.get(method, toy.EVAL), *more])
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards whose teachers can be asked without a ledger."""
    monkeypatch.setattr(Shard, "service", lambda shard, id: FakeShard(WORLD).service(id))


@pytest.mark.usefixtures("asked")
def test_a_service_that_is_away_is_left_out_by_this_trainer_and_asked_again_by_the_next() -> None:
    away: dict[int, Arrays] = {0: {"rejected": "its server is down", "away": True}, 1: {"rejected": "no use"}}
    one = trainer("ideal", spoil={})
    one.round(0)
    one._backend = Spoiled({"ideal.recover": away})
    one.round(1)
    first, second = WORLD.cards[:2]
    assert [card.id for card in one.world.cards] == [card.id for card in WORLD.cards[2:]]
    assert one.rejected() == {
        second.id: "no use; its student of 8 images is kept",
        first.id: "its server is down; its student of 8 images is kept",
    }
    counts = one.students()
    assert (counts[first.id], counts[WORLD.cards[2].id]) == (8, 16)
    assert torch.isfinite(one.student(first.id).theta).all()
    assert not torch.equal(one.student(first.id).theta, one.student(first.id, fresh=True).theta)
    after = Trainer(one.config.model_dump(mode="json"), WORLD, [], Spoiled({}), one.state)
    assert [card.id for card in after.world.cards] == [card.id for card in WORLD.cards if card.id != second.id]
    after.round(2)
    assert (after.students()[first.id], after.students()[second.id]) == (16, 8)


@pytest.mark.usefixtures("asked")
def test_a_teacher_that_was_never_asked_leaves_no_student() -> None:
    one = trainer("ideal", spoil={"ideal.recover": {0: {"rejected": "no use"}}})
    one.round(0)
    assert WORLD.cards[0].id not in one.students()
    assert one.rejected() == {WORLD.cards[0].id: "no use"}


def test_a_run_that_too_few_teachers_end_says_why_the_others_are_out() -> None:
    first, second = WORLD.cards[:2]
    world = replace(WORLD, cards=(first, replace(second, classes=("a/0", "b/0"))))
    config = resolve("purer", settings=[*toy.SETTINGS["purer"], "method.image_warmup=0"])
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
        toy.scores_of(one, "last")


def test_a_round_tells_where_its_time_went() -> None:
    one = trainer("free", "method.warmup=0")
    metrics = one.round(0)
    parts = {k: v for k, v in metrics.items() if k.startswith("seconds/")}
    assert set(parts) == {"seconds/free.recover", "seconds/maml.grad", "seconds/learner", "seconds/round"}
    total = parts.pop("seconds/round")
    assert sum(parts.values()) == pytest.approx(total)  # type: ignore[arg-type]
    assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("selection", ["val", "test-best"])
def test_the_best_weights_are_kept(selection: str) -> None:
    """The first of equals stays, a later and better one replaces it, and NaN never does, not even as the first."""
    one, rounds = trainer("random"), []
    for r, accuracy in enumerate((float("nan"), 40.0, 60.0, float("nan"), 60.0, 50.0)):
        one.state["theta"] = torch.full_like(one.state["theta"], float(r))
        one.keep(selection, accuracy, r)
        rounds.append(one.state[KEYS[selection]].get("round"))
    assert rounds == [None, 1, 2, 2, 2, 2]
    assert one.state[KEYS[selection]]["accuracy"] == 60.0
    assert (one.weights(selection).theta == 2).all()
    assert set(one.candidates()) == {"last", "random", selection}


def test_weights_that_nothing_changed_are_no_candidate() -> None:
    """A round of the warm-up leaves the learner fresh, also where the trainer is made anew between two rounds."""
    one = trainer("free", "method.warmup=1")
    assert not one.learned()
    one.round(0)
    assert not one.learned()
    later = Trainer(one.config.model_dump(mode="json"), WORLD, sets(), Spoiled({}), one.state)
    later.round(1)
    assert later.learned()
    later.state["theta"] = torch.full_like(later.state["theta"], float("inf"))
    assert not later.learned(), "weights that are not finite are none either"


def test_the_parts_of_the_loop_survive_a_round() -> None:
    one = trainer()
    kept = {name: one.state[name] for name in KEPT if name != "began"}
    assert kept == {"rejected": {}, "best": {}, "test_best": {}, "pictures": {}}
    began = one.state["began"]
    one.keep("val", 50.0, 0)
    best = one.state["best"]
    one.round(1)
    assert one.state["best"] is best
    assert one.state["began"] == began


def assert_same(a: Any, b: Any, device: torch.device) -> None:
    """Equal to the bit on the CPU, within rounding on an accelerator."""
    if device.type == "cpu":
        toy.assert_equal(a, b)
    assert alike(a, b, device)


def test_a_trainer_from_a_snapshot_goes_on_in_the_same_bits(device: torch.device) -> None:
    whole, first = trainer(), trainer()
    for r in range(3):
        whole.round(r)
    first.round(0)
    second = Trainer(first.config.model_dump(mode="json"), WORLD, sets(), Spoiled({}), first.state)
    for r in (1, 2):
        second.round(r)
    assert_same(whole.state, second.state, device)


def test_the_scores_of_a_selection_are_those_of_its_weights() -> None:
    """`val` reads the weights kept, `last` the current ones; `random` is a fresh learner."""
    one = trainer("average")
    fresh = [s.accuracies.tolist() for s in toy.scores_of(one, "last")]
    one.keep("val", 50.0, 0)
    one.round(0)
    val, last, random = (
        [s.accuracies.tolist() for s in toy.scores_of(one, name)] for name in ("val", "last", "random")
    )
    assert val == random == fresh
    assert last != fresh


def test_a_score_does_not_depend_on_who_asks_for_which_part() -> None:
    """Nor on whether the trainer that is asked has named its weights: one that begins again has not."""
    one = trainer("average")
    of = Episodes(
        weights=one.candidates()["last"], reading="finetune", data="toy", split="test", shot=1, lr=0.1
    )  # fmt: skip
    whole = one.score(Part(episodes=of, start=0, stop=20))
    again = Trainer(one.config.model_dump(mode="json"), WORLD, sets(), Spoiled({}), one.state)
    parts = [again.score(Part(episodes=of, start=start, stop=start + 10)) for start in (0, 10)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    other = one.score(Part(episodes=replace(of, lr=5.0), start=0, stop=20))
    assert other.tolist() != whole.tolist()


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.students is None])
def test_a_row_has_the_keys_of_the_contract(method: str) -> None:
    rows = [as_row(score, "fixed") for score in toy.scores_of(trainer(method), "last")]
    names = [row["method"] for row in rows]
    readings = METHODS[method].readings
    assert names == ([method] if len(readings) == 1 else [f"{method}-{reading}" for reading in readings])
    for row in rows:
        assert tuple(row) == KEYS_OF_A_ROW
        assert (row["way"], row["shot"], row["episodes"], row["split"]) == (2, 1, 20, "test")


def test_the_shard_of_the_tests_gives_what_a_real_one_gives(device: torch.device) -> None:
    """The same bits for a recover job."""
    one = trainer()
    jobs = one.method.plan(one.config.method, one.world, one.state, 0)
    shared = one.method.shared(one.config.method, one.world, one.state, 0)
    here = FakeShard(WORLD, device=device).send("free.recover", jobs[:1], shared)
    assert_same(here, LocalBackend(TEACHERS.__getitem__).map("free.recover", jobs[:1], shared), device)
