"""Accuracy and its 95 % interval."""

from collections.abc import Sequence

import numpy as np
from scipy import special
from scipy.optimize import linear_sum_assignment


def mean_ci95(accuracies: np.ndarray) -> tuple[float, float]:
    """Mean of per-episode accuracies [n], and the half-width 1.96 std / sqrt(n) of its interval.

    The standard deviation is that of the population. Raises ValueError if there are no episodes.
    """
    values = np.asarray(accuracies, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no episodes to average")
    return float(values.mean()), float(1.96 * values.std(ddof=0) / np.sqrt(values.size))


def mean_of_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds [n], and the half-width t s / sqrt(n), where t is Student's with n-1 degrees of freedom.

    One seed has no half-width.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    return float(x.mean()), float(special.stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))


def assign_units(log_probs: np.ndarray, labels: np.ndarray, way: int) -> np.ndarray:
    """The output unit of a classifier that stands for each way of a task: int [way].

    The assignment maximises the sum of the support's log-probabilities. `log_probs` [s q] are the classifier's on the
    support, q >= way, and `labels` [s] are in 0..way-1.
    """
    gain = np.stack([log_probs[labels == c].sum(axis=0) for c in range(way)])
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return columns[np.argsort(rows)]
