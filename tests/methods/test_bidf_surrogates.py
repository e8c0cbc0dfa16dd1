"""BiDf-MKD on surrogates of services: what is recovered from them, and answers of the services to it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core.images import to_pixels, view
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.methods.bidf import asked, sets
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.types import Access, Job
from tests.methods.test_surrogates import MIXED, NoWeights, world_of
from tests.support import CPU, play, same, small_bidf, small_world

pytestmark = pytest.mark.usefixtures("short_surrogates")


def small(budget: int = 500, **changes: Any) -> bidf.Config:
    """Two rounds of BiDf-MKD after two of distillation, of three visits each."""
    own = {"budget": budget, "student": "mlp"} | changes.pop("surrogate", {})
    return small_bidf(rounds=2, teachers_per_round=3, surrogate=own, **changes)


@pytest.fixture(scope="module")
def mixed() -> tuple[World, bidf.Config, NoWeights, dict[str, Any], dict[str, Any]]:
    """A whole run of a mixed pool: world, settings, shard, last state, last metrics."""
    world, cfg = replace(world_of(*MIXED), seed=1), small()  # of this seed every teacher is drawn
    shard = NoWeights(world)
    _, state, metrics = play("bidf-mkd", cfg, world, rounds=cfg.total_rounds, first=0, shard=shard)
    return world, cfg, shard, state, metrics


def test_every_service_is_distilled_and_then_inverted_and_nobody_s_weights_are_read(mixed) -> None:
    """`NoWeights` refuses the weights of a service."""
    _, cfg, shard, state, metrics = mixed
    assert cfg.total_rounds == 4
    assert set(state["surrogates"]) == {"conv4-1", "conv4-2"}
    assert "students" not in state
    assert metrics["recover/tasks"] == 3
    for kind in ("support", "query"):
        assert 0 <= metrics[f"recover/{kind}_agreement"] <= 100
    visits = [jobs for op, jobs in shard.sent if op == "bidf-mkd.recover"][2:]
    carried = {job.teacher: sorted(job.values) for jobs in visits for job in jobs}
    assert carried == {"conv4-0": [], "conv4-1": ["surrogate"], "conv4-2": ["surrogate"]}
    assert sum(op == "bidf.grad" for op, _ in shard.sent) == 2
    assert state["updates"] == 6
    assert torch.isfinite(state["theta"]).all()


def test_the_plan_of_queries_is_what_is_asked(mixed) -> None:
    """500 images for a surrogate, then two sets of eight images a visit; no zero-order gradient is estimated."""
    world, cfg, shard, *_ = mixed
    planned = METHODS["bidf-mkd"].queries(cfg, world)
    assert {id: service.asked for id, service in shard.services.items()} == planned
    visits = [(count - 500) / 16 for count in planned.values()]
    assert all(count == int(count) for count in visits)
    assert sum(visits) > 0


def test_equal_runs_have_equal_bits_and_the_distillation_leaves_the_learner_alone(mixed) -> None:
    world, cfg, _, state, _ = mixed
    _, again, _ = play("bidf-mkd", cfg, world, rounds=cfg.total_rounds, first=0, shard=NoWeights(world))
    assert same(state, again)
    before, early, metrics = play("bidf-mkd", cfg, world, rounds=2, first=0, shard=NoWeights(world))
    assert torch.equal(early["theta"], before["theta"])
    assert metrics["surrogate/queries"] == 500


@pytest.mark.parametrize(
    ("access", "answers"), [("probs", "soft"), ("logits", "soft"), ("probs", "hard"), ("label", "soft")]
)
def test_both_distillations_learn_the_answers_of_the_service_to_the_sets_of_its_surrogate(
    access: Access, answers: str
) -> None:
    """By hand: the set is that of the surrogate as a teacher, and its logits stand for the answers to its view."""
    world, cfg = world_of(access), small(surrogate={"answers": answers})
    shard = NoWeights(world)
    _, state, _ = play("bidf-mkd", cfg, world, rounds=2, first=0, shard=shard)
    jobs = bidf.plan(cfg, world, state, 2)[:1]
    (found,) = sets.recover(shard, jobs, bidf.shared(cfg, world, state, 2))
    one = surrogates.teacher(shard, jobs[0])
    (support,) = sets.synthesize(
        cfg, [one], None, [jobs[0].seed], world.image.shape, 2, device=CPU, batched=False, stream="support"
    )
    assert np.array_equal(found["support"]["images"], support["images"])
    for kind in ("support", "query"):
        task = found[kind]
        seen = view(to_pixels(task["images"]), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
        given = shard.service("conv4-0").query((seen * 255).round().numpy().astype(np.uint8))
        units = [world.cards[0].classes.index(name) for name in task["classes"]]
        soft = torch.tensor(task["logits"]).softmax(1)
        assert task["labels"].tolist() == soft.argmax(1).tolist()
        if access == "label" or answers == "hard":
            best = torch.tensor(given if given.ndim == 1 else given.argmax(1))
            expected = torch.eye(2)[best] * (1 - asked.FLOOR) + asked.FLOOR / 2
        else:
            expected = torch.tensor(given) if access == "probs" else torch.tensor(given).softmax(1)
        torch.testing.assert_close(soft, expected[:, units], atol=1e-4, rtol=1e-3)
    values = {kind: found[kind] for kind in ("support", "query")}
    changed = values | {"query": found["query"] | {"logits": -found["query"]["logits"]}}
    own, other = (
        METHODS["bidf-mkd"].ops["bidf.grad"](
            shard, [Job(index=0, seed=0, values=one)], bidf.shared(cfg, world, state, 2)
        )[0]["grad"]
        for one in (values, changed)
    )  # fmt: skip
    assert not np.allclose(own, other), "the outer distillation learns from these logits"


def test_without_relabelling_the_images_keep_the_wished_classes() -> None:
    world, cfg = world_of("label"), small(relabel=False)
    shard = NoWeights(world)
    _, state, _ = play("bidf-mkd", cfg, world, rounds=2, first=0, shard=shard)
    (found, *_) = sets.recover(shard, bidf.plan(cfg, world, state, 2), bidf.shared(cfg, world, state, 2))
    task = found["support"]
    assert task["labels"].tolist() == [0, 1] * cfg.images_per_class
    answers = task["logits"].argmax(1)
    assert task["agreement"] == pytest.approx(100 * (answers == task["labels"]).mean())
    assert task["balance"] == 100.0


def test_a_surrogate_whose_loss_is_not_finite_is_asked_nothing() -> None:
    world, cfg = world_of("label"), small()
    shard = NoWeights(world)
    _, state, _ = play("bidf-mkd", cfg, world, rounds=2, first=0, shard=shard)
    known = state["surrogates"]["conv4-0"]
    bad = state | {"surrogates": {"conv4-0": known | {"theta": torch.full_like(known["theta"], torch.nan)}}}
    before = shard.services["conv4-0"].asked
    found = sets.recover(shard, bidf.plan(cfg, world, bad, 2), bidf.shared(cfg, world, bad, 2))
    assert found == [{"rejected": "the inversion loss is not finite"}] * 3
    assert shard.services["conv4-0"].asked == before


def test_without_a_budget_services_are_asked_themselves() -> None:
    world, cfg = world_of(*MIXED), small(0)
    assert cfg.total_rounds == 2
    jobs = bidf.plan(cfg, world, bidf.init(cfg, world), 0)
    assert {bool(job.values) for job in jobs if job.teacher == "conv4-0"} <= {False}
    assert all(job.values == {"asked": "generator"} for job in jobs if job.teacher != "conv4-0")
    assert not any("surrogate" in note for note in bidf.notes(cfg, world))


def test_what_surrogates_assume_is_said_and_nothing_of_zero_order_gradients() -> None:
    said = bidf.notes(small(surrogate={"images": ("strokes",)}, zero_order={"mu": 0.001}), world_of(*MIXED))
    assert said[0] == "bidf-mkd: 2 of 3 teachers are asked, and inverted as surrogates"
    assert said[1].startswith("images of strokes: assumes")
    assert not any("zero_order" in note for note in said)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UsageError, match=r"bidf-mkd: method.surrogate.budget is set, but every teacher gives its"):
        bidf.init(small(), small_world())
    with pytest.raises(ValueError, match=r"leave images at generator"):
        small(images=("dip",))


def test_a_service_without_a_surrogate_is_not_inverted(mixed) -> None:
    world, cfg, _, state, _ = mixed
    kept = {id: one for id, one in state["surrogates"].items() if id != "conv4-1"}
    drawn = {job.teacher for r in range(2, 12) for job in bidf.plan(cfg, world, state | {"surrogates": kept}, r)}
    assert drawn == {"conv4-0", "conv4-2"}
    alone = replace(world, cards=surrogates.services(world))
    with pytest.raises(RejectedError, match="bidf-mkd: no teacher has weights or a surrogate"):
        bidf.plan(cfg, alone, state | {"surrogates": {}}, 2)
