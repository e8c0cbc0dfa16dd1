"""Object stores of tests: one in memory, of this process alone, and a server of S3 on this machine."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
