"""Accuracy, its interval, and the assignment of foreign output units."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core.scoring import assign_units, mean_ci95
from tests.support import PROPERTY


@PROPERTY
@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_interval_equals_its_formula(values):
    mean, half = mean_ci95(np.array(values))
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    assert half == pytest.approx(1.96 * spread / math.sqrt(len(values)), abs=1e-9)


def test_interval_of_two_values_by_hand():
    assert mean_ci95(np.array([40.0, 60.0])) == (50.0, pytest.approx(1.96 * 10 / math.sqrt(2)))


def test_interval_covers_the_true_mean_in_about_95_percent_of_samples():
    samples = np.random.default_rng(0).normal(50, 8, (2000, 100))
    found = [mean_ci95(row) for row in samples]
    covered = np.mean([abs(mean - 50) <= half for mean, half in found])
    assert 0.93 <= covered <= 0.965


def test_single_precision_accuracies_are_averaged_in_double():
    values = np.full(600, 52.58, np.float32)
    assert mean_ci95(values)[0] == pytest.approx(float(np.float32(52.58)), rel=1e-12)


def test_no_episodes_are_an_error():
    with pytest.raises(ValueError, match="no episodes"):
        mean_ci95(np.array([]))


@PROPERTY
@given(st.integers(2, 6), st.integers(0, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_assignment_recovers_a_hidden_permutation(way, spare, shot, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(way + spare)[:way]
    labels = np.tile(np.arange(way), shot)
    log_probs = rng.uniform(-0.4, 0.0, (way * shot, way + spare)) - 3.0
    log_probs[np.arange(way * shot), hidden[labels]] += 2.0
    assert assign_units(log_probs, labels, way).tolist() == hidden.tolist()


def test_assignment_weighs_the_whole_support():
    """Both ways prefer unit 0, the first one more strongly: greedy choice by row order and optimum differ."""
    log_probs = np.log([[0.5, 0.49, 0.01], [0.9, 0.05, 0.05]])
    assert assign_units(log_probs, np.array([0, 1]), 2).tolist() == [1, 0]
