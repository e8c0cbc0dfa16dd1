"""A server of random classifiers in a thread of the tests, and requests to it as any program would send them."""

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web

from ray_dfml.services.counter import Counter
from ray_dfml.services.hosting import Gives, Served
from ray_dfml.services.protocol import HEADER_LENGTH, Packed, Tensor, pack
from ray_dfml.services.server import Server
from ray_dfml.types import Access
from tests import support
from tests.support import FakeTeacher

TEACHER = support.random_teacher(support.card(0, channels=1, way=3))
SHAPE = TEACHER.card.image.shape


def served(
    access: Access, *, id: str = "t", teacher: FakeTeacher = TEACHER, decimals: int | None = None,
    top_k: int | None = None,
) -> Served:  # fmt: skip
    """A random teacher, as it is served."""
    gives = Gives(access=access, decimals=decimals, top_k=top_k)
    card = teacher.card
    return Served(
        id=id, image=card.image, classes=card.classes, gives=gives, net=teacher.net, theta=teacher.theta,
        stats=teacher.stats,
    )  # fmt: skip


class Running(NamedTuple):
    """A server at work: its address, and the lines that it noted."""

    url: str
    notes: list[str]


@contextlib.contextmanager
def running(models: Sequence[Served], folder: Path, **options: Any) -> Iterator[Running]:
    """Serve models, counting in `folder`, until the block ends."""
    counter, notes = Counter(folder / "served.sqlite"), []
    server = Server(models, counter, note=notes.append, **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        runner = server.runner()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield Running(f"http://127.0.0.1:{port}", notes)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
        counter.close()


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def send(
    url: str,
    method: str,
    path: str,
    body: bytes | Iterator[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One request, with the given headers and no others but those of HTTP itself."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def get(url: str, path: str, **headers: str) -> Reply:
    """GET a path."""
    return send(url, "GET", path, headers=headers)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Random float32 images [n c h w] in [0, 1], whose values an 8-bit file could hold."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.float32) / 255


def request_of(x: np.ndarray, *, id: str | None = None, binary: bool = False, **head: Any) -> Packed:
    """A request about images."""
    said = head | ({} if id is None else {"id": id})
    return pack("inputs", said, [Tensor("images", "FP32", x)], binary=binary)


def post(url: str, packed: Packed | bytes, *, model: str = "t", **headers: str) -> Reply:
    """Send a request for answers."""
    body, length = (packed, None) if isinstance(packed, bytes) else packed
    more = {} if length is None else {HEADER_LENGTH: str(length)}
    return send(url, "POST", f"/v2/models/{model}/infer", body, headers | more)


def counts(url: str, **headers: str) -> tuple[int, int]:
    """Images received and answered, by the server's own count."""
    found = get(url, "/stats", **headers).json
    return found["received"], found["answered"]
