"""A whole run of many batches against our server, while answers are spoilt and processes are killed at random.

    gateway process --> front (counts, spoils, never dies) --> `ray-dfml serve` process

Both processes are forked from a nursery that has imported everything, so that a new one is up in milliseconds.
`disturbed` makes a run and returns what it counted; it raises AssertionError where a law does not hold.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import torch
import yaml
from aiohttp import web

from ray_dfml.data.pool import Pool
from ray_dfml.data.services import Api, Asked, Terms
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.hosting import Gives, from_pool
from ray_dfml.services.protocol import HEADER_LENGTH, Tensor, pack, unpack
from ray_dfml.types import TeacherCard
from tests.services.faulty import Host
from tests.services.serving import counts

ROOT = Path(__file__).parents[2]

FAULTS = ("429", "429-after", "500", "500-late", "truncated", "html", "nan", "classes", "stall", "reset", "kill")
"""What can happen to a request. `500-late` and those after it happen once the server has it."""

NURSERY = """
import os, signal, sys
from pathlib import Path
import numpy as np
from ray_dfml.cli import main
from ray_dfml.cli.serve import serve
from ray_dfml.errors import RejectedError
from ray_dfml.runtime.shard import pin
from ray_dfml.services import client, server
from ray_dfml.services.gateway import Gateway
from tests.services.chaos import asked_of, images_of

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
client.FIRST_WAIT = float(sys.argv.pop())

def ask(pool, url, folder, count, batch, timeout):
    asked = asked_of(Path(pool), url, int(batch), float(timeout))
    with Gateway(Path(folder) / "ledger.sqlite", [asked]) as gateway:
        for first in range(0, int(count), 10 * int(batch)):
            x = images_of(asked, int(count))[first : first + 10 * int(batch)]
            while True:
                try:
                    gateway.ask(asked.card.id, x)
                    break
                except RejectedError as error:
                    print(error, file=sys.stderr, flush=True)

for line in sys.stdin:
    word, *rest = line.split()
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        ask(*rest) if word == "ask" else main([word, *rest])
    finally:
        os._exit(0)
"""


def asked_of(pool: Path, url: str, batch: int, timeout: float) -> Asked:
    """The entry of the first teacher of a pool, served at an address as probabilities."""
    card = Pool.open(pool).cards[0]
    known = TeacherCard(id=card.id, arch="", image=card.image, classes=card.classes, access="probs")
    api = Api(url=url, adapter="oip", model=card.id, output="probabilities", batch=batch, timeout=timeout)
    return Asked(card=known, terms=Terms(), api=api)


def images_of(asked: Asked, count: int) -> np.ndarray:
    """Different random uint8 images of a teacher's size."""
    return np.random.default_rng(7).integers(0, 256, (count, *asked.card.image.shape), dtype=np.uint8)


