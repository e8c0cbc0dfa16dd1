"""Files in an object store, through fsspec. A file is there whole or not at all, and what was written is seen at once.

Whatever a store says no with becomes an OSError that names the file.
"""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_dfml.errors import DfmlError, RejectedError, ResourceError
from ray_dfml.files import STORES, Uri, shown


@functools.lru_cache(maxsize=len(STORES))
def _store(scheme: str) -> Any:
    """The file system of a scheme, which remembers no listing. Raises ResourceError if its package is missing."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        extra = "'ray-dfml[s3]'" if STORES[scheme] == "s3fs" else STORES[scheme]
        raise ResourceError(f"{scheme}:// needs a package that is not here: pip install {extra}") from None


def _of(uri: Uri) -> Any:
    return _store(uri.partition(":")[0])


_SAID = {errno.ENOENT: "no such file or folder", errno.EEXIST: "is there already"}


@contextlib.contextmanager
def _saying(uri: Uri) -> Iterator[None]:
    """Turn errors of a store into errors that name the file. Those of access and of the network are no OSErrors."""
    try:
        yield
    except (DfmlError, MemoryError):
        raise
    except OSError as error:
        kind = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno or errno.EIO
        kind = errno.EEXIST if isinstance(error, FileExistsError) else kind
        text = error.strerror or _line(error)
        if kind in _SAID and (text.endswith(f"/{uri.name}") or text == type(error).__name__):
            text = _SAID[kind]  # a path alone, in the store's own spelling
        raise OSError(kind, text, str(uri)) from None
    except Exception as error:
        raise OSError(errno.EIO, _line(error), str(uri)) from None


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read(uri: Uri, *, most: int | None = None) -> bytes:
    """The content of a file. Raises RejectedError (without the URI) if it has over `most` bytes, and OSError."""
    with _saying(uri):
        if most is not None and (size := _of(uri).size(uri)) > most:
            raise RejectedError(f"{size} bytes, more than the limit of {most}")
        return _of(uri).cat_file(uri)


def exists(uri: Uri) -> bool:
    """Whether a file is there. Raises ResourceError if the store does not answer."""
    try:
        with _saying(uri):
            _of(uri).size(uri)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ResourceError(f"{uri}: cannot be reached: {error.strerror}") from None
    return True


def write(uri: Uri, data: bytes) -> None:
    """Put a file there, or replace it. Raises OSError."""
    with _saying(uri):
        _of(uri).pipe_file(uri, data)


def create(uri: Uri, data: bytes) -> None:
    """Put a file there. Of all who try at once one succeeds; the others get FileExistsError. Raises OSError."""
    with _saying(uri):
        _of(uri).pipe_file(uri, data, mode="create")


def remove(uri: Uri) -> None:
    """Remove a file if it is there. Raises OSError."""
    with _saying(uri), contextlib.suppress(FileNotFoundError):
        _of(uri).rm_file(uri)


def names(folder: Uri) -> list[str]:
    """The sorted names of what is in a folder; none if there is no folder. Raises OSError."""
    with _saying(folder):
        try:
            found = _of(folder).ls(folder, detail=False)
        except FileNotFoundError:
            return []
    return sorted(path.rstrip("/").rpartition("/")[2] for path in found)


def below(folder: Uri) -> list[str]:
    """The sorted names of all files below a folder, such as `a/b`. Raises OSError."""
    with _saying(folder):
        store = _of(folder)
        root = store._strip_protocol(folder)
        return sorted(path.removeprefix(root).lstrip("/") for path in store.find(folder))


FETCHED_BYTES = 20 * 2**30
"""What copies of files of a store may occupy on the disk together."""

UNUSED_SECONDS = 86_400.0
"""A copy that was asked for since stays, since a run may be reading it."""


def fetch(uri: Uri, into: Path) -> Path:
    """Copy a file, or a folder with all that is below it, to the disk. Returns the copy.

    The copy lies in a folder of `into` that is called after the state of what is copied, so one that is there already
    is not fetched again. Copies that nobody has asked for since a day are removed, the oldest first, while all occupy
    over FETCHED_BYTES. Raises FileNotFoundError, RejectedError for a name that leaves the folder, and OSError.
    """
    with _saying(uri):
        store = _of(uri)
        found = {path: info for path, info in store.find(uri, detail=True).items() if not path.endswith("/")}
        if not found:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder")
        root = store._strip_protocol(uri)
        state = hashlib.sha256(repr([(path, sorted(map(str, found[path].items()))) for path in sorted(found)]).encode())
        target = into / state.hexdigest()[:32]
        copy = target / uri.name
        if target.exists():
            with contextlib.suppress(OSError):  # a cache that may only be read
                os.utime(target)
            return copy
        part = into / f"{target.name}.{uuid.uuid4().hex}.part"
        try:
            places = [part / uri.name / _below(path.removeprefix(root).lstrip("/")) for path in sorted(found)]
            for folder in {place.parent for place in places}:
                folder.mkdir(parents=True, exist_ok=True)
            store.get(sorted(found), [str(place) for place in places])
            with contextlib.suppress(OSError):  # another process was quicker
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _trim(into, target)
        return copy


def _trim(into: Path, newest: Path) -> None:
    """Remove copies as `fetch` says, and what was left half fetched."""
    copies = sorted((path.stat().st_mtime, path) for path in into.iterdir())
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for _, path in copies}
    over = sum(sizes.values()) - FETCHED_BYTES
    for used, path in copies:
        if path != newest and time.time() - used > UNUSED_SECONDS and (over > 0 or path.suffix == ".part"):
            shutil.rmtree(path, ignore_errors=True)
            over -= sizes[path]


def _below(name: str) -> str:
    """A name of a file below a folder. Raises RejectedError if it leaves the folder."""
    if ".." in name.split("/") or "\\" in name or "\0" in name:
        raise RejectedError(f"{shown(name)!r} leaves the folder")
    return name
