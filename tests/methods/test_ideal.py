"""IDEAL: what stage 1 may touch, when the teacher is asked and how often, and what a round trains the student on."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ray_dfml.config import resolve
from ray_dfml.core.images import to_bytes
from ray_dfml.core.sources import SOURCES, Source
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.methods.ideal import method as ideal
from ray_dfml.methods.ideal.config import Config
from ray_dfml.methods.students import distil, lessons, loop
from ray_dfml.methods.students.config import NAMES, Batch, GeneratorConfig
from ray_dfml.methods.students.loop import Study
from ray_dfml.methods.students.stage import FLOOR, Stage, information, wished
from ray_dfml.methods.students.training import Lesson, Pupil
from tests.support import FakeShard, card, normal, play, same, slope, small_ideal, small_world


def labelled_world(access: Any = "label", way: int = 3) -> World:
    """Teachers that are only asked."""
    world = small_world(way=way)
    return replace(world, cards=tuple(replace(card, access=access) for card in world.cards))


WORLD = labelled_world()


def study(cfg: Config, world: World = WORLD, **changes: Any) -> Study:
    """A first round of the first teacher."""
    service, card = FakeShard(world).service(world.cards[0].id), world.cards[0]
    network = loop.network(cfg, card)
    pupil = Pupil.fresh(network, torch.Generator().manual_seed(1))
    values: dict[str, Any] = {
        "service": service, "lesson": Lesson(cfg, network, card.image, pupil), "device": torch.device("cpu"),
        "rng": torch.Generator().manual_seed(0), "r": 0, "last": False, "batch": Batch(8, 8),
        "images": np.zeros((0, *card.image.shape), np.uint8), "answers": np.zeros(0, np.int64), "own": {},
    }  # fmt: skip
    return Study(**values | changes)


def digest(pupil: Pupil) -> str:
    found = hashlib.sha256()
    for part in pupil.values().values():
        found.update(np.asarray(part).tobytes())
    return found.hexdigest()


def asked(shard: FakeShard) -> dict[str, int]:
    return {id: service.asked for id, service in shard.services.items()}


# ---------------------------------------------------------------------------------------------------------- stage 1


def test_the_information_term_is_lowest_for_a_balanced_batch():
    sure = 50.0 * torch.eye(4)
    assert float(information(sure, "batch")) == pytest.approx(-math.log(4) / 4)
    assert float(information(sure[:1].expand(4, -1), "batch")) == pytest.approx(0, abs=1e-6)
    assert float(information(sure, "sample")) == pytest.approx(0, abs=1e-6)
    assert float(information(torch.zeros(4, 4), "sample")) == pytest.approx(-math.log(4) / 4)


@pytest.mark.parametrize("form", ["batch", "sample"])
def test_the_information_term_has_the_gradient_of_its_formula(form):
    x, direction = normal(5, 3), normal(5, 3, seed=1)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(information(leaf, form), leaf)
    assert float((grad * direction).sum()) == pytest.approx(
        slope(lambda y: information(y, form), x, direction), rel=1e-6
    )


@pytest.mark.parametrize("form", ["batch", "sample"])
def test_a_probability_of_zero_has_a_finite_term_and_gradient(form):
    logits = torch.tensor([[0.0, -1000.0], [0.0, -1000.0]], requires_grad=True)
    term = information(logits, form)
    (grad,) = torch.autograd.grad(term, logits)
    assert float(term.detach()) == pytest.approx(0, abs=FLOOR * 20)
    assert bool(torch.isfinite(grad).all())


def test_stage_1_changes_neither_student_nor_teacher_and_asks_nothing():
    cfg = small_ideal()
    one = study(cfg)
    before, weights = digest(one.lesson.pupil), one.service.teacher.theta.clone()
    images = Stage(cfg, one).images(8)
    assert tuple(images.shape) == (8, *one.card.image.shape)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert digest(one.lesson.pupil) == before
    assert torch.equal(one.service.teacher.theta, weights)
    assert not one.service.teacher.theta.requires_grad
    assert one.service.asked == one.asked == 0


@pytest.mark.parametrize("kind", ["standard", "dcgan", "transformer"])
def test_the_generator_learns_to_please_the_student(kind):
    """After more steps the student sees more of the wished classes in the images of fixed codes."""
    found = []
    for steps in (1, 30):
        one = study(small_ideal(generator=kind, code="fixed", generator_steps=steps, generator_lr=0.01, lam=0.0))
        images = Stage(one.lesson.cfg, one).images(8)
        logits = one.lesson.logits(to_bytes(images))
        found.append(float(torch.nn.functional.cross_entropy(logits, torch.arange(8) % 3)))
    assert found[1] < found[0] - 0.01


def test_a_weight_of_zero_leaves_its_term_out(monkeypatch):
    monkeypatch.setattr("ray_dfml.methods.students.stage.information", lambda *_: pytest.fail("the term was computed"))
    Stage(small_ideal(lam=0.0), study(small_ideal(lam=0.0))).images(8)


def test_a_generator_begins_afresh_each_round_unless_told_otherwise():
    kept = {}
    for reset in (True, False):
        cfg = small_ideal(reset=reset)
        one = study(cfg)
        first = Stage(cfg, one).images(8)
        kept[reset] = one.own
        again = Stage(cfg, one).images(8)
        assert not torch.equal(first, again)
    assert kept[True] == {}
    assert list(kept[False]) == ["theta_g"]


def test_wished_labels_take_turns_with_fixed_codes_and_are_drawn_otherwise():
    rng = torch.Generator().manual_seed(0)
    assert wished(GeneratorConfig(code="fixed"), 7, 3, rng).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = wished(GeneratorConfig(), 3000, 3, rng)
    assert torch.bincount(drawn).min() > 900


# ---------------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize("profile", ["fixed", "paper", "code"])
def test_a_training_asks_exactly_what_it_plans(profile):
    config = resolve("ideal", profile=profile).method
    cfg = small_ideal(**{**config.model_dump(), **SMALL, "budget": 60})
    shard = FakeShard(WORLD)
    _, state, metrics = play("ideal", cfg, WORLD, rounds=cfg.total_rounds, first=0, shard=shard)
    plan = loop.queries(cfg, WORLD)
    assert asked(shard) == plan
    assert {id: one["asked"] for id, one in state["students"].items()} == plan
    assert metrics["queries"] == plan[WORLD.cards[0].id] <= 60
    assert profile == "code" or plan[WORLD.cards[0].id] == 60


SMALL: dict[str, Any] = {"width": 4, "latent": 4, "batch": 8, "first": 8, "generator_steps": 1, "student": "conv4",
                         "steps": 1.0, "last_steps": 2, "student_batch": 4}  # fmt: skip


def test_the_batches_grow_and_end_at_the_budget():
    plain = Config(budget=5000)
    assert [batch.new for batch in plain.batches()] == [500, 250, 375, 562, 843, 1265, 1205]
    assert sum(batch.asked for batch in plain.batches()) == 5000
    assert Config(budget=5000, rounds=2).batches() == plain.batches()[:2]
    assert Config(budget=5000).total_rounds == 7


def test_the_released_loop_asks_again_about_all_images():
    """METHODS: 25,000 nominal queries of MNIST are 1,262,500 true ones; generation stops after 400 epochs."""
    code: Any = resolve("ideal", profile="code").method
    batches = code.batches()
    assert len(batches) == 100
    assert sum(batch.new for batch in batches) == 25_000
    assert sum(batch.asked for batch in batches) == 1_262_500
    longer = code.model_copy(update={"budget": 80_050_000}).batches()
    assert len(longer) == 1000
    assert sum(batch.new for batch in longer) == 100_000
    assert sum(batch.asked for batch in longer) == 250 * sum(min(e, 400) for e in range(1, 1001))


def test_images_come_from_all_sources_and_mutants_from_the_images_known(monkeypatch):
    """Each source is replaced by images of one grey level, by which the parts are counted."""
    levels = {"dip": 0.2, "shapes": 0.6}
    for name, level in levels.items():
        plain = Source(lambda rng, count, shape, level=level: torch.full((count, *shape), level), "nothing")
        monkeypatch.setitem(distil.SOURCES, name, plain)
    parents: list[Any] = []

    def copies(rng: Any, count: int, images: Any, labels: Any, *, fill: str) -> Any:
        parents.append((images, labels, fill))
        return torch.full((count, *images.shape[1:]), 1.0)

    monkeypatch.setitem(distil.SOURCES, "mutants", Source(copies, "nothing", parents=True))
    cfg = small_ideal(images=("dip", "mutants", "shapes"), mutants=0.25)
    first = distil.candidates(cfg, study(cfg), 9)
    assert first[:, 0, 0, 0].tolist() == pytest.approx([0.2] * 5 + [0.6] * 4)
    images, answers = np.zeros((4, *WORLD.image.shape), np.uint8), np.arange(4) % 3
    later = distil.candidates(cfg, study(cfg, images=images, answers=answers), 12)
    assert later[:, 0, 0, 0].tolist() == pytest.approx([0.2] * 5 + [0.6] * 4 + [1.0] * 3)
    ((found, labels, fill),) = parents
    assert np.array_equal(found.numpy(), images)
    assert labels.tolist() == answers.tolist()
    assert fill == "edge"


def test_every_source_is_asked_about_and_its_assumption_is_a_note():
    cfg = small_ideal(images=NAMES, budget=24)
    play("ideal", cfg, WORLD, rounds=2, first=0)
    notes = ideal.notes(cfg, WORLD)
    assert len(notes) == len(NAMES)
    assert all(source.assumption in note for source, note in zip(SOURCES.values(), notes[1:], strict=True))
    with pytest.raises(ValidationError, match="name a source beside them"):
        Config(images=("mutants",))


def test_training_images_are_warped_unless_told_otherwise():
    pixels = torch.rand(4, *WORLD.image.shape, generator=torch.Generator().manual_seed(0))
    off: dict[str, Any] = {"warp": 0.0, "flip": "off"}
    for changes, equal in ((off, True), ({"warp": 1.0}, False), (off | {"crop_pad": 2}, False)):
        cfg = small_ideal(**changes)
        seen = lessons.look(cfg, study(cfg), pixels, fill="zero")
        assert seen.shape == pixels.shape
        assert torch.equal(seen, pixels) == equal


def test_a_budget_below_one_batch_is_refused():
    with pytest.raises(UsageError, match="below one batch"):
        resolve("ideal", settings=["method.budget=100"])
    with pytest.raises(ValidationError, match="unknown source"):
        Config(images=("gnerator",))


def test_stage_2_alone_asks_the_teacher(monkeypatch):
    cfg = small_ideal()
    one = study(cfg)
    order: list[str] = []
    query, images = one.service.query, Stage.images
    monkeypatch.setattr(one.service, "query", lambda x: order.append(f"ask {x.dtype}") or query(x))
    monkeypatch.setattr(Stage, "images", lambda self, n: order.append("make") or images(self, n))
    monkeypatch.setattr(distil, "trained", lambda cfg, study: order.append("train"))
    distil.work(cfg, one)
    assert order == ["make", "ask uint8", "train"]


# ---------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize(("access", "answers"), [("weights", "hard"), ("logits", "soft"), ("probs", "soft")])
def test_every_access_is_learned_from(access, answers):
    world = labelled_world(access)
    cfg = small_ideal(answers=answers)
    before, state, _ = play("ideal", cfg, world, rounds=2, first=0)
    for id, one in state["students"].items():
        assert not np.array_equal(one["pupil"]["theta"], before["students"][id]["pupil"]["theta"])
        assert len(one["images"]) == len(one["answers"]) == cfg.asked(2)
        if answers == "soft":
            np.testing.assert_allclose(one["answers"].sum(1), 1, rtol=1e-5)
        else:
            assert one["answers"].dtype == np.int64


def test_stored_answers_are_those_of_the_teacher():
    shard = FakeShard(WORLD)
    _, state, metrics = play("ideal", small_ideal(), WORLD, rounds=3, first=0, shard=shard)
    for id, one in state["students"].items():
        assert np.array_equal(shard.service(id).query(one["images"]), one["answers"])
    rarest = [
        np.bincount(one["answers"], minlength=3).min() / len(one["answers"]) for one in state["students"].values()
    ]
    assert metrics["answers/rarest"] == pytest.approx(100 * np.mean(rarest))


def test_a_job_done_twice_asks_about_the_same_images():
    cfg, shard = small_ideal(), FakeShard(WORLD)
    state = loop.init(cfg, WORLD)
    jobs, shared = loop.plan(cfg, WORLD, state, 0), loop.shared(cfg, WORLD, state, 0)
    assert same(shard.send("ideal.recover", jobs, shared), shard.send("ideal.recover", jobs[::-1], shared)[::-1])


def test_a_result_holds_the_new_answers_alone_unless_all_images_were_asked_about_again():
    cfg = small_ideal()
    _, state, _ = play("ideal", cfg, WORLD, rounds=1, first=0)
    jobs = loop.plan(cfg, WORLD, state, 1)

    def half(cfg, study):
        """Keep half of what is asked about."""
        images = np.zeros((4, *study.card.image.shape), np.uint8)
        study.keep(images[:2], study.ask(images)[:2])
        return {}

    def again(cfg, study):
        """Keep nothing new, and ask about one image less."""
        study.renew(study.answers + study.ask(study.images[1:])[0] * 0)
        return {}

    known = len(state["students"][WORLD.cards[0].id]["answers"])
    for work, images, answers in ((half, 2, 2), (again, 0, known)):
        for result in loop.recover(FakeShard(WORLD), jobs, cfg, work):
            assert (len(result["images"]), len(result["answers"])) == (images, answers)


def test_the_paper_takes_one_step_on_the_new_images_and_the_code_a_pass_over_all():
    for training, steps in (("batch", [1, 2, 3]), ("pass", [2, 6, 12])):
        cfg = small_ideal(training=training, growth=0.0, first=8, budget=24, candidates=1.0)
        state, found = loop.init(cfg, WORLD), []
        for r in range(3):
            results = FakeShard(WORLD).send(
                "ideal.recover", loop.plan(cfg, WORLD, state, r), loop.shared(cfg, WORLD, state, r)
            )
            state, _ = loop.learn(cfg, WORLD, state, r, results, lambda *_: [])
            found.append(state["students"][WORLD.cards[0].id]["pupil"]["step"])
        assert found == steps


def test_a_student_that_is_not_finite_is_rejected_with_its_reason():
    shard, cfg = FakeShard(WORLD), small_ideal(lr=1e30, warmup_steps=0)
    state = loop.init(cfg, WORLD)
    results = ideal.recover(shard, loop.plan(cfg, WORLD, state, 0), loop.shared(cfg, WORLD, state, 0))  # type: ignore[arg-type]
    assert all("not finite" in result["rejected"] for result in results)


def test_a_student_learns_what_its_teacher_says():
    """The class of an image is the third of it that is bright; after a second of training the student knows it."""
    cfg = small_ideal(steps=10.0, last_steps=50, lr=0.01, student_batch=16)
    images, answers = np.zeros((90, *WORLD.image.shape), np.uint8), np.arange(90) % 3
    images += np.random.default_rng(0).integers(0, 100, images.shape, dtype=np.uint8)
    for image, answer in zip(images, answers, strict=True):
        image[:, :, 5 * answer : 5 * answer + 5] += 150
    one = study(cfg, images=images[:60], answers=answers[:60], last=True)
    one.lesson.average = 0.9
    assert distil.trained(cfg, one) < math.log(3)
    assert (one.lesson.logits(images[60:]).argmax(-1).numpy() == answers[60:]).mean() > 0.9


@pytest.mark.parametrize("name", ["ideal", "dfme", "dafl", "zskt", "dast", "cmi"])
def test_images_that_the_generator_cannot_make_are_refused_before_the_run(name: str) -> None:
    odd = replace(small_world(), cards=(card(0, size=18),))
    cfg: Any = resolve(name, settings=["method.images=dip,generator"] if name == "ideal" else []).method
    with pytest.raises(UsageError, match="conv4-0: the generator needs height and width divisible by 4, got 18x18"):
        METHODS[name].init(cfg, odd)


def test_images_of_fixed_sources_may_have_any_size() -> None:
    odd = replace(small_world(), cards=(card(0, size=18),))
    assert set(METHODS["ideal"].init(resolve("ideal").method, odd)["students"]) == {"conv4-0"}


def test_a_transformer_generator_has_an_even_width() -> None:
    with pytest.raises(UsageError, match=r"needs an even method\.width; raise or lower it by 1$"):
        resolve("ideal", settings=["method.generator=transformer", "method.width=33"])
