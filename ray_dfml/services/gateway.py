"""The gateway: the only one who asks services, and who counts what is asked, in one process for all shards.

It owns the ledger, a client for each service, and an event loop in a thread of its own. So limits are global, and a
shard that dies takes no answer with it.
"""

import asyncio
import concurrent.futures
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np

from ray_dfml.data.services import Api, Asked, Budget
from ray_dfml.errors import Interrupted
from ray_dfml.services import client as clients
from ray_dfml.services.adapters import sent_as
from ray_dfml.services.client import Client
from ray_dfml.services.ledger import Ledger, content_hashes
from ray_dfml.types import Claim, Spent, size_text

GRACE = 30.0
"""Seconds for which `close` waits for answers that are on their way."""

_NO_BUDGET = Budget()
T = TypeVar("T")


def request_id(hashes: Sequence[bytes]) -> str:
    """The name of a batch of these images: 32 hex digits, the same in every attempt and every process."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:32]


class Gateway:
    """See `types.Gateway`. Any number of threads may call it; opening it needs neither a network nor a key."""

    def __init__(
        self,
        path: Path,
        asked: Sequence[Asked],
        *,
        run: Budget = _NO_BUDGET,
        each: Budget = _NO_BUDGET,
        pools: Mapping[str, Budget] | None = None,
        patience: float = clients.PATIENCE,
        tries: int = clients.TRIES,
    ) -> None:
        """Open or make the ledger at `path`, on a local disk, for the teachers that may be asked.

        `run`, `each` and `pools` are budgets as `Ledger` takes them. A batch is tried again for `patience` seconds
        while its service is busy or away, and given up after `tries` attempts that went wrong. Raises what `Ledger`
        raises, and UsageError for an entry that does not fit its adapter.
        """
        self._asked = {one.card.id: one for one in asked}
        self._ledger = Ledger(path, asked, run=run, each=each, pools=pools)
        self._patience, self._tries = patience, tries
        self._flying: dict[bytes, asyncio.Future[None]] = {}
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._flush: asyncio.Task[None] | None = None
        self._closing = False
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "ledger")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()
        try:
            self._connections, self._clients = self._run(self._connect())
        except BaseException:
            self._end()
            raise

    async def _connect(self) -> tuple[aiohttp.ClientSession, dict[str, Client]]:
        connections = clients.session()
        try:
            made = {id: Client(one, connections, patience=self._patience) for id, one in self._asked.items() if one.api}
            for id, client in made.items():  # so that batches begin where they began before, and have the same ids
                client.proven = self._ledger.totals()[id].answered > 0
        except BaseException:
            await connections.close()
            raise
        return connections, made

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the loop; any thread may wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def ask(self, teacher: str, images: np.ndarray) -> np.ndarray:
        """See `types.Gateway.ask`."""
        one = self._asked[teacher]
        if one.api is None:
            raise ValueError(f"{teacher} is not behind HTTP; claim and settle")
        images = sent_as(one, _checked(one, images))
        return self._run(self._ask(teacher, images, content_hashes(one, images)))

    async def _ask(self, teacher: str, images: np.ndarray, hashes: list[bytes]) -> np.ndarray:
        while flights := {self._flying[one] for one in hashes if one in self._flying}:
            await asyncio.wait(flights)
        missing = self._ledger.missing(hashes)
        if len(missing):
            self._ledger.check(teacher, len(missing))
            new = [hashes[position] for position in missing.tolist()]
            flight = self._loop.create_future()
            self._flying.update(dict.fromkeys(new, flight))
            try:
                await self._fetch(teacher, images[missing], new)
            finally:
                for one in new:
                    del self._flying[one]
                flight.set_result(None)
        return self._ledger.answers(hashes)

    async def _fetch(self, teacher: str, images: np.ndarray, hashes: list[bytes]) -> None:
        """Ask about images that no one asks about, in batches, and keep the answers.

        The first image of all goes alone, to try the service. After an error no further batch is sent, and those on
        their way are waited for. The next batch is sent while the answers of the last one are written.
        """
        service, start = self._clients[teacher], 0
        writes: list[asyncio.Future[None]] = []
        if not service.proven:
            async with service.first:
                if not service.proven:
                    writes.append(await self._send(teacher, images[:1], hashes[:1]))
                    start = 1
        size = service.adapter.batch
        todo = deque(range(start, len(images), size))

        async def work() -> None:
            while todo:
                first = todo.popleft()
                try:
                    writes.append(await self._send(teacher, images[first : first + size], hashes[first : first + size]))
                except BaseException:
                    todo.clear()
                    raise

        workers = (work() for _ in range(min(service.concurrency, len(todo))))
        sent = await asyncio.gather(*workers, return_exceptions=True)
        for result in [*sent, *await asyncio.gather(*writes, return_exceptions=True)]:
            if isinstance(result, BaseException):
                raise result

    async def _send(self, teacher: str, images: np.ndarray, hashes: list[bytes]) -> asyncio.Future[None]:
        """Ask about one batch. Returns what is done when its answers are on the disk."""
        if self._closing:
            raise Interrupted(f"{teacher}: the run ends; what was answered is kept")
        batch = _Batch(self, teacher, hashes)
        answers = await self._clients[teacher].answers(images, request_id(hashes), batch)
        return asyncio.ensure_future(self.write(lambda: self._ledger.settle(batch.id, answers)))

    def describe(self, teacher: str) -> None:
        """Compare a service's description of its model with the entry, if its protocol has one. No image is sent."""
        self._run(self._clients[teacher].describe())

    def reached(self, teacher: str) -> tuple[Api, list[str]]:
        """How a service that was asked is reached, with what was found out, and notes on it."""
        client = self._clients[teacher]
        return client.api, list(client.adapter.notes)

    async def write(self, act: Callable[[], T]) -> T:
        """Let the ledger act in its own thread. What is asked for while it is busy shares the next sync of the disk."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append((act, done))
        if self._flush is None or self._flush.done():
            self._flush = self._loop.create_task(self._write_all())
        return await done

    async def _write_all(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting, []
            try:
                results = await self._loop.run_in_executor(self._writer, self._ledger.together, [act for act, _ in now])
            except BaseException as error:
                results = [error] * len(now)
            for (_, done), result in zip(now, results, strict=True):
                if done.cancelled():
                    continue
                if isinstance(result, BaseException):
                    done.set_exception(result)
                else:
                    done.set_result(result)

    def claim(self, teacher: str, hashes: Sequence[bytes]) -> Claim:
        """See `types.Gateway.claim`."""
        return self._ledger.claim(teacher, hashes)

    def settle(self, claim: int, answers: np.ndarray) -> None:
        """See `types.Gateway.settle`."""
        self._ledger.settle(claim, answers)

    def totals(self) -> dict[str, Spent]:
        """See `types.Gateway.totals`."""
        return self._ledger.totals()

    def export(self, path: Path) -> None:
        """Write `ledger.jsonl` (`Ledger.export`)."""
        self._ledger.export(path)

    def close(self) -> None:
        """Send nothing more, wait up to GRACE seconds for answers on their way, keep them, and close the ledger."""
        if self._closing:
            return
        self._closing = True
        self._run(self._land())
        self._end()

    async def _land(self) -> None:
        for client in self._clients.values():
            client.closing.set()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=GRACE)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._connections.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._writer.shutdown()
        self._ledger.close()

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batch:
    """Counts the attempts of a batch in the ledger."""

    def __init__(self, gateway: Gateway, teacher: str, hashes: list[bytes]) -> None:
        self._gateway, self._teacher, self._hashes = gateway, teacher, hashes
        self.id = 0

    async def charge(self) -> None:
        """See `client.Attempts.charge`."""
        ledger = self._gateway._ledger
        if self.id:
            await self._gateway.write(lambda: ledger.resend(self.id))
        else:
            self.id = await self._gateway.write(lambda: ledger.grant(self._teacher, self._hashes))

    async def refund(self) -> None:
        """See `client.Attempts.refund`."""
        await self._gateway.write(lambda: self._gateway._ledger.refund(self.id))


def _checked(one: Asked, images: np.ndarray) -> np.ndarray:
    """The images if they are of the teacher's size and in range, else a ValueError: a defect of the caller."""
    if images.ndim != 4 or images.shape[1:] != one.card.image.shape or images.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"{one.card.id}: expected uint8 or float32 images n x {size_text(one.card.image.shape)}, "
            f"got {images.dtype} of shape {images.shape}"
        )
    if not len(images):
        raise ValueError(f"{one.card.id}: no images were given")
    if images.dtype == np.float32 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{one.card.id}: pixels must be in [0, 1]")
    return images
