"""A server of the Open Inference Protocol v2 for classifiers, with a durable count of what it was asked.

It trusts no request. Bodies, batches, what waits and the rate are bounded, and whatever is wrong with a request is said
in one line, `{"error": ...}`. Without a token it answers only to this machine's own names, so that no page in a browser
can ask it.
"""

import asyncio
import errno
import functools
import hashlib
import hmac
import json
import logging
import math
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web

from ray_dfml.data.services import is_loopback
from ray_dfml.errors import ResourceError, UsageError, did_you_mean
from ray_dfml.services import openapi
from ray_dfml.services.counter import Counter
from ray_dfml.services.hosting import Adapts, Batcher, NotFinite, Served
from ray_dfml.services.protocol import HEADER_LENGTH, Malformed, Message, Tensor, pack, unpack
from ray_dfml.services.rate import Bucket
from ray_dfml.types import size_text

MOST_BYTES = 64 << 20
"""The largest body, after decompression."""
MOST_IMAGES = 4096
"""The most images of a request."""
MOST_WAITING = 256 << 20
"""Bytes of bodies that are read or wait for their answers at a time, at most."""
BODY_SECONDS = 60
"""How long a body may take to arrive."""
STOP_SECONDS = 30
"""How long requests that are at work may take once the server stops."""
SLACK = 1e-5
"""How far pixels may leave [0, 1] by rounding."""

MOST_ADAPTED = 64
"""The most classifiers that a learner has made and that are kept; then the oldest is forgotten."""

