"""Accuracy and its 95 % interval."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def mean_ci95(accuracies: np.ndarray) -> tuple[float, float]:
    """Mean and half-width 1.96 std / sqrt(n) of per-episode accuracies [n], with the population std."""
    values = np.asarray(accuracies, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no episodes to average")
    return float(values.mean()), float(1.96 * values.std(ddof=0) / np.sqrt(values.size))


def assign_units(log_probs: np.ndarray, labels: np.ndarray, way: int) -> np.ndarray:
    """Which output unit stands for which way: the assignment [way] that maximises the support's summed log-probability.

    `log_probs` [s q] of a foreign classifier on the support, q >= way; `labels` [s] in 0..way-1.
    """
    gain = np.stack([log_probs[labels == c].sum(axis=0) for c in range(way)])
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return columns[np.argsort(rows)]
