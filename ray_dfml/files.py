"""Paths as people write them, names in a printable form, and errors of the disk that name the file.

Every path that a user gives, on the command line or from Python, goes through `resolved` once.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ray_dfml.errors import UsageError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path that a user means. `~`, `~NAME`, `$VAR` and `${VAR}` are expanded, and links are kept.

    If a name with a `$` exists as it is written, the `$` stands for itself. Raises UsageError for an empty path, an
    unknown variable or user, and a path that is not UTF-8, since YAML and JSON files could not hold it.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError("a path is empty; name a file or a folder")
    if "\0" in text or not _is_utf8(text):
        raise UsageError(f"{shown(text)}: this path is not UTF-8 text; rename it")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise UsageError(f"{text}: no home folder of {home.split(os.sep)[0]} is known; write ./{text} for that name")
    return Path(os.path.abspath(home if _is_literal(home) else _expanded(home)))


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_literal(text: str) -> bool:
    """Whether a `$` in a path is part of a name: the path exists, or the folder of a new name without a `$` does."""
    head, tail = os.path.split(text)
    return "$" not in text or os.path.exists(text) or ("$" not in tail and os.path.exists(head))


def _expanded(text: str) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UsageError(f"{text}: the variable {name} is not set; set it, or write the path out")
        return os.environ[name]

    return _VARIABLE.sub(value, text)


def shown(name: str | os.PathLike[str]) -> str:
    r"""A name, or a line with names in it, in a form that any terminal and file can hold.

    Bytes that are not UTF-8 become `caf\xe9.png`, and control characters become `a\nb`.
    """
    return "".join(_shown(letter) for letter in os.fspath(name))


def _shown(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # how Python stands for a byte of a name that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter if is_readable(letter) else letter.encode("unicode_escape").decode()


def is_readable(text: str) -> bool:
    """Whether a text is one line that a person can read.

    It may hold printable characters, any kind of space, and the joiners of Arabic and Indian scripts and of emoji.
    """
    return all(c.isprintable() or c in _SPACES or c in "\u200c\u200d" for c in text)


_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into errors of the disk that are raised inside, since the system names none when a write fails."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise
