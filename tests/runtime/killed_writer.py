"""`ray-dfml` in a process that kills itself at a write to an object store, for tests of SIGKILL.

Usage: killed_writer.py MOMENT PHASE LOG WORD...; it dies at the write of number MOMENT, `before` it, `after` it, or
with `half` of its bytes on the way. The rounds that it begins are lines of LOG.
"""

import http.client
import os
import signal
import sys
from typing import Any
from urllib.parse import urlsplit

from ray_dfml import object_store
from ray_dfml.cli import main
from ray_dfml.files import Uri
from ray_dfml.pipeline import Trainer


def die() -> None:
    """End at once, as after `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def put_half(uri: Uri, data: bytes) -> None:
    """Begin a PUT of `data`, and send the first half of it."""
    line = http.client.HTTPConnection(urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    line.putrequest("PUT", f"/{uri.removeprefix('s3://')}")
    line.putheader("Content-Length", str(len(data)))
    line.endheaders(data[: len(data) // 2])


def arm(moment: int, phase: str, log: str) -> None:
    """Let the write of number `moment` be the last one, and note the rounds."""
    write, begin, count = object_store.write, Trainer.round, iter(range(10**6))

    def counted(uri: Uri, data: bytes) -> None:
        number = next(count)
        if number == moment and phase == "half":
            put_half(uri, data)
        if number == moment and phase != "after":
            die()
        write(uri, data)
        if number == moment:
            die()

    def noted(trainer: Trainer, r: int) -> Any:
        with open(log, "a") as lines:
            lines.write(f"{r}\n")
        return begin(trainer, r)

    object_store.write, Trainer.round = counted, noted


if __name__ == "__main__":
    arm(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    main(sys.argv[4:])
