"""A server's own count of the images that it was asked about, which outlives it: one sqlite file.

`received` counts the images of every request that was understood, repeats included. `answered` counts those of each
request that was answered, repeats left out: a request is known by its id and its images. Both are on the disk before
the model runs, or before the answer leaves, so whoever dies: answered by the server <= received.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from ray_dfml.errors import ResourceError

WAIT_SECONDS = 30
"""How long one process waits until another has written."""

_APPLICATION = 0x64666D63  # "dfmc"
_TABLES = """
CREATE TABLE IF NOT EXISTS counts (
    model TEXT PRIMARY KEY, received INTEGER NOT NULL DEFAULT 0, answered INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (model TEXT, key BLOB, PRIMARY KEY (model, key)) WITHOUT ROWID;
"""


class Counts(NamedTuple):
    """Images that a server received and answered."""

    received: int
    answered: int


class Counter:
    """The counts of some models in a file, which is made if it is absent. Several servers may share a file.

    Raises ResourceError where the file cannot be read or written, or is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with self._named():
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and 0 < file.stat().st_size < 512:  # sqlite would take it for an empty database
                raise sqlite3.DatabaseError("file is not a database")
            self._writer = self._connect()
            (owner,) = self._writer.execute("PRAGMA application_id").fetchone()
            if owner != _APPLICATION and self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("it is the database of another program")
            self._writer.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.executescript(_TABLES)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ResourceError(f"{self.file}: the count of images cannot be kept here: {error}") from None

    def receive(self, model: str, images: int) -> None:
        """Count images of requests that have come."""
        add = "INSERT INTO counts (model, received) VALUES (?, ?)"
        with self._named():
            self._writer.execute(
                f"{add} ON CONFLICT (model) DO UPDATE SET received = received + excluded.received", (model, images)
            )

    def answer(self, model: str, requests: Sequence[tuple[bytes | None, int]]) -> None:
        """Count requests, by key and number of images, whose answers are there.

        A known key is not counted again; a request without a key always counts, and nothing is kept of it.
        """
        with self._named():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                new = sum(images for key, images in requests if key is None or self._is_new(model, key))
                self._writer.execute("UPDATE counts SET answered = answered + ? WHERE model = ?", (new, model))
                self._writer.execute("COMMIT")
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise

    def _is_new(self, model: str, key: bytes) -> bool:
        """Remember a request, and return whether it was not known."""
        return self._writer.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", (model, key)).rowcount > 0

    def counts(self, models: Sequence[str]) -> dict[str, Counts]:
        """Model -> its counts so far, in any thread."""
        with self._named(), closing(self._connect()) as reader:
            rows = {row[0]: Counts(*row[1:]) for row in reader.execute("SELECT model, received, answered FROM counts")}
        return {model: rows.get(model, Counts(0, 0)) for model in models}

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
