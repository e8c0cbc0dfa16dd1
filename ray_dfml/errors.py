"""Errors a user can act on. Each carries the process exit code of the contract; everything else is a defect (exit 1).

A message is one line: what is wrong, where, what to do.
"""

import difflib
from collections.abc import Iterable, Sequence


def first_of(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c and 4 more`: names for one line of a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'conv4'?)` where a known name is close to `name` in any case, else nothing."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


class DfmlError(Exception):
    """Base class. `exit_code` 1: the run failed."""

    exit_code = 1


class UsageError(DfmlError):
    """A command line or a configuration that cannot be carried out. Exit code 2."""

    exit_code = 2


class RejectedError(DfmlError):
    """A pool or a data source that was read and found wanting. Exit code 3."""

    exit_code = 3


class ResourceError(DfmlError):
    """The cluster or this machine lacks what the run asks for. Exit code 5."""

    exit_code = 5


class Interrupted(DfmlError):
    """Stopped by the user; the run folder can be resumed. Exit code 130."""

    exit_code = 130


class LearnerLost(DfmlError):
    """The learner's process ended; the last checkpoint is the state to go on from."""
