"""The ledger: every image that was sent to a teacher, and every answer that came back, in one sqlite file.

A row is a batch. It is on the disk before the batch is sent (`grant`), each further attempt adds to its `sent`
(`resend`), and its answers are on the disk before anyone sees them (`settle`). So whatever dies, no answer is lost,
and nothing that was sent is forgotten. `answered` counts unique images, and answered <= sent always.
"""

import contextlib
import functools
import hashlib
import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ray_dfml.data import weights_file
from ray_dfml.data.services import Asked, Budget
from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.services.budgets import Budgets, exact
from ray_dfml.types import Claim, Spent

HASH_BYTES = 32
LOCK_SECONDS = 20.0
"""How long a writer waits for another one, which may be dying."""

_APPLICATION = 0x64666D6C  # "dfml"
_VERSION = 1
_NO_BUDGET = Budget()
_POSITION = (1 << 32) - 1

_TABLE = """CREATE TABLE batches (
    id INTEGER PRIMARY KEY,
    teacher TEXT NOT NULL,
    access TEXT NOT NULL,
    time REAL NOT NULL,
    price TEXT NOT NULL,
    sent INTEGER NOT NULL,
    answered INTEGER NOT NULL,
    columns INTEGER,
    hashes BLOB NOT NULL,
    answers BLOB,
    crc INTEGER NOT NULL
)"""


def content_hashes(asked: Asked, images: np.ndarray) -> list[bytes]:
    """sha256 of each image [n ...] with its dtype, its shape, and all that the teacher's answer depends on.

    The same pixels as uint8 and as float32 have different hashes.
    """
    images = np.ascontiguousarray(images)
    start = hashlib.sha256(asked.identity + f"{images.dtype.str}{images.shape[1:]}".encode())
    hashes = []
    for image in images:
        one = start.copy()
        one.update(image)
        hashes.append(one.digest())
    return hashes


@dataclass
class _Batch:
    """A batch whose answers have not come."""

    teacher: str
    access: str
    time: float
    price: str
    sent: int
    hashes: list[bytes]

    def crc(self, answered: int, columns: int | None, answers: bytes | None) -> int:
        fields = [self.teacher, self.access, self.time, self.price, self.sent, answered, columns]
        start = zlib.crc32(b"".join(self.hashes), zlib.crc32(repr(fields).encode()))
        return zlib.crc32(answers or b"", start)


