"""Errors that a user can act on. Each class has an exit code; any other exception is a defect and exits with 1.

A message is one line that says what is wrong, where, and what to do.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Names for one line of a message, such as `a, b, c and 4 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown_reason(id: str, why: str) -> str:
    """Why a teacher is left out, in a line that begins with its id, as the reason may do already."""
    return f"{id}: {why.removeprefix(f'{id}: ')}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'conv4'?)` if a known name is close to `name` in any case, else an empty text."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def check_sources(names: Collection[str], known: Collection[str], what: str = "image source") -> None:
    """Raise ValueError for a name of `names` that is not known, with the nearest one, and for one that is given twice.

    `what` says in the message what a name stands for.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError("an image source is named twice")


class DfmlError(Exception):
    """The base class. Its exit code 1 says that the run failed."""

    exit_code = 1


class UsageError(DfmlError):
    """A command line or a configuration cannot be carried out. Exit code 2."""

    exit_code = 2


class RejectedError(DfmlError):
    """A pool or a data source was read and cannot be used. Exit code 3."""

    exit_code = 3


class ServiceAway(RejectedError):
    """A service does not answer now, and may later: it cannot be reached, is busy, fails, or refuses a request."""


class NobodyLeft(RejectedError):
    """Every teacher of a run is left out. What is done is kept."""


def rejection(error: RejectedError) -> dict[str, Any]:
    """The result of a job whose teacher cannot be used; it says whether the teacher is only away."""
    return {"rejected": str(error)} | ({"away": True} if isinstance(error, ServiceAway) else {})


class BudgetReached(DfmlError):
    """What may be spent on queries is spent. What is done is kept. Exit code 4."""

    exit_code = 4


class ResourceError(DfmlError):
    """The cluster or this machine lacks what the run asks for. Exit code 5."""

    exit_code = 5


class Interrupted(DfmlError):
    """The user stopped the run; it can be resumed. Exit code 130."""

    exit_code = 130


class NotReproduced(DfmlError):
    """A number was measured again and is outside its interval. Exit code 1."""


class LearnerLost(DfmlError):
    """The learner's process ended. The run can go on from the last checkpoint."""
