"""Recovered tasks in the bank: the classes they are stored under, how many are kept, and what is counted."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods.base import MetaConfig, State, World
from ray_dfml.types import Arrays, Job
from tests.support import (
    FakeShard,
    card,
    image_numbers,
    image_spec,
    mixed_world,
    play,
    small_bidf,
    small_config,
    small_purer,
    small_world,
    unique_images,
)

SHAPE = (3, 16, 16)


def task(teacher: str, classes: list[str], *, per_class: int = 2, first: int = 0) -> Arrays:
    """Images numbered from `first`, interleaved over the classes."""
    n = per_class * len(classes)
    labels = np.arange(n) % len(classes)
    return {"teacher": teacher, "classes": classes, "images": unique_images(n, SHAPE, first), "labels": labels}


def numbers(bank: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: image_numbers(images) for name, images in bank.items()}


def stored(*tasks: Arrays, key: Any = "class", capacity: int = 100) -> dict[str, np.ndarray]:
    bank: dict[str, np.ndarray] = {}
    for one in tasks:
        bank = bank_of.store(bank, one, key, capacity)
    return bank


def test_images_go_to_the_class_that_their_label_names():
    bank = stored(task("one", ["toy/b", "toy/a"]), task("two", ["toy/a", "toy/c"], first=10))
    assert numbers(bank) == {"toy/b": [0, 2], "toy/a": [1, 3, 10, 12], "toy/c": [11, 13]}


def test_classes_of_teachers_stay_apart_where_names_are_not_known():
    bank = stored(task("one", ["toy/b", "toy/a"]), task("two", ["toy/a", "toy/c"], first=10), key="teacher")
    assert numbers(bank) == {"toy/b#one": [0, 2], "toy/a#one": [1, 3], "toy/a#two": [10, 12], "toy/c#two": [11, 13]}


def test_the_oldest_images_of_a_class_leave_first():
    bank = stored(task("one", ["toy/a"], per_class=3), task("two", ["toy/a"], per_class=2, first=10), capacity=4)
    assert numbers(bank) == {"toy/a": [1, 2, 10, 11]}


def test_storing_changes_neither_the_bank_given_nor_the_task():
    before = stored(task("one", ["toy/a", "toy/b"]))
    copy, given = numbers(before), task("two", ["toy/a", "toy/b"], first=10)
    after = bank_of.store(before, given, "class", 3)
    after["toy/a"][:] = 255
    assert numbers(before) == copy
    assert image_numbers(given["images"]) == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("key", "ready", "missing"),
    [("class", 1, 2), ("teacher", 0, 4)],  # toy/1 has images of both teachers, enough together only
)
def test_figures_count_classes_that_can_be_drawn_and_those_that_cannot(key, ready, missing):
    world = World(cards=(card(0), card(1)), arch="conv4", image=image_spec(), way=2, seed=0)
    assert [c.classes for c in world.cards] == [("toy/0", "toy/1"), ("toy/1", "toy/2")]
    bank = stored(*(task(c.id, list(c.classes)) for c in world.cards), key=key)
    found = bank_of.figures(MetaConfig(shot=1, query=2), world, bank, key)
    assert found == {"bank/classes": ready, "bank/missing_classes": missing, "bank/images": 8, "bank/data_sets": 0}


def test_a_class_that_was_never_recovered_is_missing():
    world = World(cards=(card(0), card(1)), arch="conv4", image=image_spec(), way=2, seed=0)
    bank = stored(task("conv4-0", ["toy/0", "toy/1"], per_class=3))
    cfg = MetaConfig(shot=1, query=2)
    assert bank_of.figures(cfg, world, bank, "class")["bank/missing_classes"] == 1
    assert bank_of.figures(cfg, world, {}, "class") == {
        "bank/classes": 0, "bank/missing_classes": 3, "bank/images": 0, "bank/data_sets": 0,
    }  # fmt: skip


def test_images_of_teachers_that_left_the_pool_can_be_drawn_and_are_not_missing():
    world = World(cards=(card(0),), arch="conv4", image=image_spec(), way=2, seed=0)
    bank = stored(task("gone", ["toy/8", "toy/9"], per_class=3))
    found = bank_of.figures(MetaConfig(shot=1, query=2), world, bank, "class")
    assert found == {"bank/classes": 2, "bank/missing_classes": 2, "bank/images": 6, "bank/data_sets": 1}


def test_a_bank_that_could_never_hold_a_task_is_refused():
    cfg = MetaConfig(shot=2, query=5)
    with pytest.raises(UsageError, match=r"^free: tasks take 2 \+ 5 images of a class, method.bank_capacity is 6;"):
        bank_of.check_capacity("free", cfg, 6)
    bank_of.check_capacity("free", cfg, 7)


def test_figures_count_the_data_sets_that_tasks_come_from():
    bank = {
        f"{kind}/{i}": unique_images(2, SHAPE) for kind, count in (("a", 3), ("b", 2), ("c", 1)) for i in range(count)
    }
    world = World(cards=(), arch="conv4", image=image_spec(), way=2, seed=0)
    for cfg, wanted in ((MetaConfig(shot=1, query=1), 2), (MetaConfig(shot=1, query=1, mix_data=True), 1)):
        found = bank_of.figures(cfg, world, bank, "class")
        assert (found["bank/classes"], found["bank/data_sets"]) == (6, wanted)


def test_the_data_set_of_a_class_is_what_its_name_begins_with():
    names = [bank_of.class_key(name, "t.1", key) for name in ("a/b/c", "cat") for key in ("class", "teacher")]
    assert [bank_of.data_set(name) for name in names] == ["a", "a", "", ""]


KNOWN = ["a/0", "a/1", "a/2", "b/0", "cat"]


def test_data_sets_with_too_few_classes_for_a_task_are_noted():
    cfg = MetaConfig(shot=1, query=1)
    found = bank_of.notes(cfg, 2, KNOWN)
    assert [line.split(", a task takes 2 of one")[0] for line in found] == [
        "b: known classes 1", "classes whose names have no data set: known classes 1"
    ]  # fmt: skip
    assert bank_of.notes(cfg.model_copy(update={"mix_data": True}), 2, KNOWN) == []


def test_classes_of_which_no_task_can_be_made_are_refused():
    cfg = MetaConfig(shot=1, query=1)
    message = r"^free: a task takes 4 .* are: a 3, b 1, no data set 1; .* with method\.replay\.mix_data=true$"
    with pytest.raises(UsageError, match=message):
        bank_of.check("free", "method.replay", cfg, 4, KNOWN)
    bank_of.check("free", "method.replay", cfg, 3, KNOWN)
    bank_of.check("free", "method.replay", cfg.model_copy(update={"mix_data": True}), 4, KNOWN)
    with pytest.raises(UsageError, match="the known classes are: none; "):
        bank_of.check("free", "method.replay", cfg, 2, [])


def two_data_sets(last: str = "other/c") -> World:
    """A grey teacher of `toy`, and a colour teacher of `other`, whose last class is given."""
    world = mixed_world()
    grey, colour = world.cards
    return replace(world, cards=(grey, replace(colour, classes=("other/d", "other/a", last))))


SMALL = {"free": small_config, "purer": small_purer, "bidf-mkd": small_bidf}
"""Small settings of each method that replays."""


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_meta_update_of_every_method_has_tasks_of_one_data_set(name, mix):
    """Colours tell the data sets apart: grey images have three equal channels once the normalisation is undone."""
    world, field = two_data_sets(), "meta" if name == "purer" else "replay"
    cfg = SMALL[name]()
    meta = getattr(cfg, field).model_copy(update={"mix_data": mix, "tasks": 6})
    cfg = cfg.model_copy(update={field: meta} | ({"curriculum_after": 1} if name == "purer" else {}))
    shard = FakeShard(world)
    play(name, cfg, world, rounds=4, shard=shard)
    kinds = set()
    for op, jobs in shard.sent:
        if op in ("maml.grad", "purer.grad"):
            kinds |= {tuple(sorted(set(grey_classes(job, world)))) for job in jobs}
    assert kinds == ({(True,), (False,), (False, True)} if mix else {(True,), (False,)})


def grey_classes(job: Job, world: World) -> list[bool]:
    """Whether the images of each class of a task are grey."""
    images = job.values["query"]
    if images.dtype != np.uint8:
        mean, std = (np.array(part, np.float32)[:, None, None] for part in (world.image.mean, world.image.std))
        images = images * std + mean
    spread = np.abs(images.astype(np.float64) - images[:, :1]).max((1, 2, 3))
    return [bool(np.all(spread[way :: world.way] < 1e-4)) for way in range(world.way)]


@pytest.mark.parametrize("name", SMALL)
def test_every_method_says_which_data_sets_it_leaves_out_and_refuses_a_pool_of_none(name):
    cfg, method = SMALL[name](), METHODS[name]
    assert [line for line in method.notes(cfg, two_data_sets("third/c")) if line.startswith("third: known classes 1, ")]
    field = "meta" if name == "purer" else "replay"
    world = small_world()
    cards = [replace(c, classes=tuple(f"{c.id}{n}{name}" for n, name in enumerate(c.classes))) for c in world.cards]
    apart = replace(world, cards=tuple(cards))
    with pytest.raises(UsageError, match=rf"^{name}: a task takes 2 .*method\.{field}\.mix_data=true$"):
        method.init(cfg, apart)


@pytest.mark.parametrize("key", ["class", "teacher"])
@pytest.mark.parametrize(
    ("held", "count", "mix", "message"),
    [
        ("a/1", 3, False, ""),
        ("a/1", 2, False, "have 2 classes, too few of any one data set for a task of 2$"),
        ("c/1", 3, False, "have 3 classes, too few of any one data set for a task of 2$"),
        ("c/1", 3, True, ""),
    ],
)
def test_the_bank_counts_with_the_teachers_that_are_left(key, held, count, mix, message):
    world = replace(small_world(), cards=(replace(card(0), classes=("a/0", "b/0")),))
    bank = {bank_of.class_key(held, "gone", key): unique_images(count, SHAPE)}
    cfg = MetaConfig(shot=1, query=2, mix_data=mix)
    with pytest.raises(RejectedError, match=message) if message else nullcontext():
        bank_of.check_left(cfg, world, bank, key)


@pytest.mark.parametrize("name", SMALL)
def test_teachers_left_of_which_no_task_can_be_made_end_a_run_unless_the_bank_has_classes(name):
    method, cfg = METHODS[name], SMALL[name]()
    whole, other = small_world(cards=2).cards
    world = replace(small_world(), cards=(whole, replace(other, classes=("a/0", "b/0"))))
    left = replace(world, cards=world.cards[1:])

    def one_round(state: State) -> dict[str, Any]:
        shard = FakeShard(left)
        results = shard.send(f"{name}.recover", method.plan(cfg, left, state, 9), method.shared(cfg, left, state, 9))
        return method.learn(cfg, left, state, 9, results, shard.send)[1]

    with pytest.raises(RejectedError, match="the usable teachers and the bank have 2 classes, too few of any one"):
        one_round(method.init(cfg, world))
    if name != "purer":
        assert one_round(play(name, cfg, world, rounds=4)[1])["replay/updates"]


def test_the_ceiling_says_which_data_sets_it_leaves_out_and_refuses_to_have_none():
    real = {name: unique_images(4, SHAPE) for name in KNOWN}
    world = World(cards=(), arch="conv4", image=image_spec(3, 16), way=2, seed=0, real=real)
    cfg = METHODS["maml-oracle"].Config.model_validate({"replay": {"shot": 1, "query": 1, "tasks": 1}})
    assert len(METHODS["maml-oracle"].notes(cfg, world)) == 2
    with pytest.raises(UsageError, match=r"^maml-oracle: a task takes 4 "):
        METHODS["maml-oracle"].init(cfg, replace(world, way=4))


@pytest.mark.parametrize(("mix", "kinds"), [(False, {"a", "b"}), (True, {"a", "b", "ab"})])
def test_a_task_is_of_one_data_set_unless_it_may_mix_them(mix, kinds):
    cfg = MetaConfig(shot=1, query=1, mix_data=mix)
    bank = {
        f"{kind}/{i}": unique_images(2, SHAPE, first=100 * j + 10 * i) for j, kind in enumerate("ab") for i in range(2)
    }
    found = set()
    for seed in range(40):
        support, query = bank_of.draw(cfg, 2, bank, torch.Generator().manual_seed(seed))
        of = {"ab"[number // 100] for number in image_numbers(np.concatenate([support, query]))}
        found.add("".join(sorted(of)))
    assert found == kinds
