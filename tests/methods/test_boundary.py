"""ZSDB3 on a teacher whose boundary is a plane, so that distances and directions are known."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.config import resolve
from ray_dfml.errors import UsageError
from ray_dfml.methods.distillers import boundary
from ray_dfml.methods.distillers.boundary import Oracle, Zsdb3Config
from ray_dfml.methods.students import loop
from ray_dfml.methods.students.config import Batch
from ray_dfml.methods.students.loop import Study
from ray_dfml.methods.students.training import Lesson, Pupil
from ray_dfml.types import TeacherCard
from tests.support import FakeShard, play, same, small_distiller, small_world

WORLD = small_world(way=3)
WORLD = replace(WORLD, cards=tuple(replace(card, access="label") for card in WORLD.cards))
SIZE = int(np.prod(WORLD.image.shape))
NORMAL = F.normalize(torch.ones(SIZE) + torch.randn(SIZE, generator=torch.Generator().manual_seed(9)), dim=0)
MIDDLE = float(NORMAL.sum() / 2)


@dataclass
class Plane:
    """A teacher that names class 1 on one side of a plane through the grey image, and class 0 on the other."""

    card: TeacherCard = WORLD.cards[0]
    asked: int = 0

    def query(self, images: np.ndarray) -> np.ndarray:
        self.asked += len(images)
        return (side(torch.tensor(images).flatten(1)) > 0).long().numpy()


def side(x: Tensor) -> Tensor:
    """Signed distances to the plane [n] of pixels [n d]."""
    return x @ NORMAL - MIDDLE


def study(cfg: Zsdb3Config, asked: int = 10_000) -> Study:
    card = WORLD.cards[0]
    network = loop.network(cfg, card)
    pupil = Pupil.fresh(network, torch.Generator().manual_seed(1))
    return Study(
        service=Plane(), lesson=Lesson(cfg, network, card.image, pupil), rng=torch.Generator().manual_seed(0),
        device=torch.device("cpu"), r=0, last=False, batch=Batch(asked, asked),
        images=np.zeros((0, *card.image.shape), np.uint8), answers=np.zeros(0, np.int64), own={},
    )  # fmt: skip


def near_grey(count: int) -> tuple[Tensor, Tensor]:
    """Images of class 0 at distances of 0.51 to 0.99 from the plane, and their classes."""
    x = 0.5 - torch.linspace(0.51, 0.99, count)[:, None] * NORMAL
    return x.view(count, *WORLD.image.shape), torch.zeros(count, dtype=torch.int64)


def small(**changes: Any) -> Zsdb3Config:
    return small_distiller("zsdb3", **{"budget": 10_000} | changes)


def test_a_training_asks_exactly_what_it_plans_and_repeats_its_bits() -> None:
    cfg, found = small(batch=2, budget=200), []
    for _ in range(2):
        shard = FakeShard(WORLD)
        _, state, metrics = play("zsdb3", cfg, WORLD, rounds=cfg.total_rounds, first=0, shard=shard)
        plan = loop.queries(cfg, WORLD)
        assert {id: service.asked for id, service in shard.services.items()} == plan
        assert 200 - 3 * cfg.sample_queries < metrics["queries"] == plan[WORLD.cards[0].id] <= 200
        for id, one in state["students"].items():
            samples = plan[id] // cfg.sample_queries
            signs = samples * cfg.iterations * cfg.searches * cfg.directions
            assert len(one["own"]["finished"]) == samples
            assert len(one["images"]) == len(one["answers"]) == plan[id] - signs + samples
        found.append(state)
    assert same(*found)


def test_the_last_round_may_have_fewer_samples_and_a_budget_below_two_is_refused() -> None:
    cfg = small(batch=4)
    each = cfg.sample_queries
    assert [batch.asked for batch in small(batch=4, budget=6 * each + 1).batches()] == [4 * each, 2 * each]
    assert [batch.asked for batch in small(batch=4, budget=5 * each + 1).batches()] == [4 * each]
    with pytest.raises(UsageError, match="below two samples of 54 queries each"):
        resolve("zsdb3", settings=["method.budget=107"])


def test_halving_narrows_to_the_distance_of_the_plane() -> None:
    cfg, (x, own) = small(), near_grey(4)
    direction = NORMAL.expand(4, -1)
    low, high = boundary.halved(Oracle(study(cfg)), x, own, direction, torch.zeros(4), torch.full((4,), 2.0), 6)
    torch.testing.assert_close(high - low, torch.full((4,), 2 / 2**6))
    distance = -side(x.flatten(1))
    assert bool(((low <= distance) & (distance <= high)).all())


def test_the_search_turns_towards_the_normal_and_never_finds_a_longer_way() -> None:
    cfg, (x, own) = small(directions=64, searches=12, halvings=8, starts=1, epsilon=0.2), near_grey(6)
    lengths, aligned = [], []
    for searches in (0, 12):
        one = study(cfg)
        one.keep(np.full((1, *WORLD.image.shape), 255, np.uint8), np.array([1]))
        direction, length = boundary.nearest_boundary(
            cfg.model_copy(update={"searches": searches}), one, Oracle(one), x, own
        )
        torch.testing.assert_close(direction.norm(dim=1), torch.ones(6))
        assert bool((side((x.flatten(1) + length[:, None] * direction).clamp(0, 1)) > 0).all())
        lengths.append(length)
        aligned.append(direction @ NORMAL)
    assert bool((lengths[1] <= lengths[0] + 1e-6).all())
    assert bool((lengths[1] >= -side(x.flatten(1)) - 1e-4).all())
    assert float(aligned[1].mean()) > float(aligned[0].mean()) + 0.02


def test_a_search_begins_at_the_nearest_known_image_of_another_class() -> None:
    cfg, (x, own), one = small(reach=3.0), near_grey(2), study(small())
    ask = Oracle(one)
    known = torch.cat([near_grey(1)[0], x[:1] + 0.2, x[:1] + 0.4])
    one.keep(boundary.to_bytes(known), np.array([0, 1, 1]))
    direction, length = boundary.start(cfg, one, ask, x, own)
    there = torch.tensor(one.images[1]).flatten().float() / 255
    torch.testing.assert_close(x.flatten(1)[0] + length[0] * direction[0], there)
    one.answers[:] = 0
    _, length = boundary.start(cfg, one, ask, x, own)
    assert length.tolist() == [3.0, 3.0]


def test_a_move_goes_away_from_the_boundary_and_is_shorter_where_the_class_would_change() -> None:
    cfg, (x, own) = small(stride=0.5, tries=3), near_grey(3)
    x = x + torch.tensor([0.2, 0, 0]).view(3, 1, 1, 1) * NORMAL.view(1, *WORLD.image.shape)
    ask = Oracle(study(cfg))
    away = boundary.moved(cfg, ask, x, own, NORMAL.expand(3, -1))
    torch.testing.assert_close(side(away.flatten(1)), side(x.flatten(1)) - 0.5, atol=1e-4, rtol=0)
    wrong = boundary.moved(cfg, ask, x, own, -NORMAL.expand(3, -1))
    expected = side(x.flatten(1)) + torch.tensor([0.25, 0.5, 0.5])
    torch.testing.assert_close(side(wrong.flatten(1)), expected, atol=1e-4, rtol=0)
    stuck = boundary.moved(cfg.model_copy(update={"stride": 9.0}), ask, x, own, -NORMAL.expand(3, -1))
    torch.testing.assert_close(stuck, x)


def test_samples_are_of_the_classes_that_noise_rarely_has() -> None:
    cfg = small(candidates=60)
    one = study(cfg)
    x, own = boundary.seeds_of(cfg, one, Oracle(one), 4)
    assert one.service.asked == len(one.images) == 240
    assert 2 <= (one.answers == 1).sum() < 20
    assert torch.bincount(own).tolist() == [2, 2]
    assert torch.equal((side(x.flatten(1)) > 0).long(), own)


def test_a_soft_label_has_the_inverse_distances_and_their_sum() -> None:
    x, known = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 5.0], [4.0, 0.0]])
    found = boundary.soft_logits(x, torch.tensor([1]), known, torch.tensor([1, 0, 0, 3]), 4)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.75, 0.0, 0.25]]))


@pytest.mark.parametrize("soft", [0.0, 3.0])
def test_the_loss_is_the_cross_entropy_and_the_divergence_of_finished_samples(soft: float) -> None:
    cfg = small(soft=soft, temperature=2.0)
    one = study(cfg)
    one.keep(
        np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones(WORLD.image.shape, np.uint8), np.array([0, 1, 2, 0])
    )
    one.own["finished"] = np.array([1, 3])
    rows, logits = torch.tensor([0, 1, 1]), torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    known = torch.tensor(one.images).flatten(1).float() / 255
    target = boundary.soft_logits(known[1:2], torch.tensor([1]), known, torch.tensor(one.answers), 3)
    p = (target / 2).softmax(-1)
    divergence = (p * (p.log() - (logits[1:] / 2).log_softmax(-1))).sum()
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 1])) + soft * divergence
    torch.testing.assert_close(boundary._loss(cfg, one)(rows, logits), expected)