class Ledger:
    """The ledger in a file, with its budgets. One process may have it open, whose threads may all call it.

    It belongs on a local disk: sqlite's log does not work on NFS, nor on an object store.
    """

    def __init__(
        self,
        path: Path,
        asked: Sequence[Asked],
        *,
        run: Budget = _NO_BUDGET,
        each: Budget = _NO_BUDGET,
        pools: Mapping[str, Budget] | None = None,
    ) -> None:
        """Open the ledger at `path`, or make it. Raises RejectedError if the file is damaged or no ledger.

        `run`, `each` and `pools` are the budgets of the run, of every teacher, and of pools by name. Raises
        ResourceError if another process has the ledger open, or if the disk does not let it be written.
        """
        self.path = path
        self._asked = {one.card.id: one for one in asked}
        self._budgets = Budgets(asked, run=run, each=each, pools=pools or {})
        self._thread = threading.RLock()
        self._index: dict[bytes, int] = {}
        self._open: dict[int, _Batch] = {}
        self._answered: dict[str, int] = dict.fromkeys(self._asked, 0)
        self._decoded = functools.lru_cache(maxsize=64)(self._read_answers)
        self._lock = _locked(path)
        try:
            self._db = self._connect()
            self._load()
        except BaseException:
            self._lock.release()
            raise

    def _connect(self) -> sqlite3.Connection:
        with _refusing(self.path):
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            if db.execute("PRAGMA schema_version").fetchone()[0] == 0:
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
                mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                db.execute(_TABLE)
            else:
                mode = db.execute("PRAGMA journal_mode").fetchone()[0]
            found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found != [_APPLICATION, _VERSION]:
                raise RejectedError(f"{self.path}: is no ledger of this version; move it away")
            if mode != "wal":
                raise ResourceError(f"{self.path}: sqlite cannot keep its log here; choose a folder on a local disk")
            db.execute("PRAGMA synchronous = FULL")
            if (fault := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise ValueError(fault)
        return db

    def _load(self) -> None:
        """Rebuild the index of hashes, the counters and the open batches."""
        with _refusing(self.path):
            rows = self._db.execute(
                "SELECT id, hashes, answers, answered, columns, crc, teacher, access, time, price, sent FROM batches"
            )
            for id, blob, answers, answered, columns, crc, teacher, access, granted, price, sent in rows:
                hashes = [blob[i : i + HASH_BYTES] for i in range(0, len(blob), HASH_BYTES)]
                batch = _Batch(teacher, access, granted, price, sent, hashes)
                if batch.crc(answered, columns, answers) != crc:
                    raise ValueError(f"batch {id} is not what was written")
                self._budgets.count(teacher, sent, Decimal(price))
                self._answered[teacher] = self._answered.get(teacher, 0) + answered
                if answers is None:
                    self._open[id] = batch
                else:
                    self._remember(id, hashes)

    def _remember(self, id: int, hashes: Sequence[bytes]) -> None:
        for position, one in enumerate(hashes):
            self._index.setdefault(one, id << 32 | position)

    def missing(self, hashes: Sequence[bytes]) -> np.ndarray:
        """Positions [m] of the hashes that have no answer, each content once."""
        with self._thread:
            first: dict[bytes, int] = {}
            for position, one in enumerate(hashes):
                if one not in self._index:
                    first.setdefault(one, position)
            return np.array(list(first.values()), np.int64)

    def answers(self, hashes: Sequence[bytes]) -> np.ndarray:
        """The answers, float32 [n q] or int64 [n], of hashes that all have one. Raises KeyError otherwise."""
        with self._thread:
            places = np.array([self._index[one] for one in hashes], np.int64)
            rows, positions = places >> 32, places & _POSITION
            found: np.ndarray | None = None
            for row in np.unique(rows).tolist():
                of_row, at = self._decoded(row), np.flatnonzero(rows == row)
                found = np.empty((len(hashes), *of_row.shape[1:]), of_row.dtype) if found is None else found
                found[at] = of_row[positions[at]]
            if found is None:
                raise KeyError("no hashes were given")
            return found

    def _read_answers(self, id: int) -> np.ndarray:
        with _refusing(self.path):
            columns, data = self._db.execute("SELECT columns, answers FROM batches WHERE id = ?", (id,)).fetchone()
        return np.frombuffer(data, "<i8") if columns == 0 else np.frombuffer(data, "<f4").reshape(-1, columns)

    def together(self, acts: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do several things with one sync of the disk. Returns what each returns, or the error that it raises.

        If the disk fails, nothing of it is kept, ResourceError is raised, and the ledger must be opened again.
        """
        with self._thread:
            try:
                with _refusing(self.path):
                    self._db.execute("BEGIN IMMEDIATE")
                results = [_result(act) for act in acts]
                with _refusing(self.path):
                    self._db.execute("COMMIT")
            except BaseException:
                self._db.close()  # what is in memory may be ahead of the file
                raise
        return results

    def check(self, teacher: str, images: int) -> None:
        """Raise BudgetReached if no budget allows `images` more to be sent to a teacher."""
        with self._thread:
            self._budgets.check(teacher, images)

    def grant(self, teacher: str, hashes: Sequence[bytes]) -> int:
        """Count a batch as sent, on the disk, before it is sent. Returns its id. Raises BudgetReached."""
        one = self._asked[teacher]
        with self._thread:
            self._budgets.check(teacher, len(hashes))
            price = str(exact(one.terms.price))
            batch = _Batch(teacher, one.card.access, time.time(), price, len(hashes), list(hashes))
            crc = batch.crc(0, None, None)
            values = (teacher, batch.access, batch.time, price, batch.sent, 0, b"".join(hashes), crc)
            with _refusing(self.path):
                id = self._db.execute(
                    "INSERT INTO batches (teacher, access, time, price, sent, answered, hashes, crc)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                ).lastrowid
            assert id is not None
            self._open[id] = batch
            self._budgets.count(teacher, batch.sent, Decimal(price))
            return id

    def resend(self, id: int) -> None:
        """Count one more attempt of an open batch, before it is made. Raises BudgetReached."""
        with self._thread:
            batch = self._open[id]
            self._budgets.check(batch.teacher, len(batch.hashes))
            self._attempt(id, batch, 1)

    def refund(self, id: int) -> None:
        """Take back the last attempt of an open batch, which never reached the teacher."""
        with self._thread:
            batch = self._open[id]
            if batch.sent < len(batch.hashes):
                raise ValueError(f"batch {id} has no attempt to take back")
            self._attempt(id, batch, -1)

    def _attempt(self, id: int, batch: _Batch, times: int) -> None:
        more = times * len(batch.hashes)
        after = _Batch(**{**batch.__dict__, "sent": batch.sent + more})
        with _refusing(self.path):
            crc = after.crc(0, None, None)
            self._db.execute("UPDATE batches SET sent = ?, crc = ? WHERE id = ?", (after.sent, crc, id))
        self._open[id] = after
        self._budgets.count(batch.teacher, more, Decimal(batch.price))

    def settle(self, id: int, answers: np.ndarray) -> None:
        """Keep the answers of a batch on the disk, float32 [m q] or int64 [m]. Those of a settled batch stay."""
        with self._thread:
            if id not in self._open:
                if self._db.execute("SELECT 1 FROM batches WHERE id = ?", (id,)).fetchone() is None:
                    raise ValueError(f"{self.path}: holds no batch {id}")
                return
            batch = self._open[id]
            n = len(batch.hashes)
            if (answers.dtype, answers.ndim) not in ((np.float32, 2), (np.int64, 1)) or len(answers) != n:
                raise ValueError(f"expected {n} answers, got {answers.dtype} of shape {answers.shape}")
            if batch.sent < n:
                raise ValueError(f"batch {id} was taken back and cannot have answers")
            columns = 0 if answers.ndim == 1 else answers.shape[1]
            data = answers.astype(answers.dtype.newbyteorder("<")).tobytes()
            new = sum(one not in self._index for one in set(batch.hashes))
            with _refusing(self.path):
                self._db.execute(
                    "UPDATE batches SET answered = ?, columns = ?, answers = ?, crc = ? WHERE id = ?",
                    (new, columns, data, batch.crc(new, columns, data), id),
                )
            del self._open[id]
            self._answered[batch.teacher] += new
            self._remember(id, batch.hashes)

    def claim(self, teacher: str, hashes: Sequence[bytes]) -> Claim:
        """See `types.Gateway.claim`."""
        with self._thread:
            missing = self.missing(hashes)
            rows = {hashes[position]: row for row, position in enumerate(missing.tolist())}
            known = [one for one in hashes if one not in rows]
            id = self.grant(teacher, [hashes[position] for position in missing]) if len(missing) else 0
            old = iter(range(len(known)))
            places = [rows[one] + len(known) if one in rows else next(old) for one in hashes]
            return Claim(
                id=id,
                missing=missing,
                known=self.answers(known) if known else None,
                places=np.array(places, np.int64),
            )

    def totals(self) -> dict[str, Spent]:
        """Teacher -> what was sent, answered and spent, for all that the ledger holds or may ask."""
        with self._thread:
            used = {id: self._budgets.used(id) for id in self._answered}
            return {
                id: Spent(sent=used[id].sent, answered=answered, cost=float(used[id].cost))
                for id, answered in self._answered.items()
            }

    def export(self, path: Path) -> None:
        """Write `ledger.jsonl`: one line per batch, whose sums are the totals. It has neither images nor keys."""
        with self._thread, _refusing(self.path):
            rows = self._db.execute(
                "SELECT teacher, access, time, price, sent, answered FROM batches WHERE sent > 0 ORDER BY id"
            ).fetchall()
        lines = [
            json.dumps({
                "teacher": teacher,
                "access": access,
                "time": datetime.fromtimestamp(granted, UTC).isoformat(timespec="milliseconds"),
                "sent": sent,
                "answered": answered,
                "cost": float(sent * Decimal(price)),
            })
            for teacher, access, granted, price, sent, answered in rows
        ]  # fmt: skip
        weights_file.write_bytes(path, "".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        """Close the file, which any process may then open."""
        with self._thread:
            self._db.close()
            self._lock.release()


def _result(act: Callable[[], Any]) -> Any:
    """What an act returns or raises. Errors of the disk are not its own, and are raised."""
    try:
        return act()
    except (ResourceError, RejectedError):
        raise
    except Exception as error:
        return error


def _locked(path: Path) -> filelock.FileLock:
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise ResourceError(f"{path}: another process has this ledger open; wait for it or stop it") from None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
    return lock


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn errors of sqlite into one line: what the disk does is a ResourceError, a damaged file a RejectedError."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise ResourceError(f"{path}: the ledger is closed, since the disk failed or the run ends") from None
    except sqlite3.OperationalError as error:
        raise ResourceError(f"{path}: the ledger cannot be read or written: {error}") from None
    except (sqlite3.Error, TypeError, ValueError) as error:
        said = weights_file.first_line(error)
        raise RejectedError(f"{path}: the ledger is damaged or another file: {said}") from None
