"""`shared-answers`: what is asked, what is kept of answers, the loss against its closed form, and what is learned."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.config import resolve
from ray_dfml.core.images import normalise, to_bytes, to_pixels
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.sources.warp import warp, zoom
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import State, World
from ray_dfml.methods.shared_answers import fit, invert, method
from ray_dfml.methods.shared_answers.config import Config
from ray_dfml.methods.shared_answers.images import BEND, drawn, joined
from ray_dfml.methods.students.training import learnable
from ray_dfml.types import Arrays, Job
from tests.support import FakeShard, alike, image_spec, mixed_world, only_asked, play, small_shared_answers, small_world

UNITS = torch.tensor([[True, True, False], [True, True, True]])
KNOWN = torch.tensor([[True, True], [False, True], [True, False], [False, False]])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told() -> tuple[Tensor, Tensor]:
    """Logits and probabilities [4 2 3] in float64, of two teachers with two and three classes."""
    logits = torch.randn(4, 2, 3, generator=rng(), dtype=torch.float64)
    wished = torch.rand(4, 2, 3, generator=rng(1), dtype=torch.float64) * UNITS
    return logits, wished / wished.sum(2, keepdim=True) * KNOWN[..., None]


def test_the_loss_is_the_mean_cross_entropy_of_the_answers_that_are_known() -> None:
    logits, wished = told()
    each = [
        F.cross_entropy(logits[i, t, : 2 + t], wished[i, t, : 2 + t])
        for i in range(4) for t in range(2) if KNOWN[i, t]
    ]  # fmt: skip
    torch.testing.assert_close(fit.loss(logits, wished, KNOWN, UNITS), torch.stack(each).mean())
    assert len(each) == 4


def test_the_slope_of_the_loss_is_probabilities_less_answers() -> None:
    logits, wished = told()
    leaf = logits.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(fit.loss(leaf, wished, KNOWN, UNITS), leaf)
    given = logits.masked_fill(~UNITS, -math.inf).softmax(2)
    torch.testing.assert_close(slopes, (given - wished) * KNOWN[..., None] / 4)
    assert torch.autograd.gradcheck(lambda x: fit.loss(x, wished, KNOWN, UNITS), leaf)


def test_answers_to_nothing_have_no_loss_and_agreement_counts_what_is_known() -> None:
    logits, wished = told()
    assert float(fit.loss(logits, wished, torch.zeros_like(KNOWN), UNITS)) == 0
    assert float(fit.agreement(wished.log(), wished, KNOWN, UNITS)) == 100
    best = wished.clone()
    best[0, 0] = best[0, 0].flip(0).roll(-1)  # the other one of two classes
    assert float(fit.agreement(best, wished, KNOWN, UNITS)) == 75


def test_the_step_size_rises_and_then_falls_to_nothing() -> None:
    shares = [fit.slope(step, 300) for step in range(301)]
    assert shares[0] == pytest.approx(1 / fit.RISE)
    assert max(shares) == pytest.approx(shares[fit.RISE - 1], rel=0.01)
    assert shares[150] == pytest.approx(0.5)
    assert shares[300] == pytest.approx(0)


def test_answers_stand_where_their_round_was_and_others_are_not_known() -> None:
    labels = {"classes": 2, "rounds": np.array([0, 2]), "answers": np.array([1, 0, 1, 1])}
    soft = np.arange(9, dtype=np.float16).reshape(3, 3) / 16
    found = fit.answered([labels, {"classes": 3, "rounds": np.array([1]), "answers": soft}], [3, 3, 1])
    assert found["known"].T.tolist() == [[True] * 3 + [False] * 3 + [True], [False] * 3 + [True] * 3 + [False]]
    assert found["units"].tolist() == [[True, True, False], [True] * 3]
    assert found["wished"][[0, 1, 2, 6], 0].tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert np.array_equal(found["wished"][3:6, 1], soft)
    assert not found["wished"][~found["known"]].any()


def test_an_answer_that_was_rounded_to_nothing_is_not_known() -> None:
    rounded = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.25]], np.float32)
    soft = learnable(rounded, "probs", "soft")
    np.testing.assert_allclose(soft, [[0, 0, 0], [0, 2 / 3, 1 / 3]], rtol=1e-6)
    found = fit.answered([{"classes": 3, "rounds": np.array([0]), "answers": soft}], [2])
    assert found["known"].tolist() == [[False], [True]]


def test_images_are_those_of_the_sources_in_their_shares() -> None:
    both, shape = rng(), (1, 16, 16)
    plain = SOURCES["shapes"].function(both, 7, shape)
    large = zoom(both, SOURCES["strokes"].function(both, 3, shape), 1.2, 1.5)
    parts = Config(images=("shapes", "strokes"), shares=(2, 1)).parts
    found = drawn(parts, 10, shape, rng(), zooms=(1.2, 1.5), invert=True)
    assert np.array_equal(found, to_bytes(1 - torch.cat([plain, large])))


@pytest.mark.parametrize("channels", [1, 3])
def test_joined_images_are_two_images_of_strokes_over_one_another(channels: int) -> None:
    both, shape = rng(), (channels, 16, 16)
    first, second = SOURCES["strokes"].function(both, 125, shape), SOURCES["strokes"].function(both, 125, shape)
    found = joined(rng(), 30, shape)
    assert torch.equal(found, torch.maximum(first, warp(both, second, BEND))[:30])
    assert bool((found >= first[:30]).all())
    assert torch.equal(joined(rng(), 130, shape)[:30], found)


def test_the_batches_are_those_that_the_budget_pays_for() -> None:
    assert small_shared_answers().batches == [8, 8, 4]
    assert small_shared_answers(rounds=2).batches == [8, 8]
    assert Config().total_rounds == 10 + Config().fits
    assert small_shared_answers().total_rounds == 3 + 2


def test_the_rounds_of_the_training_share_its_steps() -> None:
    cfg = small_shared_answers(steps=7, fits=3)
    assert [cfg.fitted(r) for r in range(cfg.total_rounds)] == [(0, 0)] * 3 + [(0, 2), (2, 4), (4, 7)]


@pytest.mark.parametrize("levels", [("weights",), ("probs", "label"), ("logits", "weights")])
def test_every_teacher_is_asked_as_often_as_planned_about_the_same_images(levels: Any) -> None:
    world, cfg = only_asked(mixed_world(), *levels), small_shared_answers()
    shard, before = FakeShard(world), torch.random.get_rng_state()
    _, state, metrics = play("shared-answers", cfg, world, rounds=3, first=0, shard=shard)
    planned = METHODS["shared-answers"].queries(cfg, world)
    assert {id: service.asked for id, service in shard.services.items()} == planned == {"grey": 20, "colour": 20}
    assert metrics["queries"] == 20
    kept = {card.id: state["answers"][card.id]["answers"] for card in world.cards}
    for card in world.cards:
        assert kept[card.id].shape == ((20,) if card.access == "label" else (20, len(card.classes)))
        assert state["answers"][card.id]["rounds"].tolist() == [0, 1, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_gallery_shows_the_first_images_of_each_class_that_a_teacher_said() -> None:
    world, cfg, one = only_asked(small_world(), "probs", "label"), small_shared_answers(), METHODS["shared-answers"]
    shard, state = FakeShard(world), one.init(cfg, world)
    results = shard.send("shared-answers.recover", one.plan(cfg, world, state, 0), one.shared(cfg, world, state, 0))
    asked = method.images(cfg, world, {}, 0)
    for card, result in zip(world.cards, results, strict=True):
        answers = result["answers"]
        labels = answers if answers.ndim == 1 else answers.argmax(1)
        found = {seen.name: seen for seen in one.pictures(cfg, world, [result])}
        assert set(found) == {card.classes[label] for label in labels}
        for label, name in enumerate(card.classes):
            if name in found:
                seen, rows = found[name], np.flatnonzero(labels == label)[:4]
                assert (seen.kind, seen.teacher, set(seen.said)) == ("asked", card.id, {name})
                assert np.array_equal(seen.images, asked[rows])
                assert np.isnan(seen.confidence).all() == (card.access == "label")


def test_labels_are_kept_if_they_are_wanted() -> None:
    world = only_asked(small_world(), "probs")
    _, state, _ = play("shared-answers", small_shared_answers(answers="hard"), world, first=0)
    assert all(known["answers"].dtype == np.int64 for known in state["answers"].values())


def test_rounds_after_those_that_ask_move_the_learner_and_no_other_does(device: torch.device) -> None:
    world, cfg = only_asked(small_world(), "probs"), small_shared_answers(steps=40, fits=1)
    _, state, metrics = play("shared-answers", cfg, world, rounds=3, first=0, device=device)
    begun = METHODS["shared-answers"].init(cfg, world)
    assert torch.equal(state["theta"], begun["theta"])
    assert "fit/agreement" not in metrics
    _, state, metrics = play("shared-answers", cfg, world, rounds=4, first=0, device=device)
    _, again, _ = play("shared-answers", cfg, world, rounds=4, first=0, device=device)
    assert alike(state, again, device)
    assert metrics["fit/loss_last"] < metrics["fit/loss_first"]
    assert not torch.equal(state["theta"], begun["theta"])
    head = world.net.split(state["theta"])[1]
    assert torch.equal(head, world.net.split(begun["theta"])[1]), "the learner's own head is not trained"


def test_a_training_in_parts_ends_in_the_bits_of_one_without_a_break() -> None:
    world = only_asked(small_world(), "probs")
    _, whole, one = play("shared-answers", small_shared_answers(steps=7, fits=1), world, rounds=4, first=0)
    _, parts, last = play("shared-answers", small_shared_answers(steps=7, fits=3), world, rounds=6, first=0)
    assert torch.equal(whole["theta"], parts["theta"])
    assert alike(whole["fit"], parts["fit"], torch.device("cpu"))
    assert {name: one[name] for name in ("fit/loss_last", "fit/agreement")}.items() <= last.items()


def test_a_teacher_that_was_away_is_learned_from_in_its_rounds() -> None:
    """Of the answers that a job of the training holds, those of its missed round are not known."""
    world, cfg = only_asked(small_world(cards=2), "probs"), small_shared_answers()
    shard, one = FakeShard(world), METHODS["shared-answers"]
    state = one.init(cfg, world)
    for r in range(4):
        there = replace(world, cards=world.cards[:1]) if r == 1 else world
        jobs = one.plan(cfg, there, state, r)
        results = shard.send("shared-answers.recover", jobs, one.shared(cfg, there, state, r)) if jobs else []
        state, _ = one.learn(cfg, there, state, r, results, shard.send)
    op, (job,) = shard.sent[-1]
    assert op == "shared-answers.fit"
    assert job.values["known"].T.tolist() == [[True] * 20, [True] * 8 + [False] * 8 + [True] * 4]
    asked = np.concatenate([method.images(cfg, world, state["recovered"], r) for r in range(3)])
    assert np.array_equal(job.values["images"], asked)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method.images=stroks", "did you mean 'strokes'?"),
        ("method.images=mutants", "no image source 'mutants'"),
        ("method.images=dip,dip", "named twice"),
        ("method.shares=1,2", "method.shares needs one number above 0 for each of the 4 sources"),
        ("method.shares=1,2,3,0", "method.shares needs one number above 0"),
        ("method.zoom_low=2", "method.zoom_low is 2, above method.zoom_high, 1"),
        ("method.budget=0", "method.budget"),
        ("method.steps=4", "method.fits is 5, above method.steps, 4"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_refused_in_a_line(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve("shared-answers", settings=[text])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_images_below_eight_pixels_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 8"):
        method.init(Config(), replace(small_world(), image=image_spec(3, 7)))
    small = replace(small_world().cards[0], image=image_spec(3, 7))
    method.init(small_shared_answers(), replace(small_world(), cards=(small,)))  # it is asked about smaller copies
    with pytest.raises(UsageError, match="at least 8"):
        method.init(with_inversions(), replace(small_world(), cards=(small,)))


def test_the_preset_starts_after_no_pool_and_says_what_it_knows() -> None:
    config = resolve("shared-answers", preset="characters-shared-answers")
    assert (config.learner.start, config.learner.head) == ("no-pool-characters", "protonet")
    assert sum(METHODS["shared-answers"].queries(config.method, small_world(cards=1)).values()) == 10_000
    notes = method.notes(Config.model_validate(config.method.model_dump()), small_world())
    assert len(notes) == 7
    assert "knowledge of the domain" in notes[-1]


def play_on(cfg: Config, world: World, state: State, shard: FakeShard) -> None:
    """The first round of the training."""
    METHODS["shared-answers"].learn(cfg, world, state, len(cfg.batches), [], shard.send)


def with_inversions(**changes: Any) -> Config:
    return small_shared_answers(inversion={"images_per_class": 2, "steps": 4} | changes)


def test_each_teacher_with_weights_is_inverted_once_and_all_are_asked_about_its_images() -> None:
    world, cfg = only_asked(mixed_world(), "weights", "probs"), with_inversions()
    shard = FakeShard(world)
    _, state, metrics = play("shared-answers", cfg, world, rounds=3, first=0, shard=shard)
    play_on(cfg, world, state, shard)
    ((r, recovered),) = state["recovered"].items()
    assert r in ("1", "2")
    assert recovered.dtype == np.uint8
    assert recovered.shape == (2 * world.way, *world.image.shape)
    planned = METHODS["shared-answers"].queries(cfg, world)
    assert {id: service.asked for id, service in shard.services.items()} == planned
    assert set(planned.values()) == {20 + 2 * world.way}
    assert metrics["queries"] == 20 + 2 * world.way
    _, (job,) = shard.sent[-1]
    assert len(job.values["images"]) == 20 + 2 * world.way
    assert np.array_equal(method.images(cfg, world, state["recovered"], int(r))[-len(recovered) :], recovered)


def test_a_teacher_with_fewer_classes_than_the_learner_is_inverted_to_all_of_them() -> None:
    world, cfg = replace(mixed_world(), way=3), with_inversions()
    shard = FakeShard(world)
    _, state, _ = play("shared-answers", cfg, world, rounds=3, first=0, shard=shard)
    assert sum(len(images) for images in state["recovered"].values()) == invert.count(cfg, world) == 2 * (2 + 3)
    planned = METHODS["shared-answers"].queries(cfg, world)
    assert {id: service.asked for id, service in shard.services.items()} == planned


def test_a_teacher_whose_answers_are_not_finite_is_left_out_and_the_others_are_learned_from() -> None:
    world = only_asked(small_world(), "logits")
    shard = FakeShard(world)
    shard.spoil(world.cards[1].id)
    _, state, _ = play("shared-answers", small_shared_answers(), world, rounds=4, first=0, shard=shard)
    assert set(state["answers"]) == {world.cards[0].id, world.cards[2].id}
    assert bool(torch.isfinite(state["theta"]).all())


@pytest.mark.parametrize(("arch", "lines"), [("mlp", 1), ("lenet", 0)])
def test_a_run_says_that_teachers_without_batch_norm_are_inverted_without_statistics(arch: str, lines: int) -> None:
    world = small_world(cards=2, arch=arch)
    said = [note for note in method.notes(with_inversions(), world) if "statistics term is dropped" in note]
    assert len(said) == lines
    assert not [note for note in method.notes(small_shared_answers(), world) if "dropped" in note]


def test_the_gallery_shows_what_a_teacher_was_inverted_to() -> None:
    world, cfg, one = small_world(cards=1), with_inversions(), METHODS["shared-answers"]
    shard, state = FakeShard(world), one.init(cfg, world)
    r = next(r for r in range(3) if invert.is_due(cfg, world, world.cards[0], r))
    (result,) = shard.send("shared-answers.recover", one.plan(cfg, world, state, r), one.shared(cfg, world, state, r))
    found = one.pictures(cfg, world, [result])
    assert {(seen.kind, seen.name, len(seen.images)) for seen in found} == {
        ("recovered", name, 2) for name in result["recovered"]["classes"]
    }


def test_a_teacher_that_is_away_does_not_move_the_turns_of_others() -> None:
    world, cfg = small_world(cards=4), with_inversions()

    def turns(world: World) -> dict[str, list[bool]]:
        return {card.id: [invert.is_due(cfg, world, card, r) for r in range(3)] for card in world.cards}

    found = turns(world)
    assert turns(replace(world, cards=world.cards[1:])).items() <= found.items()
    assert all(sum(due) == 1 and not due[2] for due in found.values())


def inverted(world: World, device: torch.device, *, batched: bool = False, **changes: Any) -> list[Arrays]:
    shard = FakeShard(world, device=device, batched=batched)
    jobs = [Job(index=i, seed=i, teacher=card.id, values={"invert": True}) for i, card in enumerate(world.cards)]
    return invert.invert(with_inversions(**changes), world.way, shard, jobs)


def test_steps_bring_the_wished_classes_and_the_statistics_of_the_teacher(device: torch.device) -> None:
    world = small_world(cards=2)
    shard = FakeShard(world, device=device)
    for id, (begun, done) in zip(
        (card.id for card in world.cards),
        zip(inverted(world, device, steps=1), inverted(world, device, steps=40), strict=True), strict=True,
    ):  # fmt: skip
        assert done["loss"] < begun["loss"]
        teacher = shard.teacher(id)
        gaps = []
        for task in (begun, done):
            image = teacher.card.image
            x = normalise(to_pixels(task["images"], device), torch.tensor(image.mean), torch.tensor(image.std))
            found = teacher.net.with_stats(teacher.theta, x, teacher.stats)[1]
            gaps.append(float(torch.linalg.vector_norm(found - teacher.stats)))
        assert gaps[1] < gaps[0]
        assert invert.accuracy(done) >= invert.accuracy(begun)


def test_teachers_that_are_inverted_together_give_what_each_gives_alone(device: torch.device) -> None:
    world = small_world(cards=3)
    alone, together = inverted(world, device), inverted(world, device, batched=True)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one["images"].astype(int) - other["images"].astype(int)).max() <= 1
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)


def test_inversions_need_a_round_in_which_their_images_are_asked_about() -> None:
    with pytest.raises(UsageError, match="one round only asks"):
        method.init(with_inversions().model_copy(update={"budget": 8}), small_world())


def test_the_cost_counts_the_images_of_inversions_and_takes_time_for_them() -> None:
    world = small_world(cards=2)
    without, with_them = (
        method.cost(cfg, world, FakeShard(world)) for cfg in (small_shared_answers(), with_inversions(steps=4000))
    )
    assert (without.images, with_them.images) == (0, 2 * 2 * world.way)
    assert with_them.recovery > without.recovery
