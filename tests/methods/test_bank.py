"""Recovered tasks in the memory bank: under which classes, how many, and what is counted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.errors import UsageError
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods.base import MetaConfig, World
from ray_dfml.types import Arrays
from tests.support import card, image_numbers, image_spec, unique_images

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
    [("class", 0, 2), ("teacher", 0, 4)],  # toy/1 has images of both teachers, enough together, and is alone
)
def test_figures_count_classes_that_can_be_drawn_and_those_that_cannot(key, ready, missing):
    world = World(cards=(card(0), card(1)), arch="conv4", image=image_spec(), way=2, seed=0)
    assert [c.classes for c in world.cards] == [("toy/0", "toy/1"), ("toy/1", "toy/2")]
    bank = stored(*(task(c.id, list(c.classes)) for c in world.cards), key=key)
    found = bank_of.figures(MetaConfig(shot=1, query=2), world, bank, key)
    assert found == {"bank/classes": ready, "bank/missing_classes": missing, "bank/images": 8}


def test_a_class_that_was_never_recovered_is_missing():
    world = World(cards=(card(0), card(1)), arch="conv4", image=image_spec(), way=2, seed=0)
    bank = stored(task("conv4-0", ["toy/0", "toy/1"], per_class=3))
    cfg = MetaConfig(shot=1, query=2)
    assert bank_of.figures(cfg, world, bank, "class")["bank/missing_classes"] == 1
    assert bank_of.figures(cfg, world, {}, "class") == {
        "bank/classes": 0, "bank/missing_classes": 3, "bank/images": 0,
    }  # fmt: skip


def test_images_of_teachers_that_left_the_pool_can_be_drawn_and_are_not_missing():
    world = World(cards=(card(0),), arch="conv4", image=image_spec(), way=2, seed=0)
    bank = stored(task("gone", ["toy/8", "toy/9"], per_class=3))
    found = bank_of.figures(MetaConfig(shot=1, query=2), world, bank, "class")
    assert found == {"bank/classes": 2, "bank/missing_classes": 2, "bank/images": 6}


def test_a_bank_that_could_never_hold_a_task_is_refused():
    cfg = MetaConfig(shot=2, query=5)
    with pytest.raises(UsageError, match=r"^free: tasks take 2 \+ 5 images of a class, method.bank_capacity is 6;"):
        bank_of.check_capacity("free", cfg, 6)
    bank_of.check_capacity("free", cfg, 7)


def pool_of(*classes: tuple[str, ...], way: int = 2) -> World:
    """A pool of one teacher for each tuple of classes."""
    cards = tuple(replace(card(i), classes=names) for i, names in enumerate(classes))
    return World(cards=cards, arch="conv4", image=image_spec(), way=way, seed=0)


def test_the_data_set_of_a_class_is_what_its_name_begins_with():
    names = [bank_of.class_key(name, "t.1", key) for name in ("a/b/c", "cat") for key in ("class", "teacher")]
    assert [bank_of.data_set(name) for name in names] == ["a", "a", "", ""]


def test_data_sets_with_too_few_classes_for_a_task_are_noted():
    world = pool_of(("a/0", "b/0"), ("a/1", "b/0"), ("cat", "a/2"))
    cfg = MetaConfig(shot=1, query=1)
    found = bank_of.notes(cfg, world, "class")
    assert [line.split("teachers know")[0] for line in found] == [
        "no task of the meta-updates has classes of b: the ",
        "no task of the meta-updates has classes of no named data set: the ",
    ]
    assert "know 1 of them, a task takes 2" in found[0]
    assert bank_of.notes(cfg.model_copy(update={"mix_data": True}), world, "class") == []
    assert len(bank_of.notes(cfg, world, "teacher")) == 1  # two teachers know b/0


def test_a_pool_without_a_data_set_of_enough_classes_is_refused():
    world, cfg = pool_of(("a/0", "b/0"), ("a/0", "c/0")), MetaConfig(shot=1, query=1)
    with pytest.raises(UsageError, match=r"^free: a task takes 2 classes of one data set, the teachers know 1 of one"):
        bank_of.check("free", cfg, world, "class")
    bank_of.check("free", cfg, world, "teacher")
    bank_of.check("free", cfg.model_copy(update={"mix_data": True}), world, "class")


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
