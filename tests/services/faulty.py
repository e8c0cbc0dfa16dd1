"""Real servers for tests: a service that fails on demand, and a recording proxy that counts what passes it."""

import asyncio
import contextlib
import gzip
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from ray_dfml.data.services import Api, Asked, Terms
from ray_dfml.services import protocol
from ray_dfml.types import Access, TeacherCard
from tests.support import image_numbers, image_spec

CLASSES = 3
SIDE = 4
KEY = "sk-very-secret-0123"

Handler = Callable[[web.BaseRequest], Any]


class Host:
    """A server on an ephemeral port of 127.0.0.1, in a thread of its own, that can die and come back."""

    def __init__(self, handler: Handler) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.port = 0
        self.run(self._start(handler))

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _start(self, handler: Handler) -> None:
        self.server = web.Server(handler)
        self.runner = web.ServerRunner(self.server, shutdown_timeout=0.1)
        await self.runner.setup()
        await self._listen()
        self.port = self.runner.addresses[0][1]

    async def _listen(self) -> None:
        self.site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await self.site.start()

    async def die(self, away: float) -> None:
        """Stop listening, drop all connections, and listen again after `away` seconds."""
        await self.site.stop()
        for connection in self.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(away)
        await self._listen()

    async def _stop(self) -> None:
        await self.runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        [task.cancel() for task in left]
        await asyncio.gather(*left, return_exceptions=True)

    def close(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextlib.contextmanager
def served(handler: Handler) -> Iterator[str]:
    """A server in a thread; yields its address. A FaultyService that dies comes back after 0.2 seconds."""
    host = Host(handler)
    if isinstance(handler, FaultyService):
        handler.die = lambda: host.die(0.2)
    try:
        yield f"http://127.0.0.1:{host.port}"
    finally:
        host.close()


def truth(numbers: Iterable[int], access: Access = "probs") -> np.ndarray:
    """The right answers to the images of these numbers (`support.unique_images`)."""
    rows = np.array([np.roll([0.5, 0.25, 0.25], number) for number in numbers], np.float32)
    logits = np.log(rows) + np.array([[number] for number in numbers], np.float32)
    return rows.argmax(1) if access == "label" else rows if access == "probs" else logits


class FaultyService:
    """An `oip` server. Each POST takes the next fault of a list, and is right when the list is used up."""

    def __init__(self, faults: Iterable[str | None] = (), *, access: Access = "probs", binary: bool = True) -> None:
        self.faults, self.access, self.binary = iter(faults), access, binary
        self.received = 0
        self.right = 0
        self.ids: list[str] = []
        self.batches: list[int] = []
        self.numbers: list[int] = []
        self.types: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.callers: list[Any] = []
        self.at_once = self.most_at_once = 0
        self.deaths = 0
        self.elsewhere = "https://user:pw@elsewhere.example/v2?sig=1"
        self.die: Callable[[], Coroutine[Any, Any, None]]
        self.delay = 0.0
        self.description: dict[str, Any] = {
            "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, SIDE, SIDE]}],
            "outputs": [{"name": "answer", "datatype": "FP32", "shape": [-1, CLASSES]}, {"name": "other"}],
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response(self.description)
        length = request.headers.get(protocol.HEADER_LENGTH)
        message = protocol.unpack("inputs", await request.read(), length and int(length))
        images = message.tensors[0].array
        self.received += len(images)
        self.batches.append(len(images))
        self.types.append(str(images.dtype))
        self.ids.append(message.head["id"])
        self.headers.append(dict(request.headers))
        self.callers.append(request.transport and request.transport.get_extra_info("peername"))
        numbers = image_numbers(np.rint(images * (1 if images.dtype == np.uint8 else 255)).astype(np.uint8))
        self.numbers += numbers
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            fault = next(self.faults, None)
            if length and not self.binary:
                return web.json_response({"error": "no binary here"}, status=500)
            return await self.answer(request, fault, numbers, bool(length))
        finally:
            self.at_once -= 1

    async def answer(
        self, request: web.BaseRequest, fault: str | None, numbers: list[int], binary: bool
    ) -> web.StreamResponse:
        right = truth(numbers, self.access)
        good = message(right, binary)
        match fault:
            case None:
                self.right += len(numbers)
                return good
            case "429":
                return web.Response(status=429)
            case "429-after":
                return web.Response(status=429, headers={"Retry-After": "1"})
            case "500":
                return web.json_response({"error": "out of memory"}, status=500)
            case "503":
                return web.Response(status=503, text="<html>gateway</html>")
            case "truncated":
                assert isinstance(good.body, bytes)
                return web.Response(body=good.body[:-9], headers=good.headers)
            case "half":
                stream = web.StreamResponse(headers={"Content-Length": "9999"})
                await stream.prepare(request)
                await stream.write(b"{")
                assert request.transport is not None
                request.transport.abort()
                return stream
            case "html":
                return web.Response(text="<!doctype html><h1>Sign in</h1>", content_type="text/html")
            case "nan":
                return message(right * np.nan, True)
            case "null":
                body = {"outputs": [{"name": "answer", "datatype": "FP32", "shape": [len(numbers)], "data": [None]}]}
                return web.json_response(body)
            case "classes":
                return message(np.full((len(numbers), CLASSES + 1), 1 / (CLASSES + 1), np.float32), binary)
            case "shape":
                return message(right[:-1], binary)
            case "other":
                return message(right, binary, name="other")
            case "sums":
                return message(right * 0.9, binary)
            case "stall":
                await asyncio.sleep(30)
                return good
            case "reset":
                assert request.transport is not None
                request.transport.abort()
                return good
            case "die":
                self.deaths += 1
                self.last_words = asyncio.ensure_future(self.die())
                await asyncio.sleep(30)
                return good
            case "401":
                return web.json_response({"error": f"bad key {request.headers.get('Authorization')}"}, status=401)
            case "bomb":
                return web.Response(body=gzip.compress(bytes(8 << 20)), headers={"Content-Encoding": "gzip"})
            case "redirect":
                return web.Response(status=307, headers={"Location": self.elsewhere})
            case _:
                return web.json_response({"error": "no"}, status=int(fault))


def message(array: np.ndarray, binary: bool, name: str = "answer") -> web.Response:
    """An answer of the protocol."""
    tensor = protocol.Tensor(name, "INT64" if array.dtype == np.int64 else "FP32", array)
    packed = protocol.pack("outputs", {}, [tensor], binary=binary)
    headers = {} if packed.header_length is None else {protocol.HEADER_LENGTH: str(packed.header_length)}
    return web.Response(body=packed.body, headers=headers)


class Recorder:
    """A proxy to an upstream address that counts the images of every POST before it passes the request on."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.seen = upstream, 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if request.method == "POST":
            length = request.headers.get(protocol.HEADER_LENGTH)
            self.seen += len(protocol.unpack("inputs", body, length and int(length)).tensors[0].array)
        names = ("Content-Type", "Authorization", protocol.HEADER_LENGTH)
        headers = {name: request.headers[name] for name in names if name in request.headers}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(
                    request.method, self.upstream + request.path, data=body, headers=headers, allow_redirects=False
                ) as reply,
            ):
                kept = ("Content-Type", "Retry-After", "Location", protocol.HEADER_LENGTH)
                found = {name: reply.headers[name] for name in kept if name in reply.headers}
                return web.Response(status=reply.status, body=await reply.read(), headers=found)
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=502)


def service(url: str, *, access: Access = "probs", terms: Terms | None = None, id: str = "svc", **api: Any) -> Asked:
    """A teacher behind HTTP, of 1x4x4 images and three classes."""
    options: dict[str, Any] = {"adapter": "oip", "model": "m", "output": "answer", "batch": 4} | api
    names = tuple(f"toy/{i}" for i in range(CLASSES))
    card = TeacherCard(id=id, arch="", image=image_spec(1, SIDE), classes=names, access=access)
    return Asked(card=card, terms=terms or Terms(), api=Api(url=url, **options))
