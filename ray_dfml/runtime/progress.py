"""Progress on stderr: live lines on a terminal, and otherwise one plain line per interval. stdout is for results."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

INTERVAL_SECONDS = 10.0
VALIDATION = {"validation": "validation"}
"""The metric that is shown for every method, with the word for it."""


@dataclass
class _Stage:
    """Work of one kind that is going on: its name, how much there is, when it began, and how much is done."""

    what: str
    total: float
    began: float
    done: float = 0.0
    task: TaskID | None = None

    def text(self, now: float) -> str:
        """How much is done, and the time that is left."""
        share = self.done / max(self.total, self.done)
        return f"{100 * share:.0f} %  eta {clock((now - self.began) * (1 / share - 1))}"


class Progress:
    """Reports rounds, and stages such as a test.

    `shown` maps the metrics in percent that the line of a round shows to the words for them. `cost` gives the line that
    comes before the first round, from the number of rounds that are done. With `quiet` there are notes only, and
    without `notes` none of these either.
    """

    def __init__(
        self, shown: Mapping[str, str] | None = None, *, quiet: bool = False, notes: bool = True,
        cost: Callable[[int], str] | None = None,
    ) -> None:  # fmt: skip
        self._shown, self._cost = shown or {}, cost
        self._console = Console(stderr=True)
        self.quiet, self._notes = quiet, notes
        self._live: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage: _Stage | None = None
        self._printed = 0.0
        self._rounds = 0

    def start(self, rounds: int, done: int) -> None:
        """Begin a run of `rounds`, of which `done` are done, with the line of its cost."""
        if self._cost is not None and not self.quiet:
            self.note(self._cost(done))
        self._rounds = rounds
        self._task = self._add(f"round {done}/{rounds}", total=rounds, completed=done)

    def round(self, done: int, eta: float, row: Mapping[str, Any], sent: int = 0) -> None:
        """Report that round number `done` has ended, `row` being its metrics, and `sent` the queries so far."""
        head, text = round_line(self._shown, max(done, self._rounds), done, eta, row, sent)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, head=head, description=text)
        elif done == self._rounds or self._due():
            self._print(f"{head}  {text}")

    @contextmanager
    def stage(self, what: str, total: float) -> Iterator[None]:
        """Report work of one kind in the `with` block, where `advance` tells each part. Its line goes at the end."""
        stage = _Stage(what, total, time.monotonic(), task=self._add(what, total=total))
        self._stage = stage
        try:
            yield
        finally:
            self._stage = None
            if self._live is not None and stage.task is not None:
                self._live.remove_task(stage.task)

    def advance(self, work: float) -> None:
        """Report that so much work of the stage is done."""
        stage = self._stage
        if stage is None:
            return
        stage.done += work
        text = stage.text(time.monotonic())
        if self._live is not None and stage.task is not None:
            self._live.update(stage.task, completed=stage.done, description=text)
        elif self._due(stage.began):
            self._print(f"{stage.what} {text}")

    def _add(self, head: str, **values: Any) -> TaskID | None:
        """Add a line to the live display, which starts with the first line. None without a terminal."""
        if self.quiet or not self._console.is_terminal:
            return None
        if self._live is None:
            columns = (TextColumn("{task.fields[head]}"), BarColumn(), TextColumn("{task.description}"))
            self._live = RichProgress(*columns, console=self._console)
            self._live.start()
        return self._live.add_task("", head=head, **values)

    def _due(self, began: float = 0.0) -> bool:
        """Whether it is time for the next plain line about work that began at `began`."""
        return time.monotonic() - max(self._printed, began) > INTERVAL_SECONDS

    def _print(self, line: str) -> None:
        if not self.quiet:
            self._printed = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Write one line."""
        if self._notes:
            self._console.print(text, highlight=False) if self._live else print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def round_line(
    shown: Mapping[str, str], rounds: int, done: int, eta: float, row: Mapping[str, Any], sent: int = 0
) -> tuple[str, str]:  # fmt: skip
    """The two parts of the line of a round: its number; and the time left in seconds with what else is known.

    That is the queries so far, the recovered images a second of this round, and the metrics in `shown`.
    """
    words = {**shown, **VALIDATION}
    said = [f"{word} {row[key]:.1f} %" for key, word in words.items() if isinstance(row.get(key), float)]
    if row.get("recover/images") and row.get("seconds/round"):
        said.insert(0, f"{row['recover/images'] / row['seconds/round']:.0f} images/s")
    if sent:
        said.insert(0, f"{sent:,} queries")
    return f"round {done}/{rounds}", "  ".join([f"eta {clock(eta)}", *said])


def clock(seconds: float) -> str:
    """A time as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
