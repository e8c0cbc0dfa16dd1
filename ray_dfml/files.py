"""Paths and URIs as people write them, names in a printable form, and errors of the disk that name the file.

Every path that a user gives, on the command line or from Python, goes through `resolved` once, or through `located`
where it may also be in an object store.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ray_dfml.errors import UsageError, did_you_mean

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://|::)")
STORES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "memory": "fsspec",
}  # fmt: skip
"""Scheme of an object store -> the package that reaches it. Each of them can refuse to replace a file."""

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path that a user means. `~`, `~NAME`, `$VAR` and `${VAR}` are expanded, and links are kept.

    If a name with a `$` exists as it is written, the `$` stands for itself. Raises UsageError for an empty path, an
    unknown variable or user, and a path that is not UTF-8, since YAML and JSON files could not hold it.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError("a path is empty; name a file or a folder")
    if _SCHEME.match(text):
        raise UsageError(f"{shown(text)}: a path on a disk is needed here; copy what it names from or to the store")
    if "\0" in text or not _is_utf8(text):
        raise UsageError(f"{shown(text)}: this path is not UTF-8 text; rename it")
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise UsageError(f"{text}: no home folder of {home.split(os.sep)[0]} is known; write ./{text} for that name")
    return Path(os.path.abspath(home if _is_literal(home) else _expanded(home)))


class Uri(str):
    """The address of a folder or a file in an object store, such as `s3://bucket/pools/birds`, without `/` at its end.

    `/` goes into a folder, as it does for a path.
    """

    def __truediv__(self, name: str) -> "Uri":
        return Uri(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the last part, from its last dot on."""
        return Path(self.name).suffix


def located(place: str | os.PathLike[str]) -> Path | Uri:
    """The place that a user means: a URI of an object store, in one spelling, or a path as `resolved` gives it.

    `file://` is an absolute path. Raises UsageError for a URI that is not of STORES or not of a store alone, which
    holds no key, no `?` and no `::`, and whatever `resolved` raises.
    """
    text = os.fspath(place)
    found = _SCHEME.match(text)
    if found is None:
        return resolved(text)
    scheme = found[0].lower()
    if scheme in ("file", "local") and text[found.end() :].startswith("://"):
        path = text[found.end() + 3 :].removeprefix("localhost")
        if not path.startswith(("/", "~", "$")):
            raise UsageError(
                f"{shown(text)}: names a machine or a relative path; write {scheme}:///FOLDER/NAME, or a path without "
                f"{scheme}://"
            )
        return resolved(path)
    if scheme not in STORES or not text[found.end() :].startswith("://"):
        raise UsageError(
            f"{shown(text)}: {shown(found[0])} is no object store of this program{did_you_mean(scheme, STORES)}; "
            f"known: {', '.join(STORES)}; copy what it names to a disk"
        )
    rest = _expanded(text[found.end() + 3 :]) if "$" in text else text[found.end() + 3 :]
    parts = rest.rstrip("/").split("/")
    if not is_readable(rest) or "?" in rest or ".." in parts or "" in parts or "." in parts:
        raise UsageError(f"{shown(text)}: expected {scheme}://BUCKET/NAME/.., without '?', '..' and empty names")
    if urlsplit(f"//{parts[0]}").password is not None:
        raise UsageError(f"{scheme}://..: a key never stands in a URI; put it where {STORES[scheme]} looks for it")
    return Uri(f"{scheme}://{'/'.join(parts)}")


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
