"""Figures of a run for Prometheus, through Ray, which serves them at the metrics port of the driver's node.

Ray puts `ray_` before each name. The record of a run is its folder; these are for watching many runs at once.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ray_dfml.runtime.ray_environment import Gauge
from ray_dfml.types import Spent

SECONDS = "seconds/"
"""Metrics of a round that begin with this are times; what follows is an op, `learner` or `round`."""


class RunMetrics:
    """The gauges of one run, whose label `run` is the name of its folder."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._rounds = Gauge("dfml_rounds", "Rounds that are done.", ("run",))
        self._seconds = Gauge("dfml_round_seconds", "Seconds of the last round, by part.", ("run", "part"))
        self._validation = Gauge("dfml_validation", "Accuracy on validation episodes, in percent.", ("run",))
        self._rejected = Gauge("dfml_rejected", "Teachers that are left out.", ("run",))
        self._queries = Gauge("dfml_queries", "Images that teachers were asked about.", ("run", "teacher", "count"))
        self._money = Gauge("dfml_money", "What the questions cost.", ("run", "teacher"))

    def round(self, rounds: int, row: Mapping[str, Any], rejected: int) -> None:
        """Publish the metrics `row` of the last of `rounds` rounds."""
        run = {"run": self._run}
        self._rounds.set(rounds, run)
        self._rejected.set(rejected, run)
        for name, value in row.items():
            if name.startswith(SECONDS):
                self._seconds.set(value, run | {"part": name.removeprefix(SECONDS)})
        if row.get("validation") is not None:
            self._validation.set(row["validation"], run)

    def spent(self, totals: Mapping[str, Spent]) -> None:
        """Publish what was asked of each teacher so far."""
        for teacher, one in totals.items():
            labels = {"run": self._run, "teacher": teacher}
            self._queries.set(one.sent, labels | {"count": "sent"})
            self._queries.set(one.answered, labels | {"count": "answered"})
            self._money.set(one.cost, labels)


def waiting(op: str, jobs: int) -> None:
    """Publish how many jobs of an op wait for a shard, in the process that sends them."""
    _queue().set(jobs, {"op": op})


@functools.cache
def _queue() -> Gauge:
    return Gauge("dfml_queue", "Jobs that wait for a shard.", ("op",))
