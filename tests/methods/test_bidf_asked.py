"""BiDf-MKD from services: gradients, answers at every level of access, and queries to the image."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import losses, zero_order
from ray_dfml.core.generators import generator
from ray_dfml.core.images import normalise, to_bytes, to_pixels, view
from ray_dfml.errors import UsageError
from ray_dfml.methods.base import World
from ray_dfml.methods.bidf import asked, sets
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.types import Access, Job
from tests.support import CPU, FakeService, FakeShard, mixed_world, only_asked, play, same, small_bidf, small_world


def stripped(world: World) -> World:
    """The world as a pool shows it: nothing is known of the networks of teachers that are only asked."""
    cards = [card if card.access == "weights" else replace(card, arch="") for card in world.cards]
    return replace(world, cards=tuple(cards))


class Closed(FakeShard):
    """A shard that opens no teacher that is only asked, and hands out its services."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.closed: set[str] = set()
        for card in world.cards:
            super().service(card.id)
        self.closed = {card.id for card in world.cards if card.access != "weights"}

    def teacher(self, id: str) -> Any:
        """See `types.Shard.teacher`."""
        assert id not in self.closed, f"{id} was opened"
        return super().teacher(id)

    def service(self, id: str) -> FakeService:
        """See `types.Shard.service`."""
        return self.services[id]

    @property
    def counts(self) -> dict[str, int]:
        """Id -> images asked about, of the teachers that are only asked and of others that were."""
        return {id: one.asked for id, one in self.services.items() if id in self.closed or one.asked}


def asking(cfg: bidf.Config, world: World, *, seed: int = 3, stream: str = "support") -> asked.Asking:
    service = FakeShard(world).service(world.cards[0].id)
    return asked.Asking(cfg, service, world.image.shape, world.way, seed, stream=stream, device=CPU)


@pytest.mark.parametrize("with_judge", [False, True])
@pytest.mark.parametrize("access", ["logits", "probs"])
def test_many_directions_give_the_gradient_of_the_white_box_loss(access: Access, with_judge: bool) -> None:
    """The cosine over all pixels is that of a linear loss, and the losses are those of `losses.inversion`."""
    world = only_asked(small_world(), access)
    cfg = small_bidf(zero_order={"directions": 150, "mu": 0.05, "central": True}, images_per_class=3)
    one, learner = asking(cfg, world), world.net
    phi = learner.init(torch.Generator().manual_seed(1))
    x = 0.2 + 0.6 * torch.rand(6, *world.image.shape, generator=torch.Generator().manual_seed(2))

    def judge(pixels: Tensor) -> Tensor:  # each image by itself, so that the loss of an image is its own
        return learner(phi, pixels[0], learner.initial_stats())[None]

    found, slopes, logits = one.slope(x, judge if with_judge else None)
    leaf = x.clone().requires_grad_()
    teacher = one.service.teacher  # pyright: ignore[reportAttributeAccessIssue]
    mean, std = (torch.tensor(values) for values in (one.image.mean, one.image.std))
    answers = teacher.net(teacher.theta, normalise(leaf, mean, std), teacher.stats)[:, one.units]
    ours = judge(leaf[None])[0] if with_judge else None
    expected = losses.inversion(answers, one.labels, ours, adversarial=cfg.adversarial)
    assert float(found.mean()) == pytest.approx(float(expected.detach()), rel=1e-3)
    torch.testing.assert_close(logits[:, one.units].softmax(1), answers.detach().softmax(1), atol=1e-3, rtol=0)
    (true,) = torch.autograd.grad(expected * len(x), leaf)
    cosine = F.cosine_similarity(slopes.flatten(1), true.flatten(1)).mean()
    assert float(cosine) == pytest.approx(zero_order.cosine(768, 150), abs=0.04)


def test_the_answers_of_each_level_stand_for_logits() -> None:
    world = small_world(way=4)
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    card = {access: replace(world.cards[0], access=access) for access in ("logits", "probs", "label")}
    assert torch.equal(asked.logits_of(logits.numpy(), card["logits"]), logits)
    probs = asked.logits_of(logits.softmax(1).numpy(), card["probs"])
    torch.testing.assert_close(probs.softmax(1), logits.softmax(1))
    rounded = asked.logits_of(np.array([[1.0, 0, 0, 0]], np.float32), card["probs"])
    assert rounded.isfinite().all()
    label = asked.logits_of(logits.argmax(1).numpy(), card["label"]).exp()
    assert torch.equal(label.argmax(1), logits.argmax(1))
    torch.testing.assert_close(label.sum(1), torch.ones(9))
    torch.testing.assert_close(label.amax(1), torch.full((9,), 1 - asked.FLOOR * 3 / 4))


