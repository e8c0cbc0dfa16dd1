import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.data import splits
from ray_dfml.errors import RejectedError


def omniglot_names():
    counts = {**splits.OMNIGLOT_BACKGROUND, **splits.OMNIGLOT_EVALUATION}
    return [f"{alphabet}/character{i:02d}" for alphabet, n in counts.items() for i in range(1, n + 1)]


def assert_partition(parts, names):
    assert list(parts) == ["train", "val", "test"]
    assert all(list(part) == sorted(part) for part in parts.values())
    assert sorted(name for part in parts.values() for name in part) == sorted(names)


@pytest.mark.parametrize("literal", [splits.CIFAR_FS, splits.MINI_IMAGENET])
def test_literals_are_sorted_disjoint_and_64_16_20(literal):
    assert_partition(literal, set().union(*literal.values()))
    assert [len(part) for part in literal.values()] == [64, 16, 20]


def test_omniglot_holds_out_every_sixth_background_alphabet_and_tests_on_evaluation():
    assert sum(splits.OMNIGLOT_BACKGROUND.values()) == 964
    assert sum(splits.OMNIGLOT_EVALUATION.values()) == 659
    assert list(splits.OMNIGLOT_VAL_ALPHABETS) == sorted(splits.OMNIGLOT_BACKGROUND)[5::6]
    parts = splits.omniglot("here", omniglot_names())
    assert_partition(parts, omniglot_names())
    assert [len(part) for part in parts.values()] == [806, 158, 659]
    assert {name.split("/")[0] for name in parts["val"]} == set(splits.OMNIGLOT_VAL_ALPHABETS)
    assert {name.split("/")[0] for name in parts["test"]} == set(splits.OMNIGLOT_EVALUATION)


def test_omniglot_names_the_alphabet_that_is_not_whole():
    names = [n for n in omniglot_names() if n != "Greek/character24"]
    with pytest.raises(RejectedError, match=r"here: alphabet Greek has 23 characters, omniglot has 24"):
        splits.omniglot("here", names)
    with pytest.raises(RejectedError, match="lacks class Greek;"):
        splits.omniglot("here", [n for n in names if not n.startswith("Greek/")])


def test_cub_rule_by_index_of_the_sorted_names():
    names = [f"{i + 1:03d}.Bird" for i in range(200)]
    parts = splits.cub("here", names[::-1])
    assert_partition(parts, names)
    for i, name in enumerate(names):
        assert name in parts["train" if i % 2 == 0 else "val" if i % 4 == 1 else "test"]
    with pytest.raises(RejectedError, match="needs 200 class folders, found 199"):
        splits.cub("here", names[1:])


def test_checked_names_missing_and_foreign_classes():
    names = {c for part in splits.CIFAR_FS.values() for c in part}
    assert splits.checked("cifar-fs", "here", sorted(names), splits.CIFAR_FS) is splits.CIFAR_FS
    with pytest.raises(RejectedError, match=r"here: as cifar-fs it lacks class apple and holds class zebra"):
        splits.checked("cifar-fs", "here", sorted(names - {"apple"} | {"zebra"}), splits.CIFAR_FS)
    with pytest.raises(RejectedError, match=r"lacks 64 classes \(apple, aquarium_fish, bear, \.\.\.\)"):
        splits.checked("cifar-fs", "here", sorted(names - set(splits.CIFAR_FS["train"])), splits.CIFAR_FS)


@given(st.integers(1, 400))
def test_by_share_is_a_partition_near_64_16_20(count):
    names = [f"class {i}" for i in range(count)]
    parts = splits.by_share(sorted(names))
    assert_partition(parts, names)
    for part, share in zip(parts.values(), (0.64, 0.16, 0.20), strict=True):
        assert abs(len(part) - share * len(names)) <= 1


def test_by_share_of_100_takes_consecutive_names():
    names = [f"{i:02d}" for i in range(100)]
    assert splits.by_share(names) == {"train": tuple(names[:64]), "val": tuple(names[64:80]), "test": tuple(names[80:])}


def test_with_val_takes_the_last_fifth_of_train_only_where_val_is_absent():
    parts = {"train": tuple("abcdefghij"), "val": (), "test": ("z",)}
    assert splits.with_val(parts) == {"train": tuple("abcdefgh"), "val": ("i", "j"), "test": ("z",)}
    given_val = {"train": ("a", "b"), "val": ("c",), "test": ()}
    assert splits.with_val(given_val) == given_val


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 2])), min_size=1, max_size=120))
def test_last_tenth_of_each_class_moves_from_train_to_val(rows):
    labels, before = (np.array(column) for column in zip(*rows, strict=True))
    after = splits.last_tenth_per_class(labels, before.astype(np.int8))
    assert after.dtype == np.int8
    np.testing.assert_array_equal(after == 2, before == 2)
    for label in range(4):
        train = after[(labels == label) & (before == 0)]
        assert (train == 1).sum() == len(train) // 10
        assert (np.diff(train) >= 0).all()  # all val images come after the train images
