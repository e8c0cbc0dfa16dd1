"""The scores of a run as rows to show, and whether each is more than noise."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_dfml.methods import UNTRAINED
from ray_dfml.plots import number
from ray_dfml.report.record import Record


def verdict(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[bool | None, float | None]:
    """Whether a score is above `random` by more than the two half-widths together, and by how many points it is above.

    Both are None for `random` itself, and if `random` was not scored on these episodes.
    """
    same = ("data", "split", "way", "shot", "episodes", "bn")
    beside = reference(row)
    for other in rows:
        if other.get("method") == beside != row.get("method") and all(other.get(k) == row.get(k) for k in same):
            mean, base = number(row.get("mean")), number(other.get("mean"))
            if mean is not None and base is not None:
                margin = (number(row.get("ci95")) or 0.0) + (number(other.get("ci95")) or 0.0)
                return mean - base > margin, mean - base
    return None, None


def reference(row: Mapping[str, Any]) -> str:
    """The method `random` beside a score; where a run has several students, the one with the same teacher."""
    _, colon, teacher = str(row.get("method")).partition(":")
    return UNTRAINED + colon + teacher


def own(record: Record, row: Mapping[str, Any]) -> bool:
    """Whether a score is of the run's method (in any reading) and not of a baseline beside it."""
    method = str(row.get("method"))
    return method == record.name or method.startswith((f"{record.name}-", f"{record.name}:"))


_SHOWN = ("method", "data", "split", "way", "shot", "bn", "selection", "profile", "episodes")


def table(record: Record) -> list[dict[str, Any]]:
    """Rows for display. Among scores of the same episodes the run's own come first, and `random` comes last."""
    selections = ["val", "last", "test-best"]

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        method, selection = str(row.get("method")), row.get("selection")
        where = [str(row.get(k)) for k in ("data", "split")] + [number(row.get(k)) or 0 for k in ("way", "shot")]
        order = selections.index(selection) if selection in selections else len(selections)
        return (*where, method.partition(":")[2], method == reference(row), not own(record, row), method, order)

    rows, last = [], None
    for row in sorted(record.scores, key=place):
        above, gain = verdict(row, record.scores)
        task = "top-1" if row.get("shot") is None else f"{row.get('way')}-way {row.get('shot')}-shot"
        episodes = (row.get("data"), row.get("split"), task)
        if row.get("method") == reference(row):
            against = "the reference"
        elif above is None:
            against = "not compared: no random on these episodes"
        else:
            against = f"{gain:+.2f}" if above else f"not above random ({gain:+.2f})"
        mean, ci95 = number(row.get("mean")), number(row.get("ci95"))
        rows.append(
            {
                k: row.get(k)
                for k in ("method", "data", "split", "way", "shot", "bn", "selection", "profile", "episodes")
            }
            | {"task": task, "mean": mean, "ci95": ci95, "against": against, "above": above, "gain": gain}
            | {"own": own(record, row), "first": episodes != last}
        )
        last = episodes
    return rows
