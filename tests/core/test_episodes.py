"""Evaluation episodes: what they contain, and what they depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core import episodes
from tests.support import PROPERTY


def split(classes: int, per_class: int) -> np.ndarray:
    """Labels 10, 11, ... in shuffled order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes) + 10, per_class))


def same(a: episodes.Episode, b: episodes.Episode) -> bool:
    return np.array_equal(a.support, b.support) and np.array_equal(a.query, b.query)


@PROPERTY
@given(
    st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 10**6)
)
def test_an_episode_is_balanced_interleaved_and_without_repeats(way, spare_classes, shot, query, spare_images, index):
    labels = split(way + spare_classes, shot + query + spare_images)
    support, query_rows = episodes.draw(labels, way=way, shot=shot, query=query, seed=1, index=index)
    classes = labels[support][:way].tolist()
    assert len(set(classes)) == way
    assert labels[support].tolist() == classes * shot
    assert labels[query_rows].tolist() == classes * query
    assert len(set(support) | set(query_rows)) == way * (shot + query)


def test_episodes_depend_on_seed_and_index_only():
    labels, kind = split(8, 12), {"way": 5, "shot": 1, "query": 3}
    forward = [episodes.draw(labels, **kind, seed=3, index=i) for i in range(6)]
    backward = [episodes.draw(labels, **kind, seed=3, index=i) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not any(same(forward[0], other) for other in forward[1:])
    assert not any(same(a, episodes.draw(labels, **kind, seed=4, index=i)) for i, a in enumerate(forward))


def test_all_classes_and_images_are_drawn_in_time():
    labels, kind = split(6, 5), {"way": 2, "shot": 1, "query": 2}
    drawn = [episodes.draw(labels, **kind, seed=0, index=i) for i in range(100)]
    assert {int(labels[i]) for episode in drawn for i in episode.support} == set(labels.tolist())
    assert {int(i) for episode in drawn for i in episode.query} == set(range(30))


def test_too_few_classes_or_images_are_errors():
    with pytest.raises(ValueError, match=r"5-way episodes of 1 support .* need 5 classes with 16 images, there are 4"):
        episodes.draw(split(4, 20), way=5, shot=1, query=15, seed=0, index=0)
    with pytest.raises(ValueError, match="need 5 classes with 16 images, there are 0"):
        episodes.draw(split(6, 15), way=5, shot=1, query=15, seed=0, index=0)


def test_interleaved_labels_repeat_the_ways():
    assert episodes.interleaved(3, 2).tolist() == [0, 1, 2, 0, 1, 2]


def test_classes_that_are_too_small_take_no_part_and_change_nothing_else():
    """Classes that are too small do not change the episodes."""
    labels, kind = split(6, 5), {"way": 3, "shot": 2, "query": 3, "seed": 0}
    more = np.concatenate([labels, [3, 3, 3, 3, 99]])
    assert episodes.usable(more, 5).tolist() == list(range(10, 16))
    assert episodes.usable(more, 4).tolist() == [3, *range(10, 16)]
    for index in range(10):
        assert same(episodes.draw(more, **kind, index=index), episodes.draw(labels, **kind, index=index))
