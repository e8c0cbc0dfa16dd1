"""Teachers that a shard asks: whatever their access, through one ledger, and without a way to their weights."""

import gc
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core.answers import answers
from ray_dfml.core.net import Net
from ray_dfml.data.services import Asked, Terms
from ray_dfml.errors import BudgetReached, RejectedError
from ray_dfml.runtime.asking import Desk
from ray_dfml.runtime.shard import HostedTeacher, Shard
from ray_dfml.services.gateway import Gateway
from ray_dfml.types import Access, TeacherCard
from tests import support

CARD = support.card(0, way=3)
MODEL = support.random_teacher(CARD)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *CARD.image.shape), dtype=np.uint8)


def load(id: str) -> tuple[TeacherCard, np.ndarray, np.ndarray]:
    assert id == CARD.id
    return CARD, MODEL.theta.numpy(), MODEL.stats.numpy()


class Room:
    """A shard, and the gateway that it asks."""

    def __init__(self, path: Path, access: Access, **terms: Any) -> None:
        self.asked = Asked(card=replace(CARD, access=access), terms=Terms(**terms))
        self.gateway = Gateway(path / "ledger.sqlite", [self.asked])
        self.shard = Shard(load, desk=Desk(self.gateway, {CARD.id: self.asked}), device=torch.device("cpu"))
        self.service = self.shard.service(CARD.id)

    @property
    def counts(self) -> tuple[int, int]:
        """Images sent and answered."""
        spent = self.gateway.totals()[CARD.id]
        return spent.sent, spent.answered


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Any]:
    """room(access, **terms) -> a `Room`, which is closed after the test."""
    rooms: list[Room] = []

    def make(access: Access, **terms: Any) -> Room:
        rooms.append(Room(tmp_path / str(len(rooms)), access, **terms))
        return rooms[-1]

    yield make
    for one in rooms:
        one.gateway.close()


def plain(x: np.ndarray) -> torch.Tensor:
    """Logits of the teacher, from its weights."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CARD.image.mean, CARD.image.std))
    with torch.no_grad():
        return MODEL.net(MODEL.theta, (torch.tensor(x) / 255 - mean) / std, MODEL.stats)


@pytest.mark.parametrize("access", ["weights", "logits", "probs", "label"])
def test_it_answers_at_its_level(room: Any, access: Access) -> None:
    found = room(access).service.query(images(20))
    expected = answers(plain(images(20)), access)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_probabilities_are_cut_and_rounded_as_the_terms_say(room: Any) -> None:
    found = room("probs", decimals=1, top_k=2).service.query(images(20))
    assert np.array_equal(found, answers(plain(images(20)), "probs", decimals=1, top_k=2))


def test_each_image_is_counted_once_and_answered_alike(room: Any) -> None:
    """Twice in a question, in a later one, and alone: the answer has the same bits, and costs once."""
    one = room("logits")
    x = images(30)
    first = one.service.query(np.concatenate([x, x[:5]]))
    assert np.array_equal(first[30:], first[:5])
    assert np.array_equal(one.service.query(x[::-1]), first[:30][::-1])
    assert one.counts == (30, 30)
    alone = room("logits").service
    assert all(np.array_equal(alone.query(x[i : i + 1])[0], first[i]) for i in range(10))


def test_a_question_that_is_too_dear_costs_nothing(room: Any) -> None:
    one = room("label", budget=25)
    one.service.query(images(20))
    with pytest.raises(BudgetReached, match=f"budget of teacher {CARD.id} is 25 images: 20 are sent and 6 more"):
        one.service.query(images(6, seed=1))
    assert one.counts == (20, 20)
    one.service.query(images(20))
    one.service.query(images(5, seed=1))
    assert one.counts == (25, 25)


@pytest.mark.parametrize(
    "wrong",
    [
        images(2)[:, :1], images(2)[0], images(2).astype(np.float32), images(2).astype(np.int64),
        np.full((2, *CARD.image.shape), np.nan, np.float32),
    ],
    ids=["channels", "one image", "0 to 255", "integers", "NaN"],
)  # fmt: skip
def test_what_is_no_image_of_the_teacher_is_refused_before_it_costs(room: Any, wrong: np.ndarray) -> None:
    one = room("probs")
    with pytest.raises(ValueError, match=f"^{CARD.id}: takes "):
        one.service.query(wrong)
    assert one.counts == (0, 0)


@pytest.mark.parametrize(("access", "shape"), [("label", (0,)), ("probs", (0, 3))])
def test_no_question_no_answer(room: Any, access: Access, shape: tuple[int, ...]) -> None:
    one = room(access)
    assert one.service.query(images(0)).shape == shape
    assert one.counts == (0, 0)


@pytest.mark.parametrize("access", ["logits", "probs", "label"])
def test_weights_are_given_at_no_other_level(room: Any, access: Access) -> None:
    with pytest.raises(RejectedError, match=f"^{CARD.id}: gives {access} and no weights"):
        room(access).shard.teacher(CARD.id)


def test_a_shard_without_a_desk_refuses_too() -> None:
    """The card that comes with the weights says how they may be used."""
    closed = Shard(lambda id: (replace(CARD, access="label"), *load(id)[1:]), device=torch.device("cpu"))
    with pytest.raises(RejectedError, match="gives label and no weights"):
        closed.teacher(CARD.id)
    with pytest.raises(RejectedError, match="no ledger"):
        closed.service(CARD.id)


def test_weights_that_are_asked_stay_open(room: Any) -> None:
    assert torch.equal(room("weights").shard.teacher(CARD.id).theta, MODEL.theta)


def reached(start: object) -> list[object]:
    """All that an object leads to, by whatever it refers to: attributes, items, closures and bound objects.

    Classes, modules and the global names of functions lead to everything in a process, and are left out.
    """
    seen: dict[int, object] = {}
    waiting = [start]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen[id(one)] = one
        if isinstance(one, types.FunctionType):
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        else:
            waiting += gc.get_referents(one)
    return list(seen.values())


def test_no_parameter_can_be_reached_through_a_service(room: Any) -> None:
    """Also not through what the service holds, after it has answered."""
    one = room("logits")
    one.service.query(images(4))
    found = reached(one.service)
    assert any(isinstance(part, Gateway) for part in found), "the search goes as far as the gateway"
    assert not [part for part in found if isinstance(part, torch.Tensor | Net | HostedTeacher | Shard)]
    assert any(isinstance(part, torch.Tensor) for part in reached(one.shard._hosted)), "the search finds weights"
