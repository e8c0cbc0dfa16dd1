"""A client of one prediction service: it paces, sends, retries, and checks what comes back.

It keeps no count itself. Whoever uses it is told before each attempt (`Attempts.charge`), and told again if the
connection was refused, so that nothing was sent (`Attempts.refund`). A key is read from its environment variable when a
request is made, and stands in no message.
"""

import asyncio
import contextlib
import email.utils
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import orjson
import tenacity

from ray_dfml.data.services import KEY, Api, Asked
from ray_dfml.errors import Interrupted, RejectedError, ServiceAway
from ray_dfml.files import shown
from ray_dfml.services.adapters import Oip, Request, adapter
from ray_dfml.services.checks import BadAnswer, Unreadable
from ray_dfml.services.keys import hidden, key_of, starred
from ray_dfml.services.pace import Pace

TRIES = 3
"""Attempts that may fail: errors of the server, broken connections, silence, and answers that cannot be used."""
LONGEST_WAIT = 300.0
"""Seconds that `Retry-After` can ask for at most."""
FIRST_WAIT = 0.25
"""Seconds until the second attempt, about; each further wait is twice as long, up to a minute."""
PATIENCE = 600.0
"""Seconds for which a batch is tried again while its service is busy or away."""
FIRST_PATIENCE = 10.0
"""The same before a service has ever answered: its address is probably wrong."""
ANSWER_BYTES = 256 << 20
"""Size of the largest answer that is read."""
CONNECT_SECONDS = 10.0

_LOG = logging.getLogger(__name__)
_TRANSIENT = (408, 425)
T = TypeVar("T")


class Attempts(Protocol):
    """Who counts the attempts of a batch."""

    async def charge(self) -> None:
        """Count an attempt, durably, before it is made. Raises BudgetReached."""
        ...

    async def refund(self) -> None:
        """Take the last attempt back, since the connection was refused."""
        ...


class _Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Again(Exception):
    """An attempt that may be repeated after some seconds.

    If `free`, it does not count as a failure; if `may_be_binary`, the server may not know binary tensors.
    """

    def __init__(self, text: str, after: float, *, free: bool = False, may_be_binary: bool = False) -> None:
        super().__init__(text)
        self.after, self.free, self.may_be_binary = after, free, may_be_binary


class _Useless(_Again):
    """An answer that cannot be used."""


