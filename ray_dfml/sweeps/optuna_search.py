"""Points that Optuna proposes, a batch at a time, from the validation of the points before.

A study is made anew whenever points are asked for: it is told, in order, all that the run folders say. So a sweep that
is resumed gets the same points again, and Optuna keeps no file.
"""

from collections.abc import Sequence
from typing import Any

from ray_dfml.errors import ResourceError
from ray_dfml.sweeps.space import LISTS, Axis, Point


def proposed(
    axes: Sequence[Axis], scores: Sequence[float | None], count: int, *, batch: int, seed: int
) -> list[Point]:  # fmt: skip
    """The first `count` points of a search by Optuna's tree-structured Parzen estimator.

    They come in batches of `batch`, and those of a batch do not know each other's score. `scores` are the validations,
    in percent, of the points of all batches before the last one, in their order; None is a point that failed. Raises
    ResourceError if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ResourceError(
            "search: optuna needs Optuna: pip install 'ray-dfml[optuna]', or leave `search` out"
        ) from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    kinds: dict[str, Any] = {axis.key: _distribution(axis, optuna.distributions) for axis in axes}
    found: list[Point] = []
    for start in range(0, count, batch):
        asked = [study.ask(kinds) for _ in range(min(batch, count - start))]
        found += [{axis.key: _value(axis, one.params[axis.key]) for axis in axes} for one in asked]
        for one, score in zip(asked, scores[start : start + batch], strict=False):
            failed = score is None
            study.tell(one, score, state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE)
    return found


def _distribution(axis: Axis, kinds: Any) -> Any:
    """Lists are chosen by place, since Optuna's categories may not be lists."""
    if axis.kind in LISTS:
        return kinds.CategoricalDistribution(list(range(len(axis.values))))
    low, high = axis.ends
    if axis.kind == "randint":
        return kinds.IntDistribution(low, high)
    return kinds.FloatDistribution(low, high, log=axis.kind == "loguniform")


def _value(axis: Axis, given: Any) -> Any:
    return axis.values[given] if axis.kind in LISTS else given
