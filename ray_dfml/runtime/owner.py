"""Who writes a run in an object store: one process at a time, which shows that it lives.

Each owner creates a file under the next number, `owner-000003.json`, which the store lets one process do. The file of
the highest number says who owns the run. Its owner writes it anew every BEAT_SECONDS. Who wants the run next looks
whether the owner's process is gone from this machine, or waits whether the file stays as it is for DEAD_SECONDS.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_dfml import object_store
from ray_dfml.errors import ResourceError, UsageError
from ray_dfml.files import Uri

BEAT_SECONDS = 10.0
DEAD_SECONDS = 45.0
LOOKS = 15
"""How often the file of another owner is looked at in DEAD_SECONDS."""


class Owner:
    """The right of this process to write below a URI, from `claim` to `release`."""

    def __init__(self, uri: Uri, number: int) -> None:
        """Use `claim`."""
        self.uri, self._number, self._beats = uri, number, 0
        self._content = {"host": socket.gethostname(), "token": uuid.uuid4().hex, **_process(os.getpid())}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @classmethod
    def claim(cls, uri: Uri, note: Callable[[str], None] = lambda line: None) -> "Owner":
        """Become the owner. `note` is told if this takes a while.

        Raises UsageError if another process is at work, and ResourceError if the store does not answer, or lets a file
        be created twice.
        """
        try:
            numbers = _numbers(uri)
            if numbers:
                _wait_for(uri, numbers[-1], note)
            mine = cls(uri, numbers[-1] + 1 if numbers else 1)
            object_store.create(_file(uri, mine._number), mine._text())
            try:
                object_store.create(_file(uri, mine._number), mine._text())
            except FileExistsError:
                pass
            else:
                raise ResourceError(f"{uri}: this store creates a file twice, so two runs could mix there; use another")
            for number in numbers:
                object_store.remove(_file(uri, number))
        except FileExistsError:
            raise UsageError(f"{uri}: another process has just begun to write this run; wait, or stop it") from None
        except OSError as error:
            raise ResourceError(f"{uri}: cannot be written: {error.strerror or error}") from None
        mine._thread.start()
        return mine

    def check(self) -> None:
        """Raise ResourceError if the run belongs to another process now, which took this one for dead."""
        if not self._is_mine():
            raise ResourceError(f"{self.uri}: another process goes on with this run; this one stops")

    def release(self) -> None:
        """Give the right back, unless another process has it. A failure of the store is left to those who come next."""
        self._end.set()
        self._thread.join()
        try:
            if self._is_mine():
                object_store.remove(_file(self.uri, self._number))
        except OSError:
            return

    def _is_mine(self) -> bool:
        """Whether the run belongs to this process. Numbers begin again when nobody owns a run, so the token counts."""
        if _numbers(self.uri)[-1:] != [self._number]:
            return False
        return (_read(self.uri, self._number) or {}).get("token") == self._content["token"]

    def _text(self) -> bytes:
        return json.dumps(self._content | {"beats": self._beats}).encode()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._beats += 1
            try:
                if self._is_mine():
                    object_store.write(_file(self.uri, self._number), self._text())
            except OSError:
                continue  # `publish` meets the same store, and says so


def _file(uri: Uri, number: int) -> Uri:
    return uri / f"owner-{number:06d}.json"


def _numbers(uri: Uri) -> list[int]:
    found = (re.fullmatch(r"owner-(\d{6,})\.json", name) for name in object_store.names(uri))
    return sorted(int(match[1]) for match in found if match)


def _wait_for(uri: Uri, number: int, note: Callable[[str], None]) -> None:
    """Return when the owner of a number is gone. Raises UsageError if it lives."""
    first = _read(uri, number)
    if first is None or _is_gone(first):
        return
    who = first.get("host", "its writer")
    note(f"{uri}: {who} has not said that it stopped; waiting {DEAD_SECONDS:g} s for a sign of life")
    for _ in range(LOOKS):
        time.sleep(DEAD_SECONDS / LOOKS)
        now = _read(uri, number)
        if now is None:
            return
        if now != first:
            raise UsageError(f"{uri}: process {now.get('pid')} of {now.get('host')} is writing this run; stop it first")


def _read(uri: Uri, number: int) -> dict[str, Any] | None:
    try:
        found = json.loads(object_store.read(_file(uri, number)))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _process(pid: int) -> dict[str, Any]:
    """A process of this machine, so that it can be told from later ones of the same number."""
    try:
        machine = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return {"pid": pid}
    return {"pid": pid, "machine": machine, "started": None if state in "ZX" else rest[18]}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process of an owner was on this machine and is there no more."""
    here = _process(os.getpid())
    if "machine" not in here or owner.get("machine") != here["machine"] or not isinstance(owner.get("pid"), int):
        return False
    return _process(owner["pid"]).get("started") != owner.get("started")
