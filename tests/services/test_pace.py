"""How fast a client sends, and how long it waits when it is told to."""

import math
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from ray_dfml.services.client import retry_after
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.pace import FASTER, LIFTED, Pace
from ray_dfml.services.rate import Bucket
from tests.services.faulty import SIDE, FaultyService, served, service, truth
from tests.support import unique_images

NOON = 1795867200.0  # Sat, 28 Nov 2026 12:00:00 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "86400"}, 300),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": ""}, None),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "x", "Retry-After": "9"}, 9),
        ({"Retry-After": "Sat, 28 Nov 2026 12:00:20 GMT"}, 20),
        ({"Retry-After": "Sat, 28 Nov 2026 11:00:00 GMT"}, 0),
        ({"Retry-After": "Sat, 28 Nov 2026 13:00:20 GMT"}, 300),
        ({"Retry-After": "Sat, 28 Nov 2026 13:00:20 GMT", "Date": "Sat, 28 Nov 2026 13:00:00 GMT"}, 20),
        ({"Retry-After": "Sat, 99 Nov 2026 12:00:20 GMT"}, None),
    ],
)
def test_what_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOON) == seconds


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_leaves_a_debt_and_no_credit() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert [pace.take(20), pace.take(5), pace.take(1)] == [0, 2, 2.5]
    clock.now += 100
    assert [pace.take(1), pace.take(1)] == [0, pytest.approx(0.1)]


def test_without_a_rate_nothing_waits_until_a_refusal_shows_one() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    assert [pace.take(1000) for _ in range(3)] == [0, 0, 0]
    pace.answered(300)
    pace.answered(100)
    clock.now += 1
    pace.refused(100, clock.now, after=1)
    assert pace.wait() == 1
    assert pace.rate == 400 / 2  # what was answered until the service may be asked again
    pace.refused(100, clock.now - 0.5, after=0)  # was on its way
    assert pace.rate == 200
    clock.now += 1
    assert [pace.take(100), pace.take(100)] == [0, 0.5]
    pace.answered(100)
    assert pace.rate == pytest.approx(206)
    clock.now += 1
    pace.refused(100, clock.now, after=1)
    assert pace.rate == pytest.approx(0.7 * 206)


def test_one_refusal_before_a_batch_was_answered_shows_no_rate() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    pace.answered(1)
    pace.refused(250, clock.now, after=30)
    assert pace.wait() == 30
    assert pace.rate is None


def test_a_limit_that_is_gone_is_forgotten() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    pace.answered(100)
    clock.now += 1
    pace.refused(100, clock.now, after=1)
    assert pace.rate == 50
    for _ in range(LIFTED - 1):
        pace.answered(100)
    assert pace.rate == pytest.approx(50 * FASTER ** (LIFTED - 1))
    pace.answered(100)
    assert pace.rate is None


def test_a_rate_that_is_given_is_never_exceeded() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    pace.answered(10)
    pace.refused(100, clock.now, after=1)
    for _ in range(100):
        pace.answered(10)
    assert pace.rate == 10


class Limited(FaultyService):
    """A service that takes some images a second, and says when to come back, or does not."""

    def __init__(self, rate: float, hint: bool) -> None:
        super().__init__()
        self.bucket, self.hint = Bucket(rate), hint

    async def answer(
        self, request: web.BaseRequest, fault: str | None, numbers: list[int], binary: bool
    ) -> web.StreamResponse:
        if wait := self.bucket.take(len(numbers)):
            return web.Response(status=429, headers={"Retry-After": str(math.ceil(wait))} if self.hint else {})
        return await super().answer(request, fault, numbers, binary)


@pytest.mark.parametrize("hint", [True, False])
def test_a_client_learns_the_rate_of_a_service_and_wastes_little(tmp_path: Path, hint: bool) -> None:
    server = Limited(2000, hint)
    images = unique_images(4000, (1, SIDE, SIDE))
    with served(server) as url, Gateway(tmp_path / "l.sqlite", [service(url, batch=50)]) as gateway:
        assert np.array_equal(gateway.ask("svc", images), truth(range(4000)))
        assert gateway.totals()["svc"].sent <= 1.2 * 4000
