"""Versions of a folder in an object store. A reader sees a whole version, whatever became of the writer.

    latest.json                   which version is the newest: `name` of its list of files, with `size` and `sha256`
    000012-5e0c31d2/version.json  the list: each file as objects that follow each other, with size and sha256 of each
    000012-5e0c31d2/status.json   what version 12 wrote anew
    000011-5e0c31d2/metrics.jsonl a file that grows is a row of such segments

A version is written in this order: what is new, each object once and under a name that was never used before; the list;
then `latest.json`, which alone is replaced. So nothing half-written is ever reached from it. The letters after the
number are of the writer, so one that was taken for dead and wakes up cannot replace an object of the next writer.
"""

import hashlib
import json
import re
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ray_dfml import object_store
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from ray_dfml.files import Uri, shown

LATEST = "latest.json"
LIST = "version.json"
FORMAT = 1

SEGMENTS = 64
"""Of so many segments a file is written whole again."""

KEEP = 2
"""How many versions are kept, so that a reader who has just begun can end."""

_VERSION = re.compile(r"(\d{6,})-[0-9a-f]{8}")
"""The folder of what a version wrote: its number, and letters of its writer."""

TRIES = 10
"""How often a reader begins again whose version was dropped under its hands."""


class Segment(NamedTuple):
    """A part of a file: the object below the URI that holds it, its size in bytes, and its sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Version:
    """The files of a version by their names, as segments."""

    name: str = ""
    """The object that holds its list."""
    files: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)

    @property
    def objects(self) -> set[str]:
        """All objects that it needs."""
        parts = {segment.name for segments in self.files.values() for segment in segments}
        return parts | {self.name}


def current(uri: Uri) -> Version | None:
    """The newest version of a folder; None if there is none. Raises RejectedError if it is damaged, and OSError."""
    for _ in range(TRIES):
        try:
            latest = object_store.read(uri / LATEST)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(latest)
            here = _segment(found["name"], found["size"], found["sha256"])
            return _version(here.name, _part(uri, here))
        except FileNotFoundError:
            continue  # a newer version has replaced it
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RejectedError(f"{uri / LATEST}: not what this program writes ({error}); restore it") from None
    raise ResourceError(f"{uri}: {LATEST} names what is not there; restore it, or start a new run")


def _version(name: str, data: bytes) -> Version:
    found = json.loads(data)
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']}, this version of ray_dfml reads {FORMAT}")
    for file in map(_inside, found["files"]):
        if not _is_published(PurePosixPath(file)):
            raise ValueError(f"{shown(file)!r} never leaves its machine")
    return Version(name, {file: tuple(_segment(*one) for one in parts) for file, parts in found["files"].items()})


def _segment(name: str, size: int, sha256: str) -> Segment:
    return Segment(_inside(str(name)), int(size), str(sha256))


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ValueError(f"{shown(name)!r} leaves the folder")
    return name


def _is_published(name: PurePosixPath) -> bool:
    """Whether a file of the folder is for others. Hidden files and databases are for one machine."""
    return not any(part.startswith(".") for part in name.parts) and ".sqlite" not in name.name


def _part(uri: Uri, segment: Segment) -> bytes:
    data = object_store.read(uri / segment.name)
    if _whole(data) != (segment.size, segment.sha256):
        raise RejectedError(f"{uri / segment.name}: is not the object that was written; restore it")
    return data


def content(uri: Uri, version: Version, name: str) -> bytes:
    """A file of a version. Raises RejectedError if it is damaged, FileNotFoundError, and OSError."""
    return b"".join(_part(uri, segment) for segment in version.files[name])


def fetch(uri: Uri, into: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> Version:
    """Copy the newest version into a folder, or the files of it that are wanted. Returns the version.

    Raises UsageError if there is none, RejectedError if it is damaged, and ResourceError if the store does not answer.
    """
    try:
        for _ in range(TRIES):
            version = current(uri)
            if version is None:
                raise UsageError(f"{uri}: not a run folder (no {LATEST}); name the --run-dir of a run")
            names = list(filter(wanted, version.files))
            try:
                for name in names:
                    data, file = content(uri, version, name), into / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
                return version
            except FileNotFoundError:
                if current(uri) == version:
                    raise
            for name in names:  # of a version that is there no more
                (into / name).unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{error.filename or uri}: {error.strerror or error}") from None
    raise ResourceError(f"{uri}: changes faster than it can be read; try again")


def exists(uri: Uri) -> bool:
    """Whether a version is published at a URI. Raises ResourceError if the store does not answer."""
    return object_store.exists(uri / LATEST)


def local(place: Path | Uri) -> Path:
    """A folder with the files of a run, to read: the run's own, or a copy of what is published at a URI.

    The copy has no checkpoints, and is removed when this process ends. Raises as `fetch`.
    """
    if isinstance(place, Path):
        return place
    kept = tempfile.TemporaryDirectory(prefix="ray-dfml-")
    _COPIES.append(kept)
    folder = Path(kept.name) / place.name
    folder.mkdir()
    fetch(place, folder, wanted=lambda name: not name.startswith("checkpoints/"))
    return folder


_COPIES: list[tempfile.TemporaryDirectory[str]] = []


class _Held(NamedTuple):
    """A file as a version holds it: its segments, their size and hash together, and by what a change is noticed."""

    segments: tuple[Segment, ...]
    whole: tuple[int, str]
    signature: tuple[int, int, int]


class Publisher:
    """Writes versions of one folder to a URI. There may be one at a time.

    `check` is called before a version takes effect; whatever it raises keeps the version out.
    """

    def __init__(self, uri: Uri, folder: Path, version: Version | None, check: Callable[[], None]) -> None:
        """`version` is the one that the folder holds now, if any. Raises OSError."""
        self.uri = uri
        self._folder, self._check = folder, check
        self._recent = deque([version or Version()], maxlen=KEEP)
        self._held = {
            name: _Held(segments, _whole((folder / name).read_bytes()), _signature(folder / name))
            for name, segments in self._recent[-1].files.items()
        }
        used = [found for found in map(_VERSION.fullmatch, object_store.names(uri)) if found]
        self._objects = {f"{found[0]}/{one}" for found in used for one in object_store.below(uri / found[0])}
        self._next = 1 + max((int(found[1]) for found in used), default=-1)
        self._writer = uuid.uuid4().hex[:8]

    def publish(self) -> None:
        """Write the folder as it is now. A file that is written meanwhile must be whole at every moment.

        Hidden files and databases stay here. If nothing has changed, nothing is written. Raises OSError, and the
        version before is then still the newest.
        """
        here = f"{self._next:06d}-{self._writer}"
        self._next += 1  # no name is used twice, not even after a failure
        held = {name: self._put_file(name, path, here) for name, path in _files(self._folder)}
        version = Version(f"{here}/{LIST}", {name: one.segments for name, one in held.items()})
        if version.files == {name: one.segments for name, one in self._held.items()}:
            return
        listed = self._put(version.name, json.dumps({"format": FORMAT, "files": version.files}).encode())
        self._check()
        self._recent.append(version)  # also if this is interrupted, since the store may take it in later
        object_store.write(self.uri / LATEST, json.dumps(listed._asdict()).encode())
        self._held = held
        self._drop()

    def _put_file(self, name: str, path: Path, here: str) -> _Held:
        signature, before = _signature(path), self._held.get(name)
        if before is not None and before.signature == signature:
            return before
        data, start = path.read_bytes(), 0
        segments: tuple[Segment, ...] = ()
        if before is not None and len(before.segments) < SEGMENTS and _whole(data[: before.whole[0]]) == before.whole:
            start, segments = before.whole[0], before.segments
        if start < len(data) or not segments:
            segments = (*segments, self._put(f"{here}/{name}", data[start:]))
        return _Held(segments, _whole(data), signature)

    def _put(self, name: str, data: bytes) -> Segment:
        self._objects.add(name)
        object_store.write(self.uri / name, data)
        return Segment(name, *_whole(data))

    def _drop(self) -> None:
        """Remove the objects that no kept version needs, also those of a writer that was killed."""
        for name in sorted(self._objects.difference(*(version.objects for version in self._recent))):
            try:
                object_store.remove(self.uri / name)
            except OSError:
                return  # the next version tries again
            self._objects.discard(name)


def _whole(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


def _signature(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and _is_published(PurePosixPath(name)):
            yield name.as_posix(), path