class Processes:
    """The nursery and its living children. Everything ends with the block."""

    def __init__(self, folder: Path, first_wait: float) -> None:
        argv = [sys.executable, "-c", NURSERY, str(first_wait)]
        self._log = (folder / "processes.log").open("a")
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT
        )
        self._started: list[int] = []

    def start(self, *words: object) -> int:
        """The number of a new process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        self._started.append(int(self._process.stdout.readline()))
        return self._started[-1]

    def close(self) -> None:
        """Kill what lives."""
        for number in self._started:
            kill(number)
        self._process.kill()
        self._process.communicate()
        self._log.close()


def kill(number: int, sent: int = signal.SIGKILL) -> bool:
    """Send a process a signal; whether it was alive."""
    try:
        os.kill(number, sent)
    except ProcessLookupError:
        return False
    return True


def alive(number: int) -> bool:
    """Whether a process lives."""
    return kill(number, 0)


class Front:
    """What stands between the two processes: it counts the images of every request, then perhaps spoils it.

    It also keeps the server alive: after a `kill` it starts a new one and passes nothing on until that one listens.
    """

    def __init__(
        self, processes: Processes, serve: Sequence[object], port: int, *, rate: float, stall: float, seed: int
    ) -> None:
        self.seen, self.at_work, self.faults = 0, 0, Counter[str]()
        self.url = f"http://127.0.0.1:{port}"
        self._processes, self._serve, self._port = processes, serve, port
        self._rate, self._stall, self._rng = rate, stall, random.Random(seed)
        self._kills = asyncio.Lock()
        self.server = 0

    async def up(self) -> None:
        """Start a server and wait until it listens."""
        self.server = self._processes.start("serve", *self._serve, "--port", self._port)
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return
            except OSError:
                assert alive(self.server), "the server did not start; see processes.log"
                await asyncio.sleep(0.01)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.at_work += 1
        try:
            return await self._answer(request)
        finally:
            self.at_work -= 1

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        fault = ""
        if request.method == "POST":
            length = request.headers.get(HEADER_LENGTH)
            (tensor,) = unpack("inputs", body, length and int(length)).tensors  # pyright: ignore[reportArgumentType]
            self.seen += len(tensor.array)
            fault = self._rng.choice(FAULTS) if self._rng.random() < self._rate else ""
            self.faults[fault] += 1
        if fault in ("429", "429-after"):
            return web.Response(status=429, headers={"Retry-After": "0"} if fault == "429-after" else {})
        if fault == "500":
            return web.json_response({"error": "out of memory"}, status=500)
        passed = asyncio.ensure_future(self._pass(request, body))
        if fault == "kill":
            await self._kill()
        found = await passed
        if found is None or fault in ("reset", "kill"):
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)
        return await self._spoilt(fault, found)

    async def _kill(self) -> None:
        async with self._kills:
            await asyncio.sleep(self._rng.uniform(0.0, 0.02))
            kill(self.server)
            while alive(self.server):
                await asyncio.sleep(0.001)
            await self.up()

    async def _pass(self, request: web.BaseRequest, body: bytes) -> web.Response | None:
        """The server's answer; None if it died before."""
        async with self._kills:
            pass  # a server is up
        names = ("Content-Type", HEADER_LENGTH)
        headers = {name: request.headers[name] for name in names if name in request.headers}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(request.method, self.url + request.path, data=body, headers=headers) as reply,
            ):
                kept = {name: reply.headers[name] for name in names if name in reply.headers}
                return web.Response(status=reply.status, body=await reply.read(), headers=kept)
        except (aiohttp.ClientError, OSError):
            return None

    async def _spoilt(self, fault: str, found: web.Response) -> web.Response:
        assert isinstance(found.body, bytes)
        match fault:
            case "500-late":
                return web.json_response({"error": "lost"}, status=500)
            case "truncated":
                return web.Response(body=found.body[:-9], headers=found.headers)
            case "html":
                return web.Response(text="<!doctype html><h1>Sign in</h1>", content_type="text/html")
            case "nan" | "classes":
                length = found.headers.get(HEADER_LENGTH)
                (tensor,) = unpack("outputs", found.body, length and int(length)).tensors  # pyright: ignore
                array = tensor.array * np.float32("nan") if fault == "nan" else tensor.array[:, :-1]
                packed = pack("outputs", {}, [Tensor(tensor.name, "FP32", array)], binary=True)
                return web.Response(body=packed.body, headers={HEADER_LENGTH: str(packed.header_length)})
            case "stall":
                await asyncio.sleep(self._stall)
        return found


@dataclass
class Counted:
    """What a disturbed run counted, in images, and what happened to it."""

    sent: int
    """By the ledger."""
    seen: int
    """By the front, which never dies."""
    received: int
    """By the server."""
    answered_by_server: int
    """Of unique requests, by the server."""
    answered: int
    """By the ledger."""
    client_kills: int
    images: int = 0
    """Different images that were asked about."""
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def nursery(folder: Path, first_wait: float = 0.25) -> Iterator[Processes]:
    """The nursery; `first_wait` is the client's wait before a second attempt, in seconds."""
    processes = Processes(folder, first_wait)
    try:
        yield processes
    finally:
        processes.close()


@contextlib.contextmanager
def _served(
    processes: Processes, folder: Path, pool: Path, rate: float, timeout: float, seed: int
) -> Iterator[tuple[Front, str]]:
    """The teachers of a pool, served behind a front, and the address of the front."""
    serve = (pool, "--access", "probs", "--counter", folder / "served.sqlite")
    front = Front(processes, serve, free_port(), rate=rate, stall=1.5 * timeout, seed=seed)
    host = Host(front)
    try:
        host.run(front.up())
        yield front, f"http://127.0.0.1:{host.port}"
    finally:
        kill(front.server)
        host.close()


