"""FREE where teachers give no weights: surrogates, the queries that label recovered images, and mixed pools."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core.images import to_bytes
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.methods.bidf.config import Config as BidfConfig
from ray_dfml.methods.free import answers, bell
from ray_dfml.methods.free import method as free
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.inversion import Inversion
from ray_dfml.methods.purer.config import Config as PurerConfig
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.methods.surrogates.config import LEAST
from ray_dfml.types import Access, Arrays, Teacher
from tests.support import (
    FakeService,
    FakeShard,
    FakeTeacher,
    card,
    play,
    same,
    small_bidf,
    small_config,
    small_purer,
    small_world,
)

MIXED: tuple[Access, ...] = ("weights", "probs", "label")

pytestmark = pytest.mark.usefixtures("short_surrogates")


def world_of(*access: Access, way: int = 2) -> World:
    """Teachers 0, 1, ... of 16x16 images at these levels of access."""
    cards = tuple(replace(card(i, way=way), access=level) for i, level in enumerate(access))
    return replace(small_world(way=min(way, 2)), cards=cards)


def small(budget: int = 500, **changes: Any) -> Config:
    """Two rounds of FREE after two of distillation, on three teachers in turn."""
    own = {"budget": budget, "student": "mlp"} | changes.pop("surrogate", {})
    given = {"rounds": 2, "warmup": 0, "teachers_per_round": 3, "draws": "turns", "surrogate": own}
    return small_config(**given | changes)


def purer_small() -> PurerConfig:
    """Two rounds of PURER after two of distillation."""
    return small_purer(rounds=2, image_warmup=0, surrogate={"budget": 500, "student": "mlp"})


def bidf_small() -> BidfConfig:
    """Two rounds of BiDf-MKD after two of distillation."""
    return small_bidf(rounds=2, surrogate={"budget": 500, "student": "mlp"})


class NoWeights(FakeShard):
    """A shard that refuses to give the weights of a service, as the real one does."""

    def teacher(self, id: str) -> FakeTeacher:
        """Raises AssertionError for a teacher that is only asked."""
        assert self.teachers[id].card.access == "weights", f"the weights of {id} were read"
        return super().teacher(id)

    def service(self, id: str) -> FakeService:
        """The teacher of that name as one that is only asked; the same object on every call."""
        return self.services.setdefault(id, FakeService(self.teachers[id].card, self.teachers[id]))


@pytest.fixture(scope="module")
def mixed() -> tuple[World, Config, NoWeights, dict[str, Any], dict[str, Any]]:
    """A whole run of a mixed pool: world, settings, shard, last state, last metrics."""
    world, cfg = world_of(*MIXED), small()
    shard = NoWeights(world)
    _, state, metrics = play("free", cfg, world, rounds=cfg.total_rounds, first=0, shard=shard)
    return world, cfg, shard, state, metrics


def test_a_mixed_pool_uses_every_teacher_as_strongly_as_it_may(mixed) -> None:
    _, cfg, shard, state, metrics = mixed
    assert cfg.total_rounds == cfg.rounds + 2
    assert set(state["surrogates"]) == {"conv4-1", "conv4-2"}
    assert "students" not in state
    assert metrics["recover/tasks"] == 3
    assert 0 <= metrics["recover/agreement"] <= 100
    distilled = [
        job.teacher for op, jobs in shard.sent if op == "free.recover" for job in jobs if "pupil" in job.values
    ]
    assert sorted(distilled) == ["conv4-1", "conv4-1", "conv4-2", "conv4-2"]
    carried = {job.teacher: bool(job.values) for op, jobs in shard.sent for job in jobs if op == "free.recover"}
    assert carried == {"conv4-0": False, "conv4-1": True, "conv4-2": True}


def test_the_plan_of_queries_is_what_is_asked(mixed) -> None:
    """500 images for a surrogate, then 8 for each of two visits; nothing of the teacher with weights."""
    world, cfg, shard, *_ = mixed
    planned = METHODS["free"].queries(cfg, world)
    assert planned == {"conv4-1": 500 + 2 * 8, "conv4-2": 500 + 2 * 8}
    assert {id: service.asked for id, service in shard.services.items()} == planned


def test_equal_runs_have_equal_bits(mixed) -> None:
    world, cfg, _, state, _ = mixed
    _, again, _ = play("free", cfg, world, rounds=cfg.total_rounds, first=0, shard=NoWeights(world))
    assert same(state, again)


def test_the_distillation_leaves_the_learner_alone(mixed) -> None:
    world, cfg, *_ = mixed
    before, after, metrics = play("free", cfg, world, rounds=1, first=0, shard=NoWeights(world))
    assert torch.equal(before["theta"], after["theta"])
    assert torch.equal(before["theta_g"], after["theta_g"])
    assert metrics["surrogate/queries"] == 250


def test_a_pool_of_weights_is_inverted_as_ever() -> None:
    world, cfg = small_world(), small_config(draws="turns")
    assert cfg.total_rounds == cfg.rounds
    assert METHODS["free"].queries(cfg, world) == {}
    jobs = free.plan(cfg, world, free.init(cfg, world), 0)
    assert {bool(job.values) for job in jobs} == {False}
    assert "distil" not in free.shared(cfg, world, free.init(cfg, world), 0)


def test_without_a_budget_services_are_left_out_and_the_run_says_so() -> None:
    world, cfg = world_of(*MIXED), small_config(teachers_per_round=4)
    state, shard = free.init(cfg, world), FakeShard(world)
    jobs = free.plan(cfg, world, state, 0)
    assert {job.teacher for job in jobs} == {"conv4-0"}
    play("free", cfg, world, shard=shard)
    assert shard.services == {}
    assert free.notes(cfg, world)[0] == (
        "free: 2 of 3 teachers give no weights and are left out: conv4-1 gives probs; method.surrogate.budget=1500 "
        "would distil each into a surrogate"
    )
    assert METHODS["free"].queries(cfg, world) == {}


def test_the_assumption_about_the_data_is_said() -> None:
    own = {"images": ("dipw", "generator"), "invert": True}
    assert free.notes(small(surrogate=own), world_of(*MIXED))[:4] == [
        "free: 2 of 3 teachers are asked, and inverted as surrogates",
        "images of dipw: assumes one textured object in the middle of a dark ground",
        "images of generator: nothing about the data: it follows the student",
        "dark and light of the images changed places: this is knowledge of the domain, which no teacher gave",
    ]


@pytest.mark.parametrize("invert", [False, True])
def test_dark_and_light_of_the_sources_may_change_places(invert: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    world, cfg = world_of("label"), small(surrogate={"images": ("strokes",), "invert": invert})
    shard, asked = NoWeights(world), list[np.ndarray]()
    original = FakeService.query
    monkeypatch.setattr(FakeService, "query", lambda self, images: asked.append(images) or original(self, images))
    play("free", cfg, world, rounds=2, first=0, shard=shard)
    assert sum(map(len, asked)) == 500
    assert (np.concatenate(asked).mean() > 128) == invert


@pytest.mark.parametrize(("access", "cfg", "said"), [
    (("label", "probs"), small_config(), "no teacher gives its weights (conv4-0 gives label)"),
    (("weights", "weights"), small(), "every teacher gives its weights"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(access: Sequence[Access], cfg: Config, said: str) -> None:
    with pytest.raises(UsageError) as error:
        free.init(cfg, world_of(*access))
    assert said in str(error.value)


@pytest.mark.parametrize(("own", "said"), [
    ({"budget": LEAST - 1}, "a surrogate needs 500 queries or more"),
    ({"images": ("dop",)}, "unknown source 'dop'"),
    ({"images": ("mutants",)}, "name a source beside them"),
    ({"student": "conv5"}, "unknown architecture 'conv5'"),
])  # fmt: skip
def test_settings_that_distil_nothing_are_refused(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"surrogate": own})


def test_the_smallest_budget_pays_for_two_whole_rounds() -> None:
    assert small(budget=LEAST).surrogate.distillation.batches() == [(250, 250), (250, 250)]


def test_the_distillation_has_the_settings_of_ideal() -> None:
    own = small(budget=700, surrogate={"lam": 2.0, "answers": "hard", "images": ("shapes",)}).surrogate.distillation
    assert (own.budget, own.lam, own.answers, own.images, own.student) == (700, 2.0, "hard", ("shapes",), "mlp")


def task_of(shard: FakeShard, id: str, labels: list[int], classes: Sequence[str], cfg: Config) -> tuple[Arrays, Arrays]:
    """A task of noise with these labels, and what becomes of it when the service was asked."""
    rng = torch.Generator().manual_seed(4)
    service = shard.service(id)
    images = to_bytes(torch.rand(len(labels), *service.card.image.shape, generator=rng))
    task: Arrays = {"images": images, "labels": np.array(labels), "classes": list(classes), "view": (0, 1, True)}
    return task, answers.asked_once(cfg, service, task)


@pytest.fixture
def three() -> tuple[FakeShard, str, list[int], Any]:
    """A label service of three classes, and its answers to twelve images of noise, two of them for each."""
    shard = FakeShard(world_of("label", way=3))
    _, asked = task_of(shard, "conv4-0", [0] * 12, shard.teachers["conv4-0"].card.classes, small(
        surrogate={"labels": "relabel"}
    ))  # fmt: skip
    return shard, "conv4-0", asked["labels"].tolist(), shard.teachers["conv4-0"].card.classes


@pytest.mark.parametrize("labels", ["keep", "drop", "relabel"])
def test_what_becomes_of_images_that_the_service_sees_otherwise(three, labels: str) -> None:
    shard, id, best, classes = three
    wished = [(answer + (i % 2)) % 3 for i, answer in enumerate(best)]  # every other one is wrong
    task, found = task_of(shard, id, wished, classes, small(surrogate={"labels": labels}))
    right = [i for i in range(12) if i % 2 == 0]
    rows = {"keep": list(range(12)), "drop": right, "relabel": list(range(12))}[labels]
    assert found["agreement"] == 50.0
    assert np.array_equal(found["images"], task["images"][rows])
    assert found["labels"].tolist() == [(best if labels == "relabel" else wished)[i] for i in rows]
    assert found["logits"].argmax(1).tolist() == [best[i] for i in rows]
    assert found["view"] == (4, 4, False)
    assert shard.services[id].asked == 24


class Fixed:
    """A service of three classes with these answers."""

    def __init__(self, access: Access, answers: Sequence[Any]) -> None:
        self.card = world_of(access, way=3).cards[0]
        self._answers = np.array(answers, np.int64 if access == "label" else np.float32)

    def query(self, images: np.ndarray) -> np.ndarray:
        return self._answers


def asked_about_two(service: Fixed, labels: Sequence[int], cfg: Config) -> Arrays:
    """A task of classes 2 and 0, in this order, with the answers of the service."""
    classes = [service.card.classes[2], service.card.classes[0]]
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(16, 2).repeat(16, 3)
    task: Arrays = {"images": images, "labels": np.array(labels), "classes": classes, "view": (0, 0, False)}
    return answers.asked_once(cfg, service, task)


def test_a_task_of_some_classes_leaves_out_images_of_the_others() -> None:
    """Images that the service gives to class 1 have no label among classes 2 and 0."""
    found = asked_about_two(Fixed("label", [0, 1, 2, 1, 2]), [0, 0, 0, 1, 1], small(surrogate={"labels": "relabel"}))
    assert found["labels"].tolist() == [1, 0, 0]
    assert found["images"][:, 0, 0, 0].tolist() == [0, 2, 4]
    assert found["logits"].argmax(1).tolist() == found["labels"].tolist()


def test_bell_leaves_out_images_whose_answers_say_nothing_of_the_task() -> None:
    """The bank keeps them under the wished class, but to the learner they would say that all classes are alike."""
    cfg = small(surrogate={"labels": "keep"})
    found = asked_about_two(Fixed("label", [0, 1, 2, 1, 2]), [0, 0, 0, 1, 1], cfg)
    assert found["labels"].tolist() == [0, 0, 0, 1, 1]
    left = answers.told(cfg, found)
    assert left["images"][:, 0, 0, 0].tolist() == [0, 2, 4]
    assert left["labels"].tolist() == [0, 0, 1]
    assert left["logits"].argmax(1).tolist() == [1, 0, 0]
    assert answers.told(cfg.model_copy(update={"distill": "hard"}), found) is found


def test_an_answer_that_gives_the_task_little_is_still_learned_from() -> None:
    """Probabilities say nothing if all classes of the task have 0, as `top_k` can make them."""
    cfg = small(surrogate={"labels": "keep"})
    found = asked_about_two(Fixed("probs", [[0.1, 0.9, 0.0], [0.0, 1.0, 0.0], [0.2, 0.6, 0.2]]), [0, 1, 1], cfg)
    left = answers.told(cfg, found)
    assert left["images"][:, 0, 0, 0].tolist() == [0, 2]
    torch.testing.assert_close(torch.tensor(left["logits"]).softmax(1)[1], torch.tensor([0.5, 0.5]))


def test_only_what_is_told_reaches_bell(monkeypatch: pytest.MonkeyPatch) -> None:
    world, cfg = world_of("label", "label"), small(teachers_per_round=2, surrogate={"labels": "keep"})
    original, sizes = answers.asked_once, list[int]()

    def half(cfg: Config, service: Any, task: Arrays) -> Arrays:
        found = original(cfg, service, task)
        return found | {"told": np.arange(len(found["images"])) % 2 == 0}

    def count(cfg: Config, world: World, state: Any, tasks: Sequence[Any], r: int) -> tuple[Any, dict[str, Any]]:
        sizes.extend(len(task.images) for task in tasks)
        return state, {}

    monkeypatch.setattr(answers, "asked_once", half)
    monkeypatch.setattr(bell, "update", count)
    _, _, metrics = play("free", cfg, world, rounds=3, first=0, shard=NoWeights(world))
    assert sizes == [4, 4]
    assert metrics["bank/images"] == 16


@pytest.mark.parametrize(
    ("access", "answers"), [("probs", "soft"), ("logits", "soft"), ("probs", "hard"), ("label", "soft")]
)
def test_bell_learns_what_the_service_answers(access: Access, answers: str) -> None:
    """The softmax of the task's logits is the answer: its probabilities, or all of it on the best class."""
    shard = FakeShard(world_of(access))
    classes = shard.teachers["conv4-0"].card.classes
    task, found = task_of(
        shard, "conv4-0", [0, 1, 0, 1], classes, small(surrogate={"labels": "keep", "answers": answers})
    )
    given = shard.service("conv4-0").query(task["images"])
    soft = torch.tensor(found["logits"]).softmax(1)
    if access == "label":
        expected = torch.eye(2)[torch.tensor(given)]
    else:
        expected = torch.tensor(given) if access == "probs" else torch.tensor(given).softmax(1)
        expected = torch.eye(2)[expected.argmax(1)] if answers == "hard" else expected
    torch.testing.assert_close(soft, expected, atol=1e-5, rtol=1e-4)


