"""Answers of a classifier at each level of access."""

import numpy as np
import pytest
import torch

from ray_dfml.core.answers import answers

LOGITS = torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
PROBS = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)


@pytest.mark.parametrize("access", ["weights", "logits"])
def test_logits_are_given_as_they_are(access: str) -> None:
    found = answers(LOGITS, access)
    assert found.dtype == np.float32
    assert np.array_equal(found, LOGITS.numpy())


def test_a_label_is_the_first_of_the_largest() -> None:
    found = answers(LOGITS, "label")
    assert (found.dtype, found.tolist()) == (np.int64, [0, 0])


def test_probabilities_follow_the_closed_form() -> None:
    found = answers(LOGITS, "probs")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, PROBS, rtol=1e-6)


def test_of_the_k_largest_the_first_among_equals_are_kept() -> None:
    found = answers(LOGITS, "probs", top_k=2)
    np.testing.assert_allclose(found, PROBS * [[1, 0, 1, 0], [1, 1, 0, 0]], rtol=1e-6)


def test_all_classes_are_kept_if_k_is_their_number() -> None:
    assert np.array_equal(answers(LOGITS, "probs", top_k=4), answers(LOGITS, "probs"))


def test_probabilities_are_rounded_after_they_are_cut() -> None:
    found = answers(LOGITS, "probs", decimals=1, top_k=1)
    np.testing.assert_allclose(found, [[0.5, 0, 0, 0], [0.2, 0, 0, 0]], atol=0.06)
    assert np.array_equal(found, (np.round(found * 10) / 10).astype(np.float32))


def test_no_image_gives_no_answer() -> None:
    assert answers(LOGITS[:0], "label").shape == (0,)
    assert answers(LOGITS[:0], "probs", top_k=1, decimals=2).shape == (0, 4)
