"""Notices a round that stalls, and names what is at work: which job, on which shard, for how long.

Whoever sends jobs notes how long those of an op take. A job that takes ten times as long stalls, and so does a round
that takes ten times as long as the longest before it. This ends nothing, since the work may be long; a line says it.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_dfml.errors import first_of
from ray_dfml.runtime.progress import clock
from ray_dfml.types import Job

LOOK_SECONDS = 5.0
"""How often a round at work is looked at."""

LEAST_SECONDS = 60.0
"""What takes no longer than this does not stall."""

TIMES = 10.0
"""What takes so many times as long as the longest of its kind before it stalls."""

FIRST_SECONDS = 600.0
"""What has no other of its kind before it stalls after this time."""

BOARD = ".work.json"
"""The file in a run folder by which the learner's process tells the driver what is at work."""


@dataclass(frozen=True)
class AtWork:
    """Jobs that a shard is at: their op and teachers, since when, and how long such work took at most until now."""

    shard: int
    op: str
    teachers: tuple[str, ...]
    since: float
    """seconds since 1970"""
    longest: float | None
    """seconds; None if none has ended"""

    @property
    def seconds(self) -> float:
        """How long they have been at work."""
        return time.time() - self.since

    @property
    def stalls(self) -> bool:
        """Whether they take far longer than such work did."""
        return self.seconds > _patience(self.longest)

    @property
    def said(self) -> str:
        """The same for people."""
        of = f" of {first_of(self.teachers, 3)}" if self.teachers else ""
        before = "" if self.longest is None else f", where such work took {clock(self.longest)} at most"
        return f"shard {self.shard} is at {self.op}{of} for {clock(self.seconds)}{before}"


def _patience(longest: float | None) -> float:
    return FIRST_SECONDS if longest is None else max(LEAST_SECONDS, TIMES * longest)


class Pace:
    """How long the jobs of each op took, in relation to their cost."""

    def __init__(self) -> None:
        self._longest: dict[str, float] = {}

    def ended(self, op: str, jobs: Sequence[Job], seconds: float) -> None:
        """Note that a shard was at these jobs for so long."""
        self._longest[op] = max(self._longest.get(op, 0.0), seconds / _cost(jobs))

    def at_work(self, shard: int, op: str, jobs: Sequence[Job], seconds: float) -> AtWork:
        """Jobs that a shard has been at for so long."""
        each = self._longest.get(op)
        teachers = tuple(dict.fromkeys(job.teacher for job in jobs if job.teacher is not None))
        return AtWork(shard, op, teachers, time.time() - seconds, None if each is None else each * _cost(jobs))


def _cost(jobs: Sequence[Job]) -> float:
    return sum(job.cost for job in jobs) or 1.0


class Board:
    """A file that says what is at work, for another process of the machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, found: Sequence[AtWork]) -> None:
        """Replace what it says in one step. A disk that is full is left to those who write what must be kept."""
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps([asdict(one) for one in found]))
            os.replace(temporary, self._path)

    def read(self) -> list[AtWork]:
        """What it says; nothing where there is no file, or not one of this version."""
        try:
            return [AtWork(**one | {"teachers": tuple(one["teachers"])}) for one in json.loads(self._path.read_bytes())]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def clear(self) -> None:
        """Say that nothing is at work."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stall:
    """A round that stalls: its number from 1 on, how long it has been at work, and what stalls in it, or is at work."""

    round: int
    seconds: float
    at_work: Sequence[AtWork]

    @property
    def said(self) -> str:
        """The line for people."""
        what = "; ".join(one.said for one in self.at_work[:3]) or "no shard has a job, so the learner itself is at work"
        return f"round {self.round} has been at work for {clock(self.seconds)}: {what}"


class Watch:
    """Looks at each round in a thread while it is at work.

    `at_work` says what is, and `tell` gets a stall, once, and again whenever its time has doubled.
    """

    def __init__(self, at_work: Callable[[], Sequence[AtWork]], tell: Callable[[Stall], None]) -> None:
        self._at_work, self._tell = at_work, tell
        self._longest: float | None = None

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Watch a round in the `with` block. `tell` is never called after its end."""
        began, ended = time.monotonic(), threading.Event()
        thread = threading.Thread(target=self._look, args=(number, began, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self._longest = max(self._longest or 0.0, time.monotonic() - began)

    def _look(self, number: int, began: float, ended: threading.Event) -> None:
        patience, known = _patience(self._longest), dict[tuple[int, str, tuple[str, ...]], float]()
        while not ended.wait(LOOK_SECONDS):
            seconds = time.monotonic() - began
            found = sorted(self._at_work(), key=lambda one: one.since)
            new = [one for one in found if one.stalls and one.seconds >= known.get(_key(one), 0.0)]
            if not new and seconds < patience:
                continue
            known |= {_key(one): 2 * one.seconds for one in found if one.stalls}
            patience = 2 * seconds if seconds >= patience else patience
            self._tell(Stall(number, seconds, [one for one in found if one.stalls] or found))


def _key(one: AtWork) -> tuple[int, str, tuple[str, ...]]:
    return one.shard, one.op, one.teachers
