"""Progress on stderr: a live line on a terminal, one plain line per interval otherwise. stdout stays for results."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

INTERVAL_SECONDS = 10.0
VALIDATION = {"validation": "validation"}
"""What is shown of every method, with the word for it."""


class Progress:
    """Reports rounds. `shown` are metrics in percent that the line has, with their words; `quiet` says nothing."""

    def __init__(self, shown: Mapping[str, str] | None = None, *, quiet: bool = False) -> None:
        self._shown = {**(shown or {}), **VALIDATION}
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._live: RichProgress | None = None
        self._printed = 0.0
        self._rounds = 0

    def start(self, rounds: int, done: int) -> None:
        """Begin a run of `rounds`, of which `done` are done."""
        self._rounds = rounds
        if not self._quiet and self._console.is_terminal:
            self._live = RichProgress(
                TextColumn("round {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"),
                console=self._console,
            )  # fmt: skip
            self._live.start()
            self._task = self._live.add_task("", total=rounds, completed=done)

    def round(self, done: int, eta: float, row: Mapping[str, Any]) -> None:
        """Round number `done` has ended; `row` is its line of metrics."""
        shown = "  ".join(f"{w} {row[k]:.1f} %" for k, w in self._shown.items() if isinstance(row.get(k), float))
        text = f"eta {_clock(eta)}  {shown}"
        if self._live is not None:
            self._live.update(self._task, completed=done, description=text)
        elif not self._quiet and (time.monotonic() - self._printed > INTERVAL_SECONDS or done == self._rounds):
            self._printed = time.monotonic()
            print(f"round {done}/{self._rounds}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(text, highlight=False) if self._live else print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
