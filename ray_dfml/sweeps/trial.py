"""One trial, in its own process: it trains a run in the run's folder, and tells the rounds' figures to a listener.

A trial that was stopped or killed begins by telling the rounds that are in the folder, and goes on after them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dfml.config import build
from ray_dfml.errors import BudgetReached
from ray_dfml.methods import METHODS
from ray_dfml.runtime import driver
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.launch import continue_run, train_only
from ray_dfml.runtime.rundir import RunFolder

FINAL = ("done", driver.TRAINED, driver.BUDGET)
"""States in which a run has trained to its end."""

Tell = Callable[[Mapping[str, Any]], bool]
"""Gets figures of a round. Returns whether the trial goes on."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a trial does: the folder and configuration of its run, where to compute it, and how far.

    Fields are plain values, since they go to another process.
    """

    path: Path
    config: Mapping[str, Any]
    machine: Machine
    until: int | None = None
    """Rounds after which it stops; None: all"""
    test: bool = False
    """Instead of training, test the run"""
    label: str
    """The point and the seed, for people"""
    shown: Mapping[str, Any]
    """The same, for loggers"""


@dataclass(frozen=True)
class Found:
    """How far a run is, from its folder: the state, rounds done, rows of metrics, and the last error."""

    state: str
    rounds: int
    rows: list[dict[str, Any]]
    error: str | None
    ranked: int | None = None
    """Rounds by which the run is ranked, if it has trained on since; None: all"""

    def validation(self, name: str) -> float | None:
        """The accuracy in percent by which the run, of a method, is ranked."""
        return validation(self.rows[: self.ranked], name)

    @property
    def final(self) -> bool:
        """Whether the run has trained to its end."""
        return self.state in FINAL


def look(path: Path) -> Found:
    """Read how far a run is. A folder that is not there is a run of no rounds."""
    if not (path / "status.json").exists():
        return Found("planned", 0, [], None)
    folder = RunFolder(path)
    status = folder.read_status()
    rounds = status.get("round") or 0
    rows = [row for row in folder.rows() if row["round"] < rounds]
    return Found(status.get("state", "created"), rounds, rows, status.get("last_error"), status.get("ranked_rounds"))


def validation(rows: list[dict[str, Any]], name: str) -> float | None:
    """The accuracy in percent by which a run is ranked: that of the weights that it keeps.

    These are the best of all validations, or the last ones for a method that distils, since it selects nothing.
    """
    found = [row["validation"] for row in rows if row.get("validation") is not None]
    if not found:
        return None
    return found[-1] if METHODS[name].students else max(found)


def figures(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The figures of the last row for a listener: `round` is how many are done, and `validation` is the ranking's."""
    row = rows[-1]
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    best = validation(rows, name)
    return numbers | {"round": row["round"] + 1} | ({"validation": best} if best is not None else {})


def has_ended(task: Task) -> bool:
    """Whether a task that trains has nothing more to do: the run is at its end, or where it is to stop."""
    found = look(task.path)
    if task.until is None:
        return found.final or found.state == driver.STOPPED or found.ranked is not None
    return found.final or task.until <= found.rounds < build(task.config).total_rounds


def train(task: Task, tell: Tell) -> None:
    """Train a run up to `task.until`. Rounds that its folder holds already are told first."""
    config = build(task.config)
    found = look(task.path)
    rows: list[dict[str, Any]] = []
    for row in found.rows[: found.ranked]:
        rows.append(row)
        if not tell(figures(rows, config.name)):
            return
    if has_ended(task):
        return

    def on_round(row: Mapping[str, Any]) -> bool:
        rows.append(dict(row))
        goes_on = tell(figures(rows, config.name))
        return goes_on and (task.until is None or row["round"] + 1 < task.until)

    train_only(config, task.path, task.machine, on_round)


def test(task: Task) -> None:
    """Test a run that has trained. Its scores are in its folder; a run that is tested stays as it is.

    One that was stopped trains to its end first. It keeps the rank that it had when it was chosen, since others had no
    more rounds.
    """
    found = look(task.path)
    if found.state == driver.STOPPED and found.ranked is None:
        RunFolder(task.path).status(ranked_rounds=found.rounds)
    try:
        continue_run(task.path, task.config["name"], task.machine, quiet=True)
    except BudgetReached:
        return  # the run has spent all it may, and what it learned is tested
