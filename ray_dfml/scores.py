"""The rows of `scores.json`, which have exactly these keys for every method."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_dfml.core.scoring import mean_ci95
from ray_dfml.types import Score

KEYS = ("method", "data", "split", "way", "shot", "episodes", "bn", "profile", "selection", "mean", "ci95")


def as_row(score: Score, profile: str) -> dict[str, Any]:
    """One object of `scores.json`: the accuracy in percent, its 95 % half-width, and what they are of.

    A top-1 accuracy has no way, shot or episodes; its half-width is that of a proportion.
    """
    mean, ci95 = mean_ci95(score.accuracies)
    episodes = None if score.shot is None else len(score.accuracies)
    values = (
        score.method, score.data, score.split, score.way, score.shot, episodes, score.bn, profile,
        score.selection, round(mean, 4), round(ci95, 4),
    )  # fmt: skip
    return dict(zip(KEYS, values, strict=True))


def headline(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any] | None:
    """The score that stands for a run of `method`: its first one, which is of the weights that validation chose."""
    return next((row for row in rows if row.get("method") == method), None)
