"""Similarity of networks against closed forms and brute force."""

import itertools
import math

import pytest
import torch

from ray_dfml.core.similarity import beyond, linear_cka, same_partition


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_of_a_representation_with_itself_is_one_whatever_turns_or_scales_it():
    x = normal(40, 6)
    turn = torch.linalg.qr(normal(6, 6, seed=1)).Q
    wider = torch.linalg.qr(normal(9, 6, seed=2)).Q
    found = linear_cka([x, x @ turn, 1e-9 * x, 1e9 * x + 5, x @ wider.T])
    torch.testing.assert_close(found, torch.ones(5, 5, dtype=torch.float64))


def test_cka_is_the_formula_of_the_paper():
    x, y = normal(30, 4), normal(30, 7, seed=1) + 3
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    found = linear_cka([x, y])
    torch.testing.assert_close(found[0, 1], wanted)
    torch.testing.assert_close(found, found.T)


def test_cka_of_orthogonal_features_is_zero_and_of_a_part_is_its_share():
    basis = torch.linalg.qr(normal(20, 5) - normal(20, 5).mean(0)).Q
    basis = basis - basis.mean(0)
    left, right = basis[:, :2], basis[:, 2:4]
    found = linear_cka([left, right, torch.cat([left, right], 1), torch.ones(20, 3)])
    assert found[0, 1] == pytest.approx(0, abs=1e-12)
    assert found[0, 2] == pytest.approx(1 / math.sqrt(2))
    assert found[3].tolist() == [0, 0, 0, 0], "a representation that tells nothing"


def test_beyond_is_the_variance_outside_the_first_directions():
    turn = torch.linalg.qr(normal(50, 50)).Q
    axes = torch.linalg.qr((turn - turn.mean(0))[:, :4]).Q
    x = axes * torch.tensor([4.0, 2, 2, 1], dtype=torch.float64) @ torch.linalg.qr(normal(4, 4, seed=1)).Q + 7
    assert [beyond(x, k) for k in range(5)] == pytest.approx([1, 9 / 25, 5 / 25, 1 / 25, 0])
    assert beyond(torch.ones(9, 3), 0) == 0


def rand_by_hand(a: list[int], b: list[int]) -> float:
    """The adjusted Rand index from its definition over pairs."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = (sum(x[i] == x[j] for i, j in pairs) for x in (a, b))
    expected = in_a * in_b / len(pairs)
    return (both - expected) / ((in_a + in_b) / 2 - expected)


def test_same_partition_is_the_adjusted_rand_index():
    labels = torch.randint(3, (4, 25), generator=torch.Generator().manual_seed(0))
    labels[1] = (labels[0] + 1) % 3
    found = same_partition(labels)
    for i, j in itertools.product(range(4), repeat=2):
        assert found[i, j].item() == pytest.approx(rand_by_hand(labels[i].tolist(), labels[j].tolist()))
    assert found[0, 1] == 1, "names of classes do not count"


def test_classifiers_that_answer_one_label_sort_equally():
    assert same_partition(torch.zeros(2, 6)).tolist() == [[1, 1], [1, 1]]
    assert same_partition(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]]))[0, 1] == 0