def test_an_image_of_another_size_is_asked_about_as_the_teacher_takes_it() -> None:
    shard = FakeShard(world_of("label"))
    large = np.random.default_rng(0).integers(0, 256, (4, 3, 20, 20), dtype=np.uint8)
    task = {"images": large, "labels": np.array([0, 1, 0, 1]), "classes": list(shard.teachers["conv4-0"].card.classes)}
    found = answers.asked_once(small(surrogate={"labels": "keep"}), shard.service("conv4-0"), task)
    assert found["images"].shape == (4, 3, 20, 20)


def test_no_image_may_be_left_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the service agrees with nothing, the learner has nothing of that teacher, and the round goes on."""
    original = answers.asked_once

    def disagrees(cfg: Config, service: Any, task: Arrays) -> Arrays:
        return original(cfg, service, task | {"labels": 1 - task["labels"]})

    world, cfg = world_of("label", "label"), small(teachers_per_round=2, surrogate={"student": "conv4"})
    monkeypatch.setattr(answers, "asked_once", lambda cfg, service, task: {
        name: value[:0] if name in ("images", "labels", "logits", "told") else value
        for name, value in disagrees(cfg, service, task).items()
    })  # fmt: skip
    before, after, metrics = play("free", cfg, world, rounds=3, first=0, shard=NoWeights(world))
    assert torch.equal(before["theta"], after["theta"])
    assert metrics["bank/images"] == metrics["replay/updates"] == 0


def test_teachers_with_weights_go_on_if_no_service_is_left(mixed) -> None:
    world, cfg, *_ = mixed
    state = free.init(cfg, world)
    left = replace(world, cards=world.cards[:1])
    for r in range(2):
        assert free.plan(cfg, left, state, r) == []
        state, metrics = free.learn(cfg, left, state, r, [], NoWeights(world).send)
        assert metrics == {}
    assert {job.teacher for job in free.plan(cfg, left, state, 2)} == {world.cards[0].id}


def test_a_service_that_came_back_after_the_distillation_has_no_surrogate_and_is_left_out(mixed) -> None:
    world, cfg, _, state, _ = mixed
    kept = {id: one for id, one in state["surrogates"].items() if id != "conv4-1"}
    jobs = free.plan(cfg, world, state | {"surrogates": kept}, 2)
    assert {job.teacher for job in jobs} == {"conv4-0", "conv4-2"}
    asked = replace(world, cards=surrogates.services(world))
    with pytest.raises(RejectedError, match="no teacher has weights or a surrogate"):
        free.plan(cfg, asked, state | {"surrogates": {}}, 2)


def test_the_surrogate_is_what_is_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    world, cfg = world_of("probs"), small(teachers_per_round=1)
    shard, seen = NoWeights(world), list[Teacher]()
    original = Inversion.__init__

    def spy(self: Inversion, cfg: Any, net_g: Any, teachers: Sequence[Teacher], *rest: Any, **more: Any) -> None:
        seen.extend(teachers)
        original(self, cfg, net_g, teachers, *rest, **more)

    monkeypatch.setattr(Inversion, "__init__", spy)
    _, state, _ = play("free", cfg, world, rounds=3, first=0, shard=shard)
    (one,) = seen
    kept = state["surrogates"]["conv4-0"]
    assert (one.card.arch, one.net.layout.numel) == ("mlp", len(kept["theta"]))
    assert torch.equal(one.theta, kept["theta"])
    assert torch.equal(one.stats, kept["stats"])


def test_teachers_and_surrogates_of_one_architecture_are_inverted_together_where_the_shard_batches() -> None:
    """As on a GPU, and up to rounding with the images of one after another."""
    world, cfg = world_of(*MIXED), small(surrogate={"student": "conv4", "labels": "keep"})
    _, state, _ = play("free", cfg, world, rounds=2, first=0, shard=NoWeights(world))
    jobs, shared = free.plan(cfg, world, state, 2), free.shared(cfg, world, state, 2)
    looped, batched = (free.recover(NoWeights(world, batched=how), jobs, shared) for how in (False, True))
    for one, other in zip(looped, batched, strict=True):
        assert one["teacher"] == other["teacher"]
        assert np.abs(one["images"].astype(int) - other["images"].astype(int)).mean() < 0.5
        assert ("agreement" in one) == ("agreement" in other) == (one["teacher"] != "conv4-0")


def absent(world: World, id: str) -> World:
    return replace(world, cards=tuple(card for card in world.cards if card.id != id))


@pytest.mark.parametrize("name", ["free", "purer", "bidf-mkd"])
def test_what_a_service_missed_of_the_distillation_is_made_up_when_it_is_back(name: str) -> None:
    """One misses the last round, another all of them; both get the surrogates of a run in which nobody was away."""
    world, method = world_of("label", "probs", "label"), METHODS[name]
    cfg = {"free": small, "purer": purer_small, "bidf-mkd": bidf_small}[name]()
    shard = NoWeights(world)
    _, quiet, _ = play(name, cfg, world, rounds=2, first=0, shard=NoWeights(world))
    state = method.init(cfg, world)
    there = absent(world, "conv4-2")
    for r, present in enumerate((there, absent(there, "conv4-1"), there, world)):
        jobs = method.plan(cfg, present, state, r)
        assert {job.teacher for job in jobs} <= {card.id for card in present.cards} - ({"conv4-1"} if r == 2 else set())
        results = shard.send(f"{name}.recover", jobs, method.shared(cfg, present, state, r))
        state, _ = method.learn(cfg, present, state, r, results, shard.send)
        assert set(state.get("students", ())) == [
            {"conv4-0", "conv4-1", "conv4-2"}, {"conv4-1", "conv4-2"}, {"conv4-2"}, set()
        ][r]  # fmt: skip
    assert same(state["surrogates"], quiet["surrogates"])
    jobs = method.plan(cfg, absent(absent(world, "conv4-0"), "conv4-1"), state, 3)
    assert {job.teacher for job in jobs} == {"conv4-2"}
    (found,) = shard.send(f"{name}.recover", jobs[:1], method.shared(cfg, world, state, 3))
    assert found


@pytest.mark.parametrize("name", ["free", "purer", "bidf-mkd"])
def test_a_service_that_is_away_again_stays_behind_and_a_round_without_surrogates_makes_them_up(name: str) -> None:
    world, method = world_of("label", "label"), METHODS[name]
    cfg = {"free": small, "purer": purer_small, "bidf-mkd": bidf_small}[name]()
    shard = NoWeights(world)
    state = method.init(cfg, world)
    for r in range(2):
        state, _ = method.learn(cfg, world, state, r, [], shard.send)
    assert method.plan(cfg, world, state, 2) == []
    refused = lambda op, jobs, shared: []  # noqa: E731
    still, metrics = method.learn(cfg, world, state, 2, [], refused)
    assert (set(still["students"]), metrics["recover/tasks"]) == ({"conv4-0", "conv4-1"}, 0)
    assert method.plan(cfg, world, still, 3) == []
    state, _ = method.learn(cfg, world, still, 2, [], shard.send)
    assert set(state["surrogates"]) == {"conv4-0", "conv4-1"}
    assert len(method.plan(cfg, world, state, 3)) > 0
    assert {service.asked for service in shard.services.values()} == {500}