def test_the_generator_follows_the_estimated_gradients() -> None:
    """The loss falls, and what is stored is what the figures and the logits say of it."""
    world = only_asked(small_world(), "probs")
    cfg = small_bidf(iterations=25, lr_generator=0.03, crop_pad=1, zero_order={"directions": 40})
    one = asking(cfg, world)
    task = one.generated(generator(world.image.shape, cfg.latent, cfg.width, 2), None)
    assert task["loss_last"] < 0.8 * task["loss_first"]
    assert task["accuracy"] > 80
    seen = view(to_pixels(task["images"]), task["view"], pad=1, fill=cfg.crop_fill)
    answers = one.service.query(seen.numpy())
    np.testing.assert_allclose(torch.tensor(task["logits"]).softmax(1), answers[:, one.units], atol=1e-5)
    assert task["labels"].tolist() == answers[:, one.units].argmax(1).tolist()
    assert (
        asking(cfg.model_copy(update={"relabel": False}), world)
        .generated(generator(world.image.shape, cfg.latent, cfg.width, 2), None)["labels"]
        .tolist()
        == [0, 1] * cfg.images_per_class
    )


def test_images_of_sources_bear_the_labels_of_their_answers() -> None:
    world = only_asked(small_world(way=3), "label")
    one = asking(small_bidf(images=("dip", "shapes"), images_per_class=5, crop_pad=0, flip="off"), world)
    task = one.from_sources(None)
    assert task["images"].shape == (15, 3, 16, 16)
    answers = one.service.query(task["images"])
    assert [one.units.tolist()[local] for local in task["labels"]] == answers.tolist()
    shares = np.bincount(task["labels"], minlength=3) / 15
    assert task["balance"] == pytest.approx(100 * np.minimum(shares, 1 / 3).sum())
    assert one.service.asked == 30  # pyright: ignore[reportAttributeAccessIssue]


def test_a_task_model_chooses_the_images_on_which_it_is_least_sure() -> None:
    world = only_asked(small_world(), "probs")
    cfg, learner = small_bidf(images=("dip",), images_per_class=4, crop_pad=0), world.net
    phi = 3 * learner.init(torch.Generator().manual_seed(1))

    def judge(pixels: Tensor) -> Tensor:
        return learner(phi, pixels[0], learner.initial_stats())[None]

    def gaps(images: Tensor) -> Tensor:
        best = judge(images[None])[0].softmax(-1).topk(2, -1).values
        return best[:, 0] - best[:, 1]

    one, again = asking(cfg, world), asking(cfg, world)
    task = one.from_sources(judge)
    candidates = again._drawn(asked.CANDIDATES * 8)
    chosen = candidates[gaps(candidates).argsort(stable=True)[:8]]
    np.testing.assert_array_equal(task["images"], to_bytes(chosen))
    assert one.service.asked == 8  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_order": {"directions": 3, "central": True}},
        {"images": ("dip",)},
        {"images": ("generator", "dip", "shapes")},
    ],
)
@pytest.mark.parametrize("levels", [("logits", "probs", "label"), ("weights", "probs", "label")])
def test_the_plan_of_queries_is_exact_and_no_closed_teacher_is_opened(levels, changes) -> None:
    world = only_asked(small_world(), *levels)
    cfg = small_bidf(rounds=3, teachers_per_round=2, **changes)
    shard = Closed(world)
    _, state, metrics = play("bidf-mkd", cfg, world, rounds=3, first=0, shard=shard)
    assert shard.counts == bidf.queries(cfg, world)
    assert sum(shard.counts.values()) > 0
    assert torch.isfinite(state["theta"]).all()
    assert metrics["distill/loss"] >= 0
    assert state["bank"]