def disturbed(
    processes: Processes, folder: Path, pool: Path, *, seed: int, images: int, batch: int, rate: float,
    client_kills: int, timeout: float, between: tuple[int, int],
) -> Counted:  # fmt: skip
    """Ask the first teacher of a pool about many images, each request spoilt with probability `rate`.

    The asking process is killed `client_kills` times, each time after the front has seen a number of images drawn from
    `between` (both ends included), then runs to its end. The laws are checked whenever nothing is on its way:
    answered <= answered by the server <= received <= seen <= sent, and seen = sent as long as no client was killed.
    In the end every image has its answer, to the bit, and the server has answered no other request.
    """
    rng, start = random.Random(seed), time.monotonic()
    with _served(processes, folder, pool, rate, timeout, seed) as (front, url):
        asked = asked_of(pool, url, batch, timeout)
        words = ("ask", pool, url, folder, images, batch, timeout)
        done, killed = False, 0
        while not done:
            asking = processes.start(*words)
            if killed < client_kills:
                done = not _killed_at_work(asking, front, rng, between)
                killed += not done
            while alive(asking) or front.at_work:
                time.sleep(0.01)
            found = _counted(folder, asked, front, killed)
            done = done or (killed == client_kills and found.answered == images)
            _check(found, batch * asked.api.concurrency if asked.api else 0)
        with Gateway(folder / "ledger.sqlite", [asked]) as gateway:
            answers = gateway.ask(asked.card.id, images_of(asked, images))
        assert _counted(folder, asked, front, killed) == found, "what is known is not asked again"
    assert found.answered == found.answered_by_server == images
    served = from_pool(Pool.open(pool), asked.card.id, Gives(access="probs"), torch.device("cpu"))
    wanted, _ = served.answers(images_of(asked, images).astype(np.float32) / np.float32(255))
    assert answers.tobytes() == wanted.tobytes()
    found.images, found.faults, found.seconds = images, Counter(front.faults), time.monotonic() - start
    return found


def disturbed_training(
    processes: Processes, folder: Path, pool: Path, *, seed: int, batch: int, rate: float, kills: int, timeout: float,
    between: tuple[int, int], settings: Sequence[str],
) -> tuple[Counted, bytes]:  # fmt: skip
    """Train `ideal` on the first teacher of a pool, which is served, and return the counts and the student's file.

    The run is one process, which is killed `kills` times and resumed. Requests are spoilt and the laws checked as in
    `disturbed`; a run that ends because its service failed three times in a row is resumed too.
    """
    rng, run, killed = random.Random(seed), folder / "run", 0
    start = time.monotonic()
    with _served(processes, folder, pool, rate, timeout, seed) as (front, url):
        asked = asked_of(pool, url, batch, timeout)
        card, api = asked.card, asked.api
        assert api is not None
        entry = {
            "id": card.id, "access": card.access, "api": api.model_dump(exclude_defaults=True),
            "input": {"channels": card.image.channels, "height": card.image.height, "width": card.image.width},
            "classes": list(card.classes),
        }  # fmt: skip
        (folder / "pool").mkdir()
        (folder / "pool" / "pool.yaml").write_text(yaml.safe_dump({"version": 1, "teachers": [entry]}))
        first = ("--pool", folder / "pool", *(word for one in settings for word in ("--set", one)))
        while True:
            more = ("--resume",) if (run / "config.yaml").exists() else first
            training = processes.start("train", "ideal", "--run-dir", run, "--backend", "local", *more)
            if killed < kills:
                killed += _killed_at_work(training, front, rng, between)
            while alive(training) or front.at_work:
                time.sleep(0.01)
            if (run / "ledger.sqlite").exists():
                found = _counted(run, asked, front, killed)
                _check(found, batch * api.concurrency)
                if json.loads((run / "status.json").read_text())["state"] == "done":
                    break
    assert found.answered == found.answered_by_server
    found.images, found.faults, found.seconds = found.answered, Counter(front.faults), time.monotonic() - start
    return found, (run / "learner.safetensors").read_bytes()


def _killed_at_work(number: int, front: Front, rng: random.Random, between: tuple[int, int]) -> bool:
    """Kill a process some milliseconds after the front has seen a drawn number of images; whether it still lived."""
    enough = front.seen + rng.randint(*between)
    while front.seen < enough and alive(number):
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.005))
    return kill(number)


def _counted(folder: Path, asked: Asked, front: Front, killed: int) -> Counted:
    received, answered_by_server = counts(front.url)
    with Gateway(folder / "ledger.sqlite", [asked]) as gateway:
        spent = gateway.totals()[asked.card.id]
    return Counted(
        sent=spent.sent, seen=front.seen, received=received, answered_by_server=answered_by_server,
        answered=spent.answered, client_kills=killed,
    )  # fmt: skip


def _check(found: Counted, on_their_way: int) -> None:
    """The laws. A killed client may have charged what it had no time to send, at most what is on its way at once."""
    assert found.answered <= found.answered_by_server <= found.received <= found.seen <= found.sent, found
    assert found.sent - found.seen <= found.client_kills * on_their_way, found
