"""The bank: first in first out, and tasks drawn from it, whatever the classes are named."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core.episodes import interleaved
from ray_dfml.methods import bank as bank_of
from tests.support import PROPERTY, image_numbers, unique_images

SHAPE = (1, 2, 2)


def numbered_bank(counts: list[int]) -> dict[str, np.ndarray]:
    """Class i holds images number 1000 i, 1000 i + 1, ..."""
    return {f"c{i}": unique_images(count, SHAPE, first=1000 * i) for i, count in enumerate(counts)}


@PROPERTY
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 8))
def test_the_bank_keeps_the_newest_images_in_order(batches, capacity):
    bank: bank_of.Bank = {}
    for i, n in enumerate(batches):
        bank = bank_of.add(bank, "c", unique_images(n, SHAPE, first=sum(batches[:i])), capacity)
    assert image_numbers(bank["c"]) == list(range(sum(batches)))[-capacity:]
    assert bank["c"].dtype == np.uint8


def test_adding_leaves_the_old_bank_and_other_classes_alone():
    old = numbered_bank([3, 2])
    copies = {key: images.copy() for key, images in old.items()}
    new = bank_of.add(old, "c0", unique_images(2, SHAPE, first=500), 4)
    assert all(np.array_equal(old[key], copies[key]) for key in copies)
    assert image_numbers(new["c0"]) == [1, 2, 500, 501]
    assert new["c1"] is old["c1"]


def test_ready_classes_hold_enough_images_and_are_sorted():
    bank = {"b": unique_images(4, SHAPE), "a": unique_images(5, SHAPE), "c": unique_images(3, SHAPE)}
    assert bank_of.ready(bank, 4) == ["a", "b"]
    assert bank_of.ready({}, 1) == []


@PROPERTY
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=6),
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 10**6),
)  # fmt: skip
def test_a_task_has_distinct_images_of_distinct_ready_classes_in_interleaved_order(counts, way, shot, query, seed):
    bank = numbered_bank(counts)
    rng = torch.Generator().manual_seed(seed)
    enough = [key for key in bank if len(bank[key]) >= shot + query]
    if len(enough) < way:
        with pytest.raises(ValueError, match=f"needs {way} classes .*; the bank has {len(enough)} in all"):
            bank_of.draw_task(bank, way=way, shot=shot, query=query, rng=rng)
        return
    copies = {key: images.copy() for key, images in bank.items()}
    support, query_images = bank_of.draw_task(bank, way=way, shot=shot, query=query, rng=rng)
    assert support.shape == (way * shot, *SHAPE)
    assert query_images.shape == (way * query, *SHAPE)
    numbers = image_numbers(np.concatenate([support, query_images]))
    assert len(set(numbers)) == len(numbers)
    labels = interleaved(way, shot).tolist() + interleaved(way, query).tolist()
    keys = {label: f"c{number // 1000}" for label, number in zip(labels, numbers, strict=True)}
    assert len(set(keys.values())) == way
    assert set(keys.values()) <= set(enough)
    assert [f"c{number // 1000}" for number in numbers] == [keys[label] for label in labels]
    assert all(np.array_equal(bank[key], copies[key]) for key in copies)


def test_a_task_depends_on_the_generator_only():
    bank = numbered_bank([9, 9, 9])
    swapped = dict(reversed(bank.items()))
    draws = [
        bank_of.draw_task(source, way=2, shot=1, query=3, rng=torch.Generator().manual_seed(7))
        for source in (bank, swapped)
    ]
    assert np.array_equal(draws[0][0], draws[1][0])
    assert np.array_equal(draws[0][1], draws[1][1])


def test_classes_and_images_are_drawn_uniformly():
    bank, rng = numbered_bank([4, 4, 4, 4]), torch.Generator().manual_seed(0)
    supports = Counter()
    for _ in range(800):
        support, _ = bank_of.draw_task(bank, way=2, shot=1, query=1, rng=rng)
        supports.update(image_numbers(support))
    assert len(supports) == 16
    assert all(60 < count < 140 for count in supports.values())  # mean 100, standard deviation 9.4


def first_letter(key: str) -> str:
    """The group of a class in these tests."""
    return key[0]


def test_ready_classes_of_a_group_are_enough_for_a_task():
    bank = {key: unique_images(2, SHAPE) for key in ("a1", "a2", "a3", "b1", "b2", "c1")} | {
        "c2": unique_images(1, SHAPE)
    }
    assert bank_of.ready(bank, 2, way=2, group=first_letter) == ["a1", "a2", "a3", "b1", "b2"]
    assert bank_of.ready(bank, 2, way=3, group=first_letter) == ["a1", "a2", "a3"]
    assert bank_of.ready(bank, 2, way=4, group=first_letter) == []
    assert bank_of.ready(bank, 2, way=6) == ["a1", "a2", "a3", "b1", "b2", "c1"]


def test_a_task_is_of_one_group_and_groups_come_up_alike():
    """Six classes of `a`, two of `b`, and one of `c`, too few for a task: half of the tasks are of `a`."""
    keys = [f"a{i}" for i in range(6)] + ["b0", "b1", "c0"]
    bank = {key: unique_images(2, SHAPE, first=10 * i) for i, key in enumerate(keys)}
    rng, found = torch.Generator().manual_seed(0), Counter()
    for _ in range(400):
        support, _ = bank_of.draw_task(bank, way=2, shot=1, query=1, rng=rng, group=first_letter)
        chosen = {keys[number // 10] for number in image_numbers(support)}
        assert len(chosen) == 2
        found["".join(sorted({key[0] for key in chosen}))] += 1
    assert set(found) == {"a", "b"}
    assert abs(found["a"] - 200) < 45  # standard deviation 10


def test_one_group_alone_draws_what_no_groups_draw():
    bank = numbered_bank([4, 4, 4])
    draws = [
        bank_of.draw_task(bank, way=2, shot=1, query=1, rng=torch.Generator().manual_seed(3), group=group)
        for group in (bank_of.one_group, first_letter)
    ]
    assert np.array_equal(draws[0][0], draws[1][0])
    assert np.array_equal(draws[0][1], draws[1][1])


def test_no_group_has_enough_classes_for_a_task():
    bank = {key: unique_images(2, SHAPE) for key in ("a0", "b0", "c0")}
    with pytest.raises(ValueError, match="needs 2 classes of one group with 2 images or more; the bank has 3 in all"):
        bank_of.draw_task(bank, way=2, shot=1, query=1, rng=torch.Generator(), group=first_letter)