def test_queries_of_a_set_are_those_of_the_paper_s_code() -> None:
    """150 images, 100 directions, 200 iterations: 3.03 million, and the labels of the finished set."""
    cfg = bidf.Config.model_validate({"zero_order": {"directions": 100}})
    assert asked.set_queries(cfg, 5, True) == 3_030_000 + 150
    assert asked.set_queries(cfg, 5, False) == 150
    assert bidf.queries(cfg, small_world()) == {}


def test_services_of_other_sizes_channels_and_classes() -> None:
    """A grey service and a colour one with a class too many. Stored images of the grey one are grey."""
    world = only_asked(mixed_world(), "probs")
    for asks, changes in (("generator", {}), ("sources", {"images": ("dip", "strokes")})):
        cfg = small_bidf(**changes)
        state, shard = bidf.init(cfg, world), Closed(world)
        jobs = [Job(index=j, seed=j, teacher=c.id, values={"asked": asks}) for j, c in enumerate(world.cards)]
        grey, colour = sets.recover(shard, jobs, bidf.shared(cfg, world, state, 0))
        for kind in ("support", "query"):
            assert grey[kind]["images"].shape == colour[kind]["images"].shape == (8, 3, 20, 20)
            assert (grey[kind]["images"] == grey[kind]["images"][:, :1]).all()
            assert len(colour[kind]["classes"]) == colour[kind]["logits"].shape[1] == 2
        assert same(sets.recover(Closed(world), jobs, bidf.shared(cfg, world, state, 0)), [grey, colour])


def test_a_service_of_bytes_is_asked_about_bytes_and_says_nothing_below_a_level() -> None:
    world = only_asked(small_world(), "probs")
    cfg = small_bidf(zero_order={"directions": 5, "mu": 0.005, "eight_bit": True}, crop_pad=0)
    one, seen = asking(cfg, world), []
    query = one.service.query
    one.service.query = lambda images: (seen.append(images), query(images))[1]  # pyright: ignore
    slopes = one.slope(torch.rand(8, *world.image.shape), None)[1]
    assert not slopes.any()
    assert all(images.dtype == np.uint8 for images in seen)
    works = small_bidf(zero_order={"directions": 5, "eight_bit": True}, crop_pad=0)
    assert asking(works, world).slope(torch.rand(8, *world.image.shape), None)[1].any()


def test_notes_propose_what_works() -> None:
    world = stripped(only_asked(small_world(), "probs", "label"))
    assert asked.notes(small_bidf(), world.cards[:1]) == []
    (low,) = asked.notes(small_bidf(zero_order={"mu": 0.005}), world.cards[:1])
    assert low.endswith("and its gradient is 0; method.zero_order.mu=0.109 works")
    assert asked.notes(small_bidf(zero_order={"mu": 0.109}), world.cards[:1]) == []
    (label,) = asked.notes(small_bidf(), world.cards[:2])
    assert label.startswith("conv4-1: labels seldom change")
    (source,) = asked.notes(small_bidf(images=("dipw",)), world.cards)
    assert source.startswith("services are asked about images of dipw, which assumes one textured object")
    assert asked.notes(small_bidf(zero_order={"mu": 0.005}), small_world().cards) == []


def test_a_pool_of_services_is_planned_without_their_networks() -> None:
    world = stripped(only_asked(small_world(), "probs"))
    cfg = small_bidf(bn_weight=1.0)
    bidf.init(cfg, world)
    assert all(job.values == {"asked": "generator"} for job in bidf.plan(cfg, world, {}, 0))
    assert bidf.notes(cfg, world) == []
    assert bidf.queries(cfg, world) == bidf.queries(cfg, only_asked(small_world(), "probs"))
    assert bidf.cost(cfg, world, FakeShard(small_world())).recovery == 0
    odd = replace(world, image=replace(world.image, height=18, width=18))
    bidf.init(small_bidf(images=("dip",)), odd)
    with pytest.raises(UsageError, match="divisible by 4"):
        bidf.init(cfg, odd)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (("dipp",), "no images 'dipp' \\(did you mean 'dip'\\?\\)"),
        (("mutants",), "no images 'mutants'"),
        (("dip", "dip"), "named twice"),
    ],
)
def test_images_that_cannot_be_asked_about_are_refused(images, said) -> None:
    with pytest.raises(ValueError, match=said):
        small_bidf(images=images)