class _Refused(ServiceAway):
    """A request that the service does not take, such as one with a key that has ended; binary tensors may be why."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.may_be_binary = status in (400, 406, 411, 415, 422)


def session() -> aiohttp.ClientSession:
    """The connections of a gateway. They keep no cookies, and idle ones are closed before servers close them."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that an answer asks to wait: `retry-after-ms`, or `Retry-After` as seconds or a date. At most 300.

    A date is compared with the server's own `Date`, since clocks differ, or with `now` if there is none.
    """
    found: float | None = None
    if (text := headers.get("retry-after-ms")) is not None:
        found = _number(text, 1e-3)
    if found is None and (text := headers.get("Retry-After")) is not None:
        found = _number(text, 1.0)
        if found is None:
            until, there = _date(text), _date(headers.get("Date", ""))
            found = None if until is None else until - (now if there is None else there)
    return None if found is None else min(max(found, 0.0), LONGEST_WAIT)


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _number(text: str, unit: float) -> float | None:
    try:
        value = float(text) * unit
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Client:
    """A client of one service. It lives in one event loop."""

    def __init__(
        self, asked: Asked, connections: aiohttp.ClientSession, *, patience: float = PATIENCE, tries: int = TRIES
    ) -> None:
        """Raises UsageError if the entry does not fit its adapter."""
        assert asked.api is not None
        self.adapter = adapter(asked)
        self.concurrency = asked.api.concurrency
        self.proven = False
        """Whether the service has answered once; the first request holds one image."""
        self.first = asyncio.Lock()
        """Held while the first request is made."""
        self.closing = asyncio.Event()
        """Set when the gateway closes: what only waits ends at once."""
        self._asked, self._id, self._api = asked, asked.card.id, asked.api
        self._connections, self._patience, self._tries = connections, patience, tries
        self._slots = asyncio.Semaphore(self.concurrency)
        self._pace = Pace(self._api.rate)
        self._reached = False

    @property
    def api(self) -> Api:
        """How the service is reached, with what was found out: its input, the datatype, and binary tensors or none."""
        if not isinstance(self.adapter, Oip):
            return self._api
        found = {"input": self.adapter.input, "datatype": self.adapter.datatype}
        if self.adapter.binary is not None:
            found["binary"] = "on" if self.adapter.binary else "off"
        return self._api.model_copy(update=found)

    async def describe(self) -> None:
        """Ask an `oip` server about its model, without an image. Raises RejectedError if it does not fit the entry."""
        if not isinstance(self.adapter, Oip):
            return
        request = Request(self.adapter.metadata_path, {}, b"")
        with self._discreet():
            found = await self._repeated(lambda number: self._once("GET", request, number))
            self.adapter.describe(found.body)

    async def answers(self, images: np.ndarray, id: str, attempts: Attempts) -> np.ndarray:
        """The answers to a batch [n c h w]; `id` names the batch in all its attempts.

        Raises UsageError without a key, RejectedError if the service cannot be used, which is a ServiceAway if it may
        be later, and what `attempts` raises.
        """
        key_of(self._asked)
        if isinstance(self.adapter, Oip) and (self.adapter.input is None or self.adapter.datatype is None):
            await self.describe()
        with self._discreet():
            found = await self._repeated(lambda number: self._attempt(images, id, number, attempts))
        self.proven = True
        return found

    async def _repeated(self, work: Callable[[int], Awaitable[T]]) -> T:
        """Do work until it succeeds, fails too often, or the service is busy or away for too long."""
        failures = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal failures
            error = state.outcome and state.outcome.exception()
            if not isinstance(error, _Again):
                return True
            failures += not error.free
            patience = self._patience if self._reached or self.proven else min(self._patience, FIRST_PATIENCE)
            late = (state.seconds_since_start or 0) + error.after > patience
            return failures >= self._tries or (late and error.after > 0)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            return error.after if isinstance(error, _Again) else 0.0

        def say(state: tenacity.RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            again = f"; trying again in {wait(state):.1f} s" if wait(state) else ""
            _LOG.warning("%s: %s%s", self._id, hidden(str(error), self._asked), again)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Again), stop=stop, wait=wait, before_sleep=say, reraise=True,
            sleep=self._pause,
        )  # fmt: skip
        try:
            async for attempt in retrying:
                with attempt:
                    return await work(attempt.retry_state.attempt_number)
        except _Again as error:
            kind = RejectedError if isinstance(error, _Useless) else ServiceAway
            raise kind(f"{self._id}: {error}") from None
        raise AssertionError("tenacity returns or raises")

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the gateway closes. Raises Interrupted then."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)
        if self.closing.is_set():
            raise Interrupted(f"{self._id}: the run ends; what was answered is kept")

    @contextlib.contextmanager
    def _discreet(self) -> Iterator[None]:
        """Let no error hold the key, which a server may have repeated anywhere."""
        try:
            yield
        except RejectedError as error:
            kind = ServiceAway if isinstance(error, ServiceAway) else RejectedError
            raise kind(hidden(str(error), self._asked)) from None

    async def _attempt(self, images: np.ndarray, id: str, number: int, attempts: Attempts) -> np.ndarray:
        trying = isinstance(self.adapter, Oip) and self.adapter.binary is None
        try:
            request = self.adapter.request(images, id)
            async with self._slots:
                await self._turn(len(images))
                await attempts.charge()
                reply = await self._once("POST", request, number, len(images), attempts)
            try:
                found = self.adapter.answers(reply.headers, reply.body, len(images))
            except BadAnswer as error:
                raise _Useless(str(error), _backoff(number), may_be_binary=isinstance(error, Unreadable)) from None
        except (_Again, _Refused) as error:
            # Several requests may try bytes at once; each learns from its own answer, and none after one has worked.
            if isinstance(self.adapter, Oip) and trying and not self.adapter.binary and error.may_be_binary:
                self.adapter.binary = False
                raise _Again(f"does not take binary tensors ({error}); JSON is used", 0.0, free=True) from None
            raise
        if isinstance(self.adapter, Oip) and trying:
            self.adapter.binary = True
        self._pace.answered(len(images))
        return found

    async def _turn(self, images: int) -> None:
        """Wait while the service asked for quiet, and for the pace."""
        while wait := self._pace.wait():
            await self._pause(wait)
        await self._pause(self._pace.take(images))

    async def _once(
        self, method: str, request: Request, number: int, images: int = 0, attempts: Attempts | None = None
    ) -> _Reply:
        """One exchange, whose status is 200. Raises _Again if it may be repeated, else RejectedError."""
        sent_at = time.monotonic()
        try:
            reply = await self._exchange(method, request)
        except aiohttp.ClientConnectorError as error:
            if attempts is not None:
                await attempts.refund()
            if isinstance(error, aiohttp.ClientSSLError):
                raise RejectedError(f"{self._id}: {self._where}: its certificate is not accepted") from None
            raise _Again(f"{self._where} cannot be reached: {_why(error)}", _backoff(number), free=True) from None
        except TimeoutError:
            raise _Again(f"no answer in {self._api.timeout:g} s", _backoff(number)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(f"the connection broke ({type(error).__name__})", _backoff(number)) from None
        self._judge(reply, number, images, sent_at)
        return reply

    @property
    def _where(self) -> str:
        return urlsplit(self._api.url).netloc

    async def _exchange(self, method: str, request: Request) -> _Reply:
        timeout = aiohttp.ClientTimeout(total=self._api.timeout, sock_connect=CONNECT_SECONDS)
        async with self._connections.request(
            method, self._api.url + request.path, data=self._body(request), headers=self._headers(request),
            allow_redirects=False, timeout=timeout,
        ) as response:  # fmt: skip
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > ANSWER_BYTES:
                    raise RejectedError(f"{self._id}: answers more than {ANSWER_BYTES >> 20} MiB")
            return _Reply(response.status, response.headers, starred(bytes(body), self._asked))

    def _headers(self, request: Request) -> dict[str, str]:
        key = key_of(self._asked)
        if key is None:
            return dict(request.headers)
        if self._api.template and self._api.template.holds_key:
            return {name: value.replace(KEY, key) for name, value in request.headers.items()}
        return {**request.headers, "Authorization": f"Bearer {key}"}

    def _body(self, request: Request) -> bytes | None:
        """The body, with the key where the template says."""
        key, template = key_of(self._asked), self._api.template
        if key is None or template is None or not template.body_holds_key:
            return request.body or None
        return request.body.replace(KEY.encode(), orjson.dumps(key)[1:-1])

    def _judge(self, reply: _Reply, number: int, images: int, sent_at: float) -> None:
        """Raise _Again for a status that may pass, and RejectedError for one that will not."""
        self._reached, status = True, reply.status
        if status == 200:
            return
        said = self._said(reply)
        asked_wait = retry_after(reply.headers, time.time())
        after = _backoff(number) if asked_wait is None else asked_wait + _backoff(1)
        if status == 429:
            self._pace.refused(images, sent_at, after)
            raise _Again(f"is busy (429){said}", after, free=True)
        if status >= 500 or status in _TRANSIENT:
            raise _Again(f"fails with status {status}{said}", after, may_be_binary=status in (500, 501))
        raise _Refused(f"{self._id}: {self._refusal(reply)}{said}", status)

    def _refusal(self, reply: _Reply) -> str:
        api = self._api
        match reply.status:
            case 401 | 403 if api.key_env:
                return f"{self._where} refuses the key in {api.key_env} ({reply.status})"
            case 401 | 403:
                return f"{self._where} asks for a key ({reply.status}); name its variable as key_env"
            case 404:
                return f"{self._where} has no {'model ' + api.model if api.model else 'such path'} (404)"
            case 413:
                return f"a batch is too large (413); lower api.batch, now {api.batch}"
            case status if 300 <= status < 400:
                target = _target(hidden(reply.headers.get("Location", ""), self._asked))
                return f"answers with a redirect to {target}, which is not followed; write the final address as the url"
            case status:
                return f"refuses the request with status {status}"

    def _said(self, reply: _Reply) -> str:
        """What the server says of an error, in one line that does not hold the key."""
        try:
            found = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            return ""
        known = found if isinstance(found, dict) else {}
        said = next((known[name] for name in ("error", "detail", "message") if name in known), "")
        text = hidden(said if isinstance(said, str) else orjson.dumps(said).decode(), self._asked)
        return f": {shown(text[:200])}" if text else ""


def _target(location: str) -> str:
    """Scheme and host of a redirect, which may be anything."""
    try:
        to = urlsplit(location.replace("[key]", "key-hidden"))
    except ValueError:
        return "no address"
    return shown(f"{to.scheme}://{to.netloc.rpartition('@')[2]}")[:200] if to.netloc else "another path"


def _why(error: aiohttp.ClientConnectorError) -> str:
    code = error.os_error.errno or 0
    return os.strerror(code) if code > 0 else error.os_error.strerror or type(error.os_error).__name__


def _backoff(number: int) -> float:
    """Seconds to wait after attempt `number`, drawn so that clients do not come back together."""
    return random.uniform(0.5, 1.0) * min(60.0, FIRST_WAIT * 2.0 ** min(number - 1, 16))
