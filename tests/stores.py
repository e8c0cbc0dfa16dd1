"""Object stores of tests: one in memory, of this process alone, and a server of S3 on this machine."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from ray_dfml import object_store
from ray_dfml.files import Uri


def upload(folder: Path, uri: Uri) -> Uri:
    """Copy the files of a folder to an object store."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            object_store.write(uri / file.relative_to(folder).as_posix(), file.read_bytes())
    return uri


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of S3 with an empty bucket `bucket`. Yields the environment in which it is found."""
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        lines = iter(server.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        drain = threading.Thread(target=server.stderr.read, daemon=True)  # it logs requests, and a full pipe stops it
        drain.start()
        S3FileSystem(endpoint_url=address, key="test", secret="test", skip_instance_cache=True).mkdir("bucket")
        yield {
            "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
    finally:
        server.kill()
        server.wait()


class Killed(BaseException):
    """A process that is dead: nothing catches it, and the store takes nothing from it any more."""


class Mortal:
    """Lets the writer of a store die at a call that changes the store: before it, or `late`, after it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, late: bool) -> None:
        self.calls, self._moment, self._late = 0, -1, late
        for name in ("write", "create", "remove"):
            patch.setattr(object_store, name, self._guarded(getattr(object_store, name)))

    def _guarded(self, call: Callable[..., None]) -> Callable[..., None]:
        def guarded(*given: Any) -> None:
            number, self.calls = self.calls, self.calls + 1
            if 0 <= self._moment < number or (number == self._moment and not self._late):
                raise Killed
            call(*given)
            if number == self._moment:
                raise Killed

        return guarded

    def count(self, act: Callable[[], object]) -> int:
        """How many such calls `act` makes."""
        self.calls = 0
        act()
        return self.calls

    @contextmanager
    def dying(self, moment: int) -> Iterator[list[bool]]:
        """Die at the call of that number. Yields a list that is not empty when it came to that."""
        self.calls, self._moment = 0, moment
        died: list[bool] = []
        try:
            yield died
        except Killed:
            died.append(True)
        finally:
            self._moment = -1