VERSION = "1"
"""The only version of every model."""
SERVER = "ray-dfml"
"""The name of the server in its metadata."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """The routes and limits of a server of some classifiers, by their ids.

    `rate` bounds the images of a second, over all models; `token`, if there is one, must come with every request but
    those about health. A `learner`, if there is one, makes further classifiers of supports. `note` gets one line for
    each defect.
    """

    def __init__(
        self,
        models: Sequence[Served],
        counter: Counter,
        *,
        rate: float | None = None,
        token: str | None = None,
        learner: Adapts | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._executor = ThreadPoolExecutor(1, "model")
        self._models = {served.id: Batcher(served, counter, self._executor) for served in models}
        self._learner = learner
        self._counter, self._note = counter, note
        self._bucket = None if rate is None else Bucket(rate)
        self._token = None if token is None else hashlib.sha256(token.encode()).digest()
        self._waiting = 0
        self._document = openapi.document(models, secured=token is not None, learner=learner)

    def app(self) -> web.Application:
        """The application, whose routes are those of `openapi`."""
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[self._errors, self._guard])
        for route in (*openapi.ROUTES, *([openapi.ADAPT] if self._learner else [])):
            app.router.add_route(route.method, route.path, getattr(self, route.name))
        return app

    def runner(self) -> web.AppRunner:
        """What serves the application. It logs nothing, since aiohttp would log what is in a broken request."""
        quiet = logging.getLogger(f"{__name__}.http")
        quiet.propagate = False
        quiet.addHandler(logging.NullHandler())
        return web.AppRunner(self.app(), access_log=None, logger=quiet, shutdown_timeout=STOP_SECONDS)

    @property
    def ids(self) -> list[str]:
        """The ids of the classifiers that are served now."""
        return list(self._models)

    def close(self) -> None:
        """Stop the model's thread. No request may be at work."""
        self._executor.shutdown()

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn whatever is raised into one line of JSON."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            headers = {name: error.headers[name] for name in _KEPT if name in error.headers}
            text = error.text
            if text is None or text == f"{error.status}: {error.reason}":  # nobody here has said more
                text = f"{request.method} {request.path}: {error.reason}"
            return _error(error.status, text, headers)
        except (Malformed, UsageError) as error:
            return _error(400, str(error))
        except (NotFinite, ResourceError) as error:
            self._note(str(error))
            return _error(500, str(error))
        except Exception as error:
            self._note(f"{request.method} {request.path}: {type(error).__name__}: {error}")
            return _error(500, "this request met a defect of the server")

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let through who has the token, or, without one, whoever calls this machine by its own name."""
        if request.path in openapi.OPEN:
            return await handler(request)
        if self._token is not None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "replace")).digest(), self._token):
                headers = {"WWW-Authenticate": "Bearer"}
                raise web.HTTPUnauthorized(text="send the token as 'Authorization: Bearer TOKEN'", headers=headers)
        elif not is_loopback(_name(request.host)) or "Origin" in request.headers:
            raise web.HTTPForbidden(text="without a token only programs on this machine are answered, by its own name")
        return await handler(request)

    def _batcher(self, request: web.Request) -> Batcher:
        id = request.match_info["model"]
        if id not in self._models:
            raise web.HTTPNotFound(text=f"no model {id[:128]!a} here{did_you_mean(id, self._models)}")
        if request.match_info.get("version", VERSION) != VERSION:
            raise web.HTTPNotFound(text=f"{id} has version {VERSION} only")
        return self._models[id]

    async def live(self, request: web.Request) -> web.Response:
        """Say that the server runs."""
        return _json({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Say that the server answers; its models are there before it listens."""
        return _json({"ready": True})

    async def metadata(self, request: web.Request) -> web.Response:
        """Name and version of the server, and what it can besides the protocol."""
        return _json({"name": SERVER, "version": version("ray-dfml"), "extensions": ["binary_tensor_data"]})

    async def stats(self, request: web.Request) -> web.Response:
        """Images received and answered so far, in all and of each model."""
        counts = await asyncio.to_thread(self._counter.counts, list(self._models))
        total = {name: sum(getattr(one, name) for one in counts.values()) for name in ("received", "answered")}
        return _json(total | {"models": {id: one._asdict() for id, one in counts.items()}})

    async def openapi(self, request: web.Request) -> web.Response:
        """The description of the server in OpenAPI 3.1."""
        return _json(self._document)

    async def model(self, request: web.Request) -> web.Response:
        """Names, shapes and datatypes of what a model takes and gives."""
        return _json(openapi.metadata(self._batcher(request).served))

    async def model_ready(self, request: web.Request) -> web.Response:
        """Say that a model answers."""
        return _json({"name": self._batcher(request).served.id, "ready": True})

    async def infer(self, request: web.Request) -> web.Response:
        """Answer one batch of images."""
        return await self._bounded(request, functools.partial(self._answer, self._batcher(request)))

    async def adapt(self, request: web.Request) -> web.Response:
        """Make a classifier of labelled images; its id depends on these alone."""
        return await self._bounded(request, self._adapt)

    async def _bounded(
        self, request: web.Request, answer: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.Response:
        """The answer to a request with a body, if there is room for it."""
        size = MOST_BYTES if request.content_length is None else request.content_length
        if size > MOST_BYTES:
            raise web.HTTPRequestEntityTooLarge(MOST_BYTES, size, text=f"a body has at most {MOST_BYTES} bytes")
        if "Content-Encoding" in request.headers:  # it may grow to what is read at most
            size = MOST_BYTES
        if self._waiting + size > MOST_WAITING:
            raise _later("many requests wait already", 1)
        self._waiting += size
        try:
            return await answer(request)
        finally:
            self._waiting -= size

    def _pace(self, count: int) -> None:
        """Refuse images that are more than the rate allows now."""
        if self._bucket and (seconds := self._bucket.take(count)):
            raise _later("more images a second than this server answers", seconds)

    async def _adapt(self, request: web.Request) -> web.Response:
        learner = self._learner
        assert learner is not None
        _, tensors = await _message(request)
        images, labels = _support(tensors, learner.image.shape)
        self._pace(len(images))
        support = hashlib.sha256(json.dumps([images.shape, labels]).encode() + images.tobytes())
        id = f"adapted-{support.hexdigest()[:16]}"
        batcher = self._models.pop(id, None)
        if batcher is None:
            loop = asyncio.get_running_loop()
            served = await loop.run_in_executor(self._executor, learner.adapt, id, images, labels)
            batcher = Batcher(served, self._counter, self._executor)
        self._models[id] = batcher
        for old in list(self._models)[:-MOST_ADAPTED]:
            del self._models[old]
        return _json({"model": id, "classes": list(batcher.served.classes)})

    async def _answer(self, batcher: Batcher, request: web.Request) -> web.Response:
        served = batcher.served
        head, tensors = await _message(request)
        if len(tensors) != 1:
            raise Malformed(f"expected one input of images, got {len(tensors)}")
        images = _images(tensors[0], served.id, served.image.shape)
        binary = _wants_binary(head, served)
        id = head.get("id", "")
        if not isinstance(id, str):
            raise Malformed("the id of a request is a text")
        self._pace(len(images))
        answers = await batcher.ask(images, _key(id, images))
        kind = "INT64" if answers.dtype.kind == "i" else "FP32"
        said = {"model_name": served.id, "model_version": VERSION} | ({"id": id} if id else {})
        packed = pack("outputs", said, [Tensor(served.gives.output, kind, answers)], binary=binary)
        if packed.header_length is None:
            return web.Response(body=packed.body, content_type="application/json")
        headers = {HEADER_LENGTH: str(packed.header_length)}
        return web.Response(body=packed.body, content_type="application/octet-stream", headers=headers)


async def run(server: Server, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is at work. `announce` gets the address, with the real port.

    Raises ResourceError if the port is taken or the host is none of this machine's.
    """
    runner = server.runner()
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        real = runner.addresses[0][1]
        announce(f"http://[{host}]:{real}" if ":" in host else f"http://{host}:{real}")
        await stop.wait()
    except OSError as error:
        what = "is taken; choose another, or 0 for a free one" if error.errno == errno.EADDRINUSE else error.strerror
        raise ResourceError(f"port {port} of {host}: {what}") from None
    finally:
        await runner.cleanup()
        server.close()


_KEPT = ("Retry-After", "WWW-Authenticate", "Allow")
"""Headers of errors that say more than their text."""


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(text=json.dumps(value), status=status, headers=headers, content_type="application/json")


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return _json({"error": " ".join(text.split())}, status, headers)


def _later(text: str, seconds: float) -> web.HTTPException:
    wait = math.ceil(seconds)
    return web.HTTPTooManyRequests(text=f"{text}; come back in {wait} s", headers={"Retry-After": str(wait)})


def _name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _length(text: str | None) -> int | None:
    """The value of the header of binary tensors."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Malformed(f"{HEADER_LENGTH} is no number of bytes")
    return int(text)


async def _message(request: web.Request) -> Message:
    """The message in the body of a request."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not arrive within {BODY_SECONDS} s") from None
    return unpack("inputs", body, _length(request.headers.get(HEADER_LENGTH)))


def _support(tensors: Sequence[Tensor], shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """The images of a support, float32 [n c h w] in [0, 1], and their labels."""
    named = {tensor.name: tensor for tensor in tensors}
    if len(tensors) != 2 or set(named) != {"images", "labels"}:
        raise Malformed("expected two inputs, 'images' and 'labels'")
    images, labels = _images(named["images"], "the learner", shape), named["labels"]
    if labels.datatype != "BYTES" or labels.array.shape != (len(images),):
        raise Malformed(f"labels are BYTES of shape [{len(images)}], one for each image")
    try:
        return images, [label.decode() for label in labels.array.tolist()]
    except UnicodeDecodeError:
        raise Malformed("a label is no UTF-8") from None


def _images(tensor: Tensor, taker: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The images of a request, float32 [n c h w] in [0, 1]. Their input may have any name."""
    _, datatype, array = tensor
    if datatype != "FP32":
        raise Malformed(f"the input is FP32 with pixels in [0, 1], got {datatype}; send uint8 pixels as FP32, over 255")
    if array.ndim != 4 or array.shape[1:] != shape:
        raise Malformed(f"{taker} takes images of shape [n, {size_text(shape)}], got {array.shape}")
    if not 1 <= len(array) <= MOST_IMAGES:
        raise Malformed(f"a request has 1 to {MOST_IMAGES} images, got {len(array)}")
    if not bool(((array >= -SLACK) & (array <= 1 + SLACK)).all()):
        fault = "are not all in [0, 1]; divide by 255" if np.isfinite(array).all() else "hold NaN or infinity"
        raise Malformed(f"the pixels {fault}")
    return array


def _wants_binary(head: Mapping[str, Any], served: Served) -> bool:
    """Whether the answer is wanted as bytes. Raises Malformed for an output that the model does not give."""
    parameters, outputs = head.get("parameters", {}), head.get("outputs", [])
    if not isinstance(parameters, dict) or not isinstance(outputs, list):
        raise Malformed("parameters are an object, and outputs a list")
    binary = parameters.get("binary_data_output", False)
    for wanted in outputs:
        if not isinstance(wanted, dict) or not isinstance(options := wanted.get("parameters", {}), dict):
            raise Malformed("an output that is wanted is an object with a name")
        if wanted.get("name") != served.gives.output:
            raise Malformed(f"{served.id} gives {served.gives.output!r}, not {str(wanted.get('name'))[:60]!a}")
        if unknown := [name for name in options if name != "binary_data"]:
            raise Malformed(f"an output has no parameter {unknown[0][:60]!a} here")
        binary = options.get("binary_data", binary)
    return binary is True


def _key(id: str, images: np.ndarray) -> bytes | None:
    """What a repeat of a request has in common with it: id and images. A request without an id is never a repeat."""
    if not id:
        return None
    return hashlib.sha256(id.encode("utf-8", "surrogatepass") + b"\0" + images.tobytes()).digest()
